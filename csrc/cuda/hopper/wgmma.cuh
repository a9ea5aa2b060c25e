// Tiles in shared memory, and their products by wgmma, Hopper's matrix instruction (sm_90a).
//
// A tile is some rows of the head dimension, in panels of 64 items: a panel has 128 bytes of every
// row, swizzled, so that 16-byte piece c of row r lies at place c ^ (r % 8). That is how TMA writes
// it and how wgmma reads it. Eight rows of a panel are 1024 bytes at a multiple of 1024. What lies
// beyond the head dimension or beyond the last row is zero.

#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>

#include "csrc/cuda/attention.cuh"

namespace claa::cuda::hopper {

constexpr int kTileRows = 64;  // the rows of one wgmma
constexpr int kPanelItems = 64;
constexpr int kRowBytes = 128;  // of a panel
constexpr int kAlignment = 1024;
constexpr int kWarpgroup = 128;  // threads

// The bytes of kTileRows rows of 2-byte items.
template <int kDim>
constexpr int kTileBytes = kTileRows * kDim * 2;

// Writes `n` rows of a tile, by the threads [0, kThreads). `at(i)` is the address of row i, whose
// `dim` items are 16-byte aligned.
template <int kDim, int kThreads, class At>
__device__ void store_rows(char* tile, int n, int dim, int thread, At at) {
  constexpr int kPieces = kDim / 8;  // 16 bytes each
  constexpr int kBatch = 8;          // loads in flight
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

// The instruction that multiplies 64 rows by kColumns rows.
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

// Some rows of a tile, from the first of eight on: how far it is from a panel to the next, and from
// eight rows to the next eight.
struct Operand {
  const char* rows;
  int panel_bytes, group_bytes;

  // wgmma's descriptor of what lies `byte` behind the beginning of a panel: the address in units of
  // 16 bytes, the distance of eight rows, the swizzle. Only its lower word depends on the address.
  __device__ uint64_t descriptor(int panel, int byte) const {
    const uint64_t upper =
        uint64_t(cute::SM90::GMMA::LayoutType::B128) << 30 | unsigned(group_bytes) >> 4;
    return upper << 32 |
           (cute::cast_smem_ptr_to_uint(rows) >> 4) + ((panel * panel_bytes + byte) >> 4);
  }
};
// Of a tile of n_rows, panel after panel.
__device__ inline Operand in_panels(const char* rows, int n_rows) {
  return {rows, n_rows * kRowBytes, kAlignment};
}
// Of a tile that has eight rows of all panels, then the next eight.
template <int kDim>
__device__ Operand in_groups(const char* rows) {
  return {rows, kAlignment, kDim / kPanelItems * kAlignment};
}

template <int kProducts>
__device__ void fence_products(float (&x)[kProducts]) {
#pragma unroll
  for (int i = 0; i < kProducts; ++i) cute::warpgroup_fence_operand(x[i]);
}

// Starts the products of 64 rows of one tile with kColumns rows of another, by a warpgroup: x is
// not to be touched before finish_products.
//
// How the products lie: lane 4r + c of warp w has row 16w + r and columns 8j + 2c and 8j + 2c + 1
// at x[4j] and x[4j + 1], and row 16w + r + 8 and the same columns at x[4j + 2] and x[4j + 3].
template <class T, int kDim, int kColumns>
__device__ void start_products(float (&x)[kColumns / 2], const Operand& rows,
                               const Operand& columns, bool adds = false) {
  fence_products(x);
  cute::warpgroup_arrive();
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    const int panel = step / 4, byte = step % 4 * 32;
    const uint64_t a[1] = {rows.descriptor(panel, byte)};
    const uint64_t b[1] = {columns.descriptor(panel, byte)};
    const cute::SM90::GMMA::ScaleOut scale[1] = {step || adds ? cute::SM90::GMMA::ScaleOut::One
                                                              : cute::SM90::GMMA::ScaleOut::Zero};
    cute::detail::explode(Wgmma<T, kColumns>::fma, a, cute::seq<0>{}, b, cute::seq<0>{}, x,
                          cute::make_seq<kColumns / 2>{}, scale, cute::seq<0>{});
  }
  cute::warpgroup_commit_batch();
}

// Waits for products; the last kInFlight that were started may still be running.
template <int kInFlight, int kProducts>
__device__ void finish_products(float (&x)[kProducts]) {
  cute::warpgroup_wait<kInFlight>();
  fence_products(x);
}

// Both at once. Other warpgroups keep the multiprocessor busy meanwhile.
template <class T, int kDim, int kColumns>
__device__ void multiply(float (&x)[kColumns / 2], const Operand& rows, const Operand& columns) {
  start_products<T, kDim, kColumns>(x, rows, columns);
  finish_products<0>(x);
}

}  // namespace claa::cuda::hopper
