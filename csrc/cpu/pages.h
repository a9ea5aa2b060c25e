// Keys in pages on the CPU: one worker gathers the keys of a (prompt, key head) into its scratch
// memory and runs the kernel for keys in rows on them, by itself.
//
// Gathering reads and writes each key once more, which is little beside the product. The kernels
// give a head the same bits whoever else is in the call, so these are the bits of the dense op.

#pragma once

#include "csrc/cpu/vec.h"

namespace claa::cpu::CLAA_ISA {

inline int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// The bits of an e4m3 number as a float: all of them are floats, halves and bfloat16s.
inline uint32_t float_bits_of_e4m3(uint8_t x) {
  const uint32_t sign = uint32_t(x & 0x80) << 24, magnitude = x & 0x7f;
  if (magnitude == 0x7f) return sign | 0x7fc00000;
  if (magnitude >= 8) return sign | ((magnitude << 20) + (120u << 23));
  return sign | bits_as<uint32_t>(float(magnitude) * 0x1p-9f);
}

inline void widen_e4m3(const uint8_t* from, int64_t n, DType dtype, char* to) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = float_bits_of_e4m3(from[i]);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    switch (dtype) {
      case DType::f32: store(to + i * 4, bits); break;
      case DType::bf16: store(to + i * 2, uint16_t(bits >> 16)); break;
      case DType::f16: {
        const uint32_t half = magnitude > 0x7f800000 ? 0x7e00
                              : magnitude == 0       ? 0
                                                     : (magnitude >> 13) - (112u << 10);
        store(to + i * 2, uint16_t(sign | half));
      }
    }
  }
}

// Where the unit's keys are gathered: `length` rows of key head g of prompt b.
inline void gather_keys(const QueryKey& p, int64_t b, int64_t g, int64_t length, char* to) {
  const int64_t size = int64_t(1) << p.pages.log2_size, row_bytes = p.dim * bytes_of(p.dtype);
  const int64_t item = p.pages.is_e4m3 ? 1 : bytes_of(p.dtype);
  const int32_t* table = p.pages.of(b);
  for (int64_t n = 0; n < length; ++n, to += row_bytes) {
    const int64_t page = table[n >> p.pages.log2_size];
    const char* row =
        static_cast<const char*>(p.key) +
        (page * p.key_stride_b + g * p.key_stride_g + n % size * p.key_stride_n) * item;
    if (p.pages.is_e4m3)
      widen_e4m3(reinterpret_cast<const uint8_t*>(row), p.dim, p.dtype, to);
    else
      std::memcpy(to, row, size_t(row_bytes));
  }
}

// Makes of the params of all prompts those of one (prompt, key head), whose keys lie at `keys`.
inline void narrow_to_head(QueryKey& p, int64_t b, int64_t g, int64_t length, const char* keys) {
  const int64_t group = p.group();
  p.query = static_cast<const char*>(p.query) +
            (b * p.query_stride_b + g * group * p.query_stride_h) * bytes_of(p.dtype);
  p.key = keys;
  if (p.pages.key_scale) p.scale *= *p.pages.key_scale;
  p.pages = {};
  p.batch = p.kv_heads = p.workers = 1;
  p.heads = group;
  p.total = length;
  p.key_stride_b = p.key_stride_g = 0;
  p.key_stride_n = p.dim;
}

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Runs all of an op whose steps are alike in every round, on this thread.
template <class Params>
void run_alone(const Params& p) {
  const Schedule plan = cpu::schedule(p);
  for (int64_t round = 0; round < plan.rounds; ++round) {
    for (int step = 0; step < kSteps && plan.units[step]; ++step) {
      Portion portion{.worker = 0, .end = plan.units[step], .round = round, .step = step};
      cpu::run(p, portion);
    }
  }
}

// to[i] becomes the maximum of itself and from[i], where other threads do the same with theirs.
inline void join_maximum(float* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    int32_t* const at = reinterpret_cast<int32_t*>(to + i);
    int32_t before = __atomic_load_n(at, __ATOMIC_RELAXED), after;
    do {
      after = bits_as<int32_t>(max_or_nan(bits_as<float>(before), from[i]));
    } while (after != before && !__atomic_compare_exchange_n(at, &before, after, true,
                                                             __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  }
}

// A schedule of a unit for each (prompt, key head). `bytes_of_unit(length)`: the scratch memory for
// a prompt of so many keys.
template <class Bytes>
Schedule schedule_heads(const QueryKey& p, int64_t query_rows, Bytes bytes_of_unit) {
  int64_t most_bytes = 0, keys = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = p.pages.length(b, p.total), bytes = bytes_of_unit(length);
    keys += length;
    if (bytes > most_bytes) most_bytes = bytes;
  }
  return {.units = {p.batch * p.kv_heads},
          .unit_cost = keys / p.batch * p.dim * query_rows,
          .workspace_bytes = p.workers * most_bytes};
}

}  // namespace claa::cpu::CLAA_ISA
