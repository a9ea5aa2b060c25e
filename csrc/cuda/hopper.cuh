// Hopper's own instructions (sm_90a), through CuTe's wrappers: tiles of keys by TMA, products by
// wgmma.
//
// A tile in shared memory is a row of blocks; a block has 64 items of the head dimension of every
// row, 128 bytes, swizzled: 16-byte piece c of row r lies at place c ^ (r % 8). That is how TMA
// writes it and how wgmma reads it. Blocks start at multiples of 1024 bytes, and are filled up with
// zeros beyond the head dimension and beyond the last key.

#pragma once

#include <cudaTypedefs.h>

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cutlass/arch/barrier.h>

#include "csrc/cuda/attention.cuh"

namespace claa::cuda::hopper {

constexpr int kTileRows = 64;  // the rows of one wgmma
constexpr int kBlockItems = 64;
constexpr int kRowBytes = 128;
constexpr int kAlignment = 1024;
constexpr int kWarpgroup = 128;  // threads
constexpr int64_t kMaxTotal = int64_t(1) << 30;  // keys: their positions are 32-bit integers

using Barrier = cutlass::arch::ClusterTransactionBarrier;

// 2-byte items of a tile of keys.
template <int kDim>
constexpr int kTileBytes = kTileRows * kDim * 2;

// Whether the device runs the code of this architecture, and its TMA can read these keys.
inline bool device_fits() {
  int sm = 0;
  return device_code(&sm) == cudaSuccess && sm == 90;
}
inline bool keys_fit(const WindowAttention& a) {
  // What a tensor map can hold, in items. Keys that are repeated have stride 0.
  constexpr int64_t kFarthest = int64_t(1) << 39;
  const auto fits = [](int64_t size, int64_t stride) {
    return size == 1 || (stride > 0 && stride < kFarthest);
  };
  return keys_are_aligned(a) && a.dim <= 256 && a.total <= kMaxTotal &&
         fits(a.batch, a.key_stride_b) && fits(a.kv_heads, a.key_stride_g) &&
         fits(a.total, a.key_stride_n);
}

// What TMA needs to know about the keys: [batch, kv_heads, total, dim], a tile at a time.
inline cudaError_t map_keys(const WindowAttention& a, CUtensorMap* map) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                     &found);
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t sizes[4] = {cuuint64_t(a.dim), cuuint64_t(a.total), cuuint64_t(a.kv_heads),
                               cuuint64_t(a.batch)};
  // A dimension of size 1 may have any stride; the map wants a multiple of 16 bytes.
  const auto bytes = [](int64_t size, int64_t stride) {
    return cuuint64_t(size == 1 ? 8 : stride) * 2;
  };
  const cuuint64_t strides[3] = {bytes(a.total, a.key_stride_n), bytes(a.kv_heads, a.key_stride_g),
                                 bytes(a.batch, a.key_stride_b)};
  const cuuint32_t box[4] = {kBlockItems, kTileRows, 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUresult status = encode(
      map,
      a.dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      4, const_cast<void*>(a.key), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Brings the keys [n, n + 64) of a head into a tile; one thread calls it. `loaded` counts them.
template <int kDim>
__device__ void load_tile(const CUtensorMap& map, void* tile, Barrier& loaded, int64_t b, int64_t g,
                          int64_t n, cute::TMA::CacheHintSm90 hint) {
  loaded.arrive_and_expect_tx(kTileBytes<kDim>);
#pragma unroll
  for (int block = 0; block < kDim / kBlockItems; ++block)
    cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&loaded), uint64_t(hint),
                                 static_cast<char*>(tile) + block * kTileRows * kRowBytes,
                                 block * kBlockItems, int(n), int(g), int(b));
}

// Writes `n` rows as wgmma reads them, by the threads [0, kThreads). `at(i)` is the address of row
// i, whose `dim` items are 16-byte aligned.
template <int kDim, int kThreads, class At>
__device__ void store_rows(char* tile, int n, int dim, int thread, At at) {
  constexpr int kPieces = kDim / 8;  // 16 bytes each
  for (int i = thread; i < n * kPieces; i += kThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    uint4 items{};
    if (piece * 8 < dim) items = __ldg(reinterpret_cast<const uint4*>(at(row)) + piece);
    *reinterpret_cast<uint4*>(tile + (piece / 8 * n + row) * kRowBytes +
                              (piece % 8 ^ row % 8) * 16) = items;
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
struct Wgmma<__nv_bfloat16, 32> : cute::SM90::GMMA::MMA_64x32x16_F32BF16BF16_SS<Major::K, Major::K> {
};
template <>
struct Wgmma<__nv_bfloat16, 64> : cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<Major::K, Major::K> {
};
template <>
struct Wgmma<__nv_bfloat16, 128>
    : cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<Major::K, Major::K> {};

// Rows of a tile, as a matrix of wgmma.
__device__ inline uint64_t matrix(const char* rows) {
  cute::GmmaDescriptor descriptor;
  descriptor.bitfield.start_address_ = cute::cast_smem_ptr_to_uint(rows) >> 4;
  descriptor.bitfield.stride_byte_offset_ = 8 * kRowBytes >> 4;
  descriptor.bitfield.layout_type_ = uint8_t(cute::SM90::GMMA::LayoutType::B128);
  return descriptor;
}

template <int kSums>
__device__ void fence_sums(float (&sum)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) cute::warpgroup_fence_operand(sum[i]);
}

// The products of 64 rows with kColumns rows, by a warpgroup. Lane 4r + c of warp w gets of row
// 16w + r the columns 8j + 2c and 8j + 2c + 1 at sum[4j] and sum[4j + 1], and of row 16w + r + 8
// the same columns behind them. `n_rows`, `n_columns`: the rows of the tiles they are part of.
// Other warpgroups keep the multiprocessor busy meanwhile.
template <class T, int kDim, int kColumns>
__device__ void multiply(float (&sum)[kColumns / 2], const char* rows, int n_rows,
                         const char* columns, int n_columns) {
  const uint64_t a = matrix(rows), b = matrix(columns);
  fence_sums(sum);
  cute::warpgroup_arrive();
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    const int block = step / 4, byte = step % 4 * 32;
    const uint64_t of_a[1] = {a + ((block * n_rows * kRowBytes + byte) >> 4)};
    const uint64_t of_b[1] = {b + ((block * n_columns * kRowBytes + byte) >> 4)};
    const cute::SM90::GMMA::ScaleOut scale[1] = {step ? cute::SM90::GMMA::ScaleOut::One
                                                      : cute::SM90::GMMA::ScaleOut::Zero};
    cute::detail::explode(Wgmma<T, kColumns>::fma, of_a, cute::seq<0>{}, of_b, cute::seq<0>{}, sum,
                          cute::make_seq<kColumns / 2>{}, scale, cute::seq<0>{});
  }
  cute::warpgroup_commit_batch();
  cute::warpgroup_wait<0>();
  fence_sums(sum);
}

}  // namespace claa::cuda::hopper
