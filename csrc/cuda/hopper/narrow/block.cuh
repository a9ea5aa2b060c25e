// What all threads of a block know, and softmax partials that blocks hand to each other.
#pragma once

#include "csrc/cuda/hopper/narrow/ranges.cuh"
#include "csrc/cuda/hopper/queries.cuh"
#include "csrc/cuda/hopper/softmax_partials.cuh"

namespace claa::cuda::hopper::narrow {

template <class T_, int kDim_, int kRows_, bool kPaged_>
struct Shape {
  using T = T_;
  static constexpr bool kPaged = kPaged_;
  static constexpr int kDim = kDim_;
  static constexpr int kRows = kRows_;                         // query rows, with padding rows
  static constexpr int kTile = kTileBytes<kDim>;               // of keys
  static constexpr int kProductBytes = kTileRows * kRows * 4;  // of a tile
};

// The bits of a missing partial: the max of one that is there is a number.
constexpr uint64_t kMissing = ~uint64_t(0);

// Other blocks see all of a partial or nothing of it.
__device__ inline void store_partial(SoftmaxPartial* to, uint64_t bits) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(bits) : "memory");
}
__device__ inline uint64_t load_partial(const SoftmaxPartial* from) {
  uint64_t bits;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(bits) : "l"(from) : "memory");
  return bits;
}
__device__ inline uint64_t bits_of(const SoftmaxPartial& partial) {
  return uint64_t(__float_as_uint(partial.sum)) << 32 | __float_as_uint(partial.max);
}
__device__ inline SoftmaxPartial partial_of(uint64_t bits) {
  return {__uint_as_float(uint32_t(bits)), __uint_as_float(uint32_t(bits >> 32))};
}

// What all threads of a block know.
template <class Shape>
struct Block {
  using Tiles = Ring<Shape::kTile>;
  const ScoreParams& p;
  const Maps& maps;
  SharedMemory memory;
  PromptTable<PromptSchedule> prompts;  // with pages
  Tiles ring;
  Queries<Shape::kDim, Shape::kRows> queries;
  Run run;
  bool two_pass;
  int n_tiles;  // of the run

  __device__ __forceinline__ Block(const ScoreParams& p, const Maps& maps, char* shared)
      : p(p),
        maps(maps),
        memory(shared, p.layout),
        prompts(memory.prompts, p.attention()),
        ring(memory.stages, memory.of_stages, p.layout.stages),
        queries{memory.queries, memory.queries_full},
        run(0, 0),
        two_pass(p.partials),
        n_tiles(0) {}

  // By all threads.
  __device__ __forceinline__ void take_run() {
    if constexpr (Shape::kPaged) {
      prompts.template make<kThreads>(
          [&](int b, Units& ranges) { return plan_prompt(p, b, ranges); });
      const int block = int(blockIdx.x);
      run = {prompts.first_unit_of(block, p.blocks), prompts.first_unit_of(block + 1, p.blocks)};
      for (int i = run.first + int(threadIdx.x) % kWarp; i < run.end; i += kWarp)
        n_tiles += range_at(i).tiles;
      n_tiles = __reduce_add_sync(kFullMask, n_tiles);
    } else {
      const Schedule& s = p.schedule;
      run = Run(s);
      const int last_ranges = max(run.end - max(run.first, s.long_ranges), 0);
      n_tiles =
          (run.end - run.first - last_ranges) * NarrowRange::tiles_of(s.range_keys + 2 * s.halo) +
          last_ranges * NarrowRange::tiles_of(s.keys - (s.head_ranges - 1) * s.range_keys);
    }
  }

  // Barriers of what is loaded. By one thread.
  __device__ __forceinline__ void init_full() const {
    const auto prefetch = [](const CUtensorMap& map) {
      cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&map));
    };
    prefetch(maps.keys.map);
    prefetch(maps.queries);
    queries.full->init(1);
#pragma unroll 4
    for (int i = 0; i < ring.stages; ++i) ring.full[i].init(1);
    cutlass::arch::fence_barrier_init();
  }

  __device__ __forceinline__ NarrowRange range_at(int index) const {
    if constexpr (Shape::kPaged) {
      const int b = prompts.prompt_of(index);
      NarrowRange range(prompts[b].plan, index - prompts[b].first);
      range.b = b;
      range.bg += b * int(p.attention().kv_heads);
      return range;
    } else {
      return NarrowRange(p.schedule, index);
    }
  }

  // Where the partials of a range's head begin: those of its ranges but the last, and of the last.
  struct HeadPartials {
    int long_ranges, last_range, ranges;
  };
  __device__ __forceinline__ HeadPartials partials_of_head(const NarrowRange& range) const {
    const auto from = [&](const auto& s, int first, int head) {
      return HeadPartials{first + head * (s.head_ranges - 1), first + s.long_ranges + head,
                          s.head_ranges};
    };
    if constexpr (Shape::kPaged)
      return from(prompts[range.b].plan, prompts[range.b].first, range.g);
    else
      return from(p.schedule, 0, range.bg);
  }
};

}  // namespace claa::cuda::hopper::narrow
