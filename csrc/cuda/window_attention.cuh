// The window's attention to the context keys: the engine of score_window, score_tokens and
// score_layer.

#pragma once

#include "csrc/cuda/attention.cuh"

namespace claa::cuda {

struct WindowScores {
  WindowAttention attention;
  float* out;  // pooled: [batch, kv_heads, context], or nullptr; else [batch, heads, context]
  bool pooled;
  int64_t kernel_size;
  PoolMode pool_mode;
  float* running = nullptr;  // pooled: [batch, context], or nullptr
  int64_t running_stride_b = 0;

  CLAA_HOST_DEVICE int64_t halo() const { return pooled ? kernel_size / 2 : 0; }
  // Sums that a key has in shared memory: one where the heads may be added up before they are
  // pooled, as for an average, else one for each head.
  CLAA_HOST_DEVICE int64_t slots() const {
    return pooled && pool_mode == PoolMode::avg ? 1 : attention.group();
  }
};

// Joins the pooled score of token j into the running maximum, if there is one.
//
// The heads of a token come from different blocks in any order, so they meet in an integer maximum
// of bits: no score is negative, a NaN is made the largest integer, and a negative number already
// in `running` is a negative integer. So is a NaN already there with its sign bit set, which a
// score replaces: looking for it first would make every key range wait for memory (9 us of 103 at
// 128k).
__device__ inline void join_running(const WindowScores& s, int64_t b, int64_t j, float score) {
  if (!s.running) return;
  int* running = reinterpret_cast<int*>(s.running + b * s.running_stride_b + j);
  atomicMax(running, __float_as_int(max_or_nan(score, 0.f)));
}

// Wider pooling kernels would multiply too many keys twice.
constexpr int64_t kMaxHalo = 128;

int64_t workspace_bytes(const WindowScores& p);
cudaError_t run(const WindowScores& p, cudaStream_t stream);

// The same for Hopper (hopper/scores.cu). `takes`: whether its instructions can do the work on this
// device, with these sizes and strides.
namespace hopper {
#ifdef CLAA_HOPPER
bool takes(const WindowScores& p);
int64_t workspace_bytes(const WindowScores& p);
cudaError_t run(const WindowScores& p, cudaStream_t stream);
#else
inline bool takes(const WindowScores&) { return false; }
inline int64_t workspace_bytes(const WindowScores&) { return 0; }
inline cudaError_t run(const WindowScores&, cudaStream_t) { return cudaErrorNotSupported; }
#endif
}  // namespace hopper

}  // namespace claa::cuda
