// How blocks share out prompts whose lengths only the device knows.
//
// The work of a prompt is a number of units, such as key ranges. Every block makes the same table
// of all prompts in its shared memory, a warp for each prompt, and takes the units that begin in
// its part of the whole cost: nothing is exchanged between blocks, and how a prompt is divided
// depends on its own length alone.

#pragma once

#include <cutlass/fast_math.h>

#include "csrc/cuda/hopper/wgmma.cuh"

namespace claa::cuda::hopper {

constexpr int64_t kMostPrompts = 256;  // of a launch: the table is in shared memory

// The units of a prompt: so many of one cost, and after them some that cost less.
struct Units {
  int count = 0, cost = 1;
  int short_count = 0, short_cost = 1;

  __device__ int all() const { return count + short_count; }
  __device__ int all_cost() const { return count * cost + short_count * short_cost; }
  // The first unit that begins at a cost or after it.
  __device__ int first_from(int from) const {
    const int unit = (from + cost - 1) / cost;
    return unit <= count ? unit : count + (from - count * cost + short_cost - 1) / short_cost;
  }
};

// `Plan`: how the keys of a prompt are divided.
template <class Plan>
struct PromptTable {
  struct Prompt {
    int first;  // its first unit, counted over all prompts
    int first_cost;
    Units units;
    Plan plan;
  };
  Prompt* prompts;  // and one entry after the last
  int count;

  static int64_t bytes(const WindowAttention& a) {
    return (min(a.batch, kMostPrompts) + 1) * int64_t(sizeof(Prompt));
  }

  __device__ PromptTable(char* memory, const WindowAttention& a)
      : prompts(reinterpret_cast<Prompt*>(memory)), count(int(a.batch)) {}

  __device__ const Prompt& operator[](int b) const { return prompts[b]; }

  // By all threads of a block. plan_of(b, units), by a whole warp, gives the plan of a prompt and
  // its units.
  template <int kThreads, class PlanOf>
  __device__ __forceinline__ void make(PlanOf plan_of) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll 1
    for (int b = warp; b < count; b += kThreads / kWarp) {
      Units units;
      const Plan plan = plan_of(b, units);
      if (lane == 0) prompts[b] = {units.all(), units.all_cost(), units, plan};
    }
    __syncthreads();
    if (warp == 0) {
      int first = 0, first_cost = 0;
#pragma unroll 1
      for (int begin = 0; begin <= count; begin += kWarp) {
        const int b = begin + lane;
        const int units = b < count ? prompts[b].first : 0;
        const int cost = b < count ? prompts[b].first_cost : 0;
        int units_to = units, cost_to = cost;  // of the prompts up to this one
#pragma unroll
        for (int step = 1; step < kWarp; step *= 2) {
          const int more_units = __shfl_up_sync(kFullMask, units_to, step);
          const int more_cost = __shfl_up_sync(kFullMask, cost_to, step);
          if (lane >= step) units_to += more_units, cost_to += more_cost;
        }
        if (b <= count) {
          prompts[b].first = first + units_to - units;
          prompts[b].first_cost = first_cost + cost_to - cost;
        }
        first += __shfl_sync(kFullMask, units_to, kWarp - 1);
        first_cost += __shfl_sync(kFullMask, cost_to, kWarp - 1);
      }
    }
    __syncthreads();
  }

  // The last prompt of which `begins_at` is at most `at`: the one that has it, as prompts without
  // units begin where the next one does.
  __device__ __forceinline__ int last_at(int Prompt::* begins_at, int at) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (prompts[middle].*begins_at <= at)
        low = middle;
      else
        high = middle;
    }
    return low;
  }

  __device__ __forceinline__ int prompt_of(int unit) const { return last_at(&Prompt::first, unit); }
  __device__ __forceinline__ int units() const { return prompts[count].first; }

  // The first unit of a block, of all that run: that which begins at its part of the cost, or next
  // after it.
  __device__ __forceinline__ int first_unit_of(int block, const cutlass::FastDivmod& blocks) const {
    // cost * block / blocks in 32 bits: a 64-bit division is a call, and where a kernel has calls
    // the compiler lets no wgmma follow another.
    int share, rest, of_rest, none;
    blocks(share, rest, prompts[count].first_cost);
    blocks(of_rest, none, rest * block);
    const int at = share * block + of_rest;
    const Prompt& prompt = prompts[last_at(&Prompt::first_cost, at)];
    return prompt.first + prompt.units.first_from(at - prompt.first_cost);
  }
};

// Brings what every block will want to know of the prompts into the L2 cache: their lengths, and
// the tables of their pages, of which each block asks for a part. By all threads.
template <int kThreads>
__device__ __forceinline__ void prefetch_prompts(const WindowAttention& a) {
  constexpr int kEntries = 128 / int(sizeof(int32_t));  // of a line
  const auto prefetch = [](const int32_t* line) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
  };
  for (int b = int(threadIdx.x) * kEntries; b < int(a.batch); b += kThreads * kEntries)
    prefetch(a.pages.lengths + b);
  if (a.pages.rows) return;  // which says nothing of a prompt without keys
  const int lines = ((int(a.total) - 1 >> a.pages.log2_size) + kEntries) / kEntries;
  // The threads that plan nothing first.
  const int first = (kThreads - 1 - int(threadIdx.x)) * int(gridDim.x) + int(blockIdx.x);
  for (int i = first; i < int(a.batch) * lines; i += kThreads * int(gridDim.x))
    prefetch(a.pages.of(i / lines) + i % lines * kEntries);
}

// ---- host

// Some prompts of a batch whose keys lie in pages.
inline WindowAttention prompts_of(const WindowAttention& a, int64_t first, int64_t count) {
  WindowAttention part = a;
  part.batch = count;
  part.query = static_cast<const char*>(a.query) + first * a.query_stride_b * 2;
  part.pages.lengths += first;
  if (a.pages.rows)
    part.pages.rows += first;
  else
    part.pages.table += first * a.pages.table_stride;
  return part;
}

// Calls run(part, first) for all prompts, as many at a time as a table holds.
template <class Run>
cudaError_t for_some_prompts(const WindowAttention& a, Run run) {
  cudaError_t status = cudaSuccess;
  for (int64_t first = 0; first < a.batch && status == cudaSuccess; first += kMostPrompts)
    status = run(prompts_of(a, first, min(kMostPrompts, a.batch - first)), first);
  return status;
}

}  // namespace claa::cuda::hopper
