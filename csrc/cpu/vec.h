// Vectors of floats, as wide as the instruction set of this build allows, and exp and tanh on them.
//
// Every file of csrc/cpu is compiled once per instruction set; CLAA_ISA (plain, avx2, avx512,
// avx512_bf16) names the namespace of that build, so that dispatch.cpp can choose between them at
// run time. Kernels use no standard-library templates: of the copies compiled for different
// instruction sets the linker keeps one for all, which may be the AVX-512 one.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "csrc/kernels.h"

namespace claa::cpu::CLAA_ISA {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

// n floats, and n integers of the same width.
template <int64_t n>
struct VecOf {
  using Float __attribute__((vector_size(n * 4))) = float;
  using Int __attribute__((vector_size(n * 4))) = int32_t;
};
using Vec = VecOf<kLanes>::Float;
using VecInt = VecOf<kLanes>::Int;
using VecHalf = uint16_t __attribute__((vector_size(kLanes * 2)));
using Vec4 = VecOf<4>::Float;

// Rows of a product are padded to this many lanes: the widest vector, or half of it where half a
// vector still computes at full rate.
constexpr int64_t kRowLanes = kLanes == 16 ? 8 : kLanes;
using RowVec = VecOf<kRowLanes>::Float;

template <class V>
using IntOf = typename VecOf<sizeof(V) / 4>::Int;

constexpr float kInfinity = __builtin_inff();

// Terms of one partial sum: summing in two levels keeps the rounding error near that of a tree.
constexpr int64_t kSumBlock = 16;

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

template <class V = Vec>
inline V splat(float x) {
  return x - V{};
}

template <class V>
inline V bits_as(auto from) {
  static_assert(sizeof(V) == sizeof(from));
  return load<V>(&from);
}

// A compile-time value as an argument.
template <auto value>
struct Constant {
  constexpr auto operator()() const { return value; }
};

template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
// The larger one; NaN if either is NaN.
inline float max_or_nan(float a, float b) { return (b > a) | (b != b) ? b : a; }
inline Vec4 max_or_nan(Vec4 a, Vec4 b) { return (b > a) | (b != b) ? b : a; }

// One bit for each lane of a comparison that holds.
inline uint32_t mask_of(VecInt comparison) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(bits_as<__m512i>(comparison));
#elif defined(__AVX2__)
  return _mm256_movemask_ps(bits_as<__m256>(comparison));
#else
  return _mm_movemask_ps(bits_as<__m128>(comparison));
#endif
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// a * b + c, rounded once where the processor has such an instruction. The kernels are built
// without contraction and fuse only here: the same line must round the same in every copy that the
// compiler makes.
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return bits_as<Vec>(_mm512_fmadd_ps(bits_as<__m512>(a), bits_as<__m512>(b), bits_as<__m512>(c)));
#elif defined(__FMA__)
  return bits_as<Vec>(_mm256_fmadd_ps(bits_as<__m256>(a), bits_as<__m256>(b), bits_as<__m256>(c)));
#else
  return a * b + c;
#endif
}
#if defined(__AVX512F__)
inline RowVec multiply_add(RowVec a, RowVec b, RowVec c) {
  return bits_as<RowVec>(
      _mm256_fmadd_ps(bits_as<__m256>(a), bits_as<__m256>(b), bits_as<__m256>(c)));
}
#endif
#if defined(__FMA__)
inline Vec4 multiply_add(Vec4 a, Vec4 b, Vec4 c) {
  return bits_as<Vec4>(_mm_fmadd_ps(bits_as<__m128>(a), bits_as<__m128>(b), bits_as<__m128>(c)));
}
#endif
template <class V>
inline V multiply_add(V a, V b, float c) {
  return multiply_add(a, b, splat<V>(c));
}
template <class V>
inline V multiply_add(V a, float b, V c) {
  return multiply_add(a, splat<V>(b), c);
}
template <class V>
inline V multiply_add(V a, float b, float c) {
  return multiply_add(a, splat<V>(b), splat<V>(c));
}

// e^x within 2 units in the last place; exactly 0 for x < -87.3 (the result would be subnormal),
// infinity above 88.7, NaN for NaN. Reduction to |r| <= ln(2)/2, then a polynomial of degree 6.
template <class V>
inline V exp(V x) {
  constexpr float kLow = -87.33f, kHigh = 88.8f, kRound = 12582912.f;  // 1.5 * 2^23
  const V clamped = x > kHigh ? splat<V>(kHigh) : x;
  const V shifted = multiply_add(clamped, 1.44269504f, kRound);
  const V n = shifted - kRound;
  V r = multiply_add(n, -0.693359375f, clamped);  // ln(2) in two parts; the first is exact times n
  r = multiply_add(n, 2.12194440e-4f, r);
  V p = multiply_add(splat<V>(1.9875691500e-4f), r, 1.3981999507e-3f);
  p = multiply_add(p, r, 8.3334519073e-3f);
  p = multiply_add(p, r, 4.1665795894e-2f);
  p = multiply_add(p, r, 1.6666665459e-1f);
  p = multiply_add(p, r, 5.0000001201e-1f);
  p = multiply_add(p, r * r, r + 1.f);
  // The low bits of `shifted` are the integer n; the bits above are shifted out.
  p = p * bits_as<V>((bits_as<IntOf<V>>(shifted) + 127) << 23);  // 2^n; infinity for n = 128
  return x < kLow ? V{} : p;
}

// tanh within 2 units in the last place: a polynomial near 0, where 1 - 2 / (e^2x + 1) cancels.
template <class V>
inline V tanh(V x) {
  const V square = x * x;
  V p = multiply_add(splat<V>(-5.70498872745e-3f), square, 2.06390887954e-2f);
  p = multiply_add(p, square, -5.37397155531e-2f);
  p = multiply_add(p, square, 1.33314422036e-1f);
  p = multiply_add(p, square, -3.33332819422e-1f);
  const V near_zero = multiply_add(x * square, p, x);
  const V magnitude = x < 0.f ? -x : x;
  const V far = 1.f - 2.f / (exp(2.f * magnitude) + 1.f);
  return magnitude < 0.625f ? near_zero : (x < 0.f ? -far : far);
}

// kLanes values of any input type as floats.
struct F32 {
  static constexpr int64_t kBytes = 4;
  static constexpr bool kIsBfloat16 = false;
  static Vec to_float(const void* from) { return load<Vec>(from); }
  static float to_float_one(const void* from) { return load<float>(from); }
};

struct BF16 {
  static constexpr int64_t kBytes = 2;
  static constexpr bool kIsBfloat16 = true;
  static Vec to_float(const void* from) {
    return bits_as<Vec>(__builtin_convertvector(load<VecHalf>(from), VecInt) << 16);
  }
  static float to_float_one(const void* from) {
    return bits_as<float>(int32_t(load<uint16_t>(from)) << 16);
  }
};

// Shifts exponent and mantissa into position and corrects the bias by a multiplication, which also
// handles subnormals; infinity and NaN get the largest exponent back.
template <class Float, class Int>
inline Float half_to_float(Int half) {
  const Int sign = (half & 0x8000) << 16;
  const Int magnitude = (half & 0x7fff) << 13;
  const Float scaled = bits_as<Float>(magnitude) * 0x1p112f;
  const Int is_special = magnitude >= (0x7c00 << 13) ? Int{} - 1 : Int{};
  return bits_as<Float>(sign | bits_as<Int>(scaled) | (is_special & 0x7f800000));
}

struct F16 {
  static constexpr int64_t kBytes = 2;
  static constexpr bool kIsBfloat16 = false;
  static Vec to_float(const void* from) {
    return half_to_float<Vec>(__builtin_convertvector(load<VecHalf>(from), VecInt));
  }
  static float to_float_one(const void* from) {
    return half_to_float<float>(int32_t(load<uint16_t>(from)));
  }
};

// Calls fn with the type that reads `dtype`.
template <class Fn>
inline void with_dtype(DType dtype, Fn fn) {
  switch (dtype) {
    case DType::f32: return fn(F32{});
    case DType::f16: return fn(F16{});
    case DType::bf16: return fn(BF16{});
  }
}

}  // namespace claa::cpu::CLAA_ISA
