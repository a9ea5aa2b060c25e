// The positions of the best scores of a row, ascending: shared by select_topk and
// select_topk_packed.
//
// Radix selection: three histograms (11, 11, 10 bits of the score's order) find the threshold and
// how many of the scores equal to it are kept; one more pass in token order writes the positions,
// so they ascend without a sort and a tie goes to the lower position. Reads a row four times,
// writes k positions, needs no scratch memory. Only the first histogram visits every score; the
// other passes compare whole vectors and visit only the scores that match.

#pragma once

#include "csrc/cpu/order.h"

namespace claa::cpu::CLAA_ISA {

// Calls visit(j, order) for each score j in [begin, end), in order, for which wanted(order) holds.
// `wanted` takes one order or a vector of them.
template <class Wanted, class Visit>
inline void for_each_wanted(const float* scores, int64_t begin, int64_t end, Wanted wanted,
                            Visit visit) {
  int64_t j = begin;
  for (; j + kLanes <= end; j += kLanes) {
    const VecInt order = order_of(load<Vec>(scores + j));
    int32_t one[kLanes];
    store(one, order);
    for (uint32_t lanes = mask_of(wanted(order)); lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      visit(j + lane, one[lane]);
    }
  }
  for (; j < end; ++j) {
    const int32_t order = order_of(scores[j]);
    if (wanted(order)) visit(j, order);
  }
}

struct Threshold {
  int32_t order;  // scores above it are all kept
  int64_t ties;   // how many of those equal to it are
};

// How often each digit occurs. Two histograms in turn: neighbouring scores are often equal, and
// adding to the same counter twice in a row waits for the first addition.
struct Histogram {
  uint32_t count[2][2048] = {};

  void add(int64_t j, uint32_t digit) { ++count[j & 1][digit]; }

  // The digit of the wanted-th largest; `wanted` becomes its rank within the digit.
  uint32_t find(int64_t& wanted) const {
    uint32_t digit = 2047;
    for (;; --digit) {
      const int64_t here = int64_t(count[0][digit]) + count[1][digit];
      if (here >= wanted) return digit;
      wanted -= here;
    }
  }
};

// The threshold that keeps `wanted` of `n` scores, 0 < wanted <= n.
inline Threshold find_threshold(const float* scores, int64_t n, int64_t wanted) {
  Histogram high;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    int32_t one[kLanes];
    store(one, order_of(load<Vec>(scores + j)));
    for (int64_t lane = 0; lane < kLanes; ++lane) high.add(lane, digits_of(one[lane]) >> 21);
  }
  for (; j < n; ++j) high.add(j, digits_of(order_of(scores[j])) >> 21);
  uint32_t prefix = high.find(wanted);

  Histogram middle;
  const int32_t top = int32_t(prefix) - 1024;  // the value of order >> 21, which keeps the sign
  for_each_wanted(
      scores, 0, n, [=](auto order) { return (order >> 21) == top; },
      [&](int64_t at, int32_t order) { middle.add(at, (order >> 10) & 2047); });
  prefix = prefix << 11 | middle.find(wanted);

  Histogram low;
  const int32_t upper = int32_t(prefix) - (1024 << 11);
  for_each_wanted(
      scores, 0, n, [=](auto order) { return (order >> 10) == upper; },
      [&](int64_t at, int32_t order) { low.add(at, order & 1023); });
  return {.order = int32_t((prefix << 10 | low.find(wanted)) ^ 0x80000000u), .ties = wanted};
}

template <class Index>
void select_row(const SelectRow& row, Index* out) {
  const auto [n_window, n_sinks, n_scored, n_padding, n_empty, first_valid, first] = row.tiers;
  const float* scores = row.scores;

  out += row.out;
  for (int64_t i = 0; i < n_empty; ++i) *out++ = Index(-1);
  for (int64_t i = 0; i < n_padding; ++i) *out++ = Index(i);
  for (int64_t i = 0; i < n_sinks; ++i) *out++ = Index(first_valid + i);
  if (n_scored == row.context - first) {
    for (int64_t j = first; j < row.context; ++j) *out++ = Index(j);
  } else if (n_scored > 0) {
    Threshold threshold = find_threshold(scores + first, row.context - first, n_scored);
    for_each_wanted(
        scores, first, row.context, [=](auto order) { return order >= threshold.order; },
        [&](int64_t j, int32_t order) {
          if (order > threshold.order || threshold.ties-- > 0) *out++ = Index(j);
        });
  }
  for (int64_t i = 0; i < n_window; ++i) *out++ = Index(row.context + row.window - n_window + i);
}

}  // namespace claa::cpu::CLAA_ISA
