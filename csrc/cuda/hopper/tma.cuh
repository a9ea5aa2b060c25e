// Keys and queries by TMA, Hopper's copy engine: rows of a tensor into a tile (wgmma.cuh).

#pragma once

#include <cudaTypedefs.h>

#include <numeric>

#include <cute/arch/copy_sm90_tma.hpp>

#include "csrc/cuda/hopper/launch.cuh"
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
// Where pages and their heads begin, in steps that both strides are multiples of: so a map needs
// one dimension for both.
struct PageSteps {
  int64_t items;  // of a step
  int64_t of_page, of_head;
  int64_t places;

  explicit PageSteps(const WindowAttention& a) {
    const int64_t head_stride = a.kv_heads > 1 ? a.key_stride_g : 0;
    items = max(std::gcd(a.key_stride_b, head_stride), int64_t(1));
    of_page = a.key_stride_b / items;
    of_head = head_stride / items;
    places = (a.pages.count - 1) * of_page + (a.kv_heads - 1) * of_head + 1;
  }
};
inline bool keys_fit(const WindowAttention& a) {
  if (!keys_are_aligned(a) || a.dim > 256 || a.total > kMaxTotal) return false;
  if (a.pages.table)
    return !a.pages.is_e4m3 && a.kv_heads * a.total <= kMaxTotal / 64 &&  // costs are 32-bit too
           map_fits(a.pages.count, a.key_stride_b) && map_fits(a.kv_heads, a.key_stride_g) &&
           map_fits(2, a.key_stride_n) && PageSteps(a).places < int64_t(1) << 31;
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

using Encode = PFN_cuTensorMapEncodeTiled_v12000;
inline Encode encode_function() {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                     &found);
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

// A map of 2-byte items, from the last dimension to the first, of which TMA will bring a box at a
// time. Strides in items; of a dimension of size 1 it may be any.
template <int kDims>
cudaError_t encode_map(DType dtype, const void* first, const int64_t (&sizes)[kDims],
                       const int64_t (&strides)[kDims - 1], const int (&box)[kDims],
                       CUtensorMap* map) {
  if (!encode_function()) return cudaErrorNotSupported;
  cuuint64_t map_sizes[kDims], bytes[kDims - 1];
  cuuint32_t map_box[kDims], steps[kDims];
  for (int i = 0; i < kDims; ++i) {
    map_sizes[i] = cuuint64_t(sizes[i]);
    map_box[i] = cuuint32_t(box[i]);
    steps[i] = 1;
    // The map wants a multiple of 16 bytes.
    if (i > 0) bytes[i - 1] = cuuint64_t(sizes[i] == 1 ? 8 : strides[i - 1]) * 2;
  }
  const CUresult status = encode_function()(
      map, dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      kDims, const_cast<void*>(first), map_sizes, bytes, map_box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The map of rows [sizes[0], sizes[1], sizes[2], dim], of which TMA will bring n_rows of n_heads
// heads at a time.
inline cudaError_t map_rows(DType dtype, const void* first, int64_t dim, const int64_t (&sizes)[3],
                            const int64_t (&strides)[3], int n_heads, int n_rows,
                            CUtensorMap* map) {
  // A broadcast dimension has one entry.
  const auto size = [&](int i) { return strides[i] == 0 ? 1 : sizes[i]; };
  return encode_map<4>(dtype, first, {dim, size(2), size(1), size(0)},
                       {strides[2], strides[1], strides[0]}, {kPanelItems, n_rows, n_heads, 1},
                       map);
}

// Keys, and with pages how far it is from a page and from a head to the next in the map's last
// dimension, which has both.
struct KeyMap {
  CUtensorMap map;
  int page_step, head_step;
};

struct Maps {
  KeyMap keys;
  CUtensorMap queries;
};

// Keys in pages come by so many at a time: tiles begin at a multiple of it, and pages are no
// smaller.
constexpr int kPageRows = 16;
constexpr int kGroupRows = 8;

// Keys in pages come with all panels at once, eight rows of each and then the next eight: half as
// many copies, of which there are many. Where the dimension is no multiple of a panel, a panel's
// eight rows come by themselves, as zeros can only be added to one of the map's dimensions.
__host__ __device__ inline bool comes_in_panels(const WindowAttention& a) {
  return a.dim % kPanelItems != 0;
}

inline cudaError_t map_paged_keys(const WindowAttention& a, KeyMap* keys) {
  const PageSteps steps(a);
  keys->page_step = int(steps.of_page);
  keys->head_step = int(steps.of_head);
  const bool in_panels = comes_in_panels(a);
  const int panels = int(a.dim) / kPanelItems, padded_panels = padded_dim(a) / kPanelItems;
  return encode_map<5>(a.dtype, a.key,
                       {in_panels ? a.dim : kPanelItems, kGroupRows, in_panels ? 1 : panels,
                        (int64_t(1) << a.pages.log2_size) / kGroupRows, steps.places},
                       {a.key_stride_n, kPanelItems, kGroupRows * a.key_stride_n, steps.items},
                       {kPanelItems, kGroupRows, in_panels ? 1 : padded_panels,
                        in_panels ? 1 : kPageRows / kGroupRows, 1},
                       &keys->map);
}

// Of n_keys keys at a time, and of n_rows queries of n_heads heads.
inline cudaError_t map_keys(const WindowAttention& a, int n_keys, KeyMap* keys) {
  if (a.pages.table) return map_paged_keys(a, keys);
  *keys = {};
  return map_rows(a.dtype, a.key, a.dim, {a.batch, a.kv_heads, a.total},
                  {a.key_stride_b, a.key_stride_g, a.key_stride_n}, 1, n_keys, &keys->map);
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
// The same out of pages, by a whole warp. Each lane holds the page of kPageRows rows, so the table
// is read for 512 rows at a time, and for the next ones before they are needed; and each asks for
// some of the rows of a tile.
class PagedKeys {
 public:
  // Brings rows [n, n + kRows) of a prompt that has `keys` keys. Those from `end` on are zero, or
  // what the last page holds: `n` is a multiple of kPageRows. `direction`: 1 if the next tile
  // probably follows this one, -1 if it comes before it.
  template <int kDim, int kRows>
  __device__ __forceinline__ void load(const WindowAttention& a, const KeyMap& map, char* tile,
                                       Barrier& full, int b, int keys, int end, int g, int n,
                                       int direction = 1) {
    if (b != b_ || n < first_ || n + kRows > first_ + kHeldRows)
      hold(a.pages, b, keys, direction > 0 ? n : n + kRows - kHeldRows, direction);
    const int lane = int(threadIdx.x) % kWarp, row = lane * kPageRows;
    const int page = __shfl_sync(kFullMask, page_, ((n - first_) / kPageRows + lane) % kWarp);
    if (row >= kRows) return;
    char* const to = tile + row * kDim * 2;
    const int group = (n + row & (1 << a.pages.log2_size) - 1) / kGroupRows;
    // A page that is not there is one before the first, for which TMA writes zeros.
    const int place = n + row < end ? page * map.page_step + g * map.head_step : -1;
    const auto copy = [&](int byte, int item, int group) {
      cute::SM90_TMA_LOAD_5D::copy(&map.map, reinterpret_cast<uint64_t*>(&full),
                                   uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL), to + byte,
                                   item, 0, 0, group, place);
    };
    if (!comes_in_panels(a)) return copy(0, 0, group);
    constexpr int kPanels = kDim / kPanelItems;
#pragma unroll 1
    for (int i = 0; i < kPanels * kPageRows / kGroupRows; ++i)
      copy(i * kAlignment, i % kPanels * kPanelItems, group + i / kPanels);
  }

 private:
  static constexpr int kHeldRows = kWarp * kPageRows;
  int b_ = -1, first_ = 0, page_ = 0;   // the pages of the rows from first_ on
  int next_first_ = 0, next_page_ = 0;  // and of those that are probably wanted next

  __device__ __forceinline__ void hold(const Pages& pages, int b, int keys, int first,
                                       int direction) {
    const auto look_up = [&](int from) {
      const int row = from + int(threadIdx.x) % kWarp * kPageRows;
      return row >= 0 && row < keys ? pages.of(b)[row >> pages.log2_size] : 0;
    };
    page_ = b == b_ && first == next_first_ ? next_page_ : look_up(first);
    b_ = b;
    first_ = first;
    next_first_ = first + direction * kHeldRows;
    next_page_ = look_up(next_first_);
  }
};

// The rows of a tile of keys, which has n_rows, from a multiple of eight on.
template <int kDim, bool kPaged>
__device__ Operand key_rows(const char* tile, int n_rows, int first = 0) {
  if constexpr (kPaged)
    return in_groups<kDim>(tile + first * kDim * 2);
  else
    return in_panels(tile + first * kRowBytes, n_rows);
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
