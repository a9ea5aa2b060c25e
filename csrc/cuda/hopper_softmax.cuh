// The softmax of query columns over keys, on Hopper: how a warpgroup measures a tile of keys.
//
// Queries are the rows of the product here, so a thread has 16 logits of each of its two queries
// and keeps a measure of its own for each; lanes are joined once, at the end.

#pragma once

#include "csrc/cuda/hopper.cuh"

namespace claa::cuda::hopper {

// Of kTiles * 64 columns. Largest: of the products, before they are scaled.
template <int kTiles>
struct ThreadMeasures {
  float largest[kTiles][2], sum[kTiles][2];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kTiles * 2; ++i) {
      largest[i / 2][i % 2] = -INFINITY;
      sum[i / 2][i % 2] = 0.f;
    }
  }

  // The row of the product that a thread has as its row 0 or 1 of a tile.
  __device__ static int row_of(int tile, int row) {
    return tile * kTileRows + int(threadIdx.x) % kWarpgroup / kWarp * 16 +
           int(threadIdx.x) % kWarp / 4 + row * 8;
  }

  // Takes in the logits of 64 keys; `factor` is positive. Unless all queries see all of them, they
  // see the keys from `from` on, and the query of a row those before to(row).
  template <class T, int kDim, class To>
  __device__ void add(const char* keys, const char* queries, int n_queries, float factor,
                      bool all_see, int from, To to) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (t * kTileRows >= n_queries) continue;
      float products[kTileRows / 2];
      multiply<T, kDim, kTileRows>(products, queries + t * kTileRows * kRowBytes, n_queries, keys,
                                   kTileRows);
      add(t, products, factor, all_see, from, to);
    }
  }

  // The same for the products of tile t of the queries.
  template <class To>
  __device__ void add(int t, float (&products)[kTileRows / 2], float factor, bool all_see, int from,
                      To to) {
    if (!all_see) {
      const int end[2] = {to(row_of(t, 0)), to(row_of(t, 1))};
#pragma unroll
      for (int i = 0; i < kTileRows / 2; ++i) {
        const int key = i / 4 * 8 + int(threadIdx.x) % 4 * 2 + i % 2;
        if (key < from || key >= end[i / 2 % 2]) products[i] = -INFINITY;
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float before = largest[t][row];
      float top = before;
#pragma unroll
      for (int i = 0; i < kTileRows / 4; ++i)
        top = fmaxf(top, products[i / 2 * 4 + row * 2 + i % 2]);
      // Where nothing was seen, anything finite will do.
      const float shift = top == -INFINITY ? 0.f : top * factor;
      float part[2] = {};
#pragma unroll
      for (int i = 0; i < kTileRows / 4; ++i)
        part[i % 2] += FastExp::exp(fmaf(products[i / 2 * 4 + row * 2 + i % 2], factor, -shift));
      sum[t][row] = sum[t][row] * FastExp::exp(fmaf(before, factor, -shift)) + (part[0] + part[1]);
      largest[t][row] = top;
    }
  }

  // Joins the lanes of a row and writes the columns below `n_columns`.
  __device__ void store(Measure* to, int n_columns, float factor) const {
#pragma unroll
    for (int i = 0; i < kTiles * 2; ++i) {
      const float top = largest[i / 2][i % 2];
      Measure measure{top == -INFINITY ? kLowest : top * factor, sum[i / 2][i % 2]};
      measure.join_lanes<FastExp>(1);
      measure.join_lanes<FastExp>(2);
      const int at = row_of(i / 2, i % 2);
      if (threadIdx.x % 4 == 0 && at < n_columns) to[at] = measure;
    }
  }
};

}  // namespace claa::cuda::hopper
