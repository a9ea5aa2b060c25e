// peak_attention: the most attention any head pays from each query to each key.
//
// As in window_attention.h the softmax needs all logits of a row first, so tiles are measured,
// joined and multiplied once more to emit. Queries go in blocks, so that a block times the heads
// of a group fills the vectors; a tile of keys is read for all blocks while it is in the cache. A
// round takes as many blocks of one prompt as their measures fit in kMeasureBytes, and as many
// rounds may be open.

#include "csrc/cpu/attention.h"

namespace claa::cpu::CLAA_ISA {

namespace {

constexpr int64_t kRows = 64;  // wanted rows of a block: queries times heads of a group
constexpr int64_t kMeasureBytes = 16 << 20;

struct PeakPlan {
  const PeakAttentionParams& p;
  int64_t block_queries, blocks, row_stride, tiles, tile_keys, blocks_per_round, rounds_per_prompt;
  int64_t rounds, rounds_at_once, slot_floats, measure_floats, round_floats;

  explicit PeakPlan(const PeakAttentionParams& params) : p(params) {
    block_queries = min(round_up(max(kRows / p.group(), int64_t(1)), 4), round_up(p.queries, 4));
    blocks = ceil_div(p.queries, block_queries);
    row_stride = round_up(block_queries * p.group(), kRowAlign);
    tiles = ceil_div(p.total, kTileKeys);
    tile_keys = min(kTileKeys, p.total);
    measure_floats =
        2 * (tiles + 1) * row_stride;  // of one block and key head; last: shift, factor
    blocks_per_round = max(int64_t(1), kMeasureBytes / 4 / (measure_floats * p.kv_heads));
    blocks_per_round = min(blocks, blocks_per_round);
    rounds_per_prompt = ceil_div(blocks, blocks_per_round);
    rounds = p.batch * rounds_per_prompt;
    round_floats = blocks_per_round * p.kv_heads * measure_floats;
    rounds_at_once = max(int64_t(1), min(rounds, kMeasureBytes / 4 / round_floats));
    slot_floats = AttentionSlot::floats(row_stride, block_queries, p.dim, tile_keys);
  }

  float* workspace() const { return static_cast<float*>(p.workspace); }
  AttentionSlot slot(int64_t worker) const {
    return {workspace() + worker * slot_floats, row_stride, block_queries, p.dim, tile_keys};
  }
  // `block` counts within its round.
  float* measures(int64_t place, int64_t block, int64_t g) const {
    return workspace() + p.workers * slot_floats + place * round_floats +
           (block * p.kv_heads + g) * measure_floats;
  }
  float* shift(int64_t place, int64_t block, int64_t g) const {
    return measures(place, block, g) + 2 * tiles * row_stride;
  }
};

// One block of queries of one prompt against one key head.
template <class T>
struct PeakBlock {
  QueryRows queries;
  Keys keys;

  PeakBlock(const PeakPlan& plan, int64_t b, int64_t block, int64_t g) {
    const PeakAttentionParams& p = plan.p;
    const int64_t first = block * plan.block_queries;
    const int64_t query_offset =
        b * p.query_stride_b + g * p.group() * p.query_stride_h + first * p.query_stride_t;
    queries = {.first = static_cast<const char*>(p.query) + query_offset * T::kBytes,
               .outer = p.group(),
               .inner = min(plan.block_queries, p.queries - first),
               .stride_outer = p.query_stride_h,
               .stride_inner = p.query_stride_t,
               .dim = p.dim};
    const int64_t key_offset = b * p.key_stride_b + g * p.key_stride_g;
    keys = {.first = static_cast<const char*>(p.key) + key_offset * T::kBytes,
            .stride = p.key_stride_n};
  }

  // Logits of the keys [begin, end); padding keys get -infinity.
  void compute_tile(const PeakPlan& plan, int64_t start, int64_t begin, int64_t end,
                    const AttentionSlot& slot) const {
    pack_queries<T>(queries, slot.panel);
    multiply_tile<T>(queries, keys, begin, end, plan.p.scale, slot, slot.tile, plan.row_stride);
    for (int64_t j = begin; j < min(start, end); ++j)
      for (int64_t r = 0; r < queries.rows(); ++r)
        slot.tile[(j - begin) * plan.row_stride + r] = -kInfinity;
  }
};

// slot.sums[t, j] = the largest probability over the heads of the group
void peak_over_heads(const PeakPlan& plan, const QueryRows& q, const AttentionSlot& slot,
                     int64_t n_keys, const float* shift) {
  const float* factor = shift + plan.row_stride;
  for (int64_t j = 0; j < n_keys; ++j) {
    for_each_vector(q.rows(), [&](auto lanes, int64_t r) {
      using V = decltype(lanes);
      const V z = load<V>(slot.tile + j * plan.row_stride + r);
      store(slot.row + r, exp(z - load<V>(shift + r)) * load<V>(factor + r));
    });
    for (int64_t t = 0; t < q.inner; t += 4) {
      Vec4 peak = load<Vec4>(slot.row + t);  // lanes beyond the block are dropped
      for (int64_t h = 1; h < q.outer; ++h)
        peak = max_or_nan(peak, load<Vec4>(slot.row + h * q.inner + t));
      for (int64_t i = t; i < min(t + 4, q.inner); ++i)
        slot.sums[i * plan.tile_keys + j] = peak[i - t];
    }
  }
}

// out[b, t, begin .. end) from the peaks of key head g and what was there before.
void merge_peaks(const PeakPlan& plan, int64_t b, int64_t block, int64_t g, int64_t n_queries,
                 int64_t begin, int64_t end, const float* peaks) {
  const PeakAttentionParams& p = plan.p;
  for (int64_t i = 0; i < n_queries; ++i) {
    const int64_t t = block * plan.block_queries + i;
    float* out = p.out + (b * p.queries + t) * p.total;
    const float* before = out;
    if (g == 0)
      before = p.running ? p.running + b * p.running_stride_b + t * p.running_stride_t : nullptr;
    const float* peak = peaks + i * plan.tile_keys - begin;
    for (int64_t j = begin; j < end; ++j)
      out[j] = before ? max_or_nan(before[j], peak[j]) : peak[j];
  }
}

}  // namespace

Schedule schedule(const PeakAttentionParams& p) {
  const PeakPlan plan(p);
  return {.units = {p.kv_heads * plan.tiles, plan.blocks_per_round * p.kv_heads, plan.tiles},
          .unit_cost = kTileKeys * p.dim * plan.blocks_per_round * plan.row_stride,
          .rounds = plan.rounds,
          .rounds_at_once = plan.rounds_at_once,
          .workspace_bytes =
              4 * (p.workers * plan.slot_floats + plan.rounds_at_once * plan.round_floats)};
}

void run(const PeakAttentionParams& p, Portion& portion) {
  const PeakPlan plan(p);
  const int64_t b = portion.round / plan.rounds_per_prompt, place = portion.place;
  const int64_t first_block = portion.round % plan.rounds_per_prompt * plan.blocks_per_round;
  const int64_t blocks = min(plan.blocks_per_round, plan.blocks - first_block);
  const int64_t start = p.start.data ? p.start[b] : 0;
  const AttentionSlot slot = plan.slot(portion.worker);

  // Keys [from, to) of tile i, counted from the last key: the same sums with and without padding.
  const auto tile_begin = [&](int64_t i) { return max(int64_t(0), p.total - (i + 1) * kTileKeys); };
  const auto tile_end = [&](int64_t i) { return p.total - i * kTileKeys; };

  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const auto measure = [&](int64_t tile, int64_t g) {
      const int64_t n_keys = tile_end(tile) - tile_begin(tile);
      for (int64_t block = 0; block < blocks; ++block) {
        const PeakBlock<T> item(plan, b, first_block + block, g);
        item.compute_tile(plan, start, tile_begin(tile), tile_end(tile), slot);
        float* measures = plan.measures(place, block, g) + 2 * tile * plan.row_stride;
        measure_tile(slot.tile, n_keys, 0, n_keys, plan.row_stride, item.queries.rows(),
                     /*keep=*/false, measures, measures + plan.row_stride);
      }
    };
    const auto join = [&](int64_t block, int64_t g) {
      if (block >= blocks) return;  // a prompt's last round may have fewer
      float* shift = plan.shift(place, block, g);
      join_measures(plan.measures(place, block, g), plan.tiles, plan.row_stride,
                    PeakBlock<T>(plan, b, first_block + block, g).queries.rows(), nullptr, shift,
                    shift + plan.row_stride);
    };
    const auto emit = [&](int64_t tile) {
      const int64_t from = tile_begin(tile), to = tile_end(tile);
      for (int64_t g = 0; g < p.kv_heads; ++g) {
        for (int64_t block = 0; block < blocks; ++block) {
          const PeakBlock<T> item(plan, b, first_block + block, g);
          item.compute_tile(plan, start, from, to, slot);
          peak_over_heads(plan, item.queries, slot, to - from, plan.shift(place, block, g));
          merge_peaks(plan, b, first_block + block, g, item.queries.inner, from, to, slot.sums);
        }
      }
    };
    for (int64_t i = portion.begin; i < portion.end; ++i) {
      switch (portion.step) {
        case 0: measure(i % plan.tiles, i / plan.tiles); break;
        case 1: join(i / p.kv_heads, i % p.kv_heads); break;
        case 2: emit(i); break;
      }
    }
  });
}

}  // namespace claa::cpu::CLAA_ISA
