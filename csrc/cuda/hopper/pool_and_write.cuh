// From the products of a tile to scores: sums over query rows go to shared memory, where they are
// pooled, and summed over the heads.

#pragma once

#include "csrc/cuda/hopper/scores.cuh"
#include "csrc/cuda/pool.cuh"

namespace claa::cuda::hopper {

// Adds up a warp's sums over its query rows, of 16 keys: lane 4r + c has sums of key r and of key
// r + 8, over the query rows that it has. `sums` is of key 0, which is key `first_key` of the
// prompt; keys before `first_valid` get 0.
__device__ __forceinline__ void store_sums(float* sums, float upper, float lower, int first_key,
                                           int first_valid) {
  const int lane = threadIdx.x % kWarp;
  // A lane hands over one of its keys and keeps the other; then the pairs meet.
  const bool is_odd = lane & 1;
  float mine = is_odd ? lower : upper;
  mine += __shfl_xor_sync(kFullMask, is_odd ? upper : lower, 1);
  mine += __shfl_xor_sync(kFullMask, mine, 2);
  const int key = lane / 4 + is_odd * 8;
  if (!(lane & 2)) sums[key] = first_key + key < first_valid ? 0.f : mine;
}

// Pools the sums of a range and writes its scores, by all threads that multiply. sums_of(slot)[i]
// is the sum of key halo_begin + i; `context` is the prompt's. kIsAverage: pooled averages alone
// are compiled.
template <bool kIsAverage, class SumsOf>
__device__ __forceinline__ void pool_and_write(const ScoreParams& p, const KeyRange& range,
                                               int context, int slots, int thread, SumsOf sums_of) {
  constexpr int kBatch = 2;  // of a thread's keys at a time
  const WindowScores& s = p.scores;
  const bool is_pooled = kIsAverage || s.pooled;
  const PoolMode pool_mode = kIsAverage ? PoolMode::avg : s.pool_mode;
  const int known = min(range.halo_end, context) - range.halo_begin;
  const int end = min(range.end, context) - range.halo_begin;
  float* out = s.out + int64_t(range.bg) * (is_pooled ? 1 : slots) * context + range.halo_begin;
#pragma unroll 1
  for (int first = range.begin - range.halo_begin + thread; first < end;
       first += kBatch * kScoreConsumers) {
    float score[kBatch] = {};
#pragma unroll 1
    for (int slot = 0; slot < slots; ++slot) {
      float pooled[kBatch];
      pool_tokens<kScoreConsumers>(pooled, sums_of(slot), first, known, p.pool_halo, pool_mode);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = first + i * kScoreConsumers;
        if (!is_pooled && at < end) out[int64_t(slot) * context + at] = pooled[i];
        score[i] += pooled[i];
      }
    }
    if (!is_pooled) continue;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + i * kScoreConsumers;
      if (at >= end) break;
      if (pool_mode == PoolMode::avg) score[i] *= p.pool_scale;
      if (s.out) out[at] = score[i];
      join_running(s, range.b, range.halo_begin + at, score[i]);
    }
  }
}

}  // namespace claa::cuda::hopper
