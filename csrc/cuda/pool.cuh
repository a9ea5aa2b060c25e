// Pooling along the tokens of one row, shared by pool_heads and score_tokens.

#pragma once

#include "csrc/cuda/common.cuh"

namespace claa::cuda {

// The pooled value of token j of a row whose tokens [low, high) exist; `in` points at token 0.
// Every pool is summed anew: a running sum would carry a NaN on to every later token.
__device__ inline float pool_token(const float* in, int64_t j, int64_t low, int64_t high,
                                   int64_t kernel_size, PoolMode mode) {
  const int64_t half = kernel_size / 2;
  const int64_t from = max(j - half, low), to = min(j + half + 1, high);
  if (mode == PoolMode::max) {
    float largest = -INFINITY;
    for (int64_t i = from; i < to; ++i) largest = max_or_nan(largest, in[i]);
    return largest;
  }
  float sum = 0.f;
  for (int64_t i = from; i < to; ++i) sum += in[i];
  return sum / float(kernel_size);
}

}  // namespace claa::cuda
