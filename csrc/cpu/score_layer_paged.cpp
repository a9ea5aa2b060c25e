// score_layer_paged: for each (prompt, key head) score_tokens on its gathered keys, joined into the
// running maximum.
//
// A unit is one head: 8 of them keep 8 threads busy with a single prompt. Scratch memory of a
// worker: the keys of a head, its scores, and what score_tokens wants.

#include "csrc/cpu/pages.h"

namespace claa::cpu::CLAA_ISA {

namespace {

// The parts of a worker's scratch memory, in bytes.
struct Scratch {
  int64_t keys, scores, dense;

  Scratch(const ScoreLayerPagedParams& p, int64_t length)
      : keys(aligned(length * p.attention.dim * bytes_of(p.attention.dtype))),
        scores(aligned((length - p.attention.window) * 4)),
        dense(aligned(cpu::schedule(of_head(p, 0, 0, length, nullptr, nullptr)).workspace_bytes)) {}

  int64_t bytes() const { return keys + scores + dense; }

  static ScoreTokensParams of_head(const ScoreLayerPagedParams& p, int64_t b, int64_t g,
                                   int64_t length, const char* keys, float* out) {
    ScoreTokensParams head{.attention = p.attention,
                           .out = out,
                           .kernel_size = p.kernel_size,
                           .pool_mode = p.pool_mode};
    WindowAttention& a = head.attention;
    if (a.sink_logits)
      a.sink_logits =
          static_cast<const char*>(a.sink_logits) + g * a.group() * bytes_of(a.sinks_dtype);
    narrow_to_head(a, b, g, length, keys);
    return head;
  }
};

bool has_context(const ScoreLayerPagedParams& p, int64_t length) {
  return length > p.attention.window;
}

}  // namespace

Schedule schedule(const ScoreLayerPagedParams& p) {
  const WindowAttention& a = p.attention;
  return schedule_heads(a, a.group() * a.window, [&](int64_t length) {
    return has_context(p, length) ? Scratch(p, length).bytes() : 0;
  });
}

void run(const ScoreLayerPagedParams& p, Portion& portion) {
  const WindowAttention& a = p.attention;
  char* const memory =
      static_cast<char*>(a.workspace) + portion.worker * (schedule(p).workspace_bytes / a.workers);
  for (int64_t i = portion.begin; i < portion.end; ++i) {
    const int64_t b = i / a.kv_heads, g = i % a.kv_heads, length = a.pages.length(b, a.total);
    if (!has_context(p, length)) continue;
    const Scratch scratch(p, length);
    float* const scores = reinterpret_cast<float*>(memory + scratch.keys);
    gather_keys(a, b, g, length, memory);
    ScoreTokensParams head = Scratch::of_head(p, b, g, length, memory, scores);
    head.attention.workspace = memory + scratch.keys + scratch.scores;
    run_alone(head);
    join_maximum(p.running + b * p.running_stride_b, scores, length - a.window);
  }
}

}  // namespace claa::cpu::CLAA_ISA
