// compact_pages: move the kept keys and values of each request to the front of its pages, in place.
//
// Memory bound: each kept row is read once and written once. The rows of a strip (a piece of one
// head) are dealt to blocks in chunks, in ascending order. A block reads its chunk into registers,
// says so, waits until the chunks before it have been read, and writes. That is enough: a row moves
// towards the front, so what it overwrites is the source of a row before it, or of none. All chunks
// are read without waiting, and a chunk is only waited for by those after it; tickets give the
// chunks out in order, so whoever waits, waits for blocks that run. Nothing depends on how many run
// at a time, and no row is kept anywhere else meanwhile: the workspace has a bit for each chunk.

#include "csrc/cuda/gather.cuh"

namespace claa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 2;  // of keys and of values, that a thread moves a word of
constexpr int kChunksOfMask = 32;

// Which chunks have been read: a mask for each kChunksOfMask of a strip. All zero at first.
struct Progress {
  uint32_t tickets;
  uint32_t padding[31];
  uint32_t masks[1];  // [strips, masks of a strip]
};

// A team of lanes moves a word each of a piece of a row; teams are powers of two.
struct Plan {
  int log_team = 0;
  uint32_t pieces, strips, chunks;
  Progress* progress;

  Plan(const CompactPagesParams& p, int word) : progress(static_cast<Progress*>(p.workspace)) {
    const int64_t row_bytes = max(p.key.row_bytes, p.value.row_bytes);
    while ((1 << log_team) < kThreads && (word << log_team) < row_bytes) ++log_team;
    pieces = uint32_t(ceil_div(row_bytes, word << log_team));
    strips = uint32_t(p.kv_heads) * pieces;
    chunks = uint32_t(ceil_div(p.packed.capacity, chunk_rows()));
  }

  __host__ __device__ int64_t chunk_rows() const { return (kThreads >> log_team) * kRows; }
  __host__ __device__ int64_t masks() const { return ceil_div(chunks, kChunksOfMask); }
  int64_t bytes() const {
    return int64_t(offsetof(Progress, masks)) + strips * masks() * int64_t(sizeof(uint32_t));
  }
};

// By all threads, when they have read their words: until the chunks of the strip before this one
// have been read as well.
__device__ void wait_for_chunks_before(uint32_t* masks, uint32_t chunk) {
  const uint32_t last = chunk / kChunksOfMask, mine = 1u << chunk % kChunksOfMask;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    if (threadIdx.x == 0) {
      __threadfence();
      atomicOr(masks + last, mine);
    }
    for (uint32_t i = threadIdx.x; i <= last; i += kWarp) {
      const uint32_t wanted = i < last ? ~0u : mine - 1;
      while ((*static_cast<volatile uint32_t*>(masks + i) & wanted) != wanted) {
      }
    }
    __threadfence();
  }
  __syncthreads();
}

template <class Word>
__global__ __launch_bounds__(kThreads) void compact_pages_kernel(const CompactPagesParams p,
                                                                 const Plan plan) {
  __shared__ uint32_t ticket;
  if (threadIdx.x == 0) ticket = atomicAdd(&plan.progress->tickets, 1u);
  __syncthreads();
  const uint32_t chunk = ticket / plan.strips, strip = ticket - chunk * plan.strips;
  const uint32_t head = strip / plan.pieces, piece = strip - head * plan.pieces;
  const int64_t begin = chunk * plan.chunk_rows();
  if (begin >= p.packed.begin(p.packed.requests)) return;  // and so do the chunks after this one

  const int lane = threadIdx.x & ((1 << plan.log_team) - 1), step = kThreads >> plan.log_team;
  const int64_t byte = ((int64_t(piece) << plan.log_team) + lane) * int64_t(sizeof(Word));
  char* const keys = p.key.first + head * p.key.head_stride + byte;
  char* const values = p.value.first + head * p.value.head_stride + byte;
  const bool has_key = byte < p.key.row_bytes, has_value = byte < p.value.row_bytes;

  Word key[kRows], value[kRows];
  PageTable::Place to[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t row = begin + i * step + (threadIdx.x >> plan.log_team);
    const int64_t request = p.packed.request_of(row);
    to[i].page = -1;
    if (request < 0) continue;
    const int64_t entry = row - p.packed.begin(request);
    const int64_t token = p.index[head * p.index_stride_g + row];
    assert(token >= entry && p.table.holds(token));
    if (token == entry) continue;  // it is where it belongs
    const PageTable::Place from = p.table.place_of(request, token);
    to[i] = p.table.place_of(request, entry);
    assert(p.table.exists(from.page) && p.table.exists(to[i].page));
    if (has_key) key[i] = *reinterpret_cast<const Word*>(keys + p.key.offset(from));
    if (has_value) value[i] = *reinterpret_cast<const Word*>(values + p.value.offset(from));
  }
  wait_for_chunks_before(plan.progress->masks + strip * plan.masks(), chunk);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (to[i].page < 0) continue;
    if (has_key) *reinterpret_cast<Word*>(keys + p.key.offset(to[i])) = key[i];
    if (has_value) *reinterpret_cast<Word*>(values + p.value.offset(to[i])) = value[i];
  }
}

int word_of(const CompactPagesParams& p) {
  uint64_t sizes = 0;
  for (const PagedRows& rows : {p.key, p.value})
    sizes |= rows.row_bytes | rows.page_stride | rows.row_stride | rows.head_stride |
             uint64_t(rows.first);
  return word_bytes(sizes);
}

}  // namespace

int64_t workspace_bytes(const CompactPagesParams& p) { return Plan(p, word_of(p)).bytes(); }

cudaError_t run(const CompactPagesParams& p, cudaStream_t stream) {
  return with_word(word_of(p), [&](auto word) {
    using Word = decltype(word);
    const Plan plan(p, sizeof(Word));
    const cudaError_t status = cudaMemsetAsync(p.workspace, 0, plan.bytes(), stream);
    if (status != cudaSuccess) return status;
    compact_pages_kernel<Word><<<plan.chunks * plan.strips, kThreads, 0, stream>>>(p, plan);
    return launched();
  });
}

}  // namespace claa::cuda
