// Products of a few query rows with many keys, tile by tile, and the softmax over all keys.
//
// The rows of one key head (its query heads times the window or the block of queries) lie side by
// side in vector lanes: a tile holds [keys, rows] logits. So one read of a key serves all rows of
// its group, the sums over keys of a row run in key order whatever the tile, and a row of a tile
// needs no shuffles. Rows are ordered outer * inner + i; the ops reduce over `outer` (score_window:
// the queries of the window; peak_attention: the heads of the group) and keep `inner`.

#pragma once

#include "csrc/cpu/vec.h"

namespace claa::cpu::CLAA_ISA {

constexpr int64_t kTileKeys = 512;  // keys of one tile, without the halo of the pooling
constexpr int64_t kRowAlign = 16;   // floats: the widest vector of any build
constexpr int64_t kBlockKeys = kLanes == 16 ? 12 : 6;  // keys times 2 vectors of rows fit registers

struct QueryRows {
  const char* first;  // row 0
  int64_t outer, inner;
  int64_t stride_outer, stride_inner;  // in elements
  int64_t dim;

  int64_t rows() const { return outer * inner; }
};

struct Keys {
  const char* first;  // key 0
  int64_t stride;     // in elements
};

// The scratch of one worker, in floats.
struct AttentionSlot {
  float* panel;   // [blocks of rows][dim][rows of the block]: the queries as the product reads them
  float* keys;    // [kBlockKeys, dim]: keys as floats, where they are not floats in memory
  float* tile;    // [tile_keys, row_stride]
  float* sums;    // [inner, tile_keys]
  float* row;     // [row_stride] + one vector that reads past the end
  float* shift;   // [row_stride]
  float* factor;  // [row_stride]

  static int64_t floats(int64_t row_stride, int64_t inner, int64_t dim, int64_t tile_keys) {
    return round_up(row_stride * dim + kBlockKeys * dim + tile_keys * row_stride +
                        inner * tile_keys + row_stride + kRowAlign + 2 * row_stride,
                    kRowAlign);
  }

  AttentionSlot(float* base, int64_t row_stride, int64_t inner, int64_t dim, int64_t tile_keys)
      : panel(base),
        keys(panel + row_stride * dim),
        tile(keys + kBlockKeys * dim),
        sums(tile + tile_keys * row_stride),
        row(sums + inner * tile_keys),
        shift(row + row_stride + kRowAlign),
        factor(shift + row_stride) {}
};

// Copies the query rows into `panel`, with zeros for the rows that fill up the last vector.
template <class T>
void pack_queries(const QueryRows& q, float* panel) {
  const int64_t padded = round_up(q.rows(), kLanes);
  for (int64_t block = 0; block < padded; block += 2 * kLanes) {
    const int64_t width = min(2 * kLanes, padded - block);
    float* to = panel + block * q.dim;
    for (int64_t lane = 0; lane < width; ++lane) {
      const int64_t r = block + lane;
      const bool exists = r < q.rows();
      const int64_t offset =
          exists ? r / q.inner * q.stride_outer + r % q.inner * q.stride_inner : 0;
      const char* from = q.first + offset * T::kBytes;
      for (int64_t d = 0; d < q.dim; ++d)
        to[d * width + lane] = exists ? T::to_float_one(from + d * T::kBytes) : 0.f;
    }
  }
}

// out[j, 0 .. vectors * kLanes) = scale * panel . keys[j] for j < n_keys
template <int n_keys, int n_vectors>
inline void multiply_block(const float* panel, int64_t dim, const float* keys, int64_t key_stride,
                           float scale, float* out, int64_t out_stride) {
  Vec sum[n_keys][n_vectors] = {};
  for (int64_t d = 0; d < dim; ++d) {
    Vec q[n_vectors];
#pragma GCC unroll 2
    for (int v = 0; v < n_vectors; ++v) q[v] = load<Vec>(panel + (d * n_vectors + v) * kLanes);
#pragma GCC unroll 12
    for (int j = 0; j < n_keys; ++j) {
      const float k = keys[j * key_stride + d];
#pragma GCC unroll 2
      for (int v = 0; v < n_vectors; ++v) sum[j][v] += q[v] * k;
    }
  }
#pragma GCC unroll 12
  for (int j = 0; j < n_keys; ++j)
#pragma GCC unroll 2
    for (int v = 0; v < n_vectors; ++v) store(out + j * out_stride + v * kLanes, sum[j][v] * scale);
}

template <int n_keys>
inline void multiply_rows(const float* panel, int64_t padded_rows, int64_t dim, const float* keys,
                          int64_t key_stride, float scale, float* out, int64_t out_stride) {
  int64_t row = 0;
  for (; row + 2 * kLanes <= padded_rows; row += 2 * kLanes)
    multiply_block<n_keys, 2>(panel + row * dim, dim, keys, key_stride, scale, out + row,
                              out_stride);
  if (row < padded_rows)
    multiply_block<n_keys, 1>(panel + row * dim, dim, keys, key_stride, scale, out + row,
                              out_stride);
}

// tile[j - begin, r] = scale * (query row r . key j) for begin <= j < end
template <class T>
void multiply_tile(const QueryRows& q, const Keys& keys, int64_t begin, int64_t end, float scale,
                   const AttentionSlot& slot, float* tile, int64_t row_stride) {
  const int64_t padded = round_up(q.rows(), kLanes);
  const int64_t dim = q.dim;
  for (int64_t j = begin; j < end; j += kBlockKeys) {
    const int64_t n_keys = min(kBlockKeys, end - j);
    const char* from = keys.first + j * keys.stride * T::kBytes;
    const float* block = reinterpret_cast<const float*>(from);
    int64_t block_stride = keys.stride;
    if constexpr (T::kBytes != 4) {
      for (int64_t i = 0; i < n_keys; ++i) {
        const char* source = from + i * keys.stride * T::kBytes;
        float* target = slot.keys + i * dim;
        int64_t d = 0;
        for (; d + kLanes <= dim; d += kLanes)
          store(target + d, T::to_float(source + d * T::kBytes));
        for (; d < dim; ++d) target[d] = T::to_float_one(source + d * T::kBytes);
      }
      block = slot.keys;
      block_stride = dim;
    }
    float* out = tile + (j - begin) * row_stride;
    if (n_keys == kBlockKeys) {
      multiply_rows<kBlockKeys>(slot.panel, padded, dim, block, block_stride, scale, out,
                                row_stride);
    } else {
      for (int64_t i = 0; i < n_keys; ++i)
        multiply_rows<1>(slot.panel, padded, dim, block + i * block_stride, block_stride, scale,
                         out + i * row_stride, row_stride);
    }
  }
}

// The largest logit of each row over the keys of a tile, and the sum of exp(logit - largest).
// Sums go from the last key to the first: padding before the first then adds zeros at their end.
inline void measure_tile(const float* tile, int64_t n_keys, int64_t row_stride, int64_t rows,
                         float* largest, float* sum) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    Vec top = splat(-kInfinity);
    for (int64_t j = 0; j < n_keys; ++j) {
      const Vec z = load<Vec>(tile + j * row_stride + r);
      top = z > top ? z : top;
    }
    const Vec shift = top == -kInfinity ? Vec{} : top;  // a row that sees no key of this tile
    Vec total = {};
    for (int64_t last = n_keys; last > 0; last -= kSumBlock) {
      Vec part = {};
      for (int64_t j = last - 1; j >= max(last - kSumBlock, int64_t(0)); --j)
        part += exp(load<Vec>(tile + j * row_stride + r) - shift);
      total += part;
    }
    store(largest + r, top);
    store(sum + r, total);
  }
}

// Joins the measures of all tiles, tile 0 first: probability = exp(logit - shift) * factor.
// A row that sees no key gets factor 0.
inline void join_measures(const float* measures, int64_t tiles, int64_t row_stride, int64_t rows,
                          const float* sink, float* shift, float* factor) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    Vec top = sink ? load<Vec>(sink + r) : splat(-kInfinity);
    for (int64_t t = 0; t < tiles; ++t) {
      const Vec largest = load<Vec>(measures + 2 * t * row_stride + r);
      top = largest > top ? largest : top;
    }
    const Vec safe = top == -kInfinity ? Vec{} : top;
    Vec total = sink ? exp(load<Vec>(sink + r) - safe) : Vec{};
    for (int64_t t = 0; t < tiles; ++t) {
      const Vec largest = load<Vec>(measures + 2 * t * row_stride + r);
      total += load<Vec>(measures + (2 * t + 1) * row_stride + r) * exp(largest - safe);
    }
    store(shift + r, safe);
    store(factor + r, total == 0.f ? Vec{} : 1.f / total);
  }
}

}  // namespace claa::cpu::CLAA_ISA
