// The softmax partials of softmax.cu on Hopper, by TMA and wgmma.
//
// A work item is a chunk of keys, in tiles of 64, of one (prompt, key head), and a span: up to 256
// of its query rows. Every block stays on its multiprocessor and has a run of items, in which one
// warp brings tile after tile into a ring of stages, and warpgroups, taking turns, multiply them.
//
// Compute bound: a product and an exponential per logit.

#include "csrc/cuda/hopper/launch.cuh"
#include "csrc/cuda/hopper/schedule.cuh"
#include "csrc/cuda/hopper/softmax_partials.cuh"
#include "csrc/cuda/hopper/tma.cuh"

namespace claa::cuda::hopper {
namespace {

constexpr int kWarpgroups = 3;  // that multiply
constexpr int kConsumers = kWarpgroups * kWarpgroup;
constexpr int kThreads = kConsumers + kWarp;
constexpr int kMostStages = 12;

struct Params {
  WindowAttention attention;
  SoftmaxPartial* partials;  // [batch * kv_heads, chunks * kWarpgroups, rows]
  int chunk_tiles, chunks, items;
  int spans, span_rows;
  int rows;  // query rows of a group
  int stages;
  bool is_causal;
};

struct WorkItem {
  int chunk, span, bg, b, g;
  int head_span;  // the same in items that share their queries
  int tiles;
  int turns;  // tiles and empty ones: warpgroups take the same tiles of an item in any block

  __device__ __forceinline__ WorkItem(const Params& p, int index) {
    const int kv_heads = int(p.attention.kv_heads);
    chunk = index % p.chunks;
    head_span = index / p.chunks;
    span = head_span % p.spans;
    bg = head_span / p.spans;
    b = bg / kv_heads;
    g = bg % kv_heads;
    const int keys = min(int(p.attention.total) - first_key(p), p.chunk_tiles * kTileRows);
    tiles = (keys + kTileRows - 1) / kTileRows;
    turns = (tiles + kWarpgroups - 1) / kWarpgroups * kWarpgroups;
  }

  __device__ __forceinline__ int first_key(const Params& p) const {
    return chunk * p.chunk_tiles * kTileRows;
  }
};

template <class T, int kDim, int kRowTiles>
struct Consumer {
  using Tiles = Ring<kTileBytes<kDim>>;
  static constexpr int kSpanRows = kRowTiles * kTileRows;
  const Params& p;
  char* queries;
  int warpgroup;
  float scale_log2;

  // The queries of an item's span, by all threads that multiply.
  __device__ __forceinline__ void load_queries(const WorkItem& item) const {
    const WindowAttention& a = p.attention;
    const Rows<T> rows = query_rows<T>(a, item.b, item.g);
    store_rows<kDim, kConsumers>(queries, kSpanRows, int(a.dim), threadIdx.x, [&](int row) {
      return rows.first + QueryRow(a, item.span * p.span_rows + row).offset(a);
    });
  }

  // Takes in the warpgroup's tiles of an item.
  __device__ __forceinline__ void add_item(PartialsOfRows<kRowTiles>& partials, Tiles& ring,
                                           PipelineState& state, const WorkItem& item) const {
    const WindowAttention& a = p.attention;
    const int end = min(item.first_key(p) + p.chunk_tiles * kTileRows, int(a.total));
    const int start = Visibility::near(a.start.data ? a.start[item.b] : 0);
    const int context = p.is_causal ? int(a.context()) : int(a.total) - 1;
    for (int i = 0; i < item.turns; ++i, ring.advance(state)) {
      if (i % kWarpgroups != warpgroup) continue;
      ring.wait(state);
      if (i < item.tiles) {
        const int key = item.first_key(p) + i * kTileRows;
        const bool all_see = key >= start && key + kTileRows <= min(end, context + 1);
        const auto to = [&](int row) {
          const int query = p.is_causal ? QueryRow(a, item.span * p.span_rows + row).query : 0;
          return min(end, context + query + 1) - key;
        };
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          // Query rows by keys: lane 4r + c of warp w has of row 16w + r keys 8j + 2c and 8j + 2c +
          // 1 at x[4j] and x[4j + 1], of row 16w + r + 8 the same keys at x[4j + 2] and x[4j + 3].
          float x[kTileRows / 2];
          multiply<T, kDim, kTileRows>(x, queries + t * kTileRows * kRowBytes, kSpanRows,
                                       ring.tile(state), kTileRows);
          partials.add(t, x, scale_log2, all_see, start - key, to);
        }
      }
      ring.free(state);
    }
  }
};

template <class T, int kDim, int kRowTiles>
__global__ __launch_bounds__(kThreads, 1) void partials_kernel(
    const __grid_constant__ CUtensorMap map, const __grid_constant__ Params p) {
  extern __shared__ __align__(kAlignment) char shared[];
  constexpr int kSpanRows = kRowTiles * kTileRows;

  // ---- setup
  char* queries = shared + p.stages * kTileBytes<kDim>;
  Ring<kTileBytes<kDim>> ring(
      shared, reinterpret_cast<Barrier*>(queries + kSpanRows * kDim * int(sizeof(T))), p.stages);
  const int warp = warp_index();
  const bool is_producer = warp == kConsumers / kWarp;
  if (is_producer && threadIdx.x % kWarp == 0) ring.init(kWarpgroup / kWarp);
  finish_setup<kThreads>(is_producer);
  const int first_item = int(int64_t(blockIdx.x) * p.items / gridDim.x);
  const int end_item = int(int64_t(blockIdx.x + 1) * p.items / gridDim.x);
  PipelineState state;

  // ---- producer
  if (is_producer) {
    if (threadIdx.x % kWarp != 0) return;
    int f = 0;
    for (int index = first_item; index < end_item; ++index) {
      const WorkItem item(p, index);
      for (int i = 0; i < item.turns; ++i, ++f, ring.advance(state)) {
        const bool has_keys = i < item.tiles;
        Barrier& full = ring.begin_load(state, f < p.stages, has_keys ? kTileBytes<kDim> : 0);
        if (has_keys)
          load_keys<kDim, kTileRows>(p.attention, map, ring.tile(state), full, item.b, item.g,
                                     item.first_key(p) + i * kTileRows);
      }
    }
    return;
  }

  // ---- consumers
  const Consumer<T, kDim, kRowTiles> consumer{p, queries, warp / (kWarpgroup / kWarp),
                                              p.attention.scale * FastExp::kUnit};
  PartialsOfRows<kRowTiles> partials;
  int head_span = -1;
  for (int index = first_item; index < end_item; ++index) {
    const WorkItem item(p, index);
    if (item.head_span != head_span) {
      if (index != first_item) sync_consumers<kConsumers>();
      head_span = item.head_span;
      consumer.load_queries(item);
      sync_consumers<kConsumers>();
    }
    partials.clear();
    consumer.add_item(partials, ring, state, item);
    const int64_t part = (int64_t(item.bg) * p.chunks + item.chunk) * kWarpgroups;
    const int first_row = item.span * p.span_rows;
    partials.store(p.partials + (part + consumer.warpgroup) * p.rows + first_row,
                   min(p.span_rows, p.rows - first_row), consumer.scale_log2);
  }
}

Params plan(const WindowAttention& a) {
  const int64_t rows = group_rows(a), span_rows = rows <= 64 ? 64 : 256;
  const int64_t spans = ceil_div(rows, span_rows);
  const int64_t blocks = multiprocessors(), all_tiles = ceil_div(a.total, kTileRows);
  // The chunk for which the most loaded block has the fewest tiles.
  int64_t chunk_tiles = kWarpgroups, least_cost = INT64_MAX;
  for (int64_t tiles = kWarpgroups; tiles <= 64; tiles += kWarpgroups) {
    const int64_t items = ceil_div(all_tiles, tiles) * kPlannedHeads * spans;
    const int64_t cost = ceil_div(items, blocks) * (tiles + 1);
    if (cost > least_cost) continue;
    least_cost = cost;
    chunk_tiles = tiles;
  }
  const int64_t chunks = ceil_div(all_tiles, chunk_tiles);
  return {.attention = a,
          .partials = nullptr,
          .chunk_tiles = int(chunk_tiles),
          .chunks = int(chunks),
          .items = int(a.batch * a.kv_heads * spans * chunks),
          .spans = int(spans),
          .span_rows = int(span_rows),
          .rows = int(rows),
          .stages = 0,
          .is_causal = false};
}

template <class T, int kDim, int kRowTiles>
cudaError_t launch(Params p, cudaStream_t stream) {
  CUtensorMap map;
  const cudaError_t status = map_keys(p.attention, kTileRows, &map);
  if (status != cudaSuccess) return status;
  const int64_t query_bytes = kRowTiles * kTileBytes<kDim>;
  const int64_t stage_bytes = kTileBytes<kDim> + Ring<kTileBytes<kDim>>::kBarrierBytes;
  const int64_t room = most_shared_bytes() - query_bytes;
  p.stages = int(min(room / stage_bytes, int64_t(kMostStages)) / kWarpgroups * kWarpgroups);
  return launch_kernel(partials_kernel<T, kDim, kRowTiles>,
                       {.blocks = min(p.items, multiprocessors()),
                        .threads = kThreads,
                        .shared_bytes = query_bytes + p.stages * stage_bytes},
                       stream, map, p);
}

}  // namespace

bool takes_softmax(const WindowAttention& a) {
  return a.softcap == 0.f && !a.sliding_window && a.scale > 0.f && device_fits() && keys_fit(a) &&
         queries_are_aligned(a);
}

int64_t softmax_parts(const WindowAttention& a) { return int64_t(plan(a).chunks) * kWarpgroups; }

cudaError_t run_softmax_partials(const WindowAttention& a, bool is_causal, SoftmaxPartial* partials,
                                 cudaStream_t stream) {
  Params p = plan(a);
  p.partials = partials;
  p.is_causal = is_causal;
  return with_shape(a, [&](auto type, auto dim) {
    using T = decltype(type);
    return p.span_rows == 64 ? launch<T, dim, 1>(p, stream) : launch<T, dim, 4>(p, stream);
  });
}

}  // namespace claa::cuda::hopper
