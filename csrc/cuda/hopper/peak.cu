// The second pass of peak_attention on Hopper, by TMA and wgmma: the softmax is known.
//
// A block makes one output tile after the other: some keys by some queries of a prompt. For every
// key head one producer thread brings the keys, and for every query head its queries with their
// logsumexp; two warpgroups multiply them, keys as rows, and keep in registers the largest exponent
// that a query and a key have had: one exponential is left at the end, where `running` is merged
// in. Keys may lie in pages.
//
// Compute bound: 2 * heads * queries * keys * dim operations.

#include <cutlass/arch/reg_reconfig.h>

#include "csrc/cuda/hopper/launch.cuh"
#include "csrc/cuda/hopper/prompts.cuh"
#include "csrc/cuda/hopper/tma.cuh"
#include "csrc/cuda/peak_attention.cuh"

namespace claa::cuda::hopper {
namespace {

constexpr int kWarpgroups = 2;  // that multiply
constexpr int kConsumers = kWarpgroups * kWarpgroup;
constexpr int kThreads = kConsumers + kWarpgroup;  // whole warpgroups: they change their registers
constexpr int kMostStages = 6;

template <class T_, int kDim_, bool kLarge, bool kPaged_>
struct Shape {
  using T = T_;
  static constexpr bool kPaged = kPaged_;
  static constexpr int kDim = kDim_;
  static constexpr int kTiles = kLarge ? 2 : 1;  // of keys, of a warpgroup
  static constexpr int kQueries = kLarge ? 128 : 64;
  static constexpr int kKeys = kWarpgroups * kTiles * kTileRows;
  static constexpr int kKeyBytes = kKeys * kDim * 2;  // a stage: the keys of a head
  static constexpr int kQueryBytes = kQueries * kDim * 2;
  // A normalizer is a pair of which the factor is 1 here, as the logsumexp has it all.
  static constexpr int kNormalizerBytes = round_up(kQueries * int(sizeof(float2)), kAlignment);
  static constexpr int kQueryStageBytes = kQueryBytes + kNormalizerBytes;
  static constexpr int kKeyStages = kDim > 128 ? 1 : 2;
};

struct Params {
  PeakSecondPass pass;
  int key_blocks, query_blocks, tiles;
  int query_stages;
};

// An output tile: its first key and query.
struct OutputTile {
  int b, key, query;
  int total;  // keys of the prompt
};

struct PromptKeys {
  int total;
};

// The output tiles of all prompts. A block takes each gridDim.x-th of them.
template <class Shape>
struct OutputTiles {
  const Params& p;
  PromptTable<PromptKeys> prompts;  // with pages

  __device__ __forceinline__ OutputTiles(const Params& p, char* memory)
      : p(p), prompts(memory, p.pass.attention) {
    if constexpr (Shape::kPaged) {
      const WindowAttention& a = p.pass.attention;
      prompts.template make<kThreads>([&](int b, Units& tiles) {
        const int total = int(a.pages.length(b, a.total));
        tiles.count = (total + Shape::kKeys - 1) / Shape::kKeys * p.query_blocks;
        return PromptKeys{total};
      });
    }
  }

  // Asked for anew each time: the threads that multiply have no register to keep it in.
  __device__ __forceinline__ int count() const { return Shape::kPaged ? prompts.units() : p.tiles; }

  __device__ __forceinline__ OutputTile operator[](int index) const {
    if constexpr (Shape::kPaged) {
      const int b = prompts.prompt_of(index), of_prompt = index - prompts[b].first;
      return {b, of_prompt / p.query_blocks * Shape::kKeys,
              of_prompt % p.query_blocks * Shape::kQueries, prompts[b].plan.total};
    } else {
      return {index / p.query_blocks / p.key_blocks,
              index / p.query_blocks % p.key_blocks * Shape::kKeys,
              index % p.query_blocks * Shape::kQueries, int(p.pass.attention.total)};
    }
  }
};

template <class Shape>
struct Pipelines {
  Ring<Shape::kKeyBytes> keys;
  Ring<Shape::kQueryStageBytes> queries;
  PipelineState key_state, query_state;

  __device__ __forceinline__ Pipelines(char* shared, Barrier* barriers, int query_stages)
      : keys(shared, barriers, Shape::kKeyStages),
        queries(shared + Shape::kKeyStages * Shape::kKeyBytes, barriers + 2 * Shape::kKeyStages,
                query_stages) {}
};

// By one thread, or with pages by a warp, of which one thread does all but ask for keys.
template <class Shape>
__device__ __forceinline__ void produce(const Params& p, const Maps& maps,
                                        const OutputTiles<Shape>& tiles, Pipelines<Shape>& pipes) {
  constexpr int kDim = Shape::kDim;
  const WindowAttention& a = p.pass.attention;
  const int group = int(a.group()), kv_heads = int(a.kv_heads);
  const bool is_first_lane = threadIdx.x == kConsumers;
  auto& [keys, queries, key_state, query_state] = pipes;
  [[maybe_unused]] PagedKeys paged;
  int f = 0, h = 0;  // key heads and query heads so far
  for (int index = blockIdx.x; index < tiles.count(); index += gridDim.x) {
    const auto [b, key, query, total] = tiles[index];
    const int normalizer_bytes = min(Shape::kQueries, head_rows(a) - query) * int(sizeof(float2));
    for (int g = 0; g < kv_heads; ++g, ++f, keys.advance(key_state)) {
      Barrier& keys_full =
          keys.begin_load(key_state, f < keys.stages, Shape::kKeyBytes, is_first_lane);
      if constexpr (Shape::kPaged)
        paged.load<kDim, Shape::kKeys>(a, maps.keys, keys.tile(key_state), keys_full, b, total,
                                       total, g, key);
      else
        load_keys<kDim, Shape::kKeys>(a, maps.keys.map, keys.tile(key_state), keys_full, b, g, key);
      for (int i = 0; i < group; ++i, ++h, queries.advance(query_state)) {
        Barrier& full = queries.begin_load(query_state, h < queries.stages,
                                           Shape::kQueryBytes + normalizer_bytes, is_first_lane);
        if (!is_first_lane) continue;
        load_queries<kDim, Shape::kQueries>(a, maps.queries, queries.tile(query_state), full, b,
                                            g * group + i, query);
        const float2* normalizers = p.pass.normalizers +
                                    (int64_t(b) * kv_heads + g) * group_rows(a) + i * head_rows(a) +
                                    query;
        cute::SM90_BULK_COPY_G2S::copy(normalizers, reinterpret_cast<uint64_t*>(&full),
                                       queries.tile(query_state) + Shape::kQueryBytes,
                                       normalizer_bytes);
      }
    }
  }
}

// What a thread has of an output tile: the largest exponents so far, of keys by queries. Lane 4r +
// c of warp w has of tile t keys 16w + r and 16w + r + 8: of the first, queries 8j + 2c and 8j + 2c
// + 1 at [t][4j] and [t][4j + 1], of the second the same at [t][4j + 2] and [t][4j + 3].
template <class Shape>
using Peaks = float[Shape::kTiles][Shape::kQueries / 2];

// Takes in one query head.
template <class Shape>
__device__ __forceinline__ void add_head(Peaks<Shape>& peak, const char* keys, int first_row,
                                         const char* queries, int lane, float scale_log2) {
  constexpr int kQueries = Shape::kQueries;
  const float4* normalizers =
      reinterpret_cast<const float4*>(queries + Shape::kQueryBytes) + lane % 4;
#pragma unroll
  for (int t = 0; t < Shape::kTiles; ++t) {
    float x[kQueries / 2];  // as in Peaks
    const Operand rows =
        key_rows<Shape::kDim, Shape::kPaged>(keys, Shape::kKeys, first_row + t * kTileRows);
    multiply<typename Shape::T, Shape::kDim, kQueries>(x, rows, in_panels(queries, kQueries));
#pragma unroll
    for (int e = 0; e < kQueries / 8; ++e) {
      const float4 lse = normalizers[e * 4];  // x and z, of the thread's two queries
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& largest = peak[t][e * 4 + j];
        largest = max_or_nan(largest, fmaf(x[e * 4 + j], scale_log2, j % 2 ? -lse.z : -lse.x));
      }
    }
  }
}

template <class Shape>
__device__ __forceinline__ void write(const PeakSecondPass& p, const Peaks<Shape>& peak,
                                      const OutputTile& tile) {
  constexpr int kTiles = Shape::kTiles;
  const WindowAttention& a = p.attention;
  // Opaque, so that the compiler cannot hoist parts of addresses out of the loop over heads, where
  // no registers are left.
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  const int warp = thread / kWarp, lane = thread % kWarp;
  const int64_t b = tile.b;
  const int start = Visibility::near(a.start.data ? a.start[b] : 0);
  const int query = tile.query + lane % 4 * 2, n_queries = int(a.window) - query;
#pragma unroll
  for (int t = 0; t < kTiles * 2; ++t) {
    const int row = (warp / 4 * kTiles + t / 2) * kTileRows + warp % 4 * 16 + t % 2 * 8;
    const int64_t key = tile.key + row + lane / 4;
    if (key >= tile.total) continue;
    float* out = p.out + b * p.out_stride_b + query * p.out_stride_t + key;
    const float* running = p.running + b * p.running_stride_b + query * p.running_stride_t + key;
    constexpr int kBatch = 16;  // loads in flight: `out` may be `running`, so none passes a store
#pragma unroll
    for (int first = 0; first < Shape::kQueries / 4; first += kBatch) {
      const auto is_query = [&](int i) { return i / 2 * 8 + i % 2 < n_queries; };
      float before[kBatch];
#pragma unroll
      for (int i = first; i < first + kBatch; ++i) {
        if (p.running && is_query(i)) before[i - first] = *running;
        running += (i % 2 ? 7 : 1) * p.running_stride_t;
      }
#pragma unroll
      for (int i = first; i < first + kBatch; ++i) {
        if (is_query(i)) {
          const float exponent = peak[t / 2][i / 2 * 4 + t % 2 * 2 + i % 2];
          const float value = key < start ? 0.f : FastExp::exp(exponent);
          *out = p.running ? max_or_nan(value, before[i - first]) : value;
        }
        out += (i % 2 ? 7 : 1) * p.out_stride_t;
      }
    }
  }
}

template <class Shape>
__device__ __forceinline__ void consume(const Params& p, const OutputTiles<Shape>& tiles,
                                        Pipelines<Shape>& pipes, int warp) {
  const WindowAttention& a = p.pass.attention;
  const int group = int(a.group()), kv_heads = int(a.kv_heads);
  const int lane = threadIdx.x % kWarp;
  const float scale_log2 = a.scale * FastExp::kUnit;
  auto& [keys, queries, key_state, query_state] = pipes;
  for (int index = blockIdx.x; index < tiles.count(); index += gridDim.x) {
    Peaks<Shape> peak;
#pragma unroll
    for (int i = 0; i < Shape::kTiles * Shape::kQueries / 2; ++i)
      peak[i / (Shape::kQueries / 2)][i % (Shape::kQueries / 2)] = -INFINITY;
    for (int g = 0; g < kv_heads; ++g, keys.advance(key_state)) {
      keys.wait(key_state);
      for (int i = 0; i < group; ++i, queries.advance(query_state)) {
        queries.wait(query_state);
        add_head<Shape>(peak, keys.tile(key_state), warp / 4 * Shape::kTiles * kTileRows,
                        queries.tile(query_state), lane, scale_log2);
        // Every thread for itself. One lane for its warp would do, but not for racecheck, which
        // follows what becomes of the normalizers.
        queries.empty[query_state.stage].arrive();
      }
      keys.free(key_state);
    }
    write<Shape>(p.pass, peak, tiles[index]);
  }
}

template <class Shape>
__global__ __launch_bounds__(kThreads, 1) void peak_kernel(const __grid_constant__ Maps maps,
                                                           const __grid_constant__ Params p) {
  extern __shared__ __align__(kAlignment) char shared[];
  Barrier* barriers = reinterpret_cast<Barrier*>(shared + Shape::kKeyStages * Shape::kKeyBytes +
                                                 p.query_stages * Shape::kQueryStageBytes);
  Pipelines<Shape> pipes(shared, barriers, p.query_stages);
  const OutputTiles<Shape> tiles(
      p, reinterpret_cast<char*>(barriers + 2 * (Shape::kKeyStages + p.query_stages)));
  const int warp = warp_index();
  const bool is_producer = warp >= kConsumers / kWarp;
  if (threadIdx.x == kConsumers) {
    pipes.keys.init(kConsumers / kWarp);
    pipes.queries.init(kConsumers);
  }
  finish_setup<kThreads>(is_producer);
  if (is_producer) {
    cutlass::arch::warpgroup_reg_dealloc<Shape::kPaged ? 40 : 24>();
    if (Shape::kPaged ? warp == kConsumers / kWarp : threadIdx.x == kConsumers)
      produce(p, maps, tiles, pipes);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Shape::kPaged ? 232 : 240>();
    consume(p, tiles, pipes, warp);
  }
}

template <class Shape>
cudaError_t launch(const PeakSecondPass& pass, cudaStream_t stream) {
  const WindowAttention& a = pass.attention;
  Params p{.pass = pass,
           .key_blocks = int(ceil_div(a.total, Shape::kKeys)),
           .query_blocks = int(ceil_div(a.window, Shape::kQueries)),
           .tiles = 0,
           .query_stages = 0};
  p.tiles = int(a.batch * p.key_blocks * p.query_blocks);
  Maps maps;
  const cudaError_t status = map_both(a, Shape::kKeys, 1, Shape::kQueries, &maps);
  if (status != cudaSuccess) return status;
  const int64_t key_bytes = Shape::kKeyStages * (Shape::kKeyBytes + Ring<1>::kBarrierBytes);
  const int64_t stage_bytes = Shape::kQueryStageBytes + Ring<1>::kBarrierBytes;
  const int64_t prompt_bytes = Shape::kPaged ? PromptTable<PromptKeys>::bytes(a) : 0;
  const int64_t room = most_shared_bytes() - key_bytes - prompt_bytes;
  p.query_stages = int(min(room / stage_bytes, int64_t(kMostStages)));
  return launch_kernel(peak_kernel<Shape>,
                       {.blocks = min(p.tiles, multiprocessors()),
                        .threads = kThreads,
                        .shared_bytes = key_bytes + p.query_stages * stage_bytes + prompt_bytes},
                       stream, maps, p);
}

template <bool kPaged>
cudaError_t run_of(const PeakSecondPass& p, cudaStream_t stream) {
  const WindowAttention& a = p.attention;
  return with_shape(a, [&](auto type, auto dim) {
    using T = decltype(type);
    // Large tiles load less for a product; small ones keep all multiprocessors busy. The batch does
    // not count: it must not show in a row.
    if constexpr (dim <= 128) {
      using Large = Shape<T, dim, true, kPaged>;
      const int64_t tiles = ceil_div(a.total, Large::kKeys) * ceil_div(a.window, Large::kQueries);
      if (a.window > 64 && tiles >= multiprocessors() * 3 / 4) return launch<Large>(p, stream);
    }
    return launch<Shape<T, dim, false, kPaged>>(p, stream);
  });
}

}  // namespace

bool takes(const PeakSecondPass& p) {
  const WindowAttention& a = p.attention;
  return a.scale > 0.f && device_fits() && keys_fit(a) && queries_fit(a);
}

cudaError_t run(const PeakSecondPass& p, cudaStream_t stream) {
  if (!p.attention.pages.table) return run_of<false>(p, stream);
  const int64_t prompt_rows = p.attention.kv_heads * group_rows(p.attention);
  return for_some_prompts(p.attention, [&](const WindowAttention& part, int64_t first) {
    PeakSecondPass pass = p;
    pass.attention = part;
    pass.running += first * p.running_stride_b;
    pass.out += first * p.out_stride_b;
    pass.normalizers += first * prompt_rows;
    return run_of<true>(pass, stream);
  });
}

}  // namespace claa::cuda::hopper
