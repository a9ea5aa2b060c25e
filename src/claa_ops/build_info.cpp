// claa_ops._C: what the libraries were built with. It has no ops; they are in torch.ops.claa.

#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of claa_ops.";
  pybind11::dict info;
  info["version"] = CLAA_VERSION;
  info["compiler"] = CLAA_COMPILER;
  info["torch_headers"] = CLAA_TORCH_HEADERS;
  info["torch_target"] = CLAA_TORCH_TARGET;
  info["cpu_isas"] = CLAA_CPU_ISAS;
  info["cuda"] = CLAA_CUDA_VERSION;
  info["cuda_architectures"] = CLAA_CUDA_BUILT;
  info["cutlass"] = CLAA_CUTLASS_VERSION;
  m.attr("build_info") = info;
}
