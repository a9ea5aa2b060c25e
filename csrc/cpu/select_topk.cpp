// select_topk: positions of the k best scores, ascending.
//
// Radix selection: three histograms (11, 11, 10 bits of the score's order) find the threshold and
// how many of the scores equal to it are wanted; one more pass in token order writes the positions,
// so they ascend without a sort and a tie goes to the lower position. Reads a row four times,
// writes k positions, needs no scratch memory.

#include "csrc/cpu/order.h"

namespace claa::cpu::CLAA_ISA {

Schedule schedule(const SelectTopkParams& p) {
  return {.units = p.batch * p.inner, .unit_cost = 16 * p.context + 8 * p.k};
}

namespace {

struct Threshold {
  uint32_t order;  // scores above it are all kept
  int64_t ties;    // how many of those equal to it are
};

// The threshold that keeps `wanted` of `n` scores, 0 < wanted <= n.
Threshold find_threshold(const float* scores, int64_t n, int64_t wanted) {
  constexpr int kShift[] = {21, 10, 0};
  constexpr int kBins[] = {2048, 2048, 1024};
  uint32_t prefix = 0, prefix_mask = 0;
  for (int pass = 0; pass < 3; ++pass) {
    // Two histograms: neighbouring scores are often equal, and adding to one bin twice in a row
    // waits for the first addition.
    uint32_t count[2][2048] = {};
    const uint32_t bin_mask = kBins[pass] - 1;
    for (int64_t j = 0; j < n; ++j) {
      const uint32_t order = order_of(scores[j]);
      if ((order & prefix_mask) == prefix) ++count[j & 1][(order >> kShift[pass]) & bin_mask];
    }
    int64_t bin = kBins[pass] - 1;
    for (;; --bin) {
      const int64_t here = int64_t(count[0][bin]) + count[1][bin];
      if (here >= wanted) break;
      wanted -= here;
    }
    prefix |= uint32_t(bin) << kShift[pass];
    prefix_mask |= bin_mask << kShift[pass];
  }
  return {prefix, wanted};
}

template <class Index>
void select_row(const SelectTopkParams& p, int64_t row) {
  const int64_t b = row / p.inner;
  const float* scores = p.scores + b * p.scores_stride_b + row % p.inner * p.scores_stride_inner;
  Index* out = static_cast<Index*>(p.out) + row * p.k;

  // Four tiers, best first: window, sinks, scored tokens, padding.
  const int64_t n_window = min(p.k, p.window);
  const int64_t start = p.start.data ? p.start[b] : 0;
  const int64_t first_valid = min(max(start, int64_t(0)), p.context);
  const int64_t n_sinks = min(min(p.sink, p.context - first_valid), p.k - n_window);
  const int64_t first = first_valid + n_sinks;
  const int64_t n_scored = min(p.context - first, p.k - n_window - n_sinks);
  const int64_t n_padding = p.k - n_window - n_sinks - n_scored;

  for (int64_t i = 0; i < n_padding; ++i) *out++ = Index(i);
  for (int64_t i = 0; i < n_sinks; ++i) *out++ = Index(first_valid + i);
  if (n_scored == p.context - first) {
    for (int64_t j = first; j < p.context; ++j) *out++ = Index(j);
  } else if (n_scored > 0) {
    Threshold threshold = find_threshold(scores + first, p.context - first, n_scored);
    const Index* full = out + n_scored;
    for (int64_t j = first; out < full; ++j) {
      const uint32_t order = order_of(scores[j]);
      const bool is_tie = (order == threshold.order) & (threshold.ties > 0);
      threshold.ties -= is_tie;
      *out = Index(j);  // kept only if `out` moves on
      out += (order > threshold.order) | is_tie;
    }
  }
  for (int64_t i = 0; i < n_window; ++i) *out++ = Index(p.context + p.window - n_window + i);
}

}  // namespace

void run(const SelectTopkParams& p, int, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    p.out_is_int32 ? select_row<int32_t>(p, row) : select_row<int64_t>(p, row);
}

}  // namespace claa::cpu::CLAA_ISA
