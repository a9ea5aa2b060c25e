// Products of a few query rows with many keys, tile by tile, and the softmax over all keys.
//
// The query rows of one key head (its query heads times the window or the block of queries) lie
// side by side in vector lanes: a tile holds [keys, query rows] logits. So one read of a key serves
// all rows of its group, the sum over keys runs in key order for every row whatever the tile, and
// no reduction shuffles lanes. Rows are ordered outer * inner + i; the ops reduce over `outer`
// (score_window: the queries of the window; peak_attention: the heads of the group) and keep
// `inner`.

#pragma once

#include "csrc/cpu/vec.h"

namespace claa::cpu::CLAA_ISA {

constexpr int64_t kTileKeys = 512;  // keys of one tile, without the halo that pooling reads
constexpr int64_t kStepBlock = 64;  // steps of a product that form one partial sum
constexpr int64_t kLineSteps = 16;  // steps in one cache line of a key
constexpr int64_t kRowAlign = 8;    // rows of a tile: a multiple of this in every build
constexpr int64_t kBlockKeys = kLanes == 16 ? 12 : 6;  // times 2 vectors of rows: fills registers

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

// The first query row and the keys of one key head of one prompt; T reads their dtype.
template <class T>
const char* first_query_row(const QueryKey& p, int64_t b, int64_t g) {
  const int64_t offset = b * p.query_stride_b + g * p.group() * p.query_stride_h;
  return static_cast<const char*>(p.query) + offset * T::kBytes;
}
template <class T>
Keys keys_of(const QueryKey& p, int64_t b, int64_t g) {
  const int64_t offset = b * p.key_stride_b + g * p.key_stride_g;
  return {.first = static_cast<const char*>(p.key) + offset * T::kBytes, .stride = p.key_stride_n};
}

// One key as floats.
template <class T>
void convert_row(const char* from, int64_t dim, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, T::to_float(from + d * T::kBytes));
  for (; d < dim; ++d) to[d] = T::to_float_one(from + d * T::kBytes);
}

// The scratch memory of one worker, in floats.
struct AttentionScratch {
  float* panel;  // [blocks of rows][dim][rows of the block]: queries in the order they are read
  float* keys;   // [kBlockKeys, dim]: keys converted to floats, where memory holds another dtype
  float* tile;   // [tile_keys, row_stride]
  float* sums;   // [inner, tile_keys]
  // [row_stride] each, with room after the end for a vector that begins in the last row
  float *row, *shift, *factor;

  static int64_t floats(int64_t row_stride, int64_t inner, int64_t dim, int64_t tile_keys) {
    return round_up(row_stride * dim + kBlockKeys * dim + tile_keys * row_stride +
                        inner * tile_keys + 3 * (row_stride + kRowAlign),
                    kRowAlign);
  }

  AttentionScratch(float* base, int64_t row_stride, int64_t inner, int64_t dim, int64_t tile_keys)
      : panel(base),
        keys(panel + row_stride * dim),
        tile(keys + kBlockKeys * dim),
        sums(tile + tile_keys * row_stride),
        row(sums + inner * tile_keys),
        shift(row + row_stride + kRowAlign),
        factor(shift + row_stride + kRowAlign) {}
};

// How one step of a product reads its two operands, 4 bytes of each: one float, or two bfloat16
// where the processor multiplies such pairs.
struct FloatStep {
  static constexpr int64_t kItems = 1;

  template <class V>
  static V accumulate(V sum, V query, float key) {
    return multiply_add(query, key, sum);
  }
  template <class T>
  static float pack(const char* from) {
    return T::to_float_one(from);
  }
};

#if defined(__AVX512BF16__)
struct PairStep {
  static constexpr int64_t kItems = 2;

  static Vec accumulate(Vec sum, Vec query, float key) {
    return bits_as<Vec>(_mm512_dpbf16_ps(bits_as<__m512>(sum), bits_as<__m512bh>(query),
                                         bits_as<__m512bh>(splat(key))));
  }
  static RowVec accumulate(RowVec sum, RowVec query, float key) {
    return bits_as<RowVec>(_mm256_dpbf16_ps(bits_as<__m256>(sum), bits_as<__m256bh>(query),
                                            bits_as<__m256bh>(key - RowVec{})));
  }
  template <class T>
  static float pack(const char* from) {
    return load<float>(from);
  }
};
#endif

// Calls fn with the step that multiplies rows of T: a pair must not cross the end of a row.
template <class T, class Fn>
inline void with_step(int64_t dim, Fn fn) {
#if defined(__AVX512BF16__)
  if constexpr (T::kIsBfloat16) {
    if (dim % 2 == 0) return fn(PairStep{});
  }
#endif
  (void)dim;
  fn(FloatStep{});
}

// Bytes from a key to the keys that are prefetched while it is multiplied, 0 for none: the hardware
// prefetcher does not predict the order in which a product reads keys. `near`: the next block, into
// L1; `far`: the next tile, into L2, so that memory is read while exponentials are computed.
struct Ahead {
  int64_t near = 0, far = 0;
};

// Rows are multiplied in blocks of two vectors; the last block may be one vector, half a vector, or
// both.
inline int64_t block_rows(int64_t rows_left) {
  return min(2 * kLanes, round_up(rows_left, kRowLanes));
}

// Copies the query rows into `panel`, [blocks][steps][rows of the block]; the padding rows of the
// last block are zeros.
template <class T>
void pack_queries(const QueryRows& q, float* panel) {
  with_step<T>(q.dim, [&](auto step) {
    using Step = decltype(step);
    for (int64_t first = 0; first < q.rows(); first += 2 * kLanes) {
      const int64_t width = block_rows(q.rows() - first);
      for (int64_t lane = 0; lane < width; ++lane) {
        const int64_t r = first + lane;
        float* to = panel + lane;
        if (r >= q.rows()) {
          for (int64_t d = 0; d < q.dim; d += Step::kItems, to += width) *to = 0.f;
          continue;
        }
        const char* from =
            q.first + (r / q.inner * q.stride_outer + r % q.inner * q.stride_inner) * T::kBytes;
        for (int64_t d = 0; d < q.dim; d += Step::kItems, to += width)
          *to = Step::template pack<T>(from + d * T::kBytes);
      }
      panel += width * (q.dim / Step::kItems);
    }
  });
}

// out[j, row] = scale * panel[row] . keys[j] for j < n_keys and the rows of one block: `n_vectors`
// vectors, and half a vector more if has_half. Long products are summed in parts of kStepBlock
// steps. Meanwhile later keys are prefetched, one cache line of each at a time.
template <class Step, int n_keys, int n_vectors, bool has_half>
inline void multiply_block(const float* panel, int64_t steps, const char* keys, int64_t key_bytes,
                           Ahead ahead, float scale, float* out, int64_t out_stride) {
  constexpr int64_t width = n_vectors * kLanes + (has_half ? kRowLanes : 0);
  for (int64_t first = 0; first < steps; first += kStepBlock) {
    const int64_t end = min(first + kStepBlock, steps);
    Vec sum[n_keys][n_vectors ? n_vectors : 1] = {};
    RowVec half_sum[n_keys] = {};
    for (int64_t d = first; d < end; ++d) {
      if (d % kLineSteps == 0) {
        const char* line = keys + d * 4;
        for (int j = 0; ahead.near && j < n_keys; ++j)
          __builtin_prefetch(line + ahead.near + j * key_bytes);
        for (int j = 0; ahead.far && j < n_keys; ++j)
          __builtin_prefetch(line + ahead.far + j * key_bytes, /*rw=*/0, /*locality=*/2);
      }
      Vec q[n_vectors ? n_vectors : 1];
      RowVec half_q = {};
#pragma GCC unroll 2
      for (int v = 0; v < n_vectors; ++v) q[v] = load<Vec>(panel + d * width + v * kLanes);
      if constexpr (has_half) half_q = load<RowVec>(panel + d * width + n_vectors * kLanes);
#pragma GCC unroll 12
      for (int j = 0; j < n_keys; ++j) {
        const float k = load<float>(keys + j * key_bytes + d * 4);
#pragma GCC unroll 2
        for (int v = 0; v < n_vectors; ++v) sum[j][v] = Step::accumulate(sum[j][v], q[v], k);
        if constexpr (has_half) half_sum[j] = Step::accumulate(half_sum[j], half_q, k);
      }
    }
    const auto finish = [&](auto part, float* to) {
      if (first) part += load<decltype(part)>(to);
      store(to, end == steps ? part * scale : part);
    };
#pragma GCC unroll 12
    for (int j = 0; j < n_keys; ++j) {
      float* to = out + j * out_stride;
#pragma GCC unroll 2
      for (int v = 0; v < n_vectors; ++v) finish(sum[j][v], to + v * kLanes);
      if constexpr (has_half) finish(half_sum[j], to + n_vectors * kLanes);
    }
  }
}

template <class Step, int n_keys>
inline void multiply_rows(const float* panel, int64_t rows, int64_t steps, const char* keys,
                          int64_t key_bytes, Ahead ahead, float scale, float* out,
                          int64_t out_stride) {
  for (int64_t row = 0; row < rows; row += 2 * kLanes) {
    const int64_t width = block_rows(rows - row);
    const auto multiply = [&](auto n_vectors, auto has_half) {
      multiply_block<Step, n_keys, n_vectors(), has_half()>(
          panel, steps, keys, key_bytes, row == 0 ? ahead : Ahead{}, scale, out + row, out_stride);
    };
    if (width == 2 * kLanes) {
      multiply(Constant<2>{}, Constant<false>{});
    } else if (width == kLanes) {
      multiply(Constant<1>{}, Constant<false>{});
    } else if constexpr (kRowLanes < kLanes) {
      if (width > kLanes)
        multiply(Constant<1>{}, Constant<true>{});
      else
        multiply(Constant<0>{}, Constant<true>{});
    }
    panel += width * steps;
  }
}

// tile[j - begin, r] = scale * (query row r . key j) for begin <= j < end
template <class T>
void multiply_tile(const QueryRows& q, const Keys& keys, int64_t begin, int64_t end, float scale,
                   const AttentionScratch& scratch, float* tile, int64_t row_stride) {
  with_step<T>(q.dim, [&](auto step) {
    using Step = decltype(step);
    const int64_t steps = q.dim / Step::kItems;
    for (int64_t j = begin; j < end; j += kBlockKeys) {
      const int64_t n_keys = min(kBlockKeys, end - j);
      const char* block = keys.first + j * keys.stride * T::kBytes;
      int64_t key_bytes = keys.stride * T::kBytes;
      if constexpr (Step::kItems * T::kBytes != 4) {
        for (int64_t i = 0; i < n_keys; ++i)
          convert_row<T>(block + i * key_bytes, q.dim, scratch.keys + i * q.dim);
        block = reinterpret_cast<const char*>(scratch.keys);
        key_bytes = q.dim * 4;
      }
      float* out = tile + (j - begin) * row_stride;
      if (n_keys == kBlockKeys) {
        const bool reads_keys = block != reinterpret_cast<const char*>(scratch.keys);
        Ahead ahead;
        if (reads_keys && j + 2 * kBlockKeys <= end) ahead.near = kBlockKeys * key_bytes;
        if (reads_keys && j >= kTileKeys) ahead.far = -kTileKeys * key_bytes;
        multiply_rows<Step, kBlockKeys>(scratch.panel, q.rows(), steps, block, key_bytes, ahead,
                                        scale, out, row_stride);
      } else {
        for (int64_t i = 0; i < n_keys; ++i)
          multiply_rows<Step, 1>(scratch.panel, q.rows(), steps, block + i * key_bytes, key_bytes,
                                 {}, scale, out + i * row_stride, row_stride);
      }
    }
  });
}

// Calls fn(V{}, r) for the rows [r, r + lanes of V): whole vectors, then half of one if that is
// enough for the rest.
template <class Fn>
inline void for_each_vector(int64_t rows, Fn fn) {
  int64_t r = 0;
  for (; rows - r > kRowLanes; r += kLanes) fn(Vec{}, r);
  if (r < rows) fn(RowVec{}, r);
}

// The softmax partial of each query row in a tile: its largest logit over the n_keys keys, and the
// sum of exp(logit - largest) over the keys [first, last). With `keep` the exponentials replace the
// logits. Sums run from the last key to the first, so left padding only adds zeros at their end.
inline void softmax_partials(float* tile, int64_t n_keys, int64_t first, int64_t last,
                             int64_t row_stride, int64_t rows, bool keep, float* largest,
                             float* sum) {
  for_each_vector(rows, [&](auto lanes, int64_t r) {
    using V = decltype(lanes);
    float* logits = tile + r;
    V top = splat<V>(-kInfinity);
    for (int64_t j = 0; j < n_keys; ++j) {
      const V z = load<V>(logits + j * row_stride);
      top = z > top ? z : top;
    }
    const V shift = top == -kInfinity ? V{} : top;  // a row that sees no key of this tile
    const auto exponential = [&](int64_t j) {
      const V e = exp(load<V>(logits + j * row_stride) - shift);
      if (keep) store(logits + j * row_stride, e);
      return e;
    };
    V total = {};
    for (int64_t block = last; block > first; block -= kSumBlock) {
      V part = {};
      for (int64_t j = block - 1; j >= max(block - kSumBlock, first); --j) part += exponential(j);
      total += part;
    }
    if (keep) {
      for (int64_t j = 0; j < first; ++j) exponential(j);
      for (int64_t j = last; j < n_keys; ++j) exponential(j);
    }
    store(largest + r, top);
    store(sum + r, total);
  });
}

// Joins the softmax partials of all tiles, tile 0 first:
// probability = exp(logit - shift) * factor. A row that sees no key gets factor 0.
inline void join_partials(const float* partials, int64_t tiles, int64_t row_stride, int64_t rows,
                          const float* sink, float* shift, float* factor) {
  for_each_vector(rows, [&](auto lanes, int64_t r) {
    using V = decltype(lanes);
    V top = sink ? load<V>(sink + r) : splat<V>(-kInfinity);
    for (int64_t t = 0; t < tiles; ++t) {
      const V largest = load<V>(partials + 2 * t * row_stride + r);
      top = largest > top ? largest : top;
    }
    const V safe = top == -kInfinity ? V{} : top;
    V total = sink ? exp(load<V>(sink + r) - safe) : V{};
    for (int64_t t = 0; t < tiles; ++t) {
      const V largest = load<V>(partials + 2 * t * row_stride + r);
      total = multiply_add(load<V>(partials + (2 * t + 1) * row_stride + r), exp(largest - safe),
                           total);
    }
    store(shift + r, safe);
    store(factor + r, total == 0.f ? V{} : 1.f / total);
  });
}

}  // namespace claa::cpu::CLAA_ISA
