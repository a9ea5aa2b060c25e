// The softmax partials that a thread keeps in registers while its warpgroup goes over keys, for
// products whose rows are query rows, and for products whose columns are.

#pragma once

#include "csrc/cuda/hopper/wgmma.cuh"

namespace claa::cuda::hopper {

// Query rows as rows: kTiles * 64 of them. A thread has 16 logits of each of its two rows of a tile
// and keeps a partial of its own for either; lanes are joined once, at the end.
template <int kTiles>
struct PartialsOfRows {
  float max[kTiles][2], sum[kTiles][2];  // max: of the products, before they are scaled

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kTiles * 2; ++i) {
      max[i / 2][i % 2] = -INFINITY;
      sum[i / 2][i % 2] = 0.f;
    }
  }

  // The query row that a thread has as its row 0 or 1 of a tile.
  __device__ static int row_of(int tile, int row) {
    return tile * kTileRows + int(threadIdx.x) % kWarpgroup / kWarp * 16 +
           int(threadIdx.x) % kWarp / 4 + row * 8;
  }

  // Takes in the products of tile t with 64 keys. Unless all queries see all of these, they see the
  // keys from `from` on, and the query of a row those before to(row).
  template <class To>
  __device__ void add(int t, float (&x)[kTileRows / 2], float scale_log2, bool all_see, int from,
                      To to) {
    if (!all_see) {
      const int end[2] = {to(row_of(t, 0)), to(row_of(t, 1))};
#pragma unroll
      for (int i = 0; i < kTileRows / 2; ++i) {
        const int key = i / 4 * 8 + int(threadIdx.x) % 4 * 2 + i % 2;
        if (key < from || key >= end[i / 2 % 2]) x[i] = -INFINITY;
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float before = max[t][row];
      float top = before;
#pragma unroll
      for (int i = 0; i < kTileRows / 4; ++i) top = fmaxf(top, x[i / 2 * 4 + row * 2 + i % 2]);
      // Where nothing was seen, anything finite will do.
      const float shift = top == -INFINITY ? 0.f : top * scale_log2;
      float part[2] = {};
#pragma unroll
      for (int i = 0; i < kTileRows / 4; ++i)
        part[i % 2] += FastExp::exp(fmaf(x[i / 2 * 4 + row * 2 + i % 2], scale_log2, -shift));
      sum[t][row] =
          sum[t][row] * FastExp::exp(fmaf(before, scale_log2, -shift)) + (part[0] + part[1]);
      max[t][row] = top;
    }
  }

  // Joins the four lanes of each query row and writes the rows below `n_rows`.
  __device__ void store(SoftmaxPartial* to, int n_rows, float scale_log2) const {
#pragma unroll
    for (int i = 0; i < kTiles * 2; ++i) {
      const float top = max[i / 2][i % 2];
      SoftmaxPartial partial{top == -INFINITY ? kLowest : top * scale_log2, sum[i / 2][i % 2]};
      partial.join_lanes<FastExp>(1);
      partial.join_lanes<FastExp>(2);
      const int row = row_of(i / 2, i % 2);
      if (threadIdx.x % 4 == 0 && row < n_rows) to[row] = partial;
    }
  }
};

// Query rows as columns: kRows of them. A thread keeps a partial for each of its columns, 8j + 2c
// and 8j + 2c + 1 in lane 4r + c, at [2j] and [2j + 1].
template <int kRows>
struct PartialsOfColumns {
  static constexpr int kCount = kRows / 4;
  float max[kCount], sum[kCount];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      max[i] = kLowest;
      sum[i] = 0.f;
    }
  }

  // Takes in the logits of the thread's two keys; all lanes of a warp call it.
  __device__ void add(const float (&z)[kRows / 2]) {
    // Sums are scaled down only when they would grow too much, which is rare and saves a third of
    // the exponentials.
    constexpr float kSlack = 16.f;
    bool is_more = false;
#pragma unroll
    for (int k = 0; k < kRows / 2; ++k) is_more |= z[k] > max[k / 4 * 2 + k % 2] + kSlack;
    if (__any_sync(kFullMask, is_more)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float top = fmaxf(max[i], fmaxf(z[i / 2 * 4 + i % 2], z[i / 2 * 4 + i % 2 + 2]));
        sum[i] *= FastExp::exp(max[i] - top);
        max[i] = top;
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      sum[i] += FastExp::exp(z[i / 2 * 4 + i % 2] - max[i]) +
                FastExp::exp(z[i / 2 * 4 + i % 2 + 2] - max[i]);
  }

  // Joins lanes that have the same columns: a lane hands over half of those that it still has and
  // keeps the other half.
  template <int kStep>
  __device__ void join(int lane) {
    constexpr int kHalf = kCount * kStep / kWarp;
    const bool upper = lane & kStep;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const int j = i + kHalf;
      const SoftmaxPartial other{__shfl_xor_sync(kFullMask, upper ? max[i] : max[j], kStep),
                                 __shfl_xor_sync(kFullMask, upper ? sum[i] : sum[j], kStep)};
      SoftmaxPartial mine{upper ? max[j] : max[i], upper ? sum[j] : sum[i]};
      mine.template join<FastExp>(other);
      max[i] = mine.max;
      sum[i] = mine.sum;
    }
  }

  // Writes all columns of the warp.
  __device__ void store(SoftmaxPartial* to, int lane) {
    join<16>(lane);
    join<8>(lane);
    join<4>(lane);
    const int first =
        (lane & 16 ? kCount / 2 : 0) + (lane & 8 ? kCount / 4 : 0) + (lane & 4 ? kCount / 8 : 0);
#pragma unroll
    for (int i = 0; i < kCount / 8; ++i)
      to[(first + i) / 2 * 8 + lane % 4 * 2 + (first + i) % 2] = {max[i], sum[i]};
  }
};

}  // namespace claa::cuda::hopper
