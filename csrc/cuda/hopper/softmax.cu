// The softmax partials of softmax.cu on Hopper, by TMA and wgmma.
//
// A work item is a chunk of keys, in tiles of 64, of one (prompt, key head), and a span: up to 256
// of its query rows. Every block stays on its multiprocessor and has a run of items, in which one
// warp brings tile after tile into a ring of stages, and warpgroups, taking turns, multiply them.
//
// Keys may lie in pages. Each block then plans the chunks of every prompt by itself, as the host
// does for keys in rows.
//
// Compute bound: a product and an exponential per logit.

#include "csrc/cuda/hopper/launch.cuh"
#include "csrc/cuda/hopper/prompts.cuh"
#include "csrc/cuda/hopper/schedule.cuh"
#include "csrc/cuda/hopper/softmax_partials.cuh"
#include "csrc/cuda/hopper/tma.cuh"

namespace claa::cuda::hopper {
namespace {

constexpr int kWarpgroups = 3;  // that multiply
constexpr int kConsumers = kWarpgroups * kWarpgroup;
constexpr int kThreads = kConsumers + kWarp;
constexpr int kMostStages = 12;

constexpr int kMostChunkTiles = 63;

// How the keys of a prompt are divided into chunks.
struct Chunks {
  int keys, tiles, chunks;  // of the prompt; of a chunk; of a key head
};

struct Params {
  WindowAttention attention;
  SoftmaxPartial* partials;  // [batch * kv_heads, most_chunks * kWarpgroups, rows]
  int* parts;                // [batch], with pages: chunks * kWarpgroups of each prompt
  Chunks chunks;             // of every prompt, unless the keys lie in pages
  int most_chunks, items;
  int spans, span_rows;
  int rows;  // query rows of a group
  int stages;
  cutlass::FastDivmod blocks;  // for which the chunks are planned, and that run with pages
  bool is_causal;
};

struct WorkItem {
  int chunk, span, bg, b, g;
  int head_span;              // the same in items that share their queries
  int first_key, total, end;  // the chunk's first key; of the prompt; the end of the chunk
  int tiles;
  int turns;  // tiles and empty ones: warpgroups take the same tiles of an item in any block

  __device__ __forceinline__ WorkItem(const Params& p, const Chunks& chunks, int index) {
    const int kv_heads = int(p.attention.kv_heads);
    chunk = index % chunks.chunks;
    head_span = index / chunks.chunks;
    span = head_span % p.spans;
    bg = head_span / p.spans;
    b = bg / kv_heads;
    g = bg % kv_heads;
    first_key = chunk * chunks.tiles * kTileRows;
    total = chunks.keys;
    end = min(first_key + chunks.tiles * kTileRows, total);
    tiles = (end - first_key + kTileRows - 1) / kTileRows;
    turns = (tiles + kWarpgroups - 1) / kWarpgroups * kWarpgroups;
  }
};

// The items of all prompts: they have their chunks in common, or with pages each its own.
template <bool kPaged>
struct Items {
  const Params& p;
  PromptTable<Chunks> prompts;  // with pages

  __device__ __forceinline__ WorkItem operator[](int index) const {
    if constexpr (kPaged) {
      const int b = prompts.prompt_of(index);
      WorkItem item(p, prompts[b].plan, index - prompts[b].first);
      item.b = b;
      item.bg += b * int(p.attention.kv_heads);
      item.head_span += b * int(p.attention.kv_heads) * p.spans;
      return item;
    } else {
      return WorkItem(p, p.chunks, index);
    }
  }
  // The first item of a block.
  __device__ __forceinline__ int first_of(int block) const {
    if constexpr (kPaged) return prompts.first_unit_of(block, p.blocks);
    return int(int64_t(block) * p.items / gridDim.x);
  }
};

template <class T, int kDim, int kRowTiles, bool kPaged>
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
    const int start = Visibility::near(a.start.data ? a.start[item.b] : 0);
    const int context = p.is_causal ? item.total - int(a.window) : item.total - 1;
    for (int i = 0; i < item.turns; ++i, ring.advance(state)) {
      if (i % kWarpgroups != warpgroup) continue;
      ring.wait(state);
      if (i < item.tiles) {
        const int key = item.first_key + i * kTileRows;
        const bool all_see = key >= start && key + kTileRows <= min(item.end, context + 1);
        const auto to = [&](int row) {
          const int query = p.is_causal ? QueryRow(a, item.span * p.span_rows + row).query : 0;
          return min(item.end, context + query + 1) - key;
        };
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          // Query rows by keys: lane 4r + c of warp w has of row 16w + r keys 8j + 2c and 8j + 2c +
          // 1 at x[4j] and x[4j + 1], of row 16w + r + 8 the same keys at x[4j + 2] and x[4j + 3].
          float x[kTileRows / 2];
          multiply<T, kDim, kTileRows>(x, in_panels(queries + t * kTileRows * kRowBytes, kSpanRows),
                                       key_rows<kDim, kPaged>(ring.tile(state), kTileRows));
          partials.add(t, x, scale_log2, all_see, start - key, to);
        }
      }
      ring.free(state);
    }
  }
};

// Chunks of so many tiles, of which the keys of a head have `all_tiles`: the cost of the most
// loaded block, in tiles.
template <class Int>
__host__ __device__ Int cost_of_chunks(Int tiles, Int all_tiles, Int spans, Int blocks) {
  const Int items = (all_tiles + tiles - 1) / tiles * Int(kPlannedHeads) * spans;
  return (items + blocks - 1) / blocks * (tiles + 1);
}

// The fewest tiles of a chunk: no block has more than some ten of a single prompt's.
template <class Int>
__host__ __device__ Int least_chunk_tiles(Int all_tiles, Int spans, Int blocks) {
  const Int tiles = all_tiles * spans / blocks / kWarpgroups * kWarpgroups;
  return max(min(tiles, Int(kMostChunkTiles)), Int(kWarpgroups));
}

// The chunks of one prompt, by a warp: those that the host would choose, each lane tries some.
__device__ inline Chunks plan_prompt(const Params& p, int b, Units& items) {
  const WindowAttention& a = p.attention;
  const int keys = int(a.pages.length(b, a.total)), lane = threadIdx.x % kWarp;
  if (keys == 0) return {};
  const int all_tiles = (keys + kTileRows - 1) / kTileRows;
  const int tiles = least_chunk_tiles(all_tiles, p.spans, p.blocks.divisor) + lane * kWarpgroups;
  unsigned best = ~0u;  // the cost, and of equal ones the longest chunk
  if (tiles <= kMostChunkTiles)
    best = unsigned(cost_of_chunks(tiles, all_tiles, p.spans, p.blocks.divisor)) << 6 |
           unsigned(kMostChunkTiles - tiles);
  static_assert(kMostChunkTiles < 64 && kMostChunkTiles / kWarpgroups <= kWarp);
  const int found = kMostChunkTiles - int(__reduce_min_sync(kFullMask, best) & 63);
  const Chunks chunks{keys, found, (all_tiles + found - 1) / found};
  items = {.count = int(a.kv_heads) * p.spans * chunks.chunks, .cost = found + 1};
  return chunks;
}

template <class T, int kDim, int kRowTiles, bool kPaged>
__global__ __launch_bounds__(kThreads, 1) void partials_kernel(const __grid_constant__ KeyMap keys,
                                                               const __grid_constant__ Params p) {
  extern __shared__ __align__(kAlignment) char shared[];
  constexpr int kSpanRows = kRowTiles * kTileRows;

  // ---- setup
  char* queries = shared + p.stages * kTileBytes<kDim>;
  Barrier* barriers = reinterpret_cast<Barrier*>(queries + kSpanRows * kDim * int(sizeof(T)));
  Ring<kTileBytes<kDim>> ring(shared, barriers, p.stages);
  const Items<kPaged> items{p, {reinterpret_cast<char*>(barriers + 2 * p.stages), p.attention}};
  if constexpr (kPaged) {
    items.prompts.template make<kThreads>(
        [&](int b, Units& of_prompt) { return plan_prompt(p, b, of_prompt); });
    for (int b = threadIdx.x; blockIdx.x == 0 && b < items.prompts.count; b += kThreads)
      p.parts[b] = items.prompts[b].plan.chunks * kWarpgroups;
  }
  const int warp = warp_index();
  const bool is_producer = warp == kConsumers / kWarp;
  if (is_producer && threadIdx.x % kWarp == 0) ring.init(kWarpgroup / kWarp);
  finish_setup<kThreads>(is_producer);
  const int first_item = items.first_of(int(blockIdx.x));
  const int end_item = items.first_of(int(blockIdx.x) + 1);
  PipelineState state;

  // ---- producer
  if (is_producer) {
    const bool is_first_lane = threadIdx.x % kWarp == 0;
    if (!kPaged && !is_first_lane) return;
    [[maybe_unused]] PagedKeys paged;
    int f = 0;
    for (int index = first_item; index < end_item; ++index) {
      const WorkItem item = items[index];
      for (int i = 0; i < item.turns; ++i, ++f, ring.advance(state)) {
        const bool has_keys = i < item.tiles;
        Barrier& full =
            ring.begin_load(state, f < p.stages, has_keys ? kTileBytes<kDim> : 0, is_first_lane);
        if (!has_keys) continue;
        const int key = item.first_key + i * kTileRows;
        if constexpr (kPaged)
          paged.load<kDim, kTileRows>(p.attention, keys, ring.tile(state), full, item.b, item.total,
                                      item.total, item.g, key);
        else
          load_keys<kDim, kTileRows>(p.attention, keys.map, ring.tile(state), full, item.b, item.g,
                                     key);
      }
    }
    return;
  }

  // ---- consumers
  const Consumer<T, kDim, kRowTiles, kPaged> consumer{p, queries, warp / (kWarpgroup / kWarp),
                                                      p.attention.scale * FastExp::kUnit};
  PartialsOfRows<kRowTiles> partials;
  int head_span = -1;
  for (int index = first_item; index < end_item; ++index) {
    const WorkItem item = items[index];
    if (item.head_span != head_span) {
      if (index != first_item) sync_consumers<kConsumers>();
      head_span = item.head_span;
      consumer.load_queries(item);
      sync_consumers<kConsumers>();
    }
    partials.clear();
    consumer.add_item(partials, ring, state, item);
    const int64_t part = (int64_t(item.bg) * p.most_chunks + item.chunk) * kWarpgroups;
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
  const int64_t least_tiles = least_chunk_tiles(all_tiles, spans, blocks);
  int64_t chunk_tiles = kWarpgroups, least_cost = INT64_MAX;
  for (int64_t tiles = least_tiles; tiles <= kMostChunkTiles; tiles += kWarpgroups) {
    const int64_t cost = cost_of_chunks(tiles, all_tiles, spans, blocks);
    if (cost > least_cost) continue;
    least_cost = cost;
    chunk_tiles = tiles;
  }
  const int64_t chunks = ceil_div(all_tiles, chunk_tiles);
  // With pages, of any prompt that may be. While the fewest tiles are a block's share of them, that
  // makes no more chunks than twice as many as blocks share a span: shares are rounded down.
  const int64_t most_chunks =
      a.pages.table ? min(ceil_div(all_tiles, kWarpgroups),
                          max(ceil_div(all_tiles, kMostChunkTiles), ceil_div(2 * blocks, spans)))
                    : chunks;
  return {.attention = a,
          .partials = nullptr,
          .parts = nullptr,
          .chunks = {int(a.total), int(chunk_tiles), int(chunks)},
          .most_chunks = int(most_chunks),
          .items = int(a.batch * a.kv_heads * spans * chunks),
          .spans = int(spans),
          .span_rows = int(span_rows),
          .rows = int(rows),
          .stages = 0,
          .blocks = cutlass::FastDivmod(int(blocks)),
          .is_causal = false};
}

template <class T, int kDim, int kRowTiles, bool kPaged>
cudaError_t launch(Params p, cudaStream_t stream) {
  KeyMap keys;
  const cudaError_t status = map_keys(p.attention, kTileRows, &keys);
  if (status != cudaSuccess) return status;
  const int64_t query_bytes = kRowTiles * kTileBytes<kDim>;
  const int64_t prompt_bytes = kPaged ? PromptTable<Chunks>::bytes(p.attention) : 0;
  const int64_t stage_bytes = kTileBytes<kDim> + Ring<kTileBytes<kDim>>::kBarrierBytes;
  const int64_t room = most_shared_bytes() - query_bytes - prompt_bytes;
  p.stages = int(min(room / stage_bytes, int64_t(kMostStages)) / kWarpgroups * kWarpgroups);
  return launch_kernel(partials_kernel<T, kDim, kRowTiles, kPaged>,
                       {.blocks = kPaged ? multiprocessors() : min(p.items, multiprocessors()),
                        .threads = kThreads,
                        .shared_bytes = query_bytes + p.stages * stage_bytes + prompt_bytes},
                       stream, keys, p);
}

template <bool kPaged>
cudaError_t run(const Params& p, cudaStream_t stream) {
  return with_shape(p.attention, [&](auto type, auto dim) {
    using T = decltype(type);
    return p.span_rows == 64 ? launch<T, dim, 1, kPaged>(p, stream)
                             : launch<T, dim, 4, kPaged>(p, stream);
  });
}

}  // namespace

bool takes_softmax(const WindowAttention& a) {
  return a.softcap == 0.f && !a.sliding_window && a.scale > 0.f && device_fits() && keys_fit(a) &&
         queries_are_aligned(a);
}

int64_t softmax_parts(const WindowAttention& a) {
  return int64_t(plan(a).most_chunks) * kWarpgroups;
}

cudaError_t run_softmax_partials(const WindowAttention& a, bool is_causal, SoftmaxPartial* partials,
                                 int* parts, cudaStream_t stream) {
  const auto run_part = [&](const WindowAttention& part, int64_t first) {
    Params p = plan(part);
    const int64_t head_partials = int64_t(p.most_chunks) * kWarpgroups * p.rows;
    p.partials = partials + first * a.kv_heads * head_partials;
    p.parts = parts ? parts + first : nullptr;
    p.is_causal = is_causal;
    return parts ? run<true>(p, stream) : run<false>(p, stream);
  };
  return parts ? for_some_prompts(a, run_part) : run_part(a, 0);
}

}  // namespace claa::cuda::hopper
