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

// The same for kCount tokens at a time, `first` and every kStep-th behind it, of a row whose tokens
// [0, known) exist; sums of an average are still to be divided. No branches, in which the loads
// would wait for each other.
template <int kStep, int kCount>
__device__ void pool_tokens(float (&pooled)[kCount], const float* row, int first, int known,
                            int halo, PoolMode mode) {
  const bool is_max = mode == PoolMode::max;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pooled[i] = is_max ? -INFINITY : 0.f;
#pragma unroll 1
  for (int tap = -halo; tap <= halo; ++tap) {
    float value[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      value[i] = row[min(max(first + i * kStep + tap, 0), known - 1)];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (unsigned(first + i * kStep + tap) >= unsigned(known)) value[i] = is_max ? -INFINITY : 0.f;
      pooled[i] = is_max ? max_or_nan(pooled[i], value[i]) : pooled[i] + value[i];
    }
  }
}

}  // namespace claa::cuda
