// compact_pages: move the kept keys and values of each request to the front of its pages, in place.
//
// Memory bound: each kept row is read once and written once. All blocks run at once (a cooperative
// launch) and work in rounds: in each they read the next rows into shared memory, meet, and write
// them. Rounds take the rows in the order of their entries, those of all heads together.
//
// Why that is enough: entry e of a request comes from a token t >= e. So it overwrites what is the
// source of an entry up to e, which this round or one before has read, or of none.
//
// A block asks for the rows of the next round before it waits for the other blocks, and for the
// index of the round after that.

#include <cooperative_groups.h>
#include <cuda_pipeline.h>

#include "csrc/cuda/gather.cuh"

namespace claa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 2;                // on a multiprocessor
constexpr int kStages = 2;                // rounds of which a block has rows in shared memory
constexpr int kStageBytes = 48 << 10;     // at most, of the rows of a round
constexpr int64_t kPieceBytes = 2 << 10;  // longer rows are moved in pieces
constexpr int64_t kLeastRows = 8;         // of a block
// Rounds of which it is known where their rows are: while some threads write those of one, others
// look up those of the round after the next.
constexpr int kLookups = kStages + 1;

// Where a piece of a row comes from and where it goes, in bytes behind the first key and the first
// value, and how long it is: 0 if it stays where it is.
struct Move {
  int64_t from_key, from_value, to_key, to_value;
  int key_bytes, value_bytes;
};

struct Plan {
  int log_team = 0;            // a team of lanes moves a row; teams are powers of two
  uint32_t pieces, strips;     // of a row; of an entry: the pieces of all heads
  int key_bytes, value_bytes;  // of a piece
  uint32_t most_rows;          // of a block in a round
  int64_t blocks;

  Plan(const CompactPagesParams& p, int word) {
    const int64_t row_bytes = max(p.key.row_bytes, p.value.row_bytes);
    pieces = uint32_t(ceil_div(row_bytes, kPieceBytes));
    strips = uint32_t(p.kv_heads) * pieces;
    key_bytes = int(min(p.key.row_bytes, kPieceBytes));
    value_bytes = int(min(p.value.row_bytes, kPieceBytes));
    while ((1 << log_team) < kWarp && (word << log_team) < max(key_bytes, value_bytes)) ++log_team;
    const int64_t memory = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    const int64_t room = memory / kBlocks - 1024;  // of which the system has a part
    most_rows = uint32_t(min(min(int64_t(kStageBytes / row_memory()), room / bytes_of_row()),
                             int64_t(kThreads)));  // a thread looks up a row
    const int64_t rows = p.packed.capacity * strips;
    blocks = min(ceil_div(rows, kLeastRows),
                 int64_t(kBlocks * device_attribute(cudaDevAttrMultiProcessorCount)));
  }

  // What a piece takes in shared memory; its value lies behind its key.
  __host__ __device__ int key_memory() const { return (key_bytes + 15) / 16 * 16; }
  __host__ __device__ int row_memory() const { return key_memory() + (value_bytes + 15) / 16 * 16; }
  int64_t bytes_of_row() const {
    return kStages * int64_t(row_memory()) + kLookups * int64_t(sizeof(Move));
  }
  int64_t shared_bytes() const { return most_rows * bytes_of_row(); }
};

// The request of a thread's rows. They ascend, so it is mostly that of the row before.
struct Cursor {
  int64_t request = -1, begin = 0, end = 0;

  __device__ void go_to(const Packed& packed, int64_t row) {
    if (begin <= row && row < end) return;
    request = packed.request_of(row);
    begin = request < 0 ? 0 : packed.begin(request);
    end = request < 0 ? 0 : packed.end(request);
  }
};

// What a thread looks up: a row, of which the token is on its way.
struct Lookup {
  int64_t request, entry, token;  // request: -1 if there is no row
  uint32_t head, piece;
};

template <class Word>
struct Block {
  const CompactPagesParams& p;
  const Plan& plan;
  char* stages;
  Move* moves;                   // [kLookups, most_rows]
  uint32_t rows_of_block, rows;  // in a round; of all rounds and blocks
  int rounds;
  Cursor cursor{};

  __device__ Block(const CompactPagesParams& p, const Plan& plan, char* shared)
      : p(p),
        plan(plan),
        stages(shared),
        moves(reinterpret_cast<Move*>(shared + kStages * plan.most_rows * plan.row_memory())) {
    rows = uint32_t(p.packed.begin(p.packed.requests)) * plan.strips;
    const uint32_t most = plan.most_rows * gridDim.x;
    rounds = int((rows + most - 1) / most);
    const uint32_t shares = uint32_t(max(rounds, 1)) * gridDim.x;
    rows_of_block = (rows + shares - 1) / shares;
  }

  // The rows of this block in a round: the first, and how many.
  __device__ uint32_t first_row(int round) const {
    return (uint32_t(round) * gridDim.x + blockIdx.x) * rows_of_block;
  }
  __device__ int count(int round) const {
    const uint32_t first = first_row(round);
    return first < rows ? int(min(rows_of_block, rows - first)) : 0;
  }

  // Each thread looks up a row.
  __device__ Lookup ask_for_token(int round) {
    Lookup x{.request = -1};
    if (round >= rounds || int(threadIdx.x) >= count(round)) return x;
    const uint32_t row = first_row(round) + threadIdx.x;
    const uint32_t entry = row / plan.strips, strip = row - entry * plan.strips;
    x.head = strip / plan.pieces;
    x.piece = strip - x.head * plan.pieces;
    x.token = p.index[x.head * p.index_stride_g + entry];
    cursor.go_to(p.packed, entry);
    x.request = cursor.request;
    x.entry = entry - cursor.begin;
    return x;
  }
  __device__ void look_up(int round, const Lookup& x) const {
    if (round >= rounds || int(threadIdx.x) >= count(round)) return;
    Move move{};
    if (x.request >= 0) {
      assert(x.token >= x.entry && p.table.holds(x.token));
      if (x.token != x.entry) {
        const PageTable::Place from = p.table.place_of(x.request, x.token);
        const PageTable::Place to = p.table.place_of(x.request, x.entry);
        assert(p.table.exists(from.page) && p.table.exists(to.page));
        const int64_t byte = x.piece * kPieceBytes;
        const int64_t of_key = x.head * p.key.head_stride + byte;
        const int64_t of_value = x.head * p.value.head_stride + byte;
        move = {of_key + p.key.offset(from),
                of_value + p.value.offset(from),
                of_key + p.key.offset(to),
                of_value + p.value.offset(to),
                int(min(p.key.row_bytes - byte, kPieceBytes)),
                int(min(p.value.row_bytes - byte, kPieceBytes))};
      }
    }
    moves[round % kLookups * plan.most_rows + threadIdx.x] = move;
  }

  // Calls copy(word in shared memory, address before the offset, from, to) for each word of the
  // block's rows.
  template <class Copy>
  __device__ void for_words(int round, Copy copy) const {
    const int n = count(round), step = int(sizeof(Word)) << plan.log_team;
    const int first = (threadIdx.x & ((1 << plan.log_team) - 1)) * int(sizeof(Word));
    char* const stage = stages + round % kStages * plan.most_rows * plan.row_memory();
    const Move* const of_round = moves + round % kLookups * plan.most_rows;
#pragma unroll 4
    for (int row = threadIdx.x >> plan.log_team; row < n; row += kThreads >> plan.log_team) {
      const Move move = of_round[row];
      char* const at = stage + row * plan.row_memory();
      for (int i = first; i < move.key_bytes; i += step)
        copy(reinterpret_cast<Word*>(at + i), p.key.first + i, move.from_key, move.to_key);
      for (int i = first; i < move.value_bytes; i += step)
        copy(reinterpret_cast<Word*>(at + plan.key_memory() + i), p.value.first + i,
             move.from_value, move.to_value);
    }
  }
  __device__ void read(int round) const {
    if (round < rounds)
      for_words(round, [](Word* word, const char* first, int64_t from, int64_t) {
        if constexpr (sizeof(Word) >= 4)
          __pipeline_memcpy_async(word, first + from, sizeof(Word));
        else
          *word = *reinterpret_cast<const Word*>(first + from);
      });
    __pipeline_commit();
  }
  __device__ void write(int round) const {
    for_words(round, [](const Word* word, char* first, int64_t, int64_t to) {
      *reinterpret_cast<Word*>(first + to) = *word;
    });
  }
};

template <class Word>
__global__ __launch_bounds__(kThreads, kBlocks) void compact_pages_kernel(
    const CompactPagesParams p, const Plan plan) {
  extern __shared__ __align__(16) char shared[];
  Block<Word> block(p, plan, shared);
  const auto grid = cooperative_groups::this_grid();
  block.look_up(0, block.ask_for_token(0));
  Lookup next = block.ask_for_token(1);
  __syncthreads();
  block.read(0);
  for (int round = 0; round < block.rounds; ++round) {
    block.look_up(round + 1, next);
    __pipeline_wait_prior(0);
    auto token = grid.barrier_arrive();
    block.read(round + 1);
    next = block.ask_for_token(round + 2);
    grid.barrier_wait(std::move(token));
    block.write(round);
  }
}

int word_of(const CompactPagesParams& p) {
  uint64_t sizes = kPieceBytes;
  for (const PagedRows& rows : {p.key, p.value})
    sizes |= rows.row_bytes | rows.page_stride | rows.row_stride | rows.head_stride |
             uint64_t(rows.first);
  return word_bytes(sizes);
}

}  // namespace

cudaError_t run(const CompactPagesParams& p, cudaStream_t stream) {
  return with_word(word_of(p), [&](auto word) {
    const Plan plan(p, sizeof(word));
    const auto kernel = compact_pages_kernel<decltype(word)>;
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared_bytes()));
    if (status != cudaSuccess) return status;
    cudaLaunchAttribute attribute{.id = cudaLaunchAttributeCooperative, .val = {.cooperative = 1}};
    const cudaLaunchConfig_t config{.gridDim = dim3(unsigned(plan.blocks)),
                                    .blockDim = dim3(kThreads),
                                    .dynamicSmemBytes = size_t(plan.shared_bytes()),
                                    .stream = stream,
                                    .attrs = &attribute,
                                    .numAttrs = 1};
    return cudaLaunchKernelEx(&config, kernel, p, plan);
  });
}

}  // namespace claa::cuda
