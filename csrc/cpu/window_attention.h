// The window's attention to every key, which score_window and score_tokens share.
//
// Cost: every key is read once if `lse` is given; otherwise the keys of tiles that were not
// retained are read twice. Without `lse` the softmax needs all logits of a row before the first
// result, so:
//   first pass   for each tile of keys: logits, and the softmax partial of each query row
//   second pass  join the partials of all tiles, then for each tile: probabilities, summed over the
//                window's queries
// The first kRetainBytes of exponentials stay in memory between the passes, and the second pass
// only scales them; the rest is multiplied twice, so memory is bounded whatever the number of keys.
// A round takes the key heads whose exponentials stay in the cache, or as many as keep all workers
// busy.
//
// Tiles are counted from the last key, so the tiles, and with them every sum, are the same for a
// prompt alone and for the same prompt with left padding.

#pragma once

#include "csrc/cpu/attention.h"

namespace claa::cpu::CLAA_ISA {

constexpr int64_t kRetainBytes = 16 << 20;
constexpr int64_t kRoundBytes = 512 << 10;

struct WindowPlan {
  const WindowAttention& a;
  int64_t halo;  // keys on each side of a tile that pooling reads
  int64_t rows, row_stride, tiles, tile_keys, tile_floats, retained;
  int64_t heads, heads_per_round, rounds, rounds_at_once;
  int64_t scratch_floats, partial_floats, tile_offset;

  WindowPlan(const WindowAttention& attention, int64_t halo) : a(attention), halo(halo) {
    rows = a.group() * a.window;
    row_stride = round_up(rows, kRowAlign);
    tiles = ceil_div(a.total, kTileKeys);
    tile_keys = min(kTileKeys + 2 * halo, a.total);
    tile_floats = round_up(tile_keys * row_stride, kRowAlign);
    heads = a.batch * a.kv_heads;
    retained = min(tiles, kRetainBytes / 4 / max(tile_floats, int64_t(1)));
    heads_per_round = heads;
    if (!a.lse) {
      const int64_t head_bytes = 4 * tiles * tile_floats;
      const int64_t busy = ceil_div(4 * a.workers, tiles);  // heads that give every worker tiles
      heads_per_round = max(kRoundBytes / head_bytes, min(busy, kRetainBytes / head_bytes));
    }
    heads_per_round = max(int64_t(1), min(heads, heads_per_round));
    rounds = ceil_div(heads, heads_per_round);
    const int64_t round_bytes = 4 * heads_per_round * retained * tile_floats;
    rounds_at_once = max(int64_t(1), min(rounds, kRetainBytes / max(round_bytes, int64_t(1))));
    scratch_floats = AttentionScratch::floats(row_stride, a.group(), a.dim, tile_keys);
    partial_floats = 2 * tiles * row_stride;  // of one head
    tile_offset = a.workers * scratch_floats + rounds_at_once * heads_per_round * partial_floats;
  }

  Schedule schedule() const {
    const int64_t heads_at_once = rounds_at_once * heads_per_round;
    const int64_t logits = a.lse ? 0 : heads_at_once * retained * tile_floats;
    const int64_t units = heads_per_round * tiles;
    return {.units = {units, a.lse ? 0 : units},
            .unit_cost = kTileKeys * a.dim * rows,
            .rounds = rounds,
            .rounds_at_once = rounds_at_once,
            // The sums read a vector that may begin in the last row and end after it.
            .workspace_bytes = 4 * (tile_offset + logits + kRowAlign)};
  }

  float* workspace() const { return static_cast<float*>(a.workspace); }
  AttentionScratch scratch(int64_t worker) const {
    return {workspace() + worker * scratch_floats, row_stride, a.group(), a.dim, tile_keys};
  }
  // `head_slot`: which of the heads whose rounds are open.
  float* partials(int64_t head_slot) const {
    return workspace() + a.workers * scratch_floats + head_slot * partial_floats;
  }
  // The exponentials of a tile, kept for the second pass; nullptr if they are not retained.
  float* retained_tile(int64_t head_slot, int64_t tile) const {
    if (tile >= retained) return nullptr;
    return workspace() + tile_offset + (head_slot * retained + tile) * tile_floats;
  }
};

// One key head of one prompt.
struct WindowHead {
  int64_t b, g;
  QueryRows queries;
  Keys keys;
  int64_t start;  // the first valid key
};

template <class T>
WindowHead window_head(const WindowAttention& a, int64_t head) {
  const int64_t b = head / a.kv_heads, g = head % a.kv_heads;
  return {.b = b,
          .g = g,
          .queries = {.first = first_query_row<T>(a, b, g),
                      .outer = a.window,
                      .inner = a.group(),
                      .stride_outer = a.query_stride_w,
                      .stride_inner = a.query_stride_h,
                      .dim = a.dim},
          .keys = keys_of<T>(a, b, g),
          .start = a.start.data ? a.start[b] : 0};
}

// The keys of a tile, [begin, end), and with its halo the keys to multiply, [low, high).
struct TileRange {
  int64_t begin, end, low, high;

  TileRange(const WindowPlan& plan, int64_t tile, int64_t limit) {
    const int64_t last = plan.a.total - tile * kTileKeys;
    begin = max(int64_t(0), last - kTileKeys);
    end = min(last, limit);
    low = max(int64_t(0), begin - plan.halo);
    high = min(last + plan.halo, limit);
  }
};

// Masks what a query must not see: later keys, padding, keys outside the sliding window. Rows are
// in the order of the window's queries, so the rows that see a key are consecutive.
inline void mask_tile(const WindowAttention& a, int64_t start, const TileRange& range,
                      int64_t row_stride, float* tile) {
  const int64_t context = a.context(), group = a.group();
  if (range.low >= start && range.high <= context && !a.sliding_window) return;
  for (int64_t j = range.low; j < range.high; ++j) {
    int64_t from = max(int64_t(0), j - context), to = a.window;  // queries that see key j
    if (a.sliding_window) to = min(to, max(from, j - context + a.sliding_window));
    if (j < start) to = from;
    float* row = tile + (j - range.low) * row_stride;
    for (int64_t r = 0; r < from * group; ++r) row[r] = -kInfinity;
    for (int64_t r = to * group; r < a.window * group; ++r) row[r] = -kInfinity;
  }
}

template <class T>
void compute_tile(const WindowPlan& plan, const WindowHead& head, const TileRange& range,
                  const AttentionScratch& scratch, float* tile) {
  const WindowAttention& a = plan.a;
  multiply_tile<T>(head.queries, head.keys, range.low, range.high, a.scale, scratch, tile,
                   plan.row_stride);
  if (a.softcap != 0.f) {
    for (int64_t j = 0; j < range.high - range.low; ++j) {
      for_each_vector(plan.rows, [&](auto lanes, int64_t r) {
        using V = decltype(lanes);
        float* z = tile + j * plan.row_stride + r;
        store(z, a.softcap * tanh(load<V>(z) / a.softcap));
      });
    }
  }
  mask_tile(a, head.start, range, plan.row_stride, tile);
}

// The sink logit of each row.
inline void load_sinks(const WindowAttention& a, const WindowHead& head, float* rows) {
  with_dtype(a.sinks_dtype, [&](auto type) {
    using T = decltype(type);
    const char* sink_logits = static_cast<const char*>(a.sink_logits);
    for (int64_t r = 0; r < a.window * a.group(); ++r) {
      const int64_t h = head.g * a.group() + r % a.group();
      rows[r] = T::to_float_one(sink_logits + h * T::kBytes);
    }
  });
}

// shift and factor of each row from the attention's own logsumexp.
inline void shifts_from_lse(const WindowPlan& plan, const WindowHead& head,
                            const AttentionScratch& scratch) {
  const WindowAttention& a = plan.a;
  if (a.sink_logits) load_sinks(a, head, scratch.row);
  for (int64_t r = 0; r < plan.rows; ++r) {
    const int64_t w = r / a.group(), h = head.g * a.group() + r % a.group();
    const bool is_padding = a.context() + w < head.start;
    float lse = a.lse[head.b * a.lse_stride_b + h * a.lse_stride_h + w];
    if (a.sink_logits) {
      const float top = max(lse, scratch.row[r]);
      lse = top + std::log(std::exp(lse - top) + std::exp(scratch.row[r] - top));
    }
    scratch.shift[r] = is_padding ? 0.f : lse;
    scratch.factor[r] = is_padding ? 0.f : 1.f;
  }
  for (int64_t r = plan.rows; r < plan.row_stride; ++r) scratch.shift[r] = scratch.factor[r] = 0.f;
}

// scratch.sums[h, j] = sum over the window's queries of exponentials[j] * weight, for the n keys
// from `first_key` on. The keys are interleaved: a weight is loaded once for all of them, and no
// addition waits for the one before it.
template <int n>
inline void sum_queries_of(const WindowPlan& plan, const AttentionScratch& scratch,
                           const float* exponentials, const float* weight, int64_t first_key) {
  const int64_t group = plan.a.group(), rows = plan.rows, stride = plan.row_stride;
  const float* keys = exponentials + first_key * stride;
  for (int64_t h = 0; h < group; h += 4) {
    Vec4 sum[n] = {};  // lanes beyond the group hold sums of other rows and are dropped
    for (int64_t first = h; first < rows; first += kSumBlock * group) {
      const int64_t end = min(first + kSumBlock * group, rows);
      Vec4 part[n] = {};
      for (int64_t r = first; r < end; r += group) {
        const Vec4 w = load<Vec4>(weight + r);
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i)
          part[i] = multiply_add(load<Vec4>(keys + i * stride + r), w, part[i]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) sum[i] += part[i];
    }
    for (int64_t lane = 0; lane < min(int64_t(4), group - h); ++lane) {
      float* to = scratch.sums + (h + lane) * plan.tile_keys + first_key;
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) to[i] = sum[i][lane];
    }
  }
}

inline void sum_queries(const WindowPlan& plan, const AttentionScratch& scratch,
                        const float* exponentials, const float* weight, int64_t n_keys) {
  constexpr int kTogether = 8;
  int64_t j = 0;
  for (; j + kTogether <= n_keys; j += kTogether)
    sum_queries_of<kTogether>(plan, scratch, exponentials, weight, j);
  for (; j < n_keys; ++j) sum_queries_of<1>(plan, scratch, exponentials, weight, j);
}

// shift and factor of each row from the softmax partials of all tiles. Every worker joins those of
// its heads itself: it is little work, and saves a step that all would wait for.
inline void shifts_from_partials(const WindowPlan& plan, const WindowHead& head, int64_t head_slot,
                                 const AttentionScratch& scratch) {
  for (int64_t r = plan.rows; r < plan.row_stride; ++r) scratch.row[r] = 0.f;
  if (plan.a.sink_logits) load_sinks(plan.a, head, scratch.row);
  join_partials(plan.partials(head_slot), plan.tiles, plan.row_stride, plan.rows,
                plan.a.sink_logits ? scratch.row : nullptr, scratch.shift, scratch.factor);
}

template <class T>
void first_pass(const WindowPlan& plan, const WindowHead& head, int64_t head_slot,
                int64_t tile_index, const AttentionScratch& scratch) {
  TileRange range(plan, tile_index, plan.a.total);
  float* tile = plan.retained_tile(head_slot, tile_index);
  const bool keep = tile != nullptr;
  if (!keep) {  // the halo counts in its own tile; it is multiplied here only to be kept
    tile = scratch.tile;
    range.low = range.begin, range.high = range.end;
  }
  compute_tile<T>(plan, head, range, scratch, tile);
  float* partials = plan.partials(head_slot) + 2 * tile_index * plan.row_stride;
  softmax_partials(tile, range.high - range.low, range.begin - range.low, range.end - range.low,
                   plan.row_stride, plan.rows, keep, partials, partials + plan.row_stride);
}

// scratch.sums = the summed probabilities of the keys [low, high).
template <class T>
void sum_probabilities(const WindowPlan& plan, const WindowHead& head, int64_t head_slot,
                       int64_t tile_index, const TileRange& range,
                       const AttentionScratch& scratch) {
  float* kept = plan.a.lse ? nullptr : plan.retained_tile(head_slot, tile_index);
  const int64_t n_keys = range.high - range.low;
  if (kept) {
    const float* largest = plan.partials(head_slot) + 2 * tile_index * plan.row_stride;
    for_each_vector(plan.rows, [&](auto lanes, int64_t r) {
      using V = decltype(lanes);
      const V scale = exp(load<V>(largest + r) - load<V>(scratch.shift + r));
      store(scratch.row + r, scale * load<V>(scratch.factor + r));
    });
    sum_queries(plan, scratch, kept, scratch.row, n_keys);
  } else {
    compute_tile<T>(plan, head, range, scratch, scratch.tile);
    for_each_vector(plan.rows, [&](auto lanes, int64_t r) {
      using V = decltype(lanes);
      for (int64_t j = 0; j < n_keys; ++j) {
        float* at = scratch.tile + j * plan.row_stride + r;
        store(at, exp(load<V>(at) - load<V>(scratch.shift + r)));
      }
    });
    sum_queries(plan, scratch, scratch.tile, scratch.factor, n_keys);
  }
}

// Brings a head into a worker's scratch memory: its queries, and in the second pass its shifts.
// Queries are not packed again for tiles of which nothing is multiplied.
template <class T>
void prepare(const WindowPlan& plan, const WindowHead& head, int64_t head_index, int64_t head_slot,
             const AttentionScratch& scratch, Portion& portion) {
  const int64_t wanted = (head_index + 1) * kSteps + portion.step;
  if (portion.prepared == wanted) return;
  const bool is_first_pass = !plan.a.lse && portion.step == 0;
  const bool multiplies = is_first_pass || plan.a.lse || plan.retained < plan.tiles;
  if (multiplies && portion.prepared / kSteps != head_index + 1)
    pack_queries<T>(head.queries, scratch.panel);
  portion.prepared = wanted;
  if (plan.a.lse)
    shifts_from_lse(plan, head, scratch);
  else if (!is_first_pass)
    shifts_from_partials(plan, head, head_slot, scratch);
}

// Runs a portion. `write(b, g, sums, sums_stride, range)` gets the summed probabilities of each
// query head of the group for the context keys [low, high) of a tile and writes the results of
// [begin, end).
template <class Write>
void run_window(const WindowPlan& plan, Portion& portion, Write write) {
  const WindowAttention& a = plan.a;
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const AttentionScratch scratch = plan.scratch(portion.worker);
    for (int64_t i = portion.begin; i < portion.end; ++i) {
      const int64_t of_round = i / plan.tiles, tile_index = i % plan.tiles;
      const int64_t head_index = portion.round * plan.heads_per_round + of_round;
      if (head_index >= plan.heads) return;  // the last round may have fewer
      const int64_t head_slot = portion.slot * plan.heads_per_round + of_round;
      const WindowHead head = window_head<T>(a, head_index);
      prepare<T>(plan, head, head_index, head_slot, scratch, portion);
      if (!a.lse && portion.step == 0) {
        first_pass<T>(plan, head, head_slot, tile_index, scratch);
        continue;
      }
      const TileRange range(plan, tile_index, a.context());
      if (range.begin >= range.end) continue;  // only window keys
      sum_probabilities<T>(plan, head, head_slot, tile_index, range, scratch);
      write(head.b, head.g, scratch.sums, plan.tile_keys, range);
    }
  });
}

}  // namespace claa::cpu::CLAA_ISA
