// The window's attention to every key: the engine of score_window and score_tokens.
//
// Cost: every key is read once (`lse` given), or once more for the tiles that were not retained.
// Without `lse` the softmax needs all logits of a row before the first result, so:
//   measure  each tile of keys: logits, and per row their maximum and sum of exponentials
//   emit     join the measures of all tiles of a row, then for each tile: probabilities, summed
//            over the window's queries
// The first kRetainBytes of exponentials stay in memory between measure and emit, which then need
// only scale them; the rest is multiplied twice, so memory is bounded whatever the number of keys.
// A round takes the key heads whose exponentials stay in the cache, or as many as keep all workers
// busy.
//
// Tiles are counted from the last key. So the tiles, and with them every sum, are the same whether
// a prompt stands alone or padded on the left.

#pragma once

#include "csrc/cpu/attention.h"

namespace claa::cpu::CLAA_ISA {

constexpr int64_t kRetainBytes = 16 << 20;
constexpr int64_t kRoundBytes = 512 << 10;

struct WindowPlan {
  const WindowAttention& a;
  int64_t halo;  // keys on each side of a tile that pooling looks at
  int64_t rows, row_stride, tiles, tile_keys, tile_floats, retained;
  int64_t heads, heads_per_round, rounds, rounds_at_once;
  int64_t slot_floats, measure_floats, tile_offset;

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
    slot_floats = AttentionSlot::floats(row_stride, a.group(), a.dim, tile_keys);
    measure_floats = 2 * tiles * row_stride;  // of one head
    tile_offset = a.workers * slot_floats + rounds_at_once * heads_per_round * measure_floats;
  }

  Schedule schedule() const {
    const int64_t heads_at_once = rounds_at_once * heads_per_round;
    const int64_t logits = a.lse ? 0 : heads_at_once * retained * tile_floats;
    const int64_t units = heads_per_round * tiles;
    return {.units = {units, a.lse ? 0 : units},
            .unit_cost = kTileKeys * a.dim * rows,
            .rounds = rounds,
            .rounds_at_once = rounds_at_once,
            // The sums read a vector that may begin in the last row and end behind it.
            .workspace_bytes = 4 * (tile_offset + logits + kRowAlign)};
  }

  float* workspace() const { return static_cast<float*>(a.workspace); }
  AttentionSlot slot(int64_t worker) const {
    return {workspace() + worker * slot_floats, row_stride, a.group(), a.dim, tile_keys};
  }
  // `seat`: one of the heads that are in work at a time.
  float* measures(int64_t seat) const {
    return workspace() + a.workers * slot_floats + seat * measure_floats;
  }
  // Where the exponentials of a tile wait for `emit`, or nullptr.
  float* retained_tile(int64_t seat, int64_t tile) const {
    if (tile >= retained) return nullptr;
    return workspace() + tile_offset + (seat * retained + tile) * tile_floats;
  }
};

// One key head of one prompt.
struct WindowHead {
  int64_t b, g;
  QueryRows queries;
  Keys keys;
  int64_t start;  // first valid key

  WindowHead(const WindowAttention& a, int64_t head, int64_t item_bytes)
      : b(head / a.kv_heads), g(head % a.kv_heads) {
    const int64_t query_offset = b * a.query_stride_b + g * a.group() * a.query_stride_h;
    queries = {.first = static_cast<const char*>(a.query) + query_offset * item_bytes,
               .outer = a.window,
               .inner = a.group(),
               .stride_outer = a.query_stride_w,
               .stride_inner = a.query_stride_h,
               .dim = a.dim};
    const int64_t key_offset = b * a.key_stride_b + g * a.key_stride_g;
    keys = {.first = static_cast<const char*>(a.key) + key_offset * item_bytes,
            .stride = a.key_stride_n};
    start = a.start.data ? a.start[b] : 0;
  }
};

// The keys of a tile, [begin, end), and with its halo what to multiply, [low, high).
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

// Hides what a query must not see: later keys, padding, keys outside the sliding window. Rows are
// in the order of the window's queries, so the visible ones of a key are neighbours.
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
                  const AttentionSlot& slot, float* tile) {
  const WindowAttention& a = plan.a;
  multiply_tile<T>(head.queries, head.keys, range.low, range.high, a.scale, slot, tile,
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
                            const AttentionSlot& slot) {
  const WindowAttention& a = plan.a;
  if (a.sink_logits) load_sinks(a, head, slot.row);
  for (int64_t r = 0; r < plan.rows; ++r) {
    const int64_t w = r / a.group(), h = head.g * a.group() + r % a.group();
    const bool is_padding = a.context() + w < head.start;
    float lse = a.lse[head.b * a.lse_stride_b + h * a.lse_stride_h + w];
    if (a.sink_logits) {
      const float top = max(lse, slot.row[r]);
      lse = top + std::log(std::exp(lse - top) + std::exp(slot.row[r] - top));
    }
    slot.shift[r] = is_padding ? 0.f : lse;
    slot.factor[r] = is_padding ? 0.f : 1.f;
  }
  for (int64_t r = plan.rows; r < plan.row_stride; ++r) slot.shift[r] = slot.factor[r] = 0.f;
}

// slot.sums[h, j] = sum over the window's queries of exponentials[j] * weight, for the n keys from
// `first_key` on. The keys take turns, so a weight is loaded once for all, and no sum waits for
// itself.
template <int n>
inline void sum_queries_of(const WindowPlan& plan, const AttentionSlot& slot,
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
      float* to = slot.sums + (h + lane) * plan.tile_keys + first_key;
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) to[i] = sum[i][lane];
    }
  }
}

inline void sum_queries(const WindowPlan& plan, const AttentionSlot& slot,
                        const float* exponentials, const float* weight, int64_t n_keys) {
  constexpr int kTogether = 8;
  int64_t j = 0;
  for (; j + kTogether <= n_keys; j += kTogether)
    sum_queries_of<kTogether>(plan, slot, exponentials, weight, j);
  for (; j < n_keys; ++j) sum_queries_of<1>(plan, slot, exponentials, weight, j);
}

// shift and factor of each row from the measures of all tiles. Every worker joins those of its
// heads itself: that is little work, and a step less to wait for.
inline void shifts_from_measures(const WindowPlan& plan, const WindowHead& head, int64_t seat,
                                 const AttentionSlot& slot) {
  for (int64_t r = plan.rows; r < plan.row_stride; ++r) slot.row[r] = 0.f;
  if (plan.a.sink_logits) load_sinks(plan.a, head, slot.row);
  join_measures(plan.measures(seat), plan.tiles, plan.row_stride, plan.rows,
                plan.a.sink_logits ? slot.row : nullptr, slot.shift, slot.factor);
}

template <class T>
void measure(const WindowPlan& plan, const WindowHead& head, int64_t seat, int64_t tile_index,
             const AttentionSlot& slot) {
  TileRange range(plan, tile_index, plan.a.total);
  float* tile = plan.retained_tile(seat, tile_index);
  const bool keep = tile != nullptr;
  if (!keep) {  // the neighbours measure the halo; it is multiplied here only to be kept
    tile = slot.tile;
    range.low = range.begin, range.high = range.end;
  }
  compute_tile<T>(plan, head, range, slot, tile);
  float* measures = plan.measures(seat) + 2 * tile_index * plan.row_stride;
  measure_tile(tile, range.high - range.low, range.begin - range.low, range.end - range.low,
               plan.row_stride, plan.rows, keep, measures, measures + plan.row_stride);
}

// Leaves the summed probabilities of the keys [low, high) in slot.sums.
template <class T>
void sum_probabilities(const WindowPlan& plan, const WindowHead& head, int64_t seat,
                       int64_t tile_index, const TileRange& range, const AttentionSlot& slot) {
  float* kept = plan.a.lse ? nullptr : plan.retained_tile(seat, tile_index);
  const int64_t n_keys = range.high - range.low;
  if (kept) {
    const float* largest = plan.measures(seat) + 2 * tile_index * plan.row_stride;
    for_each_vector(plan.rows, [&](auto lanes, int64_t r) {
      using V = decltype(lanes);
      const V scale = exp(load<V>(largest + r) - load<V>(slot.shift + r));
      store(slot.row + r, scale * load<V>(slot.factor + r));
    });
    sum_queries(plan, slot, kept, slot.row, n_keys);
  } else {
    compute_tile<T>(plan, head, range, slot, slot.tile);
    for_each_vector(plan.rows, [&](auto lanes, int64_t r) {
      using V = decltype(lanes);
      for (int64_t j = 0; j < n_keys; ++j) {
        float* at = slot.tile + j * plan.row_stride + r;
        store(at, exp(load<V>(at) - load<V>(slot.shift + r)));
      }
    });
    sum_queries(plan, slot, slot.tile, slot.factor, n_keys);
  }
}

// What a worker's slot holds of a head: its queries, and when it emits also its shifts. Queries are
// not packed anew for tiles of which nothing is multiplied.
template <class T>
void prepare(const WindowPlan& plan, const WindowHead& head, int64_t head_index, int64_t seat,
             const AttentionSlot& slot, Portion& portion) {
  const int64_t wanted = (head_index + 1) * kSteps + portion.step;
  if (portion.prepared == wanted) return;
  const bool measuring = !plan.a.lse && portion.step == 0;
  const bool multiplies = measuring || plan.a.lse || plan.retained < plan.tiles;
  if (multiplies && portion.prepared / kSteps != head_index + 1)
    pack_queries<T>(head.queries, slot.panel);
  portion.prepared = wanted;
  if (plan.a.lse)
    shifts_from_lse(plan, head, slot);
  else if (!measuring)
    shifts_from_measures(plan, head, seat, slot);
}

// Runs a portion. `emit(b, g, sums, sums_stride, range)` gets the summed probabilities of each
// query head of the group for the context keys [low, high) of a tile and writes the results of
// [begin, end).
template <class Emit>
void run_window(const WindowPlan& plan, Portion& portion, Emit emit) {
  const WindowAttention& a = plan.a;
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const AttentionSlot slot = plan.slot(portion.worker);
    for (int64_t i = portion.begin; i < portion.end; ++i) {
      const int64_t of_round = i / plan.tiles, tile_index = i % plan.tiles;
      const int64_t head_index = portion.round * plan.heads_per_round + of_round;
      if (head_index >= plan.heads) return;  // the last round may have fewer
      const int64_t seat = portion.place * plan.heads_per_round + of_round;
      const WindowHead head(a, head_index, T::kBytes);
      prepare<T>(plan, head, head_index, seat, slot, portion);
      if (!a.lse && portion.step == 0) {
        measure<T>(plan, head, seat, tile_index, slot);
        continue;
      }
      const TileRange range(plan, tile_index, a.context());
      if (range.begin >= range.end) continue;  // only window keys
      sum_probabilities<T>(plan, head, seat, tile_index, range, slot);
      emit(head.b, head.g, slot.sums, plan.tile_keys, range);
    }
  });
}

}  // namespace claa::cpu::CLAA_ISA
