// Pooling along the tokens of one row, shared by pool_heads and score_tokens.

#pragma once

#include "csrc/cuda/common.cuh"

namespace claa::cuda {

// The pooled value of token j of a row whose tokens [low, high) exist; `in` points at token 0.
// Every pool is summed anew: a running sum would carry a NaN on to every later token.
template <class Index>
__device__ float pool_token(const float* in, Index j, Index low, Index high, Index kernel_size,
                            PoolMode pool_mode) {
  const Index half = kernel_size / 2;
  const Index from = max(j - half, low), to = min(j + half + 1, high);
  if (pool_mode == PoolMode::max) {
    float largest = -INFINITY;
    for (Index i = from; i < to; ++i) largest = max_or_nan(largest, in[i]);
    return largest;
  }
  float sum = 0.f;
  for (Index i = from; i < to; ++i) sum += in[i];
  return sum / float(kernel_size);
}

// The same for kCount tokens at a time, `first` and every kStep-th behind it, of a row whose tokens
// [0, known) exist, none of them negative; sums of an average are still to be divided. The taps of
// the usual kernel are on their way together, without branches in which they would wait.
template <int kStep, int kCount, class Row>
__device__ void pool_tokens(float (&pooled)[kCount], const Row& row, int first, int known, int halo,
                            PoolMode pool_mode) {
  constexpr int kTaps = 7;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pooled[i] = 0.f;
#pragma unroll 1
  for (int tap = -halo; tap <= halo; tap += kTaps) {
    float value[kTaps * kCount];
#pragma unroll
    for (int t = 0; t < kTaps * kCount; ++t) {
      const int middle = first + t % kCount * kStep, at = middle + tap + t / kCount;
      value[t] = unsigned(at) < unsigned(min(middle + halo + 1, known)) ? row[at] : 0.f;
    }
    if (pool_mode == PoolMode::max) {
#pragma unroll
      for (int t = 0; t < kTaps * kCount; ++t)
        pooled[t % kCount] = max_or_nan(pooled[t % kCount], value[t]);
    } else {
#pragma unroll
      for (int t = 0; t < kTaps * kCount; ++t) pooled[t % kCount] += value[t];
    }
  }
}

}  // namespace claa::cuda
