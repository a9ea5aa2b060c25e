// Pooling along the tokens of one row, shared by pool_heads and score_tokens.

#pragma once

#include "csrc/cuda/common.cuh"

namespace claa::cuda {

// The pooled value of token j of a row whose tokens [begin, end) exist; `in` points at token 0.
// Every pool is summed anew: a running sum would carry a NaN to every later token.
template <class Index>
__device__ float pool_token(const float* in, Index j, Index begin, Index end, Index kernel_size,
                            PoolMode pool_mode) {
  const Index half = kernel_size / 2;
  const Index from = max(j - half, begin), to = min(j + half + 1, end);
  if (pool_mode == PoolMode::max) {
    float largest = -INFINITY;
    for (Index i = from; i < to; ++i) largest = max_or_nan(largest, in[i]);
    return largest;
  }
  float sum = 0.f;
  for (Index i = from; i < to; ++i) sum += in[i];
  return sum / float(kernel_size);
}

// The same for kCount tokens at a time, `first` and every kStep-th after it, of a row whose tokens
// [0, known) exist, none of them negative; averages are still sums, which the caller divides. The
// taps of the usual pooling kernel are all loaded before the first is used, without branches.
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
