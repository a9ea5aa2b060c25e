// The order of scores: as torch.topk has it, NaN above every number, -0 equal to 0.

#pragma once

#include "csrc/cpu/vec.h"

namespace claa::cpu::CLAA_ISA {

// An integer that grows with the score.
inline uint32_t order_of(float score) {
  const uint32_t bits = bits_as<uint32_t>(score == 0.f ? 0.f : score);
  const uint32_t ordered = bits ^ (int32_t(bits) < 0 ? 0xffffffffu : 0x80000000u);
  return score != score ? 0xffffffffu : ordered;
}

}  // namespace claa::cpu::CLAA_ISA
