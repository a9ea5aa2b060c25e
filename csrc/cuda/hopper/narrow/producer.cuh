// The warp that brings keys and the first queries.
#pragma once

#include "csrc/cuda/hopper/narrow/block.cuh"

namespace claa::cuda::hopper::narrow {

// One warp: one lane brings the queries of the first range and keys in rows, all of them keys in
// pages.
template <class Shape>
struct Producer {
  static constexpr int kDim = Shape::kDim;
  Block<Shape>& block;
  PagedKeys paged;
  NarrowRange range;            // of the next tile
  int index, in_range, loaded;  // number of the range; of the tile in it, and in the run
  PipelineState state;

  __device__ __forceinline__ explicit Producer(Block<Shape>& block, const NarrowRange& first)
      : block(block), range(first), index(block.run.first), in_range(0), loaded(0) {}

  // Keys that may be asked for before the kernels ahead have ended. By one thread.
  __device__ __forceinline__ void prefetch() const {
#pragma unroll 1
    for (int i = 0; i < min(kBytesPrefetched / Shape::kTile, range.key_tiles); ++i)
      prefetch_keys<kDim>(block.p.attention(), block.maps.keys.map, range.b, range.g,
                          range.halo_begin + i * kTileRows);
  }

  __device__ __forceinline__ void load_tile(bool is_first_phase, int direction) {
    const bool has_keys = in_range < range.key_tiles;
    Barrier& full = block.ring.begin_load(state, is_first_phase, has_keys ? Shape::kTile : 0,
                                          !Shape::kPaged || threadIdx.x == kConsumers);
    if (!has_keys) return;
    const WindowAttention& a = block.p.attention();
    const int first = range.halo_begin + in_range * kTileRows;
    if constexpr (Shape::kPaged)
      paged.template load<kDim, kTileRows>(a, block.maps.keys, block.ring.tile(state), full,
                                           range.b, range.context + int(a.window), range.halo_end,
                                           range.g, first, direction);
    else
      load_keys<kDim, kTileRows>(a, block.maps.keys.map, block.ring.tile(state), full, range.b,
                                 range.g, first);
  }

  // Loads tiles up to the end-th of the run.
  __device__ __forceinline__ void load_until(int end) {
#pragma unroll 1
    for (; loaded < end; ++loaded, block.ring.advance(state)) {
      load_tile(loaded < block.ring.stages, 1);
      if (++in_range < range.tiles) continue;
      in_range = 0;
      range = block.range_at(++index);
    }
  }

  // For the second pass: from the last to the first, those that neither lie in the stages still nor
  // were kept as products.
  __device__ __forceinline__ void load_again() {
#pragma unroll 1
    while (loaded > block.p.kept_tiles) {
      if (--in_range < 0) {
        range = block.range_at(--index);
        in_range = range.tiles - 1;
      }
      block.ring.retreat(state);
      if (--loaded < block.n_tiles - block.ring.stages) load_tile(false, -1);
    }
  }
};

}  // namespace claa::cuda::hopper::narrow
