// Window scores of few columns on Hopper (hopper_narrow.cu): what hopper_scores.cu gives to it.

#pragma once

#include "csrc/cuda/window_attention.cuh"

namespace claa::cuda::hopper::narrow {

bool takes(const WindowScores& s);
int64_t workspace_bytes(const WindowScores& s);
cudaError_t run(const WindowScores& s, cudaStream_t stream);

}  // namespace claa::cuda::hopper::narrow
