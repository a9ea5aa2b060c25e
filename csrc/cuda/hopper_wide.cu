// Window scores of many columns on Hopper, by TMA and wgmma: more than 64 of them.
//
// A unit is a range of keys of one (prompt, key head) with a halo of half a pooling kernel on each
// side, in tiles of 64 keys. Every block has a multiprocessor for itself and a run of units, in
// which one warp brings tile after tile into a ring of stages, as far ahead as there is room. Two
// warpgroups multiply each tile, by half of the columns each: so the shifts of a thread's columns
// stay in its registers. Keys are the rows of the product, so a thread sums over columns in its
// registers; sums of a unit go to shared memory, where they are pooled.
//
// A tile costs as many cycles of the tensor cores as of the exponentials, and reading it hardly
// more. So a warpgroup has the products of the next tile started before it exponentiates those of
// the present one. Queries and shifts are asked for before the first keys: behind a ring full of
// those they would come last. With `lse` queries and first keys are fetched into the L2 cache while
// the kernel ahead still runs.
//
// Without `lse` the blocks first measure the softmax of their units, wait for each other, and go
// over their tiles again from the last to the first: what the stages still hold is not loaded
// again, and the L2 cache has more of the rest. Tile f of a block always lies in stage f % stages.
//
// Reads every key once, or twice without `lse`; writes every score once. Units do not depend on the
// batch where measures do, and sums go over columns in order: the same bits in any batch.

#include "csrc/cuda/hopper_wide.cuh"

#include <cooperative_groups.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/fast_math.h>

#include "csrc/cuda/hopper_softmax.cuh"
#include "csrc/cuda/overlap.cuh"
#include "csrc/cuda/pool.cuh"

namespace claa::cuda::hopper::wide {
namespace {

constexpr int kGroups = 2;  // warpgroups that multiply
constexpr int kConsumers = kGroups * kWarpgroup;
constexpr int kThreads = kConsumers + kWarpgroup;  // whole warpgroups: they change their registers
constexpr int kMostColumns = 256;
constexpr int kMostHalo = 32;
constexpr int kMostTiles = 32;  // of a unit, with one sum per key
constexpr int kMostStages = 16;
constexpr int kTilesPrefetched = 2;

// kPlain: lse is given, averages need one sum for each key, and every column is a query.
template <class T_, int kDim_, int kColumns_, bool kPlain_>
struct Shape {
  using T = T_;
  static constexpr bool kPlain = kPlain_;
  static constexpr int kDim = kDim_;
  static constexpr int kColumns = kColumns_;  // of a warpgroup
  static constexpr int kRowTiles = kColumns / kTileRows;
  static constexpr int kAllColumns = kGroups * kColumns;
  static constexpr int kQueryBytes = kAllColumns * kDim * 2;
};

struct Params {
  WindowScores scores;
  Measure* measures;                // [batch * kv_heads, head_units, columns]; nullptr with `lse`
  int block_units, shorter_blocks;  // the blocks behind these have one unit more
  int unit_keys, head_units;
  int long_units;  // of all heads; behind them come the heads' last units, which may be short
  cutlass::FastDivmod head_long_units, kv_heads;
  int group, head_columns, slots;
  bool has_fillers;  // columns that are no queries
  int keys, context, halo;
  int sums_stride;
  int stages;
  float pool_factor;
};

struct Unit {
  int bg, b, g;
  int in_head;     // its number
  int first, end;  // keys whose scores it gives
  int low, high;   // with the halo
  int tiles;

  __device__ Unit(const Params& p, int index) {
    if (index < p.long_units) {
      p.head_long_units(bg, in_head, index);
    } else {
      bg = index - p.long_units;
      in_head = p.head_units - 1;
    }
    p.kv_heads(b, g, bg);
    first = in_head * p.unit_keys;
    end = min(first + p.unit_keys, p.keys);
    low = max(first - p.halo, 0);
    high = min(end + p.halo, p.keys);
    tiles = (high - low + kTileRows - 1) / kTileRows;
  }
};

// The sums of a head, of the columns of either warpgroup.
struct SplitSums {
  const float* sums;
  int other;  // floats from one to the other

  __device__ float operator[](int key) const { return sums[key] + sums[other + key]; }
};

// Calls use(sum, i) for every product that start(sum, i) starts, with the next one on its way.
// use(.., parity) knows whether i is odd.
template <int kSums, class Start, class Use>
__device__ void overlap(int n, Start start, Use use) {
  constexpr std::integral_constant<int, 0> is_even;
  constexpr std::integral_constant<int, 1> is_odd;
  float even[kSums], odd[kSums];
  start(even, 0);
  int i = 0;
#pragma unroll 1
  for (; i + 2 < n; i += 2) {
    start(odd, i + 1);
    finish_products<1>(even);
    use(even, i, is_even);
    start(even, i + 2);
    finish_products<1>(odd);
    use(odd, i + 1, is_odd);
  }
  if (i + 1 < n) {
    start(odd, i + 1);
    finish_products<1>(even);
    use(even, i, is_even);
    finish_products<0>(odd);
    use(odd, i + 1, is_odd);
  } else {
    finish_products<0>(even);
    use(even, i, is_even);
  }
}

template <class Shape>
__global__ __launch_bounds__(kThreads,
                             1) void wide_kernel(const __grid_constant__ CUtensorMap key_map,
                                                 const __grid_constant__ CUtensorMap query_map,
                                                 const __grid_constant__ Params p) {
  using T = typename Shape::T;
  constexpr int kDim = Shape::kDim, kColumns = Shape::kColumns, kAllColumns = Shape::kAllColumns;
  extern __shared__ __align__(kAlignment) char tiles[];
  const WindowAttention& a = p.scores.attention;
  const bool is_twice = !Shape::kPlain && p.measures;
  const int stages = p.stages, slots = Shape::kPlain ? 1 : p.slots;
  char* queries = tiles + stages * kTileBytes<kDim>;
  float* shifts = reinterpret_cast<float*>(queries + Shape::kQueryBytes);  // negative
  Measure* halves = reinterpret_cast<Measure*>(shifts + kAllColumns);      // of measures
  float* sums = reinterpret_cast<float*>(halves + kWarpgroup);  // [kGroups, slots, sums_stride]
  Barrier* barriers = reinterpret_cast<Barrier*>(sums + kGroups * slots * p.sums_stride);
  Barrier& queries_loaded = barriers[0];
  Ring<kTileBytes<kDim>> ring(tiles, barriers + 1, stages);

  const int thread = threadIdx.x, warp = warp_index(), lane = thread % kWarp;
  const bool is_producer = warp >= kConsumers / kWarp;
  const int block = int(blockIdx.x);
  const int first_unit = block * p.block_units + max(block - p.shorter_blocks, 0);
  const int end_unit = first_unit + p.block_units + (block >= p.shorter_blocks);
  const int held_columns = p.group * p.head_columns;
  const auto load_queries_of = [&](const Unit& unit) {
    queries_loaded.arrive_and_expect_tx(held_columns * kDim * int(sizeof(T)));
    load_queries<kDim, kAllColumns>(a, query_map, queries, queries_loaded, unit.b, unit.g * p.group,
                                    0);
  };
  const auto load_shifts = [&](const Unit& unit) {
    if (thread < kAllColumns)
      shifts[thread] = -column_of_lse<FastExp>(a, unit.b, unit.g, Column(a, thread)).x;
  };

  if (thread == kConsumers) {
    if (!is_twice) {
      const Unit unit(p, first_unit);
      prefetch_queries<kDim>(a, query_map, unit.b, unit.g * p.group, 0);
      for (int i = 0; i < min(kTilesPrefetched, unit.tiles); ++i)
        prefetch_keys<kDim>(a, key_map, unit.b, unit.g, unit.low + i * kTileRows);
    }
    queries_loaded.init(1);
    ring.init(kConsumers / kWarp);
  }
  wait_for_kernels_ahead();
  // Queries and shifts come before the first keys, which will keep the memory busy.
  if (thread == kConsumers) {
    load_queries_of(Unit(p, first_unit));
  } else if (!is_producer) {
    if (!is_twice) load_shifts(Unit(p, first_unit));
    // Columns that no query has, for TMA writes only those of the group; and heads of which a
    // warpgroup has no columns.
    const int rows = kAllColumns - held_columns;
    for (int i = thread; i < rows * kDim / 8; i += kConsumers) {
      const int row = held_columns + i * 8 / kDim, block = i / 8 % (kDim / kBlockItems);
      *reinterpret_cast<uint4*>(queries + (block * kAllColumns + row) * kRowBytes +
                                i % 8 * 16) = {};
    }
    cutlass::arch::fence_view_async_shared();  // wgmma reads through another proxy
    for (int i = thread; slots > 1 && i < kGroups * slots * p.sums_stride; i += kConsumers)
      sums[i] = 0.f;
  }
  begin<kThreads>(is_producer);
  int n_tiles = 0;  // only needed to go back
  for (int u = first_unit; is_twice && u < end_unit; ++u) n_tiles += Unit(p, u).tiles;

  using Place = typename Ring<kTileBytes<kDim>>::Place;
  Place place;  // of the next tile, or behind it on the way back

  if (is_producer) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    const bool is_loading = thread == kConsumers;
    const auto load = [&](const Unit& unit, int i, bool is_first) {
      load_keys<kDim, kTileRows>(a, key_map, ring.tile(place),
                                 ring.begin_load(place, is_first, kTileBytes<kDim>), unit.b, unit.g,
                                 unit.low + i * kTileRows);
    };
    int f = 0;
    if (is_loading) {
      for (int u = first_unit; u < end_unit; ++u) {
        const Unit unit(p, u);
        for (int i = 0; i < unit.tiles; ++i, ++f, ring.advance(place)) load(unit, i, f < stages);
      }
    }
    if (!is_twice) return;
    __syncwarp();  // a barrier wants whole warps
    cooperative_groups::this_grid().sync();
    if (!is_loading) return;
    for (int u = end_unit - 1; u >= first_unit; --u) {
      const Unit unit(p, u);
      for (int i = unit.tiles - 1; i >= 0; --i) {
        ring.retreat(place);
        if (--f < n_tiles - stages) load(unit, i, false);
      }
    }
    return;
  }

  cutlass::arch::warpgroup_reg_alloc<232>();
  const int group = warp / (kWarpgroup / kWarp);
  const float factor = a.scale * FastExp::kUnit;
  const char* group_queries = queries + group * kColumns * kRowBytes;

  int bg_of_queries = Unit(p, first_unit).bg;
  uint32_t queries_parity = 0;
  // When the threads that multiply have no more use of those before.
  const auto change_queries = [&](const Unit& unit) {
    if (unit.bg == bg_of_queries) return;
    bg_of_queries = unit.bg;
    queries_parity ^= 1;
    if (thread == 0) load_queries_of(unit);
  };
  const auto start_of = [&](const Unit& unit) {
    return Visibility::near(a.start.data ? a.start[unit.b] : 0);
  };

  if (is_twice) {
    constexpr int kRowTiles = Shape::kRowTiles;
    ThreadMeasures<kRowTiles> measures;
    int f = 0;
    for (int u = first_unit; u < end_unit; ++u) {
      const Unit unit(p, u);
      if (u == first_unit || unit.bg != bg_of_queries) {
        if (u != first_unit) sync_consumers<kConsumers>();
        change_queries(unit);
        queries_loaded.wait(queries_parity);
      }
      const int start = max(unit.first, start_of(unit)), causal = p.context;
      measures.clear();
      Place next = place;
      overlap<kTileRows / 2>(
          unit.tiles * kRowTiles,
          [&](auto& products, int i) {
            const int t = i % kRowTiles;
            if (t == 0) ring.wait(next);
            start_products<T, kDim, kTileRows>(products, group_queries + t * kTileRows * kRowBytes,
                                               kAllColumns, ring.tile(next), kTileRows);
            if (t == kRowTiles - 1) ring.advance(next);
          },
          [&](auto& products, int i, auto parity) {
            const int t = parity % kRowTiles, key = unit.low + i / kRowTiles * kTileRows;
            if (t == kRowTiles - 1) {
              if (f++ < n_tiles - stages) ring.free(place);
              ring.advance(place);
            }
            measures.add(
                t, products, factor, key >= start && key + kTileRows <= min(unit.end, causal + 1),
                start - key, [&](int row) {
                  return min(unit.end, causal + Column(a, group * kColumns + row).query + 1) - key;
                });
          });
      const int64_t part = int64_t(unit.bg) * p.head_units + unit.in_head;
      measures.store(p.measures + (part * kGroups + group) * kColumns, kColumns, factor);
    }
    cooperative_groups::this_grid().sync();
  }

  int bg_of_shifts = -1;
  const auto join_shifts = [&](const Unit& unit) {
    // Every column has as many threads as there are; each joins some of the parts.
    constexpr int kSegments = kConsumers / kAllColumns;
    const int parts = p.head_units, column = thread % kAllColumns, segment = thread / kAllColumns;
    const Measure* from = p.measures + int64_t(unit.bg) * parts * kAllColumns + column;
    Measure measure{kLowest, 0.f};
    constexpr int kBatch = 12;  // that are on their way together
#pragma unroll 1
    for (int first = segment; first < parts; first += kBatch * kSegments) {
      float2 batch[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int part = min(first + i * kSegments, parts - 1);
        batch[i] = __ldcg(reinterpret_cast<const float2*>(from + part * kAllColumns));
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (first + i * kSegments < parts) measure.join<FastExp>({batch[i].x, batch[i].y});
    }
    if constexpr (kSegments == 2) {
      if (segment == 1) halves[column] = measure;
      sync_consumers<kConsumers>();
      if (segment == 0) measure.join<FastExp>(halves[column]);
    }
    if (segment == 0)
      shifts[column] = -column_of_measure<FastExp>(a, unit.g, Column(a, column), measure).x;
  };

  const int first_column = group * kColumns, first_head = first_column / p.head_columns;
  float2 shift[kColumns / 8];  // of the columns that a thread has
  int index = is_twice ? end_unit - 1 : first_unit;
  for (int left = end_unit - first_unit; left > 0; --left, index += is_twice ? -1 : 1) {
    const Unit unit(p, index);
    if (unit.bg != bg_of_shifts) {
      change_queries(unit);
      if (is_twice) {
        join_shifts(unit);
      } else if (bg_of_shifts >= 0) {
        load_shifts(unit);
      }
      bg_of_shifts = unit.bg;
      sync_consumers<kConsumers>();
#pragma unroll
      for (int e = 0; e < kColumns / 8; ++e)
        shift[e] = reinterpret_cast<const float2*>(shifts + group * kColumns)[e * 4 + lane % 4];
      queries_loaded.wait(queries_parity);
    }
    const int start = start_of(unit);

    float* group_sums = sums + group * slots * p.sums_stride;
    // Of key r and r + 8 of a warp's 16.
    const auto store = [&](int slot, int tile, float low, float high) {
      // A lane hands over one of its keys and keeps the other; then the pairs meet.
      const bool is_odd = lane & 1;
      float mine = is_odd ? high : low;
      mine += __shfl_xor_sync(kFullMask, is_odd ? low : high, 1);
      mine += __shfl_xor_sync(kFullMask, mine, 2);
      const int key = tile * kTileRows + warp % 4 * 16 + lane / 4 + is_odd * 8;
      if (!(lane & 2)) group_sums[slot * p.sums_stride + key] = unit.low + key < start ? 0.f : mine;
    };
    const auto tile_of = [&](int n) { return is_twice ? unit.tiles - 1 - n : n; };
    Place next = place;
    const auto start_tile = [&](auto& x, int) {
      if (is_twice) ring.retreat(next);
      ring.wait(next);
      // From the first lane it is that of the whole warp, so the product is told by uniform
      // registers, and its steps follow each other closely.
      const int stage = __shfl_sync(kFullMask, lane == 0 ? next.stage : 0, 0);
      start_products<T, kDim, kColumns>(x, tiles + stage * kTileBytes<kDim>, kTileRows,
                                        group_queries, kAllColumns);
      if (!is_twice) ring.advance(next);
    };
    const auto end_tile = [&] {
      if (is_twice) ring.retreat(place);
      ring.free(place);
      if (!is_twice) ring.advance(place);
    };
    // The product of a column that is no query is 0, or NaN if the key is infinite; its shift makes
    // nothing of 0.
    const auto clear_fillers = [&](auto& x) {
      if constexpr (!Shape::kPlain) {
        if (!p.has_fillers) return;
#pragma unroll
        for (int z = 0; z < kColumns / 2; ++z)
          if ((z % 2 ? shift[z / 4].y : shift[z / 4].x) == -INFINITY) x[z] = 0.f;
      }
    };
    // The probability of two columns, for one key.
    const auto pair = [&](auto& x, int z) {
      return FastExp::exp(fmaf(x[z], factor, shift[z / 4].x)) +
             FastExp::exp(fmaf(x[z + 1], factor, shift[z / 4].y));
    };
    if (slots == 1) {
      overlap<kColumns / 2>(unit.tiles, start_tile, [&](auto& x, int n, auto) {
        end_tile();
        clear_fillers(x);
        float sum[4] = {};
#pragma unroll
        for (int z = 0; z < kColumns / 2; z += 2) sum[z / 2 % 4] += pair(x, z);
        store(0, tile_of(n), sum[0] + sum[2], sum[1] + sum[3]);
      });
    } else {
      overlap<kColumns / 2>(unit.tiles, start_tile, [&](auto& x, int n, auto) {
        end_tile();
        clear_fillers(x);
        int head = first_head, columns = first_column - first_head * p.head_columns;
        float low = 0.f, high = 0.f;
#pragma unroll
        for (int e = 0; e < kColumns / 8; ++e) {
          low += pair(x, e * 4);
          high += pair(x, e * 4 + 2);
          columns += 8;
          if (columns < p.head_columns && e + 1 < kColumns / 8) continue;
          if (head < slots) store(head, tile_of(n), low, high);
          low = high = 0.f;
          columns = 0;
          ++head;
        }
      });
    }
    sync_consumers<kConsumers>();

    const int known = min(unit.high, p.context) - unit.low;
    const int end = min(unit.end, p.context) - unit.low;
    const auto sums_of = [&](int slot) {
      return SplitSums{sums + slot * p.sums_stride, slots * p.sums_stride};
    };
    float* out = p.scores.out + int64_t(unit.bg) * (p.scores.pooled ? 1 : slots) * p.context;
    constexpr int kBatch = 2;  // of a thread's keys at a time
#pragma unroll 1
    for (int from = unit.first - unit.low + thread; from < end; from += kBatch * kConsumers) {
      float score[kBatch] = {};
#pragma unroll 1
      for (int slot = 0; slot < slots; ++slot) {
        float pooled[kBatch];
        pool_tokens<kConsumers>(pooled, sums_of(slot), from, known, p.halo,
                                Shape::kPlain ? PoolMode::avg : p.scores.pool_mode);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int at = from + i * kConsumers;
          if (!Shape::kPlain && !p.scores.pooled && at < end)
            out[int64_t(slot) * p.context + unit.low + at] = pooled[i];
          score[i] += pooled[i];
        }
      }
      if (!Shape::kPlain && !p.scores.pooled) continue;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = from + i * kConsumers;
        if (at >= end) break;
        if (Shape::kPlain || p.scores.pool_mode == PoolMode::avg) score[i] *= p.pool_factor;
        out[unit.low + at] = score[i];
        join_running(p.scores, unit.b, unit.low + at, score[i]);
      }
    }
    sync_consumers<kConsumers>();
  }
}

// Columns of a warpgroup.
int columns_of(const WindowAttention& a) { return a.group() * head_columns(a) <= 128 ? 64 : 128; }

// Fills the sizes, and says how many blocks and how much shared memory the kernel wants.
struct Plan {
  Params params;
  int columns;
  int64_t blocks, shared_bytes, measure_bytes;

  explicit Plan(const WindowScores& s) : columns(columns_of(s.attention)) {
    const WindowAttention& a = s.attention;
    const int dim = padded_dim(a), all_columns = kGroups * columns;
    const int64_t tile_bytes = kTileRows * dim * 2;
    const bool is_twice = !a.lse;
    const int64_t all = is_twice ? a.total : a.context();
    const int64_t heads = a.batch * a.kv_heads, planned = is_twice ? kPlannedHeads : heads;
    const int64_t most_blocks = device_attribute(cudaDevAttrMultiProcessorCount);

    // The size of units for which the busiest block has the fewest tiles; a unit costs one more.
    int64_t unit_tiles = 0, head_units = 0, least_cost = INT64_MAX;
    for (int64_t tiles = max(int64_t(2), kMostTiles / s.slots()); tiles >= 2; --tiles) {
      const int64_t keys = tiles * kTileRows - 2 * s.halo();
      const int64_t in_head = max(ceil_div(all, keys), int64_t(1));
      const int64_t last_tiles = ceil_div(all - (in_head - 1) * keys + s.halo(), kTileRows);
      const int64_t long_units = planned * (in_head - 1), units = planned * in_head;
      const int64_t cost = busiest_block(long_units, units, most_blocks, [&](auto n, auto n_last) {
        return n + (n - n_last) * tiles + n_last * last_tiles;
      });
      if (cost >= least_cost) continue;
      least_cost = cost;
      unit_tiles = tiles;
      head_units = in_head;
    }
    const int64_t unit_keys = unit_tiles * kTileRows - 2 * s.halo(), units = heads * head_units;
    blocks = min(units, most_blocks);
    measure_bytes = is_twice ? units * all_columns * int64_t(sizeof(Measure)) : 0;

    const int64_t sums_stride = unit_tiles * kTileRows;
    const int64_t floats = all_columns + 2 * kWarpgroup + kGroups * s.slots() * sums_stride;
    const int64_t fixed =
        all_columns * dim * 2 + floats * int64_t(sizeof(float)) + int64_t(sizeof(Barrier));
    const int64_t stage_bytes = tile_bytes + Ring<1>::kBarrierBytes;
    const int64_t room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    const int64_t stages = min((room - fixed) / stage_bytes, int64_t(kMostStages));
    shared_bytes = fixed + stages * stage_bytes;
    params = {.scores = s,
              .measures = is_twice ? static_cast<Measure*>(a.workspace) : nullptr,
              .block_units = int(units / blocks),
              .shorter_blocks = int(blocks - units % blocks),
              .unit_keys = int(unit_keys),
              .head_units = int(head_units),
              .long_units = int(units - heads),
              .head_long_units = cutlass::FastDivmod(int(max(head_units - 1, int64_t(1)))),
              .kv_heads = cutlass::FastDivmod(int(a.kv_heads)),
              .group = int(a.group()),
              .head_columns = head_columns(a),
              .slots = int(s.slots()),
              .has_fillers = a.group() * a.window != all_columns,
              .keys = int(all),
              .context = int(a.context()),
              .halo = int(s.halo()),
              .sums_stride = int(sums_stride),
              .stages = int(stages),
              .pool_factor = 1.f / float(2 * s.halo() + 1)};
  }

  bool is_plain() const {
    return !params.measures && !params.has_fillers && params.scores.pooled &&
           params.scores.pool_mode == PoolMode::avg;
  }
};

template <class Shape>
cudaError_t launch(const Plan& plan, cudaStream_t stream) {
  const WindowAttention& a = plan.params.scores.attention;
  CUtensorMap keys, queries;
  cudaError_t status = map_keys(a, kTileRows, &keys);
  if (status == cudaSuccess)
    status = map_queries(a, plan.params.group, plan.params.head_columns, &queries);
  if (status != cudaSuccess) return status;
  const auto kernel = wide_kernel<Shape>;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                int(plan.shared_bytes));
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attribute{.id = cudaLaunchAttributeCooperative, .val = {.cooperative = 1}};
  cudaLaunchConfig_t config{.gridDim = dim3(unsigned(plan.blocks)),
                            .blockDim = dim3(kThreads),
                            .dynamicSmemBytes = size_t(plan.shared_bytes),
                            .stream = stream,
                            .attrs = &attribute,
                            .numAttrs = plan.params.measures != nullptr};
  if (!plan.params.measures) let_overlap(config);  // replaces it
  return cudaLaunchKernelEx(&config, kernel, keys, queries, plan.params);
}

}  // namespace

bool takes(const WindowScores& s) {
  const WindowAttention& a = s.attention;
  return a.group() * head_columns(a) <= kMostColumns && s.halo() <= kMostHalo &&
         Plan(s).params.stages > 1;
}

int64_t workspace_bytes(const WindowScores& s) { return Plan(s).measure_bytes; }

cudaError_t run(const WindowScores& s, cudaStream_t stream) {
  const Plan plan(s);
  return with_shape(s.attention, [&](auto type, auto dim) {
    using T = decltype(type);
    const auto with_columns = [&](auto columns) {
      return plan.is_plain() ? launch<Shape<T, dim, columns, true>>(plan, stream)
                             : launch<Shape<T, dim, columns, false>>(plan, stream);
    };
    return plan.columns == 64 ? with_columns(std::integral_constant<int, 64>{})
                              : with_columns(std::integral_constant<int, 128>{});
  });
}

}  // namespace claa::cuda::hopper::wide
