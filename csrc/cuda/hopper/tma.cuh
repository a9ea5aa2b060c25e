// Keys and queries by TMA, Hopper's copy engine: rows of a tensor into a tile (wgmma.cuh).

#pragma once

#include <cudaTypedefs.h>

#include <cute/arch/copy_sm90_tma.hpp>

#include "csrc/cuda/hopper/pipeline.cuh"

namespace claa::cuda::hopper {

constexpr int64_t kMaxTotal = int64_t(1) << 30;  // keys: their positions are 32-bit integers

// What a tensor map can hold.
inline bool map_fits(int64_t size, int64_t stride) {
  return size == 1 || (stride > 0 && stride < int64_t(1) << 39);
}
// A broadcast dimension has one entry in the map, at coordinate 0.
__host__ __device__ inline int coordinate(int64_t index, int64_t stride) {
  return stride == 0 ? 0 : int(index);
}
inline bool keys_fit(const WindowAttention& a) {
  if (!keys_are_aligned(a) || a.dim > 256 || a.total > kMaxTotal) return false;
  if (a.pages.table)
    return !a.pages.is_e4m3 && a.kv_heads * a.total <= kMaxTotal / 64 &&  // costs are 32-bit too
           map_fits(a.pages.count, a.key_stride_b) && map_fits(a.kv_heads, a.key_stride_g) &&
           map_fits(2, a.key_stride_n);
  return (a.key_stride_b == 0 || map_fits(a.batch, a.key_stride_b)) &&
         (a.key_stride_g == 0 || map_fits(a.kv_heads, a.key_stride_g)) &&
         map_fits(a.total, a.key_stride_n);
}
inline bool queries_fit(const WindowAttention& a) {
  return queries_are_aligned(a) && (a.query_stride_b == 0 || map_fits(a.batch, a.query_stride_b)) &&
         (a.query_stride_h == 0 || map_fits(a.heads, a.query_stride_h)) &&
         map_fits(a.window, a.query_stride_w);
}

// ---- host: maps

// The map of rows [sizes[0], sizes[1], sizes[2], dim], of which TMA will bring n_rows of n_heads
// heads at a time.
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
  // A map has its dimensions from the last to the first. One of size 1 may have any stride, of
  // which the map wants a multiple of 16 bytes.
  cuuint64_t map_sizes[4] = {cuuint64_t(dim)}, bytes[3];
  for (int i = 0; i < 3; ++i) {
    const int64_t size = strides[2 - i] == 0 ? 1 : sizes[2 - i];
    map_sizes[i + 1] = cuuint64_t(size);
    bytes[i] = cuuint64_t(size == 1 ? 8 : strides[2 - i]) * 2;
  }
  const cuuint32_t box[4] = {kPanelItems, cuuint32_t(n_rows), cuuint32_t(n_heads), 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult status = encode(
      map, dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      4, const_cast<void*>(first), map_sizes, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

struct Maps {
  CUtensorMap keys, queries;
};

// Keys in pages come by so many at a time: tiles begin at a multiple of it, and pages are no
// smaller.
constexpr int kPageRows = 16;

// Of n_keys keys at a time, and of n_rows queries of n_heads heads.
inline cudaError_t map_keys(const WindowAttention& a, int n_keys, CUtensorMap* map) {
  if (a.pages.table)
    return map_rows(a.dtype, a.key, a.dim,
                    {a.pages.count, a.kv_heads, int64_t(1) << a.pages.log2_size},
                    {a.key_stride_b, a.key_stride_g, a.key_stride_n}, 1, kPageRows, map);
  return map_rows(a.dtype, a.key, a.dim, {a.batch, a.kv_heads, a.total},
                  {a.key_stride_b, a.key_stride_g, a.key_stride_n}, 1, n_keys, map);
}
inline cudaError_t map_both(const WindowAttention& a, int n_keys, int n_heads, int n_rows,
                            Maps* maps) {
  const cudaError_t status = map_keys(a, n_keys, &maps->keys);
  if (status != cudaSuccess) return status;
  return map_rows(a.dtype, a.query, a.dim, {a.batch, a.heads, a.window},
                  {a.query_stride_b, a.query_stride_h, a.query_stride_w}, n_heads, n_rows,
                  &maps->queries);
}

// ---- device: copies, each asked for by one thread

// Brings rows [n, n + kRows) of a head into a tile, to the full barrier that expects them.
template <int kDim, int kRows>
__device__ void load_rows(const CUtensorMap& map, char* tile, Barrier& full, int b, int head,
                          int n) {
#pragma unroll
  for (int panel = 0; panel < kDim / kPanelItems; ++panel)
    cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&full),
                                 uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                 tile + panel * kRows * kRowBytes, panel * kPanelItems, n, head, b);
}
template <int kDim, int kRows>
__device__ void load_keys(const WindowAttention& a, const CUtensorMap& map, char* tile,
                          Barrier& full, int64_t b, int64_t g, int n) {
  load_rows<kDim, kRows>(map, tile, full, coordinate(b, a.key_stride_b),
                         coordinate(g, a.key_stride_g), n);
}
// The same out of the pages of a prompt that has `keys` keys. Rows from there on are zero, or what
// the last page holds: `n` is a multiple of kPageRows. kInFlight: entries of the table read at a
// time.
template <int kDim, int kRows, int kInFlight>
__device__ void load_paged_keys(const Pages& pages, const CUtensorMap& map, char* tile,
                                Barrier& full, const int32_t* table, int keys, int g, int n) {
  constexpr int kMissing = -1;  // a page that is not there, for which TMA writes zeros
  const int in_page = (1 << pages.log2_size) - 1;
#pragma unroll 1
  for (int first = 0; first < kRows; first += kInFlight * kPageRows) {
    int page[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int key = n + first + i * kPageRows;
      page[i] = key < keys ? table[key >> pages.log2_size] : kMissing;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int row = first + i * kPageRows;
#pragma unroll
      for (int panel = 0; panel < kDim / kPanelItems; ++panel)
        cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&full),
                                     uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                     tile + (panel * kRows + row) * kRowBytes, panel * kPanelItems,
                                     n + row & in_page, g, page[i]);
    }
  }
}
template <int kDim, int kRows>
__device__ void load_queries(const WindowAttention& a, const CUtensorMap& map, char* tile,
                             Barrier& full, int64_t b, int64_t h, int n) {
  load_rows<kDim, kRows>(map, tile, full, coordinate(b, a.query_stride_b),
                         coordinate(h, a.query_stride_h), n);
}

// Asks for rows to come into the L2 cache. This may be done before the kernels ahead have ended,
// since what they write goes through that cache.
template <int kDim>
__device__ void prefetch_rows(const CUtensorMap& map, int b, int head, int n) {
#pragma unroll
  for (int panel = 0; panel < kDim / kPanelItems; ++panel)
    cute::SM90_TMA_LOAD_4D::PREFETCH::copy(&map, panel * kPanelItems, n, head, b);
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

}  // namespace claa::cuda::hopper
