// Window scores on Hopper: the same engine as window_attention.cu, by TMA and wgmma.
//
// A unit is a range of keys of one (prompt, key head) with a halo of half a pooling kernel on each
// side, in tiles of 64 keys. Every block stays on its multiprocessor and has a run of units, in
// which one warp brings tile after tile into a ring of stages, as far ahead as there is room, and
// warpgroups, taking turns, multiply them by all columns. Keys are the rows of the product, so a
// thread sums over columns in its registers; sums of a unit go to shared memory, where they are
// pooled.
//
// Without `lse` the blocks first measure the softmax of their units, wait for each other, and go
// over their tiles again from the last to the first: what the stages still hold is not loaded
// again, and the L2 cache has more of the rest. Tile f of a block always lies in stage f % stages.
//
// Reads every key once, or twice without `lse`; writes every score once. Units do not depend on the
// batch where measures do, and sums go over columns in order: the same bits in any batch.

#include <cooperative_groups.h>

#include "csrc/cuda/hopper_narrow.cuh"
#include "csrc/cuda/hopper_softmax.cuh"
#include "csrc/cuda/pool.cuh"
#include "csrc/cuda/window_attention.cuh"

namespace claa::cuda::hopper {
namespace {

constexpr int kMostColumns = 256;
constexpr int kMostHalo = 32;
constexpr int kMostTiles = 32;  // of a unit, with one sum per key
constexpr int kMostStages = 16;

// Warpgroups of a block that multiply: where columns are many, they share the queries, and have the
// multiprocessor to themselves.
constexpr int groups_of(int dim, int columns) { return columns < 128 ? 1 : dim < 256 ? 3 : 2; }

template <class T_, int kDim_, int kColumns_>
struct Shape {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr int kColumns = kColumns_;  // of one product
  static constexpr int kGroups = groups_of(kDim, kColumns);
  static constexpr int kBlocks = kGroups == 1 ? 2 : 1;
  static constexpr int kConsumers = kGroups * kWarpgroup;
  static constexpr int kThreads = kConsumers + kWarp;
  static constexpr int kRowTiles = kColumns == 128 ? kMostColumns / kTileRows : 1;
};

struct Params {
  WindowScores scores;
  Measure* measures;  // [batch * kv_heads, head_units, groups, columns]; nullptr with `lse`
  int unit_tiles, unit_keys, head_units, units;
  int columns;     // a multiple of those of a product
  int query_rows;  // in shared memory
  int sums;        // floats in shared memory
  int sums_stride;
  int stages;
};

template <class Shape>
struct Unit {
  int bg, b, g;
  int first, end;  // keys whose scores it gives
  int low, high;   // with the halo
  int loads;       // tiles
  int tiles;       // a multiple of the groups, so that they take the same ones in any block

  __device__ Unit(const Params& p, int index) {
    const WindowAttention& a = p.scores.attention;
    const int all = int(p.measures ? a.total : a.context()), halo = int(p.scores.halo());
    bg = index / p.head_units;
    b = bg / int(a.kv_heads);
    g = bg - b * int(a.kv_heads);
    first = (index - bg * p.head_units) * p.unit_keys;
    end = min(first + p.unit_keys, all);
    low = max(first - halo, 0);
    high = min(end + halo, all);
    loads = (high - low + kTileRows - 1) / kTileRows;
    tiles = int(round_up(loads, Shape::kGroups));
  }
};

template <class Shape>
__global__ __launch_bounds__(Shape::kThreads, Shape::kBlocks) void score_kernel(
    const __grid_constant__ CUtensorMap map, const __grid_constant__ Params p) {
  using T = typename Shape::T;
  constexpr int kDim = Shape::kDim, kColumns = Shape::kColumns, kGroups = Shape::kGroups;
  constexpr int kConsumers = Shape::kConsumers;
  extern __shared__ __align__(kAlignment) char tiles[];
  const WindowAttention& a = p.scores.attention;
  const bool is_twice = p.measures;
  const int stages = p.stages;
  char* queries = tiles + stages * kTileBytes<kDim>;
  float* sums = reinterpret_cast<float*>(queries + p.query_rows * kDim * int(sizeof(T)));
  float* shifts = sums + p.sums;  // negative, in the order in which threads want them
  Ring<kTileBytes<kDim>> ring(tiles, reinterpret_cast<Barrier*>(shifts + p.columns), stages);

  const int warp = warp_index(), lane = threadIdx.x % kWarp;
  const bool is_producer = warp == kConsumers / kWarp;
  if (is_producer && lane == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&map));
    ring.init(kWarpgroup / kWarp);
  }
  begin<Shape::kThreads>(is_producer);

  const int first_unit = int(int64_t(blockIdx.x) * p.units / gridDim.x);
  const int end_unit = int(int64_t(blockIdx.x + 1) * p.units / gridDim.x);
  int n_tiles = 0;  // only needed to go back
  for (int u = first_unit; is_twice && u < end_unit; ++u) n_tiles += Unit<Shape>(p, u).tiles;

  typename Ring<kTileBytes<kDim>>::Place place;  // of the next tile, or behind it on the way back
  const auto load = [&](const Unit<Shape>& unit, int i, bool is_first) {
    const bool is_empty = i >= unit.loads;
    Barrier& loaded = ring.begin_load(place, is_first, is_empty ? 0 : kTileBytes<kDim>);
    if (!is_empty)
      load_keys<kDim, kTileRows>(a, map, ring.tile(place), loaded, unit.b, unit.g,
                                 unit.low + i * kTileRows);
  };
  const int thread = threadIdx.x, group = warp / (kWarpgroup / kWarp);
  const float factor = a.scale * FastExp::kUnit;

  int bg_of_queries = -1;
  const auto load_queries = [&](const Unit<Shape>& unit) {
    if (unit.bg == bg_of_queries) return;
    bg_of_queries = unit.bg;
    const Rows<T> rows = query_rows<T>(a, unit.b, unit.g);
    store_rows<kDim, kConsumers>(queries, p.query_rows, int(a.dim), thread, [&](int column) {
      return rows.first + Column(a, column).query_offset(a);
    });
  };
  const auto start_of = [&](const Unit<Shape>& unit) {
    return Visibility::near(a.start.data ? a.start[unit.b] : 0);
  };

  if (is_twice) {
    if (is_producer) {
      if (lane == 0) {
        int f = 0;
        for (int u = first_unit; u < end_unit; ++u) {
          const Unit<Shape> unit(p, u);
          for (int i = 0; i < unit.tiles; ++i, ++f, ring.advance(place)) load(unit, i, f < stages);
        }
      }
    } else {
      ThreadMeasures<Shape::kRowTiles> measures;
      int f = 0;
      for (int u = first_unit; u < end_unit; ++u) {
        const Unit<Shape> unit(p, u);
        if (u != first_unit && unit.bg != bg_of_queries) sync_consumers<kConsumers>();
        if (unit.bg != bg_of_queries) {
          load_queries(unit);
          sync_consumers<kConsumers>();
        }
        const int start = max(unit.first, start_of(unit));
        measures.clear();
        for (int i = 0; i < unit.tiles; ++i, ++f, ring.advance(place)) {
          if (i % kGroups != group) continue;
          ring.wait(place);
          const int key = unit.low + i * kTileRows, causal = int(a.context());
          if (i < unit.loads)
            measures.template add<T, kDim>(
                ring.tile(place), queries, p.query_rows, factor,
                key >= start && key + kTileRows <= min(unit.end, causal + 1), start - key,
                [&](int row) { return min(unit.end, causal + Column(a, row).query + 1) - key; });
          if (f < n_tiles - stages) ring.free(place);
        }
        measures.store(p.measures + (int64_t(u) * kGroups + group) * p.columns, p.columns, factor);
      }
    }
    cooperative_groups::this_grid().sync();
  }

  if (is_producer) {
    if (lane != 0) return;
    int f = is_twice ? n_tiles : 0;
    for (int j = first_unit; j < end_unit; ++j) {
      const Unit<Shape> unit(p, is_twice ? first_unit + end_unit - 1 - j : j);
      for (int i = 0; i < unit.tiles; ++i) {
        if (!is_twice) {
          load(unit, i, f < stages);
          ring.advance(place);
          ++f;
        } else {
          ring.retreat(place);
          if (--f < n_tiles - stages) load(unit, unit.tiles - 1 - i, false);
        }
      }
    }
    return;
  }

  int bg_of_shifts = -1;
  // Where the shift of a column lies: a thread reads those of 2c, 2c + 1, 2c + 8 and 2c + 9 of 16
  // columns at once.
  const auto place_of = [](int column) {
    return column / 16 * 16 + column % 8 / 2 * 4 + column / 8 % 2 * 2 + column % 2;
  };
  const auto join_shifts = [&](const Unit<Shape>& unit) {
    if (unit.bg == bg_of_shifts) return;
    bg_of_shifts = unit.bg;
    // Every column has as many threads as there are; each joins some of the parts.
    const int parts = p.head_units * kGroups, segments = kConsumers / p.columns;
    const int column = thread % p.columns, segment = thread / p.columns;
    const Measure* from = p.measures + int64_t(unit.bg) * parts * p.columns + column;
    Measure measure{kLowest, 0.f};
    constexpr int kBatch = 12;  // that are on their way together
#pragma unroll 1
    for (int first = segment; first < parts && segment < segments; first += kBatch * segments) {
      float2 batch[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int part = min(first + i * segments, parts - 1);
        batch[i] = __ldcg(reinterpret_cast<const float2*>(from + part * p.columns));
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (first + i * segments < parts) measure.join<FastExp>({batch[i].x, batch[i].y});
    }
    Measure* of_thread = reinterpret_cast<Measure*>(sums);
    of_thread[thread] = measure;
    sync_consumers<kConsumers>();
    if (segment == 0) {
#pragma unroll 1
      for (int i = 1; i < segments; ++i) measure.join<FastExp>(of_thread[i * p.columns + column]);
      const Column at(a, column);
      shifts[place_of(column)] = -column_of_measure<FastExp>(a, unit.g, at, measure).x;
    }
  };

  const int slots = int(p.scores.slots()), chunks = p.columns / kColumns;
  const int head_eights = head_columns(a) / kHeadAlign;
  for (int j = first_unit; j < end_unit; ++j) {
    const Unit<Shape> unit(p, is_twice ? first_unit + end_unit - 1 - j : j);
    if (unit.bg != bg_of_queries || unit.bg != bg_of_shifts) {
      if (is_twice) {
        load_queries(unit);
        join_shifts(unit);
      } else {
        // The shift is on its way while the queries are loaded.
        float shift = 0.f;
        if (thread < p.columns)
          shift = -column_of_lse<FastExp>(a, unit.b, unit.g, Column(a, thread)).x;
        load_queries(unit);
        bg_of_shifts = unit.bg;
        if (thread < p.columns) shifts[place_of(thread)] = shift;
      }
      sync_consumers<kConsumers>();
    }
    const int start = start_of(unit);

    float sum[2] = {};  // of keys r and r + 8 of a warp's 16
    const auto store = [&](int slot, int i) {
      // A lane hands over one of its keys and keeps the other; then the pairs meet.
      const bool is_odd = lane & 1;
      float mine = is_odd ? sum[1] : sum[0];
      mine += __shfl_xor_sync(kFullMask, is_odd ? sum[0] : sum[1], 1);
      mine += __shfl_xor_sync(kFullMask, mine, 2);
      const int key = i * kTileRows + warp % 4 * 16 + lane / 4 + is_odd * 8;
      if (!(lane & 2)) sums[slot * p.sums_stride + key] = unit.low + key < start ? 0.f : mine;
    };
    const auto go_on = [&] {
      if (!is_twice) ring.advance(place);
    };
    for (int n = 0; n < unit.tiles; ++n, go_on()) {
      if (is_twice) ring.retreat(place);
      const int i = is_twice ? unit.tiles - 1 - n : n;
      if (i % kGroups != group) continue;
      ring.wait(place);
      if (i >= unit.loads) {
        ring.free(place);
        continue;
      }
      int head = 0, eights = 0;  // of the columns so far
      for (int chunk = 0; chunk < chunks; ++chunk) {
        float x[kColumns / 2];
        multiply<T, kDim, kColumns>(x, ring.tile(place), kTileRows,
                                    queries + chunk * kColumns * kRowBytes, p.query_rows);
        if (chunk + 1 == chunks) ring.free(place);
        const float4* shift = reinterpret_cast<const float4*>(shifts) + chunk * kColumns / 4;
        // Sums of 8 columns, which are one head's: at x[4e] of key r, at x[4e + 2] of key r + 8.
#pragma unroll
        for (int e = 0; e < kColumns / 8; ++e) {
          const float4 four = shift[e / 2 * 4 + lane % 4];
          const float low = e % 2 ? four.z : four.x, high = e % 2 ? four.w : four.y;
#pragma unroll
          for (int z = e * 4; z < e * 4 + 4; z += 2)
            x[z] =
                FastExp::exp(fmaf(x[z], factor, low)) + FastExp::exp(fmaf(x[z + 1], factor, high));
        }
        if (slots == 1) {
#pragma unroll
          for (int z = 0; z < kColumns / 2; z += 2) sum[z / 2 % 2] += x[z];
          continue;
        }
#pragma unroll
        for (int e = 0; e < kColumns / 8; ++e) {
          sum[0] += x[e * 4];
          sum[1] += x[e * 4 + 2];
          if (++eights < head_eights) continue;
          if (head < slots) store(head, i);
          sum[0] = sum[1] = 0.f;
          ++head;
          eights = 0;
        }
      }
      if (slots == 1) store(0, i);
      sum[0] = sum[1] = 0.f;
    }
    sync_consumers<kConsumers>();

    const int64_t context = a.context();
    const int known = min(unit.high, int(context)) - unit.low;
    const int end = min(unit.end, int(context)) - unit.low;
#pragma unroll 1
    for (int at = unit.first - unit.low + thread; at < end; at += kConsumers) {
      const int64_t to = unit.low + at;
      if (!p.scores.pooled) {
#pragma unroll 1
        for (int slot = 0; slot < slots; ++slot)
          p.scores.out[(int64_t(unit.bg) * slots + slot) * context + to] =
              sums[slot * p.sums_stride + at];
        continue;
      }
      float score = 0.f;
#pragma unroll 1
      for (int slot = 0; slot < slots; ++slot)
        score += pool_token(sums + slot * p.sums_stride, at, 0, known, int(p.scores.kernel_size),
                            p.scores.mode);
      p.scores.out[unit.bg * context + to] = score;
      join_running(p.scores, unit.b, to, score);
    }
    sync_consumers<kConsumers>();
  }
}

int columns_of(const WindowAttention& a) {
  const int64_t columns = a.group() * head_columns(a);
  return int(columns <= 32 ? 32 : columns <= 64 ? 64 : round_up(columns, 128));
}

// Fills the sizes, and says how many blocks and how much shared memory the kernel wants.
struct Plan {
  Params params;
  int64_t blocks, shared_bytes, measure_bytes;

  explicit Plan(const WindowScores& s) {
    const WindowAttention& a = s.attention;
    const int dim = padded_dim(a), columns = columns_of(a);
    const int64_t tile_bytes = kTileRows * dim * 2, groups = groups_of(dim, columns);
    const bool is_twice = !a.lse;
    const int64_t all = is_twice ? a.total : a.context();
    const int64_t heads = a.batch * a.kv_heads, planned = is_twice ? kPlannedHeads : heads;
    const int64_t most_blocks =
        device_attribute(cudaDevAttrMultiProcessorCount) * (groups == 1 ? 2 : 1);

    // The size of units for which the busiest block has the fewest tiles.
    const int64_t least = round_up(s.halo() ? 2 : 1, groups);
    const int64_t most = max(least, kMostTiles / s.slots());
    int64_t unit_tiles = least, least_cost = INT64_MAX;
    for (int64_t tiles = least; tiles <= most; tiles += groups) {
      const int64_t units = ceil_div(all, tiles * kTileRows - 2 * s.halo()) * planned;
      const int64_t cost = ceil_div(units, most_blocks) * (tiles + 1);
      if (cost > least_cost) continue;
      least_cost = cost;
      unit_tiles = tiles;
    }
    const int64_t unit_keys = unit_tiles * kTileRows - 2 * s.halo();
    const int64_t head_units = ceil_div(all, unit_keys), units = heads * head_units;
    blocks = min(units, most_blocks);
    measure_bytes = is_twice ? units * groups * columns * int64_t(sizeof(Measure)) : 0;

    const int64_t query_rows = is_twice ? max(columns, kTileRows) : columns;
    const int64_t sums_stride = unit_tiles * kTileRows;
    const int64_t sums = max(s.slots() * sums_stride, 2 * groups * kWarpgroup);
    const int64_t fixed =
        query_rows * tile_bytes / kTileRows + (sums + columns) * int64_t(sizeof(float));
    const int64_t stage_bytes = tile_bytes + Ring<1>::kBarrierBytes;
    const int64_t room = groups > 1
                             ? device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)
                             : device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 -
                                   device_attribute(cudaDevAttrReservedSharedMemoryPerBlock);
    // A stage must always have tiles of the same group.
    const int64_t stages =
        min((room - fixed) / stage_bytes, int64_t(kMostStages)) / groups * groups;
    shared_bytes = fixed + stages * stage_bytes;
    params = {.scores = s,
              .measures = is_twice ? static_cast<Measure*>(a.workspace) : nullptr,
              .unit_tiles = int(unit_tiles),
              .unit_keys = int(unit_keys),
              .head_units = int(head_units),
              .units = int(units),
              .columns = columns,
              .query_rows = int(query_rows),
              .sums = int(sums),
              .sums_stride = int(sums_stride),
              .stages = int(stages)};
  }
};

template <class Shape>
cudaError_t launch(const Plan& plan, cudaStream_t stream) {
  CUtensorMap map;
  const cudaError_t status = map_keys(plan.params.scores.attention, kTileRows, &map);
  if (status != cudaSuccess) return status;
  return launch_kernel(score_kernel<Shape>, plan.blocks, Shape::kThreads, plan.shared_bytes,
                       plan.params.measures != nullptr, stream, map, plan.params);
}

}  // namespace

bool takes(const WindowScores& s) {
  const WindowAttention& a = s.attention;
  if (!device_fits() || !keys_fit(a) || !queries_are_aligned(a)) return false;
  if (a.softcap != 0.f || a.sliding_window || !(a.scale > 0.f)) return false;
  if (narrow::takes(s)) return true;
  if (columns_of(a) > kMostColumns || s.halo() > kMostHalo) return false;
  return Plan(s).params.stages > 0;
}

int64_t workspace_bytes(const WindowScores& s) {
  return narrow::takes(s) ? narrow::workspace_bytes(s) : Plan(s).measure_bytes;
}

cudaError_t run(const WindowScores& s, cudaStream_t stream) {
  if (narrow::takes(s)) return narrow::run(s, stream);
  const Plan plan(s);
  return with_shape(s.attention, [&](auto type, auto dim) {
    using T = decltype(type);
    switch (plan.params.columns) {
      case 32: return launch<Shape<T, dim, 32>>(plan, stream);
      case 64: return launch<Shape<T, dim, 64>>(plan, stream);
      default: return launch<Shape<T, dim, 128>>(plan, stream);
    }
  });
}

}  // namespace claa::cuda::hopper
