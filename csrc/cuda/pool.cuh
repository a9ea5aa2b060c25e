// Pooling along the tokens of one row, shared by pool_heads and score_tokens.

#pragma once

#include "csrc/cuda/common.cuh"

namespace claa::cuda {

// The pooled value of token j of a row whose tokens [low, high) exist; `in` points at token 0.
// Every pool is summed anew: a running sum would carry a NaN on to every later token.
template <class Index>
__device__ float pool_token(const float* in, Index j, Index low, Index high, Index kernel_size,
                            PoolMode mode) {
  const Index half = kernel_size / 2;
  const Index from = max(j - half, low), to = min(j + half + 1, high);
  if (mode == PoolMode::max) {
    float largest = -INFINITY;
    for (Index i = from; i < to; ++i) largest = max_or_nan(largest, in[i]);
    return largest;
  }
  float sum = 0.f;
  for (Index i = from; i < to; ++i) sum += in[i];
  return sum / float(kernel_size);
}

}  // namespace claa::cuda
