// rank_variance: how much the ranks of the important tokens change between layers.
//
// Step 0 ranks each layer's tokens: a stable radix sort of (order, position) pairs, three digits
// of 11, 11 and 10 bits, best score first. Step 1 reads the ranks once. They are integers,
// so the variance of one token is exact up to its last division.

#include "csrc/cpu/order.h"

namespace claa::cpu::CLAA_ISA {

namespace {

struct Entry {
  uint32_t order, position;
};

// Workspace: ranks [layers, batch, context] (uint32), then per worker two lists of entries.
uint32_t* ranks(const RankVarianceParams& p) { return static_cast<uint32_t*>(p.workspace); }
int64_t rank_count(const RankVarianceParams& p) {
  return round_up(p.layers * p.batch * p.context, 2);
}
Entry* entries(const RankVarianceParams& p, int64_t worker) {
  return reinterpret_cast<Entry*>(ranks(p) + rank_count(p)) + worker * 2 * p.context;
}

void rank_layer(const RankVarianceParams& p, int64_t layer, int64_t b, Entry* from, Entry* to) {
  const float* scores = p.scores + layer * p.scores_stride_l + b * p.scores_stride_b;
  for (int64_t j = 0; j < p.context; ++j) from[j] = {~digits_of(order_of(scores[j])), uint32_t(j)};
  for (int shift = 0; shift < 32; shift += 11) {
    int64_t next[2048] = {};
    for (int64_t j = 0; j < p.context; ++j) ++next[(from[j].order >> shift) & 2047];
    int64_t sum = 0;
    for (int64_t& n : next) {
      const int64_t here = n;
      n = sum;
      sum += here;
    }
    for (int64_t j = 0; j < p.context; ++j) to[next[(from[j].order >> shift) & 2047]++] = from[j];
    Entry* swap = from;
    from = to;
    to = swap;
  }
  uint32_t* rank = ranks(p) + (layer * p.batch + b) * p.context;
  for (int64_t j = 0; j < p.context; ++j) rank[from[j].position] = uint32_t(j + 1);
}

float variance(const RankVarianceParams& p, int64_t b) {
  double total = 0;
  int64_t in_union = 0;
  for (int64_t j = 0; j < p.context; ++j) {
    int64_t sum = 0, squares = 0;
    bool is_important = false;
    for (int64_t layer = 0; layer < p.layers; ++layer) {
      const int64_t rank = ranks(p)[(layer * p.batch + b) * p.context + j];
      sum += rank;
      squares += rank * rank;
      is_important |= rank <= p.k;
    }
    if (!is_important) continue;
    ++in_union;
    total += double(p.layers * squares - sum * sum) / double(p.layers * p.layers);
  }
  return in_union ? float(total / double(in_union)) : 0.f;
}

}  // namespace

Schedule schedule(const RankVarianceParams& p) {
  return {
      .units = {p.layers * p.batch, p.batch},
      .unit_cost = 64 * p.context,
      .workspace_bytes = 4 * rank_count(p) + p.workers * 2 * p.context * int64_t(sizeof(Entry))};
}

void run(const RankVarianceParams& p, Portion& portion) {
  Entry* scratch = entries(p, portion.worker);
  for (int64_t i = portion.begin; i < portion.end; ++i) {
    if (portion.step == 0)
      rank_layer(p, i / p.batch, i % p.batch, scratch, scratch + p.context);
    else
      p.out[i] = variance(p, i);
  }
}

}  // namespace claa::cpu::CLAA_ISA
