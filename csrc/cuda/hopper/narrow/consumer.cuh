// The warpgroups that multiply keys by queries, and pool what comes of it.
#pragma once

#include "csrc/cuda/hopper/narrow/block.cuh"
#include "csrc/cuda/hopper/pool_and_write.cuh"

namespace claa::cuda::hopper::narrow {

// Two warpgroups. Tiles of a range go to them in turn, and so do the stages.
template <class Shape>
struct Consumer {
  using T = typename Shape::T;
  static constexpr int kDim = Shape::kDim, kRows = Shape::kRows;
  Block<Shape>& block;
  const ScoreParams& p;
  int thread, warp, lane, warpgroup;
  int row;              // of a tile: the thread's first key; the other one is 8 rows after it
  int bg_of_lse;        // whose logsumexp lies in shared memory
  PipelineState state;  // of the next tile; in the second of two passes, of the one before
  int f;                // the same tile's number in the run, of two passes

  __device__ __forceinline__ explicit Consumer(Block<Shape>& block)
      : block(block),
        p(block.p),
        thread(threadIdx.x),
        warp(warp_index()),
        lane(thread % kWarp),
        warpgroup(warp / (kWarpgroup / kWarp)),
        row(warp % 4 * 16 + lane / 4),
        state{warpgroup, 0},
        f(0) {}

  __device__ __forceinline__ void advance() {
    state.stage += kWarpgroups;
    if (state.stage >= block.ring.stages) state = {warpgroup, state.phase ^ 1};
  }
  __device__ __forceinline__ void retreat() {
    state.stage -= kWarpgroups;
    if (state.stage < 0) state = {block.ring.stages - kWarpgroups + warpgroup, state.phase ^ 1};
  }

  // ---- setup

  __device__ __forceinline__ void set_up() {
    if (thread == 0) {
#pragma unroll 4
      for (int i = 0; i < block.ring.stages; ++i) block.ring.empty[i].init(kWarpgroup / kWarp);
      cutlass::arch::fence_barrier_init();
    }
    block.queries.clear_padding_rows(p, thread);
  }

  // The partials of the run are marked, or the logsumexp of the first range is loaded.
  __device__ __forceinline__ void begin(const NarrowRange& first) {
    bg_of_lse = block.two_pass ? -1 : first.bg;
    if (block.two_pass) {
#pragma unroll 1
      for (int i = block.run.first * kRows + thread; i < block.run.end * kRows; i += kConsumers)
        store_partial(p.partials + i, kMissing);
    } else {
      load_lse(first);
    }
  }

  // Queries of another head: all threads that multiply call it, when none of them uses those
  // before.
  __device__ __forceinline__ void begin_queries(const NarrowRange& range) {
    block.queries.bg = range.bg;
    if (thread == 0) block.queries.load(p, block.maps.queries, range);
  }
  __device__ __forceinline__ void end_queries() {
    block.queries.phase ^= 1;
    block.queries.wait();
  }

  // Where the logsumexp of a query row lies: a thread reads those of its columns of the product,
  // 2c, 2c + 1, 2c + 8 and 2c + 9 of 16, as one float4.
  __device__ __forceinline__ static int place_of(int row) {
    return row / 16 * 16 + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2;
  }
  __device__ __forceinline__ void load_lse(const NarrowRange& range) {
    if (thread < kRows)
      block.memory.minus_lse[place_of(thread)] = minus_lse_of(p.attention(), range, thread);
  }

  // ---- first pass

  // The products of a tile that are kept, as a thread has them in registers, float4 by float4.
  __device__ __forceinline__ float4* kept_products(int tile) {
    return reinterpret_cast<float4*>(block.memory.kept + tile * Shape::kProductBytes) +
           thread % kWarpgroup;
  }
  __device__ __forceinline__ void keep(const float (&x)[kRows / 2], int tile) {
    float4* to = kept_products(tile);
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j)
      to[j * kWarpgroup] = {x[j * 4], x[j * 4 + 1], x[j * 4 + 2], x[j * 4 + 3]};
  }

  // Logits from `key` on become -infinity where a query does not see the key, or where another
  // range takes its partial.
  __device__ __forceinline__ void mask(float (&x)[kRows / 2], const NarrowRange& range,
                                       int first_valid, int key) {
    if (key < first_valid || key + kTileRows > range.partial_end) {
      const int upper = key + row, lower = upper + 8;
      const bool has_upper = upper >= first_valid && upper < range.partial_end;
      const bool has_lower = lower >= first_valid && lower < range.partial_end;
#pragma unroll
      for (int z = 0; z < kRows / 2; ++z)
        if (!(z % 4 < 2 ? has_upper : has_lower)) x[z] = -INFINITY;
    }
    if (key + kTileRows > range.context) {
      int query = lane % 4 * 2;
      // Opaque, so that the compiler cannot hoist the arithmetic of heads out of this rare branch.
      asm("" : "+r"(query));
#pragma unroll
      for (int e = 0; e < kRows / 8; ++e) {
#pragma unroll
        for (int z = 0; z < 4; ++z)
          if (key + row + z / 2 * 8 > range.context + query + z % 2) x[e * 4 + z] = -INFINITY;
        query += 8;
        if (query >= p.head_rows) query -= p.head_rows;
      }
    }
  }

  // Joins the partials of a range's warps, and shows them to the other blocks. A warp joins some
  // query rows, each lane those of one warp.
  __device__ __forceinline__ void publish(PartialsOfColumns<kRows>& partials, int index) {
    // Two ranges take turns in shared memory: with one barrier for each, a warp may be one ahead.
    SoftmaxPartial* of_warps =
        block.memory.partials + (index - block.run.first) % 2 * kWarps * kRows;
    partials.store(of_warps + warp * kRows, lane);
    sync_consumers<kConsumers>();
    static_assert(kWarps == 8);
#pragma unroll 1
    for (int row = warp * 4 + lane % 4; row < kRows; row += kWarps * 4) {
      SoftmaxPartial partial = of_warps[lane / 4 * kRows + row];
#pragma unroll
      for (int step = 4; step < kWarp; step *= 2) partial.join_lanes<FastExp>(step);
      if (lane < 4) store_partial(p.partials + index * kRows + row, bits_of(partial));
    }
  }

  __device__ __forceinline__ void first_pass() {
    PartialsOfColumns<kRows> partials;
    f = warpgroup;
#pragma unroll 1
    for (int index = block.run.first; index < block.run.end; ++index) {
      const NarrowRange range = block.range_at(index);
      if (range.bg != block.queries.bg) {
        sync_consumers<kConsumers>();
        begin_queries(range);
        end_queries();
      }
      const int first_valid = first_valid_key(p.attention(), range);
      partials.clear();
#pragma unroll 1
      for (int i = warpgroup; i < range.tiles; i += kWarpgroups, f += kWarpgroups, advance()) {
        block.ring.wait(state);
        const bool is_needed_again = f >= block.n_tiles - block.ring.stages;
        if (i >= range.key_tiles) {
          if (!is_needed_again) block.ring.free(state);
          continue;
        }
        // Keys `row` and `row + 8` of the tile by query rows: lane 4r + c has of the first key rows
        // 8j + 2c and 8j + 2c + 1 at x[4j] and x[4j + 1], of the second the same at x[4j + 2] and
        // x[4j + 3].
        float x[kRows / 2];
        multiply<T, kDim, kRows>(x,
                                 key_rows<kDim, Shape::kPaged>(block.ring.tile(state), kTileRows),
                                 in_panels(block.queries.rows, kRows));
        if (!is_needed_again) block.ring.free(state);
        if (f < p.kept_tiles) keep(x, f);
#pragma unroll
        for (int z = 0; z < kRows / 2; ++z) x[z] = __fmul_rn(x[z], p.scale_log2);
        mask(x, range, first_valid, range.halo_begin + i * kTileRows);
        partials.add(x);
      }
      publish(partials, index);
    }
  }

  // The logsumexp of a head, when the partials of all its ranges are there. A warp joins some query
  // rows, each lane an eighth of the ranges.
  __device__ __forceinline__ void join_partials(const NarrowRange& range) {
    const auto [long_ranges, last_range, ranges] = block.partials_of_head(range);
#pragma unroll 1
    for (int row = warp * 4 + lane % 4; row < kRows; row += kWarps * 4) {
      float* minus_lse = block.memory.minus_lse + place_of(row);
      const auto from = [&](int in_head) {
        const int index = in_head + 1 < ranges ? long_ranges + in_head : last_range;
        return p.partials + int64_t(index) * kRows + row;
      };
      SoftmaxPartial partial{kLowest, 0.f};
      constexpr int kBatch = 4;  // loads in flight
#pragma unroll 1
      for (int first = lane / 4; first < ranges; first += kBatch * 8) {
        SoftmaxPartial batch[kBatch];
        bool is_missing;
        do {
          is_missing = false;
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            const int other = first + i * 8;
            const uint64_t bits =
                other < ranges ? load_partial(from(other)) : bits_of({kLowest, 0.f});
            is_missing |= bits == kMissing;
            batch[i] = partial_of(bits);
          }
        } while (is_missing);
        float top = partial.max;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) top = fmaxf(top, batch[i].max);
        partial.sum *= FastExp::exp(partial.max - top);
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          partial.sum += batch[i].sum * FastExp::exp(batch[i].max - top);
        partial.max = top;
      }
      __syncwarp();
#pragma unroll
      for (int step = 4; step < kWarp; step *= 2) partial.join_lanes<FastExp>(step);
      if (lane < 4) *minus_lse = minus_lse_of(p.attention(), range, row, partial);
    }
  }

  // ---- second pass

  // Queries and logsumexp of a range, where they are another head's than those before.
  __device__ __forceinline__ void prepare(const NarrowRange& range) {
    const bool has_other_queries =
        range.bg != block.queries.bg && (!block.two_pass || f > p.kept_tiles);
    if (has_other_queries) begin_queries(range);
    if (range.bg != bg_of_lse) {
      bg_of_lse = range.bg;
      if (block.two_pass) {
        join_partials(range);
      } else {
        load_lse(range);
      }
      sync_consumers<kConsumers>();
    }
    if (has_other_queries) end_queries();
  }

  // The products of tile i of a range, out of those that were kept or anew. False if it has no
  // keys.
  __device__ __forceinline__ bool products_of(float (&x)[kRows / 2], const NarrowRange& range,
                                              int i) {
    if (block.two_pass && f + warpgroup < p.kept_tiles) {
      if (i >= range.key_tiles) return false;
      const float4* from = kept_products(f + warpgroup);
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j) {
        const float4 four = from[j * kWarpgroup];
        x[j * 4] = four.x;
        x[j * 4 + 1] = four.y;
        x[j * 4 + 2] = four.z;
        x[j * 4 + 3] = four.w;
      }
      return true;
    }
    block.ring.wait(state);
    if (i < range.key_tiles)
      multiply<T, kDim, kRows>(x, key_rows<kDim, Shape::kPaged>(block.ring.tile(state), kTileRows),
                               in_panels(block.queries.rows, kRows));
    block.ring.free(state);
    if (!block.two_pass) advance();
    return i < range.key_tiles;
  }

  // Probabilities, summed over the thread's columns of 8 query rows, which are one head's: at x[4e]
  // of the first key, at x[4e + 2] of the second.
  __device__ __forceinline__ void add_pairs(float (&x)[kRows / 2],
                                            const float4 (&minus_lse)[kRows / 16]) {
#pragma unroll
    for (int e = 0; e < kRows / 8; ++e) {
      const float even = e % 2 ? minus_lse[e / 2].z : minus_lse[e / 2].x;
      const float odd = e % 2 ? minus_lse[e / 2].w : minus_lse[e / 2].y;
      // The product of a padding row is 0, or NaN if the key is infinite; of 0 its logsumexp makes
      // no probability.
      if (p.has_padding_rows) {
        if (even == -INFINITY) x[e * 4] = x[e * 4 + 2] = 0.f;
        if (odd == -INFINITY) x[e * 4 + 1] = x[e * 4 + 3] = 0.f;
      }
#pragma unroll
      for (int z = e * 4; z < e * 4 + 4; z += 2)
        x[z] = FastExp::exp(fmaf(x[z], p.scale_log2, even)) +
               FastExp::exp(fmaf(x[z + 1], p.scale_log2, odd));
    }
  }

  // Sums over all query rows, or over those of each head, into shared memory.
  __device__ __forceinline__ void add_heads(const float (&x)[kRows / 2], const NarrowRange& range,
                                            int first_valid, int i) {
    const int first_key = i * kTileRows + warp % 4 * 16;  // of the warp
    float sum[2] = {};                                    // of the thread's two keys
    const auto store = [&](int slot) {
      store_sums(block.memory.sums + slot * p.sums_stride + first_key, sum[0], sum[1],
                 range.halo_begin + first_key, first_valid);
    };
    if (p.slots == 1) {
#pragma unroll
      for (int z = 0; z < kRows / 2; z += 2) sum[z / 2 % 2] += x[z];
      store(0);
      return;
    }
    int head = 0, rows = 0;  // of the head so far
#pragma unroll
    for (int e = 0; e < kRows / 8; ++e) {
      sum[0] += x[e * 4];
      sum[1] += x[e * 4 + 2];
      rows += 8;
      if (rows < p.head_rows) continue;
      if (head < p.slots) store(head);
      sum[0] = sum[1] = 0.f;
      ++head;
      rows = 0;
    }
  }

  __device__ __forceinline__ void add_range(const NarrowRange& range) {
    const int first_valid = first_valid_key(p.attention(), range);
    float4 minus_lse[kRows / 16];  // of the thread's columns: [j] of 16j + 2c, + 1, + 8 and + 9
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i)
      minus_lse[i] = reinterpret_cast<const float4*>(block.memory.minus_lse)[i * 4 + lane % 4];
    const int step = block.two_pass ? -kWarpgroups : kWarpgroups;
    int i = warpgroup + (block.two_pass ? range.tiles - kWarpgroups : 0);
#pragma unroll 1
    for (int n = 0; n < range.tiles; n += kWarpgroups, i += step) {
      if (block.two_pass) {
        retreat();
        f -= kWarpgroups;
      }
      float x[kRows / 2];  // as in the first pass
      if (!products_of(x, range, i)) continue;
      add_pairs(x, minus_lse);
      add_heads(x, range, first_valid, i);
    }
  }

  __device__ __forceinline__ void second_pass() {
    f = block.n_tiles;  // tiles from here on are done; only needed to go back
#pragma unroll 1
    for (int j = block.run.first; j < block.run.end; ++j) {
      const NarrowRange range =
          block.range_at(block.two_pass ? block.run.first + block.run.end - 1 - j : j);
      prepare(range);
      add_range(range);
      sync_consumers<kConsumers>();
      pool_and_write<false>(p, range, range.context, p.slots, thread,
                            [&](int slot) { return block.memory.sums + slot * p.sums_stride; });
      if (j + 1 < block.run.end) sync_consumers<kConsumers>();
    }
  }
};

}  // namespace claa::cuda::hopper::narrow
