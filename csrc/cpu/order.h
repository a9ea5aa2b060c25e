// The order of scores, as in torch.topk: NaN above every number, -0 equal to 0.

#pragma once

#include "csrc/cpu/vec.h"

namespace claa::cpu::CLAA_ISA {

// An integer that grows with the score.
inline int32_t order_of(float score) {
  const int32_t bits = bits_as<int32_t>(score == 0.f ? 0.f : score);
  return score != score ? INT32_MAX : bits ^ ((bits >> 31) & INT32_MAX);
}

inline VecInt order_of(Vec score) {
  const VecInt bits = bits_as<VecInt>(score == 0.f ? Vec{} : score);
  const VecInt order = bits ^ ((bits >> 31) & INT32_MAX);
  return score != score ? VecInt{} + INT32_MAX : order;
}

// The same order as an unsigned integer, for radix passes over its digits.
inline uint32_t digits_of(int32_t order) { return uint32_t(order) ^ 0x80000000u; }

}  // namespace claa::cpu::CLAA_ISA
