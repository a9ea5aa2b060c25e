// The window's attention to the context keys: the engine of score_window and score_tokens.

#pragma once

#include "csrc/cuda/attention.cuh"

namespace claa::cuda {

struct WindowScores {
  WindowAttention attention;
  float* out;  // pooled: [batch, kv_heads, context]; else [batch, heads, context]
  bool pooled;
  int64_t kernel_size;
  PoolMode mode;

  CLAA_HOST_DEVICE int64_t halo() const { return pooled ? kernel_size / 2 : 0; }
  // Sums that a key has in shared memory: the average commutes with the sum over heads.
  CLAA_HOST_DEVICE int64_t slots() const {
    return pooled && mode == PoolMode::avg ? 1 : attention.group();
  }
};

// Wider pooling kernels would multiply too many keys twice.
constexpr int64_t kMaxHalo = 128;

int64_t workspace_bytes(const WindowScores& p);
cudaError_t run(const WindowScores& p, cudaStream_t stream);

// The same for Hopper (hopper_scores.cu). `takes`: whether the device, the sizes and the strides
// are such that its instructions can do the work.
namespace hopper {
#ifdef CLAA_HOPPER
bool takes(const WindowScores& p);
#else
inline bool takes(const WindowScores&) { return false; }
#endif
int64_t workspace_bytes(const WindowScores& p);
cudaError_t run(const WindowScores& p, cudaStream_t stream);
}  // namespace hopper

}  // namespace claa::cuda
