// Argument checks. Every message reads: <op>: <argument> must <requirement>, got <value>.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>

#include "csrc/kernels.h"

namespace claa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises RuntimeError in Python with exactly this text. It is the only class of exception that
// every torch release carries across the stable ABI.
template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <class... Parts>
void check(bool condition, const char* op, const Parts&... parts) {
  if (!condition) fail(op, parts...);
}

// As Python spells it.
inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::UInt32: return "uint32";
    case ScalarType::UInt64: return "uint64";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    default: return torch::headeronly::toString(dtype);
  }
}

// How messages print a tensor. These hold the tensor and format it only when a check has failed:
// a stream costs a microsecond, and more when its code is cold.
struct ShapeOf {
  const Tensor& tensor;
};
struct StridesOf {
  const Tensor& tensor;
};
struct DeviceOf {
  const Tensor& tensor;
};
inline ShapeOf shape_of(const Tensor& t) { return {t}; }
inline StridesOf strides_of(const Tensor& t) { return {t}; }
inline DeviceOf device_of(const Tensor& t) { return {t}; }

template <class List>
std::ostream& write_list(std::ostream& out, const List& values) {
  out << "[";
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  return out << "]";
}
inline std::ostream& operator<<(std::ostream& out, ShapeOf shape) {
  return write_list(out, shape.tensor.sizes());
}
inline std::ostream& operator<<(std::ostream& out, StridesOf strides) {
  return write_list(out, strides.tensor.strides());
}
inline std::ostream& operator<<(std::ostream& out, DeviceOf device) {
  if (device.tensor.is_cpu()) return out << "cpu";
  const int index = device.tensor.get_device_index();
  if (device.tensor.is_cuda()) return out << "cuda:" << index;
  return out << "another device (index " << index << ")";
}

inline void check_rank(const char* op, const char* name, const Tensor& t, int64_t rank,
                       const char* shape) {
  check(t.dim() == rank, op, name, " must have shape ", shape, ", got ", shape_of(t));
}

inline void check_size(const char* op, const char* name, const Tensor& t, int64_t dim,
                       const char* symbol, int64_t expected, const char* source) {
  check(t.size(dim) == expected, op, name, " must have ", symbol, " = ", expected, " like ", source,
        ", got ", t.size(dim), " in ", shape_of(t));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  check(t.scalar_type() == dtype, op, name, " must have dtype ", name_of(dtype), ", got ",
        name_of(t.scalar_type()));
}

inline void check_dtype_like(const char* op, const char* name, const Tensor& t, const Tensor& like,
                             const char* source) {
  check(t.scalar_type() == like.scalar_type(), op, name, " must have dtype ",
        name_of(like.scalar_type()), " like ", source, ", got ", name_of(t.scalar_type()));
}

inline void check_device_like(const char* op, const char* name, const Tensor& t, const Tensor& like,
                              const char* source) {
  check(t.is_cpu() == like.is_cpu() && t.is_cuda() == like.is_cuda() &&
            t.get_device_index() == like.get_device_index(),
        op, name, " must be on the device of ", source, " (", device_of(like), "), got ",
        device_of(t));
}

inline void check_last_dim_contiguous(const char* op, const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  check(t.size(last) <= 1 || t.stride(last) == 1, op, name,
        " must be contiguous in its last dimension, got strides ", strides_of(t));
}

// Bytes of one item of a tensor whose rows are moved as bytes.
inline int64_t item_bytes_of(const char* op, const char* name, const Tensor& t) {
  const int64_t bytes = t.element_size();
  check(bytes <= 8, op, name, " must have a dtype of at most 8 bytes, got ",
        name_of(t.scalar_type()));
  return bytes;
}

// The float dtypes that the kernels read.
inline DType float_dtype(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default:
      fail(op, name, " must have dtype float32, bfloat16 or float16, got ",
           name_of(t.scalar_type()));
  }
}

inline Indices indices_of(const char* op, const char* name, const Tensor& t) {
  const bool is_int32 = t.scalar_type() == ScalarType::Int;
  check(is_int32 || t.scalar_type() == ScalarType::Long, op, name,
        " must have dtype int64 or int32, got ", name_of(t.scalar_type()));
  check_last_dim_contiguous(op, name, t);
  return {t.const_data_ptr(), is_int32};
}

// An optional [B] tensor with an integer for each row, such as the first valid position.
inline Indices row_integers(const char* op, const char* name, const std::optional<Tensor>& t,
                            int64_t batch, const Tensor& like, const char* source) {
  if (!t) return {};
  check_rank(op, name, *t, 1, "[B]");
  check_size(op, name, *t, 0, "B", batch, source);
  check_device_like(op, name, *t, like, source);
  return indices_of(op, name, *t);
}

inline PoolMode pool_mode_of(const char* op, int64_t pool_mode) {
  check(pool_mode == 0 || pool_mode == 1, op, "pool_mode must be 0 (avg) or 1 (max), got ",
        pool_mode);
  return pool_mode == 0 ? PoolMode::avg : PoolMode::max;
}

inline void check_kernel_size(const char* op, int64_t kernel_size) {
  check(kernel_size > 0 && kernel_size % 2 == 1, op, "kernel_size must be odd and positive, got ",
        kernel_size);
}

inline void check_groups(const char* op, int64_t heads, int64_t kv_heads) {
  check(kv_heads > 0 && heads % kv_heads == 0, op, "G must divide H = ", heads, ", got ", kv_heads);
}

// On the CPU an index outside [-1, total) is an error here, before any row is copied; on CUDA it is
// a device assertion, because reading the indices would make the host wait.
inline void check_index_range(const char* op, const Tensor& index, int64_t total) {
  if (!index.is_cpu() || index.numel() == 0) return;
  const Indices values = indices_of(op, "index", index);
  const int64_t last = index.dim() - 1, kept = index.size(last);
  const int64_t outer = last == 0 ? 1 : index.size(0),
                outer_stride = last == 0 ? 0 : index.stride(0);
  const int64_t inner = last == 2 ? index.size(1) : 1;
  const int64_t inner_stride = last == 2 ? index.stride(1) : 0;
  for (int64_t row = 0; row < outer * inner; ++row) {
    const int64_t first = row / inner * outer_stride + row % inner * inner_stride;
    for (int64_t i = 0; i < kept; ++i) {
      const int64_t value = values[first + i];
      check(value >= -1 && value < total, op, "index must be in [-1, N) = [-1, ", total, "), got ",
            value);
    }
  }
}

}  // namespace claa
