// peak_attention_paged: for each (prompt, key head) peak_attention on its gathered keys, joined
// into the running maximum.
//
// Scratch memory of a worker: the keys of a head, its peaks, and what peak_attention wants.

#include "csrc/cpu/pages.h"

namespace claa::cpu::CLAA_ISA {

namespace {

// The parts of a worker's scratch memory, in bytes.
struct Scratch {
  int64_t keys, peaks, dense;

  Scratch(const PeakAttentionPagedParams& p, int64_t length)
      : keys(aligned(length * p.dim * bytes_of(p.dtype))),
        peaks(aligned(length * p.queries * 4)),
        dense(aligned(cpu::schedule(of_head(p, 0, 0, length, nullptr, nullptr)).workspace_bytes)) {}

  int64_t bytes() const { return keys + peaks + dense; }

  static PeakAttentionParams of_head(const PeakAttentionPagedParams& p, int64_t b, int64_t g,
                                     int64_t length, const char* keys, float* out) {
    PeakAttentionParams head{static_cast<const QueryKey&>(p)};
    head.queries = p.queries;
    head.query_stride_t = p.query_stride_t;
    head.out = out;
    narrow_to_head(head, b, g, length, keys);
    return head;
  }
};

}  // namespace

Schedule schedule(const PeakAttentionPagedParams& p) {
  return schedule_heads(p, 2 * p.group() * p.queries, [&](int64_t length) {
    return length > 0 ? Scratch(p, length).bytes() : 0;
  });
}

void run(const PeakAttentionPagedParams& p, Portion& portion) {
  char* const memory =
      static_cast<char*>(p.workspace) + portion.worker * (schedule(p).workspace_bytes / p.workers);
  for (int64_t i = portion.begin; i < portion.end; ++i) {
    const int64_t b = i / p.kv_heads, g = i % p.kv_heads, length = p.pages.length(b, p.total);
    if (length == 0) continue;
    const Scratch scratch(p, length);
    float* const peaks = reinterpret_cast<float*>(memory + scratch.keys);
    gather_keys(p, b, g, length, memory);
    PeakAttentionParams head = Scratch::of_head(p, b, g, length, memory, peaks);
    head.workspace = memory + scratch.keys + scratch.peaks;
    run_alone(head);
    for (int64_t t = 0; t < p.queries; ++t)
      join_maximum(p.running + b * p.running_stride_b + t * p.running_stride_t, peaks + t * length,
                   length);
  }
}

}  // namespace claa::cpu::CLAA_ISA
