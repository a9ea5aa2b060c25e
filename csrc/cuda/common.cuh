// What the CUDA kernels share: sizes, conversions, wide loads, the order of scores.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "csrc/kernels.h"

namespace claa::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class T>
__host__ __device__ constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
__host__ __device__ constexpr T max(T a, T b) {
  return a < b ? b : a;
}

// The larger one; NaN if either is NaN.
__device__ inline float max_or_nan(float a, float b) {
  float largest;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(a), "f"(b));
  return largest;
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__nv_fp8_e4m3 x) { return float(x); }

// The two e4m3 numbers of the lower 16 bits, as a pair of T, which has them all.
__device__ inline uint32_t widen_pair(uint32_t two, __half) {
  const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(two), __NV_E4M3);
  return uint32_t(pair.y) << 16 | pair.x;
}
__device__ inline uint32_t widen_pair(uint32_t two, __nv_bfloat16) {
  const __half2 pair(__nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(two), __NV_E4M3));
  const float2 floats = __half22float2(pair);
  // Nothing is lost: the lower halves are zero.
  return (__float_as_uint(floats.y) & 0xffff0000) | __float_as_uint(floats.x) >> 16;
}

// 2^x, about 2 units in the last place; 0 for -infinity.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float kLog2E = 1.4426950408889634f;

// A load of 16 bytes that are read once: they need no room in the L1 cache.
__device__ inline uint4 load_streaming(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// An integer that grows with the score, as torch.topk has it: NaN above every number, -0 as 0. The
// sum is +0 for both zeros, and for every NaN the one whose bits are 0x7fffffff.
__device__ inline uint32_t order_of(float score) {
  const int32_t bits = __float_as_int(__fadd_rn(score, 0.f));
  return uint32_t(bits) ^ (uint32_t(bits >> 31) | 0x80000000u);
}

// The launches of an op so far; the first error counts.
inline cudaError_t launched() { return cudaGetLastError(); }

// Calls fn with a value of the type that `dtype` names.
template <class Fn>
cudaError_t with_dtype(DType dtype, Fn fn) {
  switch (dtype) {
    case DType::f32: return fn(float{});
    case DType::f16: return fn(__half{});
    case DType::bf16: return fn(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

// An attribute of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

}  // namespace claa::cuda
