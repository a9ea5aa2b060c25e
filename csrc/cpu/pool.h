// Pooling along the tokens of one row, shared by pool_heads and score_tokens.

#pragma once

#include "csrc/cpu/vec.h"

namespace claa::cpu::CLAA_ISA {

constexpr int64_t kStrip = 128;  // tokens that are pooled together, tap by tap

// sums[j - strip] = the sum of the taps within `half` of each token j of [strip, strip_end). Tokens
// outside [low, high) count as zeros. How the sum is split into blocks does not depend on where the
// row begins.
inline void sum_taps(const float* in, int64_t low, int64_t high, int64_t strip, int64_t strip_end,
                     int64_t half, float* sums) {
  for (int64_t block = -half; block <= half; block += kSumBlock) {
    float part[kStrip] = {};
    for (int64_t tap = block; tap < min(block + kSumBlock, half + 1); ++tap) {
      const float* source = in + (tap - low);
      const int64_t to = min(strip_end, high - tap);
      for (int64_t j = max(strip, low - tap); j < to; ++j) part[j - strip] += source[j];
    }
    for (int64_t i = 0; i < strip_end - strip; ++i)
      sums[i] = block == -half ? part[i] : sums[i] + part[i];
  }
}

// The same with the maximum; tokens outside [low, high) do not count.
inline void max_taps(const float* in, int64_t low, int64_t high, int64_t strip, int64_t strip_end,
                     int64_t half, float* largest) {
  for (int64_t i = 0; i < strip_end - strip; ++i) largest[i] = -kInfinity;
  for (int64_t tap = -half; tap <= half; ++tap) {
    const float* source = in + (tap - low);
    const int64_t to = min(strip_end, high - tap);
    for (int64_t j = max(strip, low - tap); j < to; ++j)
      largest[j - strip] = max_or_nan(largest[j - strip], source[j]);
  }
}

// out[j - begin] (+)= pooled value of token j, begin <= j < end. `in` holds the tokens [low, high).
// Every pool is summed from its taps: a running sum would carry a NaN or a rounding error to every
// later token.
inline void pool_row(const float* in, int64_t low, int64_t high, int64_t begin, int64_t end,
                     int64_t kernel_size, PoolMode pool_mode, bool accumulate, float* out) {
  float pooled[kStrip];
  for (int64_t strip = begin; strip < end; strip += kStrip) {
    const int64_t strip_end = min(strip + kStrip, end);
    float* to = out + (strip - begin);
    if (pool_mode == PoolMode::avg) {
      sum_taps(in, low, high, strip, strip_end, kernel_size / 2, pooled);
      for (int64_t i = 0; i < strip_end - strip; ++i) pooled[i] /= float(kernel_size);
    } else {
      max_taps(in, low, high, strip, strip_end, kernel_size / 2, pooled);
    }
    for (int64_t i = 0; i < strip_end - strip; ++i)
      to[i] = accumulate ? to[i] + pooled[i] : pooled[i];
  }
}

}  // namespace claa::cpu::CLAA_ISA
