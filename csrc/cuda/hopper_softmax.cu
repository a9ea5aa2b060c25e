// The measures of softmax.cu on Hopper, by TMA and wgmma.
//
// A unit is a chunk of keys, in tiles of 64, of one (prompt, key head) and up to 256 of its
// columns. Every block stays on its multiprocessor and has a run of units, in which one warp brings
// tile after tile into a ring of stages, and warpgroups, taking turns, measure them.
//
// Compute bound: a product and an exponential per logit.

#include "csrc/cuda/hopper_softmax.cuh"

namespace claa::cuda::hopper {
namespace {

constexpr int kGroups = 3;
constexpr int kConsumers = kGroups * kWarpgroup;
constexpr int kThreads = kConsumers + kWarp;
constexpr int kMostStages = 12;

struct Params {
  WindowAttention attention;
  Measure* measures;  // [batch * kv_heads, chunks * kGroups, columns]
  int chunk_tiles, chunks, units;
  int spans, span_columns;
  int columns;  // of a head group
  int stages;
  bool is_causal;
};

template <class T, int kDim, int kRowTiles>
__global__ __launch_bounds__(kThreads,
                             1) void measure_kernel(const __grid_constant__ CUtensorMap map,
                                                    const __grid_constant__ Params p) {
  extern __shared__ __align__(kAlignment) char shared[];
  const WindowAttention& a = p.attention;
  constexpr int kSpanRows = kRowTiles * kTileRows;
  char* queries = shared + p.stages * kTileBytes<kDim>;
  Ring<kTileBytes<kDim>> ring(
      shared, reinterpret_cast<Barrier*>(queries + kSpanRows * kDim * int(sizeof(T))), p.stages);
  const int warp = warp_index();
  const bool is_producer = warp == kConsumers / kWarp;
  if (is_producer && threadIdx.x % kWarp == 0) ring.init(kWarpgroup / kWarp);
  begin<kThreads>(is_producer);

  const int first_unit = int(int64_t(blockIdx.x) * p.units / gridDim.x);
  const int end_unit = int(int64_t(blockIdx.x + 1) * p.units / gridDim.x);
  const int total = int(a.total), chunk_keys = p.chunk_tiles * kTileRows;
  const auto tiles_of = [&](int unit) {
    return (min(total - unit % p.chunks * chunk_keys, chunk_keys) + kTileRows - 1) / kTileRows;
  };
  // Groups take the same tiles of a unit in any block: there may be empty ones behind the last.
  const auto turns_of = [](int tiles) { return (tiles + kGroups - 1) / kGroups * kGroups; };
  const int kv_heads = int(a.kv_heads);

  typename Ring<kTileBytes<kDim>>::Place at;
  if (is_producer) {
    if (threadIdx.x % kWarp != 0) return;
    int f = 0;
    for (int u = first_unit; u < end_unit; ++u) {
      const int bg = u / p.chunks / p.spans, key = u % p.chunks * chunk_keys;
      const int b = bg / kv_heads, g = bg % kv_heads, tiles = tiles_of(u), turns = turns_of(tiles);
      for (int i = 0; i < turns; ++i, ++f, ring.advance(at)) {
        const bool is_empty = i >= tiles;
        Barrier& loaded = ring.begin_load(at, f < p.stages, is_empty ? 0 : kTileBytes<kDim>);
        if (!is_empty)
          load_keys<kDim, kTileRows>(a, map, ring.tile(at), loaded, b, g, key + i * kTileRows);
      }
    }
    return;
  }

  const int group = warp / (kWarpgroup / kWarp);
  const float factor = a.scale * FastExp::kUnit;
  ThreadMeasures<kRowTiles> measures;
  int head_span = -1;
  for (int u = first_unit; u < end_unit; ++u) {
    const int span = u / p.chunks % p.spans, bg = u / p.chunks / p.spans;
    const int b = bg / kv_heads, g = bg % kv_heads;
    const int first_column = span * p.span_columns;
    if (u / p.chunks != head_span) {
      if (u != first_unit) sync_consumers<kConsumers>();
      head_span = u / p.chunks;
      const Rows<T> rows = query_rows<T>(a, b, g);
      store_rows<kDim, kConsumers>(queries, kSpanRows, int(a.dim), threadIdx.x, [&](int row) {
        return rows.first + Column(a, first_column + row).query_offset(a);
      });
      sync_consumers<kConsumers>();
    }
    const int chunk = u % p.chunks, end = min((chunk + 1) * chunk_keys, total);
    const int start = Visibility::near(a.start.data ? a.start[b] : 0);
    const int causal = p.is_causal ? int(a.context()) : total - 1;
    measures.clear();
    const int tiles = tiles_of(u), turns = turns_of(tiles);
    for (int i = 0; i < turns; ++i, ring.advance(at)) {
      if (i % kGroups != group) continue;
      ring.wait(at);
      const int key = chunk * chunk_keys + i * kTileRows;
      if (i < tiles)
        measures.template add<T, kDim>(
            ring.tile(at), queries, kSpanRows, factor,
            key >= start && key + kTileRows <= min(end, causal + 1), start - key, [&](int row) {
              const int query = p.is_causal ? Column(a, first_column + row).query : 0;
              return min(end, causal + query + 1) - key;
            });
      ring.free(at);
    }
    measures.store(p.measures + ((int64_t(bg) * p.chunks + chunk) * kGroups + group) * p.columns +
                       first_column,
                   min(p.span_columns, p.columns - first_column), factor);
  }
}

Params plan(const WindowAttention& a) {
  const int64_t columns = group_columns(a), span_columns = columns <= 64 ? 64 : 256;
  const int64_t spans = ceil_div(columns, span_columns);
  const int64_t blocks = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t all = ceil_div(a.total, kTileRows);
  // The chunk for which the busiest block has the fewest tiles.
  int64_t chunk_tiles = kGroups, least_cost = INT64_MAX;
  for (int64_t tiles = kGroups; tiles <= 64; tiles += kGroups) {
    const int64_t units = ceil_div(all, tiles) * kPlannedHeads * spans;
    const int64_t cost = ceil_div(units, blocks) * (tiles + 1);
    if (cost > least_cost) continue;
    least_cost = cost;
    chunk_tiles = tiles;
  }
  const int64_t chunks = ceil_div(all, chunk_tiles);
  return {.attention = a,
          .measures = nullptr,
          .chunk_tiles = int(chunk_tiles),
          .chunks = int(chunks),
          .units = int(a.batch * a.kv_heads * spans * chunks),
          .spans = int(spans),
          .span_columns = int(span_columns),
          .columns = int(columns),
          .stages = 0,
          .is_causal = false};
}

template <class T, int kDim, int kRowTiles>
cudaError_t launch(Params p, cudaStream_t stream) {
  CUtensorMap map;
  cudaError_t status = map_keys(p.attention, kTileRows, &map);
  if (status != cudaSuccess) return status;
  const int64_t fixed = kRowTiles * kTileBytes<kDim>;
  const int64_t stage = kTileBytes<kDim> + Ring<kTileBytes<kDim>>::kBarrierBytes;
  const int64_t room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - fixed;
  p.stages = int(min(room / stage, int64_t(kMostStages)) / kGroups * kGroups);
  const int blocks = min(p.units, device_attribute(cudaDevAttrMultiProcessorCount));
  return launch_kernel(measure_kernel<T, kDim, kRowTiles>, blocks, kThreads,
                       fixed + p.stages * stage, stream, map, p);
}

}  // namespace

bool measures(const WindowAttention& a) {
  return a.softcap == 0.f && !a.sliding_window && a.scale > 0.f && device_fits() && keys_fit(a) &&
         queries_are_aligned(a);
}

int64_t measure_parts(const WindowAttention& a) { return int64_t(plan(a).chunks) * kGroups; }

cudaError_t run_measures(const WindowAttention& a, bool is_causal, Measure* measures,
                         cudaStream_t stream) {
  Params p = plan(a);
  p.measures = measures;
  p.is_causal = is_causal;
  return with_shape(a, [&](auto type, auto dim) {
    using T = decltype(type);
    return p.span_columns == 64 ? launch<T, dim, 1>(p, stream) : launch<T, dim, 4>(p, stream);
  });
}

}  // namespace claa::cuda::hopper
