// The second step of peak_attention on Hopper, by TMA and wgmma: the softmax is known.
//
// A unit is some keys and some queries of a prompt. For every key head one warp brings the keys,
// and for every query head its queries with their shifts; two warpgroups multiply them, keys as
// rows, and keep in registers the largest exponent that a query and a key have had: one
// exponential is left at the end, where `running` is merged in.
//
// Compute bound: 2 * heads * queries * keys * dim operations.

#include <cutlass/arch/reg_reconfig.h>

#include "csrc/cuda/hopper.cuh"
#include "csrc/cuda/peak_attention.cuh"

namespace claa::cuda::hopper {
namespace {

constexpr int kGroups = 2;
constexpr int kConsumers = kGroups * kWarpgroup;
constexpr int kThreads = kConsumers + kWarpgroup;  // whole warpgroups: they change their registers
constexpr int kMostStages = 6;

template <class T_, int kDim_, bool kLarge>
struct Shape {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr int kTiles = kLarge ? 2 : 1;  // of keys, of a warpgroup
  static constexpr int kQueries = kLarge ? 128 : 64;
  static constexpr int kKeys = kGroups * kTiles * kTileRows;
  static constexpr int kKeyBytes = kKeys * kDim * 2;  // a stage: the keys of a head
  static constexpr int kQueryBytes = kQueries * kDim * 2;
  static constexpr int kShiftBytes = round_up(kQueries * int(sizeof(float2)), kAlignment);
  static constexpr int kKeyStages = kDim > 128 ? 1 : 2;
};

struct Params {
  PeakEmit emit;
  int key_blocks, query_blocks, units;
  int query_stages;
};

template <class Shape>
__global__ __launch_bounds__(kThreads,
                             1) void peak_kernel(const __grid_constant__ CUtensorMap key_map,
                                                 const __grid_constant__ CUtensorMap query_map,
                                                 const __grid_constant__ Params p) {
  using T = typename Shape::T;
  constexpr int kDim = Shape::kDim, kTiles = Shape::kTiles, kQueries = Shape::kQueries;
  constexpr int kStageBytes = Shape::kQueryBytes + Shape::kShiftBytes;
  extern __shared__ __align__(kAlignment) char shared[];
  const WindowAttention& a = p.emit.attention;
  char* of_queries = shared + Shape::kKeyStages * Shape::kKeyBytes;
  Barrier* barriers = reinterpret_cast<Barrier*>(of_queries + p.query_stages * kStageBytes);
  Ring<Shape::kKeyBytes> keys(shared, barriers, Shape::kKeyStages);
  Ring<kStageBytes> queries(of_queries, barriers + 2 * Shape::kKeyStages, p.query_stages);
  const int warp = warp_index();
  const bool is_producer = warp >= kConsumers / kWarp;
  if (threadIdx.x == kConsumers) {
    keys.init(kConsumers / kWarp);
    queries.init(kConsumers);
  }
  begin<kThreads>(is_producer);

  const int group = int(a.group()), kv_heads = int(a.kv_heads);
  const auto batch_of = [&](int unit) { return unit / p.query_blocks / p.key_blocks; };
  const auto key_of = [&](int unit) { return unit / p.query_blocks % p.key_blocks * Shape::kKeys; };
  const auto query_of = [&](int unit) { return unit % p.query_blocks * kQueries; };

  typename Ring<Shape::kKeyBytes>::Place key_at;
  typename Ring<kStageBytes>::Place query_at;
  if (is_producer) {
    cutlass::arch::warpgroup_reg_dealloc<24>();
    if (threadIdx.x == kConsumers) {
      int f = 0, h = 0;
      for (int unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
        const int b = batch_of(unit), query = query_of(unit), key = key_of(unit);
        const int shift_bytes = min(kQueries, head_columns(a) - query) * int(sizeof(float2));
        for (int g = 0; g < kv_heads; ++g, ++f, keys.advance(key_at)) {
          load_keys<kDim, Shape::kKeys>(a, key_map, keys.tile(key_at),
                                        keys.begin_load(key_at, f < keys.count, Shape::kKeyBytes),
                                        b, g, key);
          for (int i = 0; i < group; ++i, ++h, queries.advance(query_at)) {
            Barrier& loaded =
                queries.begin_load(query_at, h < queries.count, Shape::kQueryBytes + shift_bytes);
            load_queries<kDim, kQueries>(a, query_map, queries.tile(query_at), loaded, b,
                                         g * group + i, query);
            const float2* shifts = p.emit.columns + (int64_t(b) * kv_heads + g) * group_columns(a) +
                                   i * head_columns(a) + query;
            cute::SM90_BULK_COPY_G2S::copy(shifts, reinterpret_cast<uint64_t*>(&loaded),
                                           queries.tile(query_at) + Shape::kQueryBytes,
                                           shift_bytes);
          }
        }
      }
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<240>();
    const int lane = threadIdx.x % kWarp;
    const float factor = a.scale * FastExp::kUnit;
    for (int unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
      float peak[kTiles][kQueries / 2];  // exponents
#pragma unroll
      for (int i = 0; i < kTiles * kQueries / 2; ++i)
        peak[i / (kQueries / 2)][i % (kQueries / 2)] = -INFINITY;
      for (int g = 0; g < kv_heads; ++g, keys.advance(key_at)) {
        keys.wait(key_at);
        for (int i = 0; i < group; ++i, queries.advance(query_at)) {
          queries.wait(query_at);
          const float4* shifts =
              reinterpret_cast<const float4*>(queries.tile(query_at) + Shape::kQueryBytes) +
              lane % 4;
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            float x[kQueries / 2];
            multiply<T, kDim, kQueries>(
                x, keys.tile(key_at) + (warp / 4 * kTiles + t) * kTileRows * kRowBytes,
                Shape::kKeys, queries.tile(query_at), kQueries);
#pragma unroll
            for (int e = 0; e < kQueries / 8; ++e) {
              const float4 shift = shifts[e * 4];  // x and z; the factors are 1
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                float& largest = peak[t][e * 4 + j];
                largest =
                    max_or_nan(largest, fmaf(x[e * 4 + j], factor, j % 2 ? -shift.z : -shift.x));
              }
            }
          }
          // Every thread for itself. One lane for its warp would do, but not for racecheck, which
          // follows what becomes of the shifts.
          queries.freed[query_at.stage].arrive();
        }
        keys.free(key_at);
      }

      const int64_t b = batch_of(unit);
      const int start = Visibility::near(a.start.data ? a.start[b] : 0);
      const int query = query_of(unit) + lane % 4 * 2, n_queries = int(a.window) - query;
#pragma unroll
      for (int t = 0; t < kTiles * 2; ++t) {
        const int row = (warp / 4 * kTiles + t / 2) * kTileRows + warp % 4 * 16 + t % 2 * 8;
        const int64_t key = key_of(unit) + row + lane / 4;
        if (key >= a.total) continue;
        float* out = p.emit.out + (b * a.window + query) * a.total + key;
        const float* running =
            p.emit.running + b * p.emit.running_stride_b + query * p.emit.running_stride_t + key;
#pragma unroll
        for (int i = 0; i < kQueries / 4; ++i) {
          if (i / 2 * 8 + i % 2 < n_queries) {
            float value =
                key < start ? 0.f : FastExp::exp(peak[t / 2][i / 2 * 4 + t % 2 * 2 + i % 2]);
            if (p.emit.running) value = max_or_nan(value, *running);
            *out = value;
          }
          out += (i % 2 ? 7 : 1) * a.total;
          running += (i % 2 ? 7 : 1) * p.emit.running_stride_t;
        }
      }
    }
  }
}

template <class Shape>
cudaError_t launch(const PeakEmit& emit, cudaStream_t stream) {
  const WindowAttention& a = emit.attention;
  Params p{.emit = emit,
           .key_blocks = int(ceil_div(a.total, Shape::kKeys)),
           .query_blocks = int(ceil_div(a.window, Shape::kQueries)),
           .units = 0,
           .query_stages = 0};
  p.units = int(a.batch * p.key_blocks * p.query_blocks);
  CUtensorMap keys, queries;
  cudaError_t status = map_keys(a, Shape::kKeys, &keys);
  if (status == cudaSuccess) status = map_queries(a, 1, Shape::kQueries, &queries);
  if (status != cudaSuccess) return status;
  using Barriers = Ring<1>;
  const int64_t fixed = Shape::kKeyStages * (Shape::kKeyBytes + Barriers::kBarrierBytes);
  const int64_t stage = Shape::kQueryBytes + Shape::kShiftBytes + Barriers::kBarrierBytes;
  const int64_t room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - fixed;
  p.query_stages = int(min(room / stage, int64_t(kMostStages)));
  const int blocks = min(p.units, device_attribute(cudaDevAttrMultiProcessorCount));
  return launch_kernel(peak_kernel<Shape>, blocks, kThreads, fixed + p.query_stages * stage, stream,
                       keys, queries, p);
}

}  // namespace

bool takes(const PeakEmit& p) {
  const WindowAttention& a = p.attention;
  return a.scale > 0.f && device_fits() && keys_fit(a) && queries_fit(a);
}

cudaError_t run(const PeakEmit& p, cudaStream_t stream) {
  const WindowAttention& a = p.attention;
  return with_shape(a, [&](auto type, auto dim) {
    using T = decltype(type);
    // Large blocks load less for a product; small ones keep all multiprocessors busy. The batch
    // does not count: it must not show in a row.
    if constexpr (dim <= 128) {
      const int64_t large = ceil_div(a.total, Shape<T, dim, true>::kKeys) *
                            ceil_div(a.window, Shape<T, dim, true>::kQueries);
      if (a.window > 64 && large >= device_attribute(cudaDevAttrMultiProcessorCount) * 3 / 4)
        return launch<Shape<T, dim, true>>(p, stream);
    }
    return launch<Shape<T, dim, false>>(p, stream);
  });
}

}  // namespace claa::cuda::hopper
