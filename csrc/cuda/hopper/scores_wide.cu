// Window scores of 65 to 256 query rows on Hopper, by TMA and wgmma.
//
// A key range comes in tiles of 64 keys. Every block has a multiprocessor for itself and a run of
// ranges, in which one producer thread brings tile after tile into a ring of stages, as far ahead
// as there is room. Two warpgroups multiply each tile, by half of the query rows each: so the
// logsumexp of a thread's query rows stays in its registers. Keys are the rows of the product, so a
// thread sums over query rows in its registers; sums of a range go to shared memory, where they are
// pooled.
//
// Tensor cores and exponentials take equally long per tile, and loading it costs little more. So a
// warpgroup starts the products of the next tile before it exponentiates those of the present one.
// Queries and logsumexp are asked for before the first keys: after a ring full of those they would
// come last. With `lse` queries and first keys are fetched into the L2 cache while the kernel ahead
// still runs.
//
// Without `lse` there are two passes. In the first the blocks take the softmax partials of their
// ranges; they wait for each other (a cooperative launch); the second goes over the tiles again,
// from the last to the first: what the stages still hold is not loaded again, and the L2 cache has
// more of the rest. Tile f of a block is always in stage f % stages.
//
// Reads every key once, or twice without `lse`; writes every score once. Ranges do not depend on
// the batch where partials do, and sums go over query rows in order: the same bits in any batch.

#include <cooperative_groups.h>
#include <cutlass/arch/reg_reconfig.h>

#include "csrc/cuda/hopper/launch.cuh"
#include "csrc/cuda/hopper/pool_and_write.cuh"
#include "csrc/cuda/hopper/queries.cuh"
#include "csrc/cuda/hopper/scores.cuh"
#include "csrc/cuda/hopper/softmax_partials.cuh"
#include "csrc/cuda/overlap.cuh"

namespace claa::cuda::hopper::wide {
namespace {

constexpr int kWarpgroups = kScoreWarpgroups, kConsumers = kScoreConsumers;
constexpr int kThreads = kConsumers + kWarpgroup;  // whole warpgroups: they change their registers
constexpr int kMostRows = 256;
constexpr int kMostTiles = 32;  // of a range, with one sum per key
constexpr int kMostStages = 16;
constexpr int kTilesPrefetched = 2;

// kPlain: lse is given, averages need one sum for each key, and there are no padding rows.
template <class T_, int kDim_, int kRows_, bool kPlain_>
struct Shape {
  using T = T_;
  static constexpr bool kPlain = kPlain_;
  static constexpr int kDim = kDim_;
  static constexpr int kRows = kRows_;  // query rows of a warpgroup
  static constexpr int kRowTiles = kRows / kTileRows;
  static constexpr int kAllRows = kWarpgroups * kRows;
  static constexpr int kTile = kTileBytes<kDim>;  // of keys
};

// A range has range_keys keys, whose scores and partials it gives, and a halo on each side. (Cut as
// the narrow kernel cuts them, ranges made this kernel spill, for 6 to 13 % of its time.)
struct WideRange : KeyRange {
  int tiles;

  __device__ __forceinline__ WideRange(const Schedule& s, int index) : KeyRange(s, index) {
    begin = in_head * s.range_keys;
    end = min(begin + s.range_keys, s.keys);
    halo_begin = max(begin - s.halo, 0);
    halo_end = min(end + s.halo, s.keys);
    tiles = (halo_end - halo_begin + kTileRows - 1) / kTileRows;
  }
};

// Calls use(x, i) for the products x that every start(x, i) starts, i < n, with the next ones on
// their way. use(x, i, is_odd) knows at compile time whether i is odd.
template <int kProducts, class Start, class Use>
__device__ __forceinline__ void with_next_in_flight(int n, Start start, Use use) {
  constexpr std::integral_constant<int, 0> even_index;
  constexpr std::integral_constant<int, 1> odd_index;
  float even[kProducts], odd[kProducts];
  start(even, 0);
  int i = 0;
#pragma unroll 1
  for (; i + 2 < n; i += 2) {
    start(odd, i + 1);
    finish_products<1>(even);
    use(even, i, even_index);
    start(even, i + 2);
    finish_products<1>(odd);
    use(odd, i + 1, odd_index);
  }
  if (i + 1 < n) {
    start(odd, i + 1);
    finish_products<1>(even);
    use(even, i, even_index);
    finish_products<0>(odd);
    use(odd, i + 1, odd_index);
  } else {
    finish_products<0>(even);
    use(even, i, even_index);
  }
}

// The sums of a head, of the query rows of either warpgroup.
struct SplitSums {
  const float* sums;
  int other;  // floats from one to the other

  __device__ float operator[](int key) const { return sums[key] + sums[other + key]; }
};

// What all threads of a block know.
template <class Shape>
struct Block {
  const ScoreParams& p;
  const Maps& maps;
  SharedMemory memory;
  Ring<Shape::kTile> ring;
  Queries<Shape::kDim, Shape::kAllRows> queries;
  Run run;
  bool two_pass;
  int slots, n_tiles;  // tiles of the run, of two passes

  __device__ __forceinline__ Block(const ScoreParams& p, const Maps& maps, char* shared)
      : p(p),
        maps(maps),
        memory(shared, p.layout),
        ring(memory.stages, memory.of_stages, p.layout.stages),
        queries{memory.queries, memory.queries_full},
        run(p.schedule),
        two_pass(!Shape::kPlain && p.partials),
        slots(Shape::kPlain ? 1 : p.slots),
        n_tiles(0) {}

  __device__ __forceinline__ void count_tiles() {
    for (int index = run.first; two_pass && index < run.end; ++index)
      n_tiles += WideRange(p.schedule, index).tiles;
  }
};

// ---- producer

// Barriers, and what may be asked for before the kernels ahead have ended: by one thread.
template <class Shape>
__device__ __forceinline__ void set_up(Block<Shape>& block) {
  constexpr int kDim = Shape::kDim;
  if (!block.two_pass) {
    const WindowAttention& a = block.p.attention();
    const WideRange range(block.p.schedule, block.run.first);
    prefetch_queries<kDim>(a, block.maps.queries, range.b, range.g * block.p.group, 0);
    for (int i = 0; i < min(kTilesPrefetched, range.tiles); ++i)
      prefetch_keys<kDim>(a, block.maps.keys.map, range.b, range.g,
                          range.halo_begin + i * kTileRows);
  }
  block.queries.full->init(1);
  block.ring.init(kConsumers / kWarp);
}

template <class Shape>
__device__ __forceinline__ void produce(Block<Shape>& block, bool is_loading) {
  PipelineState state;
  const auto load = [&](const WideRange& range, int i, bool is_first_phase) {
    load_keys<Shape::kDim, kTileRows>(block.p.attention(), block.maps.keys.map,
                                      block.ring.tile(state),
                                      block.ring.begin_load(state, is_first_phase, Shape::kTile),
                                      range.b, range.g, range.halo_begin + i * kTileRows);
  };
  int f = 0;
  if (is_loading) {
    for (int index = block.run.first; index < block.run.end; ++index) {
      const WideRange range(block.p.schedule, index);
      for (int i = 0; i < range.tiles; ++i, ++f, block.ring.advance(state))
        load(range, i, f < block.ring.stages);
    }
  }
  if (!block.two_pass) return;
  __syncwarp();  // a barrier wants whole warps
  cooperative_groups::this_grid().sync();
  if (!is_loading) return;
  for (int index = block.run.end - 1; index >= block.run.first; --index) {
    const WideRange range(block.p.schedule, index);
    for (int i = range.tiles - 1; i >= 0; --i) {
      block.ring.retreat(state);
      if (--f < block.n_tiles - block.ring.stages) load(range, i, false);
    }
  }
}

// ---- consumers

template <class Shape>
struct Consumer {
  using T = typename Shape::T;
  static constexpr int kDim = Shape::kDim, kRows = Shape::kRows, kAllRows = Shape::kAllRows;
  Block<Shape>& block;
  const ScoreParams& p;
  int thread, warp, lane, warpgroup;
  float scale_log2;
  const char* query_rows;  // of the warpgroup
  PipelineState state;     // of the next tile; on the way back, of the one before
  int bg_of_lse;           // whose logsumexp lies in shared memory
  // The negative logsumexp of query rows 8e + 2c and 8e + 2c + 1 of the warpgroup, in lane 4r + c.
  float2 minus_lse[kRows / 8];

  __device__ __forceinline__ explicit Consumer(Block<Shape>& block)
      : block(block),
        p(block.p),
        thread(threadIdx.x),
        warp(warp_index()),
        lane(thread % kWarp),
        warpgroup(warp / (kWarpgroup / kWarp)),
        scale_log2(p.attention().scale * FastExp::kUnit),
        query_rows(block.queries.rows + warpgroup * kRows * kRowBytes),
        bg_of_lse(-1) {}

  // When the threads that multiply have no more use of the queries before.
  __device__ __forceinline__ void change_queries(const WideRange& range) {
    if (range.bg == block.queries.bg) return;
    block.queries.bg = range.bg;
    block.queries.phase ^= 1;
    if (thread == 0) block.queries.load(p, block.maps.queries, range);
  }

  // ---- first pass

  __device__ __forceinline__ void first_pass() {
    constexpr int kRowTiles = Shape::kRowTiles;
    PartialsOfRows<kRowTiles> partials;
    int f = 0;
    for (int index = block.run.first; index < block.run.end; ++index) {
      const WideRange range(p.schedule, index);
      if (index == block.run.first || range.bg != block.queries.bg) {
        if (index != block.run.first) sync_consumers<kConsumers>();
        change_queries(range);
        block.queries.wait();
      }
      const int from = max(range.begin, first_valid_key(p.attention(), range));
      const int context = p.schedule.context;
      partials.clear();
      PipelineState next = state;
      // Tile by tile of keys, and of these tile by tile of query rows: the rows of the product
      // here, the keys its columns.
      with_next_in_flight<kTileRows / 2>(
          range.tiles * kRowTiles,
          [&](auto& x, int i) {
            const int t = i % kRowTiles;
            if (t == 0) block.ring.wait(next);
            start_products<T, kDim, kTileRows>(
                x, in_panels(query_rows + t * kTileRows * kRowBytes, kAllRows),
                in_panels(block.ring.tile(next), kTileRows));
            if (t == kRowTiles - 1) block.ring.advance(next);
          },
          [&](auto& x, int i, auto is_odd) {
            const int t = is_odd % kRowTiles, key = range.halo_begin + i / kRowTiles * kTileRows;
            if (t == kRowTiles - 1) {
              if (f++ < block.n_tiles - block.ring.stages) block.ring.free(state);
              block.ring.advance(state);
            }
            partials.add(t, x, scale_log2,
                         key >= from && key + kTileRows <= min(range.end, context + 1), from - key,
                         [&](int row) {
                           const int query = QueryRow(p.attention(), warpgroup * kRows + row).query;
                           return min(range.end, context + query + 1) - key;
                         });
          });
      const int64_t part = int64_t(range.bg) * p.schedule.head_ranges + range.in_head;
      partials.store(p.partials + (part * kWarpgroups + warpgroup) * kRows, kRows, scale_log2);
    }
  }

  // ---- between the passes

  // The logsumexp of a head. Every query row has as many threads as there are; each joins some of
  // the partials.
  __device__ __forceinline__ void join_partials(const WideRange& range) {
    constexpr int kSegments = kConsumers / kAllRows;
    const int parts = p.schedule.head_ranges, row = thread % kAllRows, segment = thread / kAllRows;
    const SoftmaxPartial* from = p.partials + int64_t(range.bg) * parts * kAllRows + row;
    SoftmaxPartial partial{kLowest, 0.f};
    constexpr int kBatch = 12;  // loads in flight
#pragma unroll 1
    for (int first = segment; first < parts; first += kBatch * kSegments) {
      float2 batch[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int part = min(first + i * kSegments, parts - 1);
        batch[i] = __ldcg(reinterpret_cast<const float2*>(from + part * kAllRows));
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (first + i * kSegments < parts) partial.join<FastExp>({batch[i].x, batch[i].y});
    }
    if constexpr (kSegments == 2) {
      if (segment == 1) block.memory.partials[row] = partial;
      sync_consumers<kConsumers>();
      if (segment == 0) partial.join<FastExp>(block.memory.partials[row]);
    }
    if (segment == 0)
      block.memory.minus_lse[row] = minus_lse_of(p.attention(), range, row, partial);
  }

  __device__ __forceinline__ void load_lse(const WideRange& range) {
    if (thread < kAllRows)
      block.memory.minus_lse[thread] = minus_lse_of(p.attention(), range, thread);
  }

  // Queries and logsumexp of a range, where they are another head's than those before.
  __device__ __forceinline__ void prepare(const WideRange& range) {
    if (range.bg == bg_of_lse) return;
    change_queries(range);
    if (block.two_pass) {
      join_partials(range);
    } else if (bg_of_lse >= 0) {
      load_lse(range);
    }
    bg_of_lse = range.bg;
    sync_consumers<kConsumers>();
#pragma unroll
    for (int e = 0; e < kRows / 8; ++e)
      minus_lse[e] = reinterpret_cast<const float2*>(block.memory.minus_lse +
                                                     warpgroup * kRows)[e * 4 + lane % 4];
    block.queries.wait();
  }

  // ---- second pass

  // The product of a padding row is 0, or NaN if the key is infinite; of 0 its logsumexp makes no
  // probability.
  __device__ __forceinline__ void clear_padding_rows(float (&x)[kRows / 2]) const {
    if constexpr (!Shape::kPlain) {
      if (!p.has_padding_rows) return;
#pragma unroll
      for (int z = 0; z < kRows / 2; ++z)
        if ((z % 2 ? minus_lse[z / 4].y : minus_lse[z / 4].x) == -INFINITY) x[z] = 0.f;
    }
  }

  // The probability of two query rows, for one key.
  __device__ __forceinline__ float pair(const float (&x)[kRows / 2], int z) const {
    return FastExp::exp(fmaf(x[z], scale_log2, minus_lse[z / 4].x)) +
           FastExp::exp(fmaf(x[z + 1], scale_log2, minus_lse[z / 4].y));
  }

  // Sums over the warpgroup's query rows, or over those of each head, of tile i of a range, into
  // shared memory. Of its keys r and r + 8 of the warp's 16, lane 4r + c has query rows 8j + 2c and
  // 8j + 2c + 1 at x[4j] and x[4j + 1], and at x[4j + 2] and x[4j + 3].
  template <bool kOneSum>
  __device__ __forceinline__ void add_heads(const float (&x)[kRows / 2], const WideRange& range,
                                            int first_valid, int i) {
    float* sums = block.memory.sums + warpgroup * block.slots * p.sums_stride;
    const int first_key = i * kTileRows + warp % 4 * 16;  // of the warp
    const auto store = [&](int slot, float upper, float lower) {
      store_sums(sums + slot * p.sums_stride + first_key, upper, lower,
                 range.halo_begin + first_key, first_valid);
    };
    if constexpr (kOneSum) {
      float sum[4] = {};
#pragma unroll
      for (int z = 0; z < kRows / 2; z += 2) sum[z / 2 % 4] += pair(x, z);
      store(0, sum[0] + sum[2], sum[1] + sum[3]);
    } else {
      const int first_row = warpgroup * kRows;
      int head = first_row / p.head_rows, rows = first_row - head * p.head_rows;
      float upper = 0.f, lower = 0.f;
#pragma unroll
      for (int e = 0; e < kRows / 8; ++e) {
        upper += pair(x, e * 4);
        lower += pair(x, e * 4 + 2);
        rows += 8;
        if (rows < p.head_rows && e + 1 < kRows / 8) continue;
        if (head < block.slots) store(head, upper, lower);
        upper = lower = 0.f;
        rows = 0;
        ++head;
      }
    }
  }

  template <bool kOneSum>
  __device__ __forceinline__ void add_range(const WideRange& range) {
    const int first_valid = first_valid_key(p.attention(), range);
    PipelineState next = state;
    with_next_in_flight<kRows / 2>(
        range.tiles,
        [&](auto& x, int) {
          if (block.two_pass) block.ring.retreat(next);
          block.ring.wait(next);
          // Taken from the first lane it is that of the whole warp, so the address of the tile is
          // in uniform registers, and the steps of the product follow each other closely.
          const int stage = __shfl_sync(kFullMask, lane == 0 ? next.stage : 0, 0);
          start_products<T, kDim, kRows>(
              x, in_panels(block.memory.stages + stage * Shape::kTile, kTileRows),
              in_panels(query_rows, kAllRows));
          if (!block.two_pass) block.ring.advance(next);
        },
        [&](auto& x, int n, auto) {
          if (block.two_pass) block.ring.retreat(state);
          block.ring.free(state);
          if (!block.two_pass) block.ring.advance(state);
          clear_padding_rows(x);
          add_heads<kOneSum>(x, range, first_valid, block.two_pass ? range.tiles - 1 - n : n);
        });
  }

  __device__ __forceinline__ void second_pass() {
    int index = block.two_pass ? block.run.end - 1 : block.run.first;
    for (int left = block.run.end - block.run.first; left > 0;
         --left, index += block.two_pass ? -1 : 1) {
      const WideRange range(p.schedule, index);
      prepare(range);
      if (block.slots == 1) {
        add_range<true>(range);
      } else {
        add_range<false>(range);
      }
      sync_consumers<kConsumers>();
      pool_and_write<Shape::kPlain>(
          p, range, p.schedule.context, block.slots, thread, [&](int slot) {
            return SplitSums{block.memory.sums + slot * p.sums_stride, block.slots * p.sums_stride};
          });
      sync_consumers<kConsumers>();
    }
  }
};

template <class Shape>
__global__ __launch_bounds__(kThreads, 1) void wide_kernel(const __grid_constant__ Maps maps,
                                                           const __grid_constant__ ScoreParams p) {
  extern __shared__ __align__(kAlignment) char shared[];
  Block<Shape> block(p, maps, shared);
  const bool is_producer = warp_index() >= kConsumers / kWarp;
  const bool is_loading = threadIdx.x == kConsumers;

  // ---- setup: queries and logsumexp are asked for before the first keys, which will keep the
  // memory busy
  if (is_loading) set_up(block);
  wait_for_kernels_ahead();
  Consumer<Shape> consumer(block);
  if (is_loading) {
    block.queries.load(p, maps.queries, WideRange(p.schedule, block.run.first));
  } else if (!is_producer) {
    if (!block.two_pass) consumer.load_lse(WideRange(p.schedule, block.run.first));
    block.queries.clear_padding_rows(p, threadIdx.x);
    // A warpgroup has no query rows of some heads.
    for (int i = threadIdx.x; block.slots > 1 && i < kWarpgroups * block.slots * p.sums_stride;
         i += kConsumers)
      block.memory.sums[i] = 0.f;
  }
  finish_setup<kThreads>(is_producer);
  block.count_tiles();

  if (is_producer) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    produce(block, is_loading);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    block.queries.bg = WideRange(p.schedule, block.run.first).bg;
    if (block.two_pass) {
      consumer.first_pass();
      cooperative_groups::this_grid().sync();
    }
    consumer.second_pass();
  }
}

// ---- host

// How the work is divided: key ranges over blocks, shared memory over stages and sums.
struct Plan {
  ScoreParams params;
  int rows;  // of a warpgroup
  int64_t blocks, partial_bytes;

  explicit Plan(const WindowScores& s);

  bool is_plain() const {
    return !params.partials && !params.has_padding_rows && params.scores.pooled &&
           params.scores.pool_mode == PoolMode::avg;
  }
};

Plan::Plan(const WindowScores& s) {
  const WindowAttention& a = s.attention;
  rows = a.group() * head_rows(a) <= 128 ? 64 : 128;
  const int64_t keys = a.lse ? a.context() : a.total, heads = a.batch * a.kv_heads;
  // In tiles; a range costs one more.
  const Division division = best_division(
      max(int64_t(2), kMostTiles / s.slots()), 2, a.lse ? heads : kPlannedHeads, multiprocessors(),
      [&](int64_t tiles) {
        const int64_t range_keys = tiles * kTileRows - 2 * s.halo();
        const int64_t head_ranges = max(ceil_div(keys, range_keys), int64_t(1));
        return Division{tiles, head_ranges,
                        ceil_div(keys - (head_ranges - 1) * range_keys + s.halo(), kTileRows)};
      },
      [](const Division& d, int64_t n, int64_t n_last) {
        return n + (n - n_last) * d.tiles + n_last * d.last_tiles;
      });
  const int64_t ranges = heads * division.head_ranges, all_rows = kWarpgroups * rows;
  blocks = min(ranges, int64_t(multiprocessors()));
  partial_bytes = a.lse ? 0 : ranges * all_rows * int64_t(sizeof(SoftmaxPartial));

  const int64_t row_bytes = padded_dim(a) * 2, tile_bytes = kTileRows * row_bytes;
  const int64_t sums_stride = division.tiles * kTileRows;
  const Layout::Sizes sizes{.tile_bytes = tile_bytes,
                            .kept_bytes = 0,
                            .query_rows = all_rows,
                            .row_bytes = row_bytes,
                            .partials = kWarpgroup,
                            .sums = kWarpgroups * s.slots() * sums_stride};
  const int64_t room = most_shared_bytes() - Layout::of(sizes, 0).bytes;
  const int64_t stages = min(room / (tile_bytes + Ring<1>::kBarrierBytes), int64_t(kMostStages));
  params = score_params(s, schedule_of(s, division, keys, blocks, s.halo()),
                        Layout::of(sizes, stages), all_rows, sums_stride, 0);
}

template <class Shape>
cudaError_t launch(const Plan& plan, cudaStream_t stream) {
  return launch_scores(wide_kernel<Shape>, plan.params, plan.blocks, kThreads, stream);
}

}  // namespace

bool takes(const WindowScores& s) {
  const WindowAttention& a = s.attention;
  return !a.pages.table && a.group() * head_rows(a) <= kMostRows && s.halo() <= kMostHalo &&
         Plan(s).params.layout.stages > 1;
}

int64_t workspace_bytes(const WindowScores& s) { return Plan(s).partial_bytes; }

cudaError_t run(const WindowScores& s, cudaStream_t stream) {
  const Plan plan(s);
  return with_shape(s.attention, [&](auto type, auto dim) {
    using T = decltype(type);
    const auto with_rows = [&](auto rows) {
      return plan.is_plain() ? launch<Shape<T, dim, rows, true>>(plan, stream)
                             : launch<Shape<T, dim, rows, false>>(plan, stream);
    };
    return plan.rows == 64 ? with_rows(std::integral_constant<int, 64>{})
                           : with_rows(std::integral_constant<int, 128>{});
  });
}

}  // namespace claa::cuda::hopper::wide
