// Copying kept rows as bytes, shared by the gathers.

#pragma once

#include "csrc/cpu/vec.h"

namespace claa::cpu::CLAA_ISA {

struct RowSource {
  const char* first;
  int64_t stride;  // bytes
  int64_t row_bytes;
};

constexpr int64_t kPrefetchRows = 8;  // kept rows lie far apart: hardware cannot predict the next

inline void prefetch_row(const char* row, int64_t row_bytes) {
  for (int64_t byte = 0; byte < min(row_bytes, int64_t(1024)); byte += 64)
    __builtin_prefetch(row + byte);
}

// A row of zeros where there is nothing to copy.
inline void copy_row(char* to, const char* from, int64_t row_bytes) {
  if (from)
    std::memcpy(to, from, row_bytes);
  else
    std::memset(to, 0, row_bytes);
}

// out[i] = source row index[offset + i] for begin <= i < end; -1 gives zeros.
inline void gather_rows(const RowSource& source, const Indices& index, int64_t offset,
                        int64_t begin, int64_t end, char* out) {
  for (int64_t i = begin; i < end; ++i) {
    if (i + kPrefetchRows < end) {
      const int64_t ahead = index[offset + i + kPrefetchRows];
      prefetch_row(source.first + max(ahead, int64_t(0)) * source.stride, source.row_bytes);
    }
    const int64_t from = index[offset + i];
    copy_row(out + i * source.row_bytes, from < 0 ? nullptr : source.first + from * source.stride,
             source.row_bytes);
  }
}

}  // namespace claa::cpu::CLAA_ISA
