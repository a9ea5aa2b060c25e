// Copying kept rows as bytes, shared by gather_kv and gather_tokens.
//
// A row is moved in words as wide as its size, strides and addresses allow, 16 bytes at best. A
// team of lanes moves one row, a thread kRows rows at a time: all its loads are in flight before
// its first store.

#pragma once

#include <cassert>

#include "csrc/cuda/common.cuh"

namespace claa::cuda {

struct RowSource {
  const char* first;
  char* out;       // row i of the strip goes to out + i * row_bytes
  int64_t stride;  // bytes
  int64_t row_bytes;
};

constexpr int kGatherThreads = 256;
constexpr int kGatherRows = 4;

// Lanes that move one row: a power of two.
__host__ __device__ inline int team_size(int64_t row_bytes, int word) {
  const int64_t words = ceil_div(row_bytes, word);
  int team = 1;
  while (team < kGatherThreads && team < words) team *= 2;
  return team;
}

// Rows that a block moves.
__host__ __device__ inline int64_t block_rows(int64_t row_bytes, int word) {
  return int64_t(kGatherThreads / team_size(row_bytes, word)) * kGatherRows;
}

// Rows [begin, end) of a strip, `position(i)` being the source row of row i.
template <class Word, class Position>
__device__ void gather_rows(const RowSource& s, int64_t total, int64_t begin, int64_t end,
                            Position position) {
  const int team = team_size(s.row_bytes, sizeof(Word));
  const int lane = threadIdx.x % team;
  const int64_t words = s.row_bytes / sizeof(Word);
  const int64_t step = kGatherThreads / team;
  const int64_t row = begin + threadIdx.x / team;

  int64_t from[kGatherRows];
#pragma unroll
  for (int i = 0; i < kGatherRows; ++i) {
    from[i] = row + i * step < end ? position(row + i * step) : -1;
    assert(from[i] >= -1 && from[i] < total);
  }
  for (int64_t w = lane; w < words; w += team) {
    Word value[kGatherRows];
#pragma unroll
    for (int i = 0; i < kGatherRows; ++i)
      value[i] = from[i] < 0
                     ? Word{}
                     : __ldg(reinterpret_cast<const Word*>(s.first + from[i] * s.stride) + w);
#pragma unroll
    for (int i = 0; i < kGatherRows; ++i)
      if (row + i * step < end)
        reinterpret_cast<Word*>(s.out + (row + i * step) * s.row_bytes)[w] = value[i];
  }
}

// The widest word that divides all of `sizes_and_addresses`, or'ed together.
inline int word_bytes(uint64_t sizes_and_addresses) {
  int word = 16;
  while (sizes_and_addresses % word) word /= 2;
  return word;
}

template <class Fn>
cudaError_t with_word(int bytes, Fn fn) {
  switch (bytes) {
    case 16: return fn(uint4{});
    case 8: return fn(uint2{});
    case 4: return fn(uint32_t{});
    case 2: return fn(uint16_t{});
    default: return fn(uint8_t{});
  }
}

}  // namespace claa::cuda
