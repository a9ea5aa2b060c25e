// The table of contents: every op's schema and the function that implements it.
//
// Compiled into both libraries. The CPU library is always loaded and has the schemas.
//
// Enumerations are ints here: the stable ABI leaks `str` arguments before torch 2.14. Sizes are
// SymInt, so one compiled graph serves every prompt length. torch.compile cannot trace an op that
// writes to an argument and has another that is called `mode`: hence `pool_mode`.

#include <torch/csrc/stable/library.h>

#include "csrc/kernels.h"
#include "src/claa_ops/ops.h"

#ifdef CLAA_CUDA
#define CLAA_DEVICE CUDA
#else
#define CLAA_DEVICE CPU
#endif

STABLE_TORCH_LIBRARY_IMPL(claa, CLAA_DEVICE, m) {
  m.impl("score_window", TORCH_BOX(&claa::score_window));
  m.impl("pool_heads", TORCH_BOX(&claa::pool_heads));
  m.impl("score_tokens", TORCH_BOX(&claa::score_tokens));
  m.impl("aggregate_scores", TORCH_BOX(&claa::aggregate_scores));
  m.impl("score_layer", TORCH_BOX(&claa::score_layer));
  m.impl("score_layer_paged", TORCH_BOX(&claa::score_layer_paged));
  m.impl("select_topk", TORCH_BOX(&claa::select_topk));
  m.impl("gather_kv", TORCH_BOX(&claa::gather_kv));
  m.impl("gather_tokens", TORCH_BOX(&claa::gather_tokens));
  m.impl("peak_attention", TORCH_BOX(&claa::peak_attention));
  m.impl("peak_attention_paged", TORCH_BOX(&claa::peak_attention_paged));
  m.impl("rank_variance", TORCH_BOX(&claa::rank_variance));
  m.impl("hop_tokens", TORCH_BOX(&claa::hop_tokens));
  m.impl("select_topk_packed", TORCH_BOX(&claa::select_topk_packed));
  m.impl("gather_rows", TORCH_BOX(&claa::gather_rows));
  m.impl("store_pages", TORCH_BOX(&claa::store_pages));
  m.impl("gather_pages", TORCH_BOX(&claa::gather_pages));
  m.impl("kept_metadata", TORCH_BOX(&claa::kept_metadata));
  m.impl("compact_pages", TORCH_BOX(&claa::compact_pages));
}

#ifndef CLAA_CUDA

STABLE_TORCH_LIBRARY(claa, m) {
  m.def(
      "score_window(Tensor query, Tensor key, *, float? scale=None, Tensor? lse=None, "
      "Tensor? start=None, SymInt sliding_window=0, float softcap=0.0, Tensor? sink_logits=None) "
      "-> Tensor");
  m.def(
      "pool_heads(Tensor scores, SymInt num_kv_heads, *, SymInt kernel_size=7, int pool_mode=0) "
      "-> Tensor");
  m.def(
      "score_tokens(Tensor query, Tensor key, *, SymInt kernel_size=7, int pool_mode=0, "
      "float? scale=None, Tensor? lse=None, Tensor? start=None, SymInt sliding_window=0, "
      "float softcap=0.0, Tensor? sink_logits=None) -> Tensor");
  m.def("aggregate_scores(Tensor running, Tensor scores) -> Tensor");
  m.def(
      "score_layer(Tensor(a!) running, Tensor query, Tensor key, *, SymInt kernel_size=7, "
      "int pool_mode=0, float? scale=None, Tensor? lse=None, Tensor? start=None, "
      "SymInt sliding_window=0, float softcap=0.0, Tensor? sink_logits=None) -> Tensor");
  m.def(
      "score_layer_paged(Tensor(a!) running, Tensor query, Tensor key_pages, Tensor block_table, "
      "Tensor lengths, *, Tensor? rows=None, SymInt kernel_size=7, int pool_mode=0, "
      "float? scale=None, float softcap=0.0, Tensor? sink_logits=None, Tensor? k_scale=None) -> "
      "()");
  m.def(
      "select_topk(Tensor scores, SymInt k, *, SymInt window=0, SymInt num_sinks=0, "
      "Tensor? start=None, Tensor? counts=None, bool int32=False) -> Tensor");
  m.def("gather_kv(Tensor key, Tensor value, Tensor index) -> (Tensor, Tensor)");
  m.def("gather_tokens(Tensor x, Tensor index) -> Tensor");
  m.def(
      "peak_attention(Tensor query, Tensor key, *, float? scale=None, Tensor? running=None, "
      "Tensor? start=None) -> Tensor");
  m.def(
      "peak_attention_paged(Tensor(a!) running, Tensor query, Tensor key_pages, "
      "Tensor block_table, Tensor lengths, *, Tensor? rows=None, float? scale=None, "
      "Tensor? k_scale=None) -> ()");
  m.def("rank_variance(Tensor scores, SymInt k) -> Tensor");
  m.def(
      "hop_tokens(Tensor scores, Tensor states, *, SymInt hops=4, SymInt num_seeds=64, "
      "float temperature=0.1, SymInt gap=8, SymInt kernel_size=25, int pool_mode=0, "
      "Tensor? start=None) -> Tensor");
  m.def(
      "select_topk_packed(Tensor(a!) index, Tensor scores, Tensor lengths, Tensor starts, *, "
      "SymInt window=0, SymInt num_sinks=0) -> ()");
  m.def("gather_rows(Tensor(a!) out, Tensor x, Tensor index) -> ()");
  m.def("store_pages(Tensor(a!) pages, Tensor x, Tensor slots) -> ()");
  m.def(
      "gather_pages(Tensor(a!) out, Tensor pages, Tensor block_table, Tensor starts, Tensor index) "
      "-> ()");
  m.def(
      "kept_metadata(Tensor(a!) seq_lens, Tensor(b!) slots, Tensor logical_seq_lens, "
      "Tensor prompts, Tensor kept, Tensor block_table, SymInt block_size) -> ()");
  m.def(
      "compact_pages(Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor block_table, "
      "Tensor starts, Tensor index) -> ()");
  m.def("_cpu_isa(int limit) -> int");
}

namespace {

// The CPU instruction set in use (0 plain, 1 AVX2, 2 AVX-512, 3 with bfloat16 products), after
// limiting it to `limit`; a negative limit only asks.
int64_t cpu_isa(int64_t limit) {
  if (limit >= 0) claa::cpu::limit_isa(static_cast<claa::cpu::Isa>(limit));
  return static_cast<int64_t>(claa::cpu::active_isa());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(claa, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&cpu_isa));
}

#endif
