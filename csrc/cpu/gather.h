// Copying kept rows as bytes, shared by gather_kv and gather_tokens.

#pragma once

#include "csrc/cpu/vec.h"

namespace claa::cpu::CLAA_ISA {

struct RowSource {
  const char* first;
  int64_t stride;  // bytes
  int64_t row_bytes;
};

constexpr int64_t kPrefetchRows = 8;  // kept rows lie far apart: hardware cannot predict the next

// out[i] = source row index[offset + i] for begin <= i < end; -1 gives zeros.
inline void gather_rows(const RowSource& source, const Indices& index, int64_t offset,
                        int64_t begin, int64_t end, char* out) {
  for (int64_t i = begin; i < end; ++i) {
    if (i + kPrefetchRows < end) {
      const int64_t ahead = index[offset + i + kPrefetchRows];
      const char* row = source.first + max(ahead, int64_t(0)) * source.stride;
      for (int64_t byte = 0; byte < min(source.row_bytes, int64_t(1024)); byte += 64)
        __builtin_prefetch(row + byte);
    }
    const int64_t from = index[offset + i];
    char* to = out + i * source.row_bytes;
    if (from < 0) {
      std::memset(to, 0, source.row_bytes);
    } else {
      std::memcpy(to, source.first + from * source.stride, source.row_bytes);
    }
  }
}

}  // namespace claa::cpu::CLAA_ISA
