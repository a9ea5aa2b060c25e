// Copying kept rows as bytes, shared by gather_kv and gather_tokens.
//
// A row is moved in words as wide as its size, strides and addresses allow, 16 bytes at best. A
// thread moves kGatherWords words, of as many rows or of the same row of as many sources: all its
// loads are in flight before its first store.

#pragma once

#include <cassert>

#include "csrc/cuda/overlap.cuh"

namespace claa::cuda {

struct RowSource {
  const char* first;
  char* out;       // row i of the strip goes to out + i * row_bytes
  int64_t stride;  // bytes
  int64_t row_bytes;
};

constexpr int kGatherThreads = 128;
constexpr int kGatherWords = 2;
constexpr int64_t kMaxGridY = 65535;

// How a strip of rows is spread over blocks: a team of lanes moves a word each of a piece of a row.
// Teams are powers of two, so that the kernel need not divide.
struct GatherPlan {
  int log_team = 0;
  uint32_t pieces;  // of a row
  int64_t blocks;   // of rows

  GatherPlan(int64_t kept, int64_t row_bytes, int word, int sources) {
    while ((1 << log_team) < kGatherThreads && (word << log_team) < row_bytes) ++log_team;
    pieces = uint32_t(ceil_div(row_bytes, word << log_team));
    blocks = ceil_div(kept, int64_t(kGatherThreads >> log_team) * (kGatherWords / sources));
  }

  // Strips and pieces lie side by side in x: blocks that run at a time copy the same tokens of all
  // heads, which lie close together in memory.
  dim3 grid(int64_t strips) const {
    return {unsigned(strips * pieces), unsigned(min(blocks, kMaxGridY))};
  }
};

// This block's piece of rows of a strip; row i comes from row `position(i)` of each source.
template <class Word, int kSources, class Position>
__device__ void gather_rows(const RowSource (&sources)[kSources], const GatherPlan& plan,
                            uint32_t piece, int64_t total, int64_t kept, Position position) {
  constexpr int kRows = kGatherWords / kSources;
  const int lane = threadIdx.x & ((1 << plan.log_team) - 1);
  const int step = kGatherThreads >> plan.log_team;
  const int64_t byte = ((int64_t(piece) << plan.log_team) + lane) * int64_t(sizeof(Word));
  for (int64_t block = blockIdx.y; block < plan.blocks; block += gridDim.y) {
    const int64_t row = block * step * kRows + (threadIdx.x >> plan.log_team);
    Word words[kRows][kSources];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t from = row + i * step < kept ? position(row + i * step) : -1;
      assert(from >= -1 && from < total);
#pragma unroll
      for (int n = 0; n < kSources; ++n) {
        const RowSource& s = sources[n];
        words[i][n] = from >= 0 && byte < s.row_bytes
                          ? *reinterpret_cast<const Word*>(s.first + from * s.stride + byte)
                          : Word{};
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int n = 0; n < kSources; ++n) {
        const RowSource& s = sources[n];
        if (row + i * step < kept && byte < s.row_bytes)
          *reinterpret_cast<Word*>(s.out + (row + i * step) * s.row_bytes + byte) = words[i][n];
      }
    }
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
