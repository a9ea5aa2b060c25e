// Window scores of many columns on Hopper (hopper_wide.cu): what hopper_scores.cu gives to it.

#pragma once

#include "csrc/cuda/window_attention.cuh"

namespace claa::cuda::hopper::wide {

bool takes(const WindowScores& s);
int64_t workspace_bytes(const WindowScores& s);
cudaError_t run(const WindowScores& s, cudaStream_t stream);

}  // namespace claa::cuda::hopper::wide
