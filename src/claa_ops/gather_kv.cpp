// gather_kv: check the arguments, allocate the outputs, fill the params, launch.

#include "src/claa_ops/launch.h"
#include "src/claa_ops/ops.h"

namespace claa {

std::tuple<Tensor, Tensor> gather_kv(const Tensor& key, const Tensor& value, const Tensor& index) {
  constexpr const char* op = "gather_kv";
  check_rank(op, "key", key, 4, "[B, G, N, D]");
  check_rank(op, "value", value, 4, "[B, G, N, Dv]");
  const int64_t batch = key.size(0), kv_heads = key.size(1), total = key.size(2);
  check_size(op, "value", value, 0, "B", batch, "key");
  check_size(op, "value", value, 1, "G", kv_heads, "key");
  check_size(op, "value", value, 2, "N", total, "key");
  check_device_like(op, "value", value, key, "key");
  check_last_dim_contiguous(op, "key", key);
  check_last_dim_contiguous(op, "value", value);

  const bool has_heads = index.dim() == 3;
  check(has_heads || index.dim() == 2, op, "index must have shape [B, G, k] or [B, k], got ",
        shape_of(index));
  check_size(op, "index", index, 0, "B", batch, "key");
  if (has_heads) check_size(op, "index", index, 1, "G", kv_heads, "key");
  check_device_like(op, "index", index, key, "key");
  const Indices positions = indices_of(op, "index", index);
  check_index_range(op, index, total);
  const int64_t key_bytes = item_bytes_of(op, "key", key);
  const int64_t value_bytes = item_bytes_of(op, "value", value);

  const int64_t kept = index.size(index.dim() - 1);
  const Tensor key_out = allocate(key, {batch, kv_heads, kept, key.size(3)});
  const Tensor value_out = allocate(value, {batch, kv_heads, kept, value.size(3)});
  if (key_out.numel() == 0 && value_out.numel() == 0) return {key_out, value_out};
  launch(key, GatherKvParams{
                  .key = static_cast<const char*>(key.const_data_ptr()),
                  .value = static_cast<const char*>(value.const_data_ptr()),
                  .index = positions,
                  .key_out = static_cast<char*>(key_out.mutable_data_ptr()),
                  .value_out = static_cast<char*>(value_out.mutable_data_ptr()),
                  .batch = batch,
                  .kv_heads = kv_heads,
                  .total = total,
                  .kept = kept,
                  .key_row_bytes = key.size(3) * key_bytes,
                  .value_row_bytes = value.size(3) * value_bytes,
                  .key_stride_b = key.stride(0) * key_bytes,
                  .key_stride_g = key.stride(1) * key_bytes,
                  .key_stride_n = key.stride(2) * key_bytes,
                  .value_stride_b = value.stride(0) * value_bytes,
                  .value_stride_g = value.stride(1) * value_bytes,
                  .value_stride_n = value.stride(2) * value_bytes,
                  .index_stride_b = index.stride(0),
                  .index_stride_g = has_heads ? index.stride(1) : 0,
              });
  return {key_out, value_out};
}

}  // namespace claa
