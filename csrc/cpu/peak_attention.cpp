// peak_attention: the largest attention of any head from each query to each key.
//
// As in window_attention.h the softmax needs all logits of a row first: a first pass finds the
// softmax partials of all tiles, they are joined, and a second pass multiplies again. Queries are
// taken in blocks, so that a block times the heads of a group fills the vectors; a tile of keys is
// read for all blocks while it is in the cache. A round takes as many blocks of one prompt as their
// partials fit in kPartialBytes, and as many rounds are open at once as fit in it together.

#include "csrc/cpu/attention.h"

namespace claa::cpu::CLAA_ISA {

namespace {

constexpr int64_t kRows = 64;  // target rows of a block: queries times heads of a group
constexpr int64_t kPartialBytes = 16 << 20;

struct PeakPlan {
  const PeakAttentionParams& p;
  int64_t block_queries, blocks, row_stride, tiles, tile_keys, blocks_per_round, rounds_per_prompt;
  int64_t rounds, rounds_at_once, scratch_floats, partial_floats, round_floats;

  explicit PeakPlan(const PeakAttentionParams& params) : p(params) {
    block_queries = min(round_up(max(kRows / p.group(), int64_t(1)), 4), round_up(p.queries, 4));
    blocks = ceil_div(p.queries, block_queries);
    row_stride = round_up(block_queries * p.group(), kRowAlign);
    tiles = ceil_div(p.total, kTileKeys);
    tile_keys = min(kTileKeys, p.total);
    // Of one block and key head: of each tile, then the shift and factor of each row.
    partial_floats = 2 * (tiles + 1) * row_stride;
    blocks_per_round = max(int64_t(1), kPartialBytes / 4 / (partial_floats * p.kv_heads));
    blocks_per_round = min(blocks, blocks_per_round);
    rounds_per_prompt = ceil_div(blocks, blocks_per_round);
    rounds = p.batch * rounds_per_prompt;
    round_floats = blocks_per_round * p.kv_heads * partial_floats;
    rounds_at_once = max(int64_t(1), min(rounds, kPartialBytes / 4 / round_floats));
    scratch_floats = AttentionScratch::floats(row_stride, block_queries, p.dim, tile_keys);
  }

  float* workspace() const { return static_cast<float*>(p.workspace); }
  AttentionScratch scratch(int64_t worker) const {
    return {workspace() + worker * scratch_floats, row_stride, block_queries, p.dim, tile_keys};
  }
  // `block` counts within its round.
  float* partials(int64_t slot, int64_t block, int64_t g) const {
    return workspace() + p.workers * scratch_floats + slot * round_floats +
           (block * p.kv_heads + g) * partial_floats;
  }
  float* shift(int64_t slot, int64_t block, int64_t g) const {
    return partials(slot, block, g) + 2 * tiles * row_stride;
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
    queries = {.first = first_query_row<T>(p, b, g) + first * p.query_stride_t * T::kBytes,
               .outer = p.group(),
               .inner = min(plan.block_queries, p.queries - first),
               .stride_outer = p.query_stride_h,
               .stride_inner = p.query_stride_t,
               .dim = p.dim};
    keys = keys_of<T>(p, b, g);
  }

  // Logits of the keys [begin, end); padding keys get -infinity.
  void compute_tile(const PeakPlan& plan, int64_t start, int64_t begin, int64_t end,
                    const AttentionScratch& scratch) const {
    pack_queries<T>(queries, scratch.panel);
    multiply_tile<T>(queries, keys, begin, end, plan.p.scale, scratch, scratch.tile,
                     plan.row_stride);
    for (int64_t j = begin; j < min(start, end); ++j)
      for (int64_t r = 0; r < queries.rows(); ++r)
        scratch.tile[(j - begin) * plan.row_stride + r] = -kInfinity;
  }
};

// scratch.sums[t, j] = the largest probability over the heads of the group
void peak_over_heads(const PeakPlan& plan, const QueryRows& q, const AttentionScratch& scratch,
                     int64_t n_keys, const float* shift) {
  const float* factor = shift + plan.row_stride;
  for (int64_t j = 0; j < n_keys; ++j) {
    for_each_vector(q.rows(), [&](auto lanes, int64_t r) {
      using V = decltype(lanes);
      const V z = load<V>(scratch.tile + j * plan.row_stride + r);
      store(scratch.row + r, exp(z - load<V>(shift + r)) * load<V>(factor + r));
    });
    for (int64_t t = 0; t < q.inner; t += 4) {
      Vec4 peak = load<Vec4>(scratch.row + t);  // lanes beyond the block are dropped
      for (int64_t h = 1; h < q.outer; ++h)
        peak = max_or_nan(peak, load<Vec4>(scratch.row + h * q.inner + t));
      for (int64_t i = t; i < min(t + 4, q.inner); ++i)
        scratch.sums[i * plan.tile_keys + j] = peak[i - t];
    }
  }
}

// out[b, t, begin .. end) = the maximum of the peaks of key head g and of what was there before.
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
              4 * (p.workers * plan.scratch_floats + plan.rounds_at_once * plan.round_floats)};
}

void run(const PeakAttentionParams& p, Portion& portion) {
  const PeakPlan plan(p);
  const int64_t b = portion.round / plan.rounds_per_prompt, slot = portion.slot;
  const int64_t first_block = portion.round % plan.rounds_per_prompt * plan.blocks_per_round;
  const int64_t blocks = min(plan.blocks_per_round, plan.blocks - first_block);
  const int64_t start = p.start.data ? p.start[b] : 0;
  const AttentionScratch scratch = plan.scratch(portion.worker);

  // Keys [begin, end) of tile i, counted from the last key: the same sums with and without padding.
  const auto tile_begin = [&](int64_t i) { return max(int64_t(0), p.total - (i + 1) * kTileKeys); };
  const auto tile_end = [&](int64_t i) { return p.total - i * kTileKeys; };

  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const auto first_pass = [&](int64_t tile, int64_t g) {
      const int64_t n_keys = tile_end(tile) - tile_begin(tile);
      for (int64_t block = 0; block < blocks; ++block) {
        const PeakBlock<T> item(plan, b, first_block + block, g);
        item.compute_tile(plan, start, tile_begin(tile), tile_end(tile), scratch);
        float* partials = plan.partials(slot, block, g) + 2 * tile * plan.row_stride;
        softmax_partials(scratch.tile, n_keys, 0, n_keys, plan.row_stride, item.queries.rows(),
                         /*keep=*/false, partials, partials + plan.row_stride);
      }
    };
    const auto join = [&](int64_t block, int64_t g) {
      if (block >= blocks) return;  // a prompt's last round may have fewer
      float* shift = plan.shift(slot, block, g);
      join_partials(plan.partials(slot, block, g), plan.tiles, plan.row_stride,
                    PeakBlock<T>(plan, b, first_block + block, g).queries.rows(), nullptr, shift,
                    shift + plan.row_stride);
    };
    const auto second_pass = [&](int64_t tile) {
      const int64_t from = tile_begin(tile), to = tile_end(tile);
      for (int64_t g = 0; g < p.kv_heads; ++g) {
        for (int64_t block = 0; block < blocks; ++block) {
          const PeakBlock<T> item(plan, b, first_block + block, g);
          item.compute_tile(plan, start, from, to, scratch);
          peak_over_heads(plan, item.queries, scratch, to - from, plan.shift(slot, block, g));
          merge_peaks(plan, b, first_block + block, g, item.queries.inner, from, to, scratch.sums);
        }
      }
    };
    for (int64_t i = portion.begin; i < portion.end; ++i) {
      switch (portion.step) {
        case 0: first_pass(i % plan.tiles, i / plan.tiles); break;
        case 1: join(i / p.kv_heads, i % p.kv_heads); break;
        case 2: second_pass(i); break;
      }
    }
  });
}

}  // namespace claa::cpu::CLAA_ISA
