// Hopper's own instructions (sm_90a), through CuTe's wrappers: tiles of keys by TMA, products by
// wgmma.
//
// A tile in shared memory is a row of blocks; a block has 64 items of the head dimension of every
// row, 128 bytes, swizzled: 16-byte piece c of row r lies at place c ^ (r % 8). That is how TMA
// writes it and how wgmma reads it. Blocks start at multiples of 1024 bytes, and are filled up with
// zeros beyond the head dimension and beyond the last key.

#pragma once

#include <cudaTypedefs.h>

#include <array>
#include <atomic>

#include <cutlass/arch/barrier.h>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>

#include "csrc/cuda/attention.cuh"

namespace claa::cuda::hopper {

constexpr int kTileRows = 64;  // the rows of one wgmma
constexpr int kBlockItems = 64;
constexpr int kRowBytes = 128;
constexpr int kAlignment = 1024;
constexpr int kWarpgroup = 128;                  // threads
constexpr int64_t kMaxTotal = int64_t(1) << 30;  // keys: their positions are 32-bit integers

// The heads for which the units of a softmax are planned, whatever there are: its measures must
// know neither the batch nor the other heads.
constexpr int64_t kPlannedHeads = 8;

// What the busiest block has to do. Blocks take runs of units, of which those from `long_units` on
// may be short; where they do not come out even, the later blocks have one unit more.
// cost_of(n, n_short) is the cost of n units.
template <class Cost>
int64_t busiest_block(int64_t long_units, int64_t units, int64_t most_blocks, Cost cost_of) {
  const int64_t blocks = min(units, most_blocks), n = units / blocks, longer = units % blocks;
  const auto cost_from = [&](int64_t first, int64_t n) {
    return cost_of(n, min(max(first + n - long_units, int64_t(0)), n));
  };
  const int64_t cost = cost_from(0, n);
  return longer ? max(cost, cost_from((blocks - longer) * n, n + 1)) : cost;
}

using Barrier = cutlass::arch::ClusterTransactionBarrier;

// 2-byte items of a tile of keys.
template <int kDim>
constexpr int kTileBytes = kTileRows * kDim * 2;

// Whether the current device runs the code of this architecture. Each device is asked once: the
// answer takes as long as most of what comes before a launch.
inline bool device_fits() {
  static std::array<std::atomic<int>, 64> codes;  // 0: not asked yet
  int device = 0, sm = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  std::atomic<int>* known = device < int(codes.size()) ? &codes[device] : nullptr;
  if (known) sm = known->load(std::memory_order_relaxed);
  if (sm == 0 && device_code(&sm) == cudaSuccess && known)
    known->store(sm, std::memory_order_relaxed);
  return sm == 90;
}
// What a tensor map can hold.
inline bool map_fits(int64_t size, int64_t stride) {
  return size == 1 || (stride > 0 && stride < int64_t(1) << 39);
}
// A stride of 0 repeats what there is once: no coordinate of a map.
__host__ __device__ inline int coordinate(int64_t index, int64_t stride) {
  return stride == 0 ? 0 : int(index);
}
inline bool keys_fit(const WindowAttention& a) {
  return keys_are_aligned(a) && a.dim <= 256 && a.total <= kMaxTotal &&
         (a.key_stride_b == 0 || map_fits(a.batch, a.key_stride_b)) &&
         (a.key_stride_g == 0 || map_fits(a.kv_heads, a.key_stride_g)) &&
         map_fits(a.total, a.key_stride_n);
}
inline bool queries_fit(const WindowAttention& a) {
  return queries_are_aligned(a) && (a.query_stride_b == 0 || map_fits(a.batch, a.query_stride_b)) &&
         (a.query_stride_h == 0 || map_fits(a.heads, a.query_stride_h)) &&
         map_fits(a.window, a.query_stride_w);
}

// What TMA needs to know about rows [sizes[0], sizes[1], sizes[2], dim], of which it will bring
// n_rows of n_heads heads at a time.
inline cudaError_t map_rows(DType dtype, const void* first, int64_t dim, const int64_t (&sizes)[3],
                            const int64_t (&strides)[3], int n_heads, int n_rows,
                            CUtensorMap* map) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                     &found);
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  if (!encode) return cudaErrorNotSupported;
  // The map has its dimensions from the last to the first. One of size 1 may have any stride, of
  // which the map wants a multiple of 16 bytes.
  cuuint64_t map_sizes[4] = {cuuint64_t(dim)}, bytes[3];
  for (int i = 0; i < 3; ++i) {
    const int64_t size = strides[2 - i] == 0 ? 1 : sizes[2 - i];
    map_sizes[i + 1] = cuuint64_t(size);
    bytes[i] = cuuint64_t(size == 1 ? 8 : strides[2 - i]) * 2;
  }
  const cuuint32_t box[4] = {kBlockItems, cuuint32_t(n_rows), cuuint32_t(n_heads), 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult status = encode(
      map, dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      4, const_cast<void*>(first), map_sizes, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

inline cudaError_t map_keys(const WindowAttention& a, int n_rows, CUtensorMap* map) {
  return map_rows(a.dtype, a.key, a.dim, {a.batch, a.kv_heads, a.total},
                  {a.key_stride_b, a.key_stride_g, a.key_stride_n}, 1, n_rows, map);
}
inline cudaError_t map_queries(const WindowAttention& a, int n_heads, int n_rows,
                               CUtensorMap* map) {
  return map_rows(a.dtype, a.query, a.dim, {a.batch, a.heads, a.window},
                  {a.query_stride_b, a.query_stride_h, a.query_stride_w}, n_heads, n_rows, map);
}

// Brings rows [n, n + kRows) of a head into a tile; one thread calls it. `loaded` expects them.
template <int kDim, int kRows>
__device__ void load_rows(const CUtensorMap& map, char* tile, Barrier& loaded, int b, int head,
                          int n) {
#pragma unroll
  for (int block = 0; block < kDim / kBlockItems; ++block)
    cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&loaded),
                                 uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                 tile + block * kRows * kRowBytes, block * kBlockItems, n, head, b);
}
template <int kDim, int kRows>
__device__ void load_keys(const WindowAttention& a, const CUtensorMap& map, char* tile,
                          Barrier& loaded, int64_t b, int64_t g, int n) {
  load_rows<kDim, kRows>(map, tile, loaded, coordinate(b, a.key_stride_b),
                         coordinate(g, a.key_stride_g), n);
}
template <int kDim, int kRows>
__device__ void load_queries(const WindowAttention& a, const CUtensorMap& map, char* tile,
                             Barrier& loaded, int64_t b, int64_t h, int n) {
  load_rows<kDim, kRows>(map, tile, loaded, coordinate(b, a.query_stride_b),
                         coordinate(h, a.query_stride_h), n);
}

// Asks for rows of a map into the L2 cache: by one thread. It may do so before the kernels ahead
// have ended, since what they write goes through that cache.
template <int kDim>
__device__ void prefetch_rows(const CUtensorMap& map, int b, int head, int n) {
#pragma unroll
  for (int block = 0; block < kDim / kBlockItems; ++block)
    cute::SM90_TMA_LOAD_4D::PREFETCH::copy(&map, block * kBlockItems, n, head, b);
}
template <int kDim>
__device__ void prefetch_keys(const WindowAttention& a, const CUtensorMap& map, int64_t b,
                              int64_t g, int n) {
  prefetch_rows<kDim>(map, coordinate(b, a.key_stride_b), coordinate(g, a.key_stride_g), n);
}
template <int kDim>
__device__ void prefetch_queries(const WindowAttention& a, const CUtensorMap& map, int64_t b,
                                 int64_t h, int n) {
  prefetch_rows<kDim>(map, coordinate(b, a.query_stride_b), coordinate(h, a.query_stride_h), n);
}

// A ring of stages in shared memory: one thread has them filled, warpgroups use them. A stage is
// always used by the same warpgroups.
template <int kBytes>
struct Ring {
  char* tiles;
  Barrier *loaded, *freed;
  int count;

  // Shared memory that a stage takes besides its tile.
  static constexpr int64_t kBarrierBytes = 2 * sizeof(Barrier);

  // Where a tile lies: tile f of the ring in stage f % count, the (f / count)th that it has.
  struct Place {
    int stage = 0;
    uint32_t parity = 0;
  };
  __device__ void advance(Place& at) const {
    if (++at.stage < count) return;
    at.stage = 0;
    at.parity ^= 1;
  }
  __device__ void retreat(Place& at) const {
    if (--at.stage >= 0) return;
    at.stage = count - 1;
    at.parity ^= 1;
  }

  __device__ Ring(char* tiles, Barrier* barriers, int count)
      : tiles(tiles), loaded(barriers), freed(barriers + count), count(count) {}

  // By one thread; `warps` use a stage.
  __device__ void init(int warps) {
    for (int i = 0; i < count; ++i) {
      loaded[i].init(1);
      freed[i].init(warps);
    }
    cutlass::arch::fence_barrier_init();
  }

  __device__ char* tile(Place at) const { return tiles + at.stage * kBytes; }
  // Waits until the stage is free, and says what will come.
  __device__ Barrier& begin_load(Place at, bool is_first, int bytes) {
    if (!is_first) freed[at.stage].wait(at.parity ^ 1);
    loaded[at.stage].arrive_and_expect_tx(bytes);
    return loaded[at.stage];
  }
  __device__ void wait(Place at) { loaded[at.stage].wait(at.parity); }
  // By every warp that uses the stage.
  __device__ void free(Place at) {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) freed[at.stage].arrive();
  }
};

// The index of a warp, in a way that shows the compiler that it is that of the whole warp: what a
// warpgroup does then needs no divergent code, nor addresses in registers of each thread.
__device__ inline int warp_index() { return cutlass::canonical_warp_idx_sync(); }

// The barriers of the rings are initialised: the warps that load say so and go on, the threads that
// multiply wait for it.
template <int kThreads>
__device__ void begin(bool is_loading) {
  __syncwarp();
  if (is_loading) {
    cutlass::arch::NamedBarrier::arrive(kThreads, 1);
  } else {
    cutlass::arch::NamedBarrier::sync(kThreads, 1);
  }
}

// A barrier of the threads that multiply.
template <int kThreads>
__device__ void sync_consumers() {
  cutlass::arch::NamedBarrier::sync(kThreads, 0);
}

// Writes `n` rows as wgmma reads them, by the threads [0, kThreads). `at(i)` is the address of row
// i, whose `dim` items are 16-byte aligned.
template <int kDim, int kThreads, class At>
__device__ void store_rows(char* tile, int n, int dim, int thread, At at) {
  constexpr int kPieces = kDim / 8;  // 16 bytes each
  constexpr int kBatch = 8;          // that are on their way together
  for (int first = thread; first < n * kPieces; first += kBatch * kThreads) {
    uint4 items[kBatch] = {};
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = first + j * kThreads, row = i / kPieces, piece = i % kPieces;
      if (row < n && piece * 8 < dim)
        items[j] = __ldg(reinterpret_cast<const uint4*>(at(row)) + piece);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = first + j * kThreads, row = i / kPieces, piece = i % kPieces;
      if (row < n)
        *reinterpret_cast<uint4*>(tile + (piece / 8 * n + row) * kRowBytes +
                                  (piece % 8 ^ row % 8) * 16) = items[j];
    }
  }
  cutlass::arch::fence_view_async_shared();  // wgmma reads through another proxy
}

template <class T, int kColumns>
struct Wgmma;
using cute::SM90::GMMA::Major;
template <>
struct Wgmma<__half, 32> : cute::SM90::GMMA::MMA_64x32x16_F32F16F16_SS<Major::K, Major::K> {};
template <>
struct Wgmma<__half, 64> : cute::SM90::GMMA::MMA_64x64x16_F32F16F16_SS<Major::K, Major::K> {};
template <>
struct Wgmma<__half, 128> : cute::SM90::GMMA::MMA_64x128x16_F32F16F16_SS<Major::K, Major::K> {};
template <>
struct Wgmma<__nv_bfloat16, 32>
    : cute::SM90::GMMA::MMA_64x32x16_F32BF16BF16_SS<Major::K, Major::K> {};
template <>
struct Wgmma<__nv_bfloat16, 64>
    : cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<Major::K, Major::K> {};
template <>
struct Wgmma<__nv_bfloat16, 128>
    : cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<Major::K, Major::K> {};

// Rows of a tile as a matrix of wgmma, `bytes` behind their first: the address in 16 bytes, 1024
// bytes from 8 rows to the next, the swizzle. Only the low half of it depends on the rows.
__device__ inline uint64_t matrix(const char* rows, int bytes) {
  constexpr uint64_t kHigh = uint64_t(cute::SM90::GMMA::LayoutType::B128) << 30 | kAlignment >> 4;
  return kHigh << 32 | (cute::cast_smem_ptr_to_uint(rows) >> 4) + (bytes >> 4);
}

template <int kSums>
__device__ void fence_sums(float (&sum)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) cute::warpgroup_fence_operand(sum[i]);
}

// Starts the products of 64 rows with kColumns rows, by a warpgroup: `sum` is not to be touched
// before finish_products. Lane 4r + c of warp w gets of row 16w + r the columns 8j + 2c and 8j + 2c
// + 1 at sum[4j] and sum[4j + 1], and of row 16w + r + 8 the same columns behind them. `n_rows`,
// `n_columns`: the rows of the tiles they are part of.
template <class T, int kDim, int kColumns>
__device__ void start_products(float (&sum)[kColumns / 2], const char* rows, int n_rows,
                               const char* columns, int n_columns) {
  fence_sums(sum);
  cute::warpgroup_arrive();
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    const int block = step / 4, byte = step % 4 * 32;
    const uint64_t of_a[1] = {matrix(rows, block * n_rows * kRowBytes + byte)};
    const uint64_t of_b[1] = {matrix(columns, block * n_columns * kRowBytes + byte)};
    const cute::SM90::GMMA::ScaleOut scale[1] = {step ? cute::SM90::GMMA::ScaleOut::One
                                                      : cute::SM90::GMMA::ScaleOut::Zero};
    cute::detail::explode(Wgmma<T, kColumns>::fma, of_a, cute::seq<0>{}, of_b, cute::seq<0>{}, sum,
                          cute::make_seq<kColumns / 2>{}, scale, cute::seq<0>{});
  }
  cute::warpgroup_commit_batch();
}

// Waits for products; the last kBehind that were started may still be on their way.
template <int kBehind, int kSums>
__device__ void finish_products(float (&sum)[kSums]) {
  cute::warpgroup_wait<kBehind>();
  fence_sums(sum);
}

// Both at once. Other warpgroups keep the multiprocessor busy meanwhile.
template <class T, int kDim, int kColumns>
__device__ void multiply(float (&sum)[kColumns / 2], const char* rows, int n_rows,
                         const char* columns, int n_columns) {
  start_products<T, kDim, kColumns>(sum, rows, n_rows, columns, n_columns);
  finish_products<0>(sum);
}

inline int padded_dim(const WindowAttention& a) {
  return a.dim <= 64 ? 64 : a.dim <= 128 ? 128 : 256;
}

// Calls fn with a value of the type of queries and keys, and with the padded head dimension.
template <class Fn>
cudaError_t with_shape(const WindowAttention& a, Fn fn) {
  const auto with_dim = [&](auto type) {
    switch (padded_dim(a)) {
      case 64: return fn(type, std::integral_constant<int, 64>{});
      case 128: return fn(type, std::integral_constant<int, 128>{});
      default: return fn(type, std::integral_constant<int, 256>{});
    }
  };
  return a.dtype == DType::f16 ? with_dim(__half{}) : with_dim(__nv_bfloat16{});
}

template <class... Params>
cudaError_t launch_kernel(void (*kernel)(Params...), int64_t blocks, int threads,
                          int64_t shared_bytes, cudaStream_t stream,
                          const std::type_identity_t<Params>&... params) {
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (status != cudaSuccess) return status;
  const cudaLaunchConfig_t config{.gridDim = dim3(unsigned(blocks)),
                                  .blockDim = dim3(unsigned(threads)),
                                  .dynamicSmemBytes = size_t(shared_bytes),
                                  .stream = stream};
  return cudaLaunchKernelEx(&config, kernel, params...);
}

}  // namespace claa::cuda::hopper
