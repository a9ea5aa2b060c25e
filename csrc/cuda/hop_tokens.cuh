// What the kernels of hop_tokens share: what lies in the workspace, and how states are read.

#pragma once

#include "csrc/cuda/overlap.cuh"
#include "csrc/cuda/product.cuh"

namespace claa::cuda::hop_tokens {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kTile = 128;                   // tokens
constexpr int kWarpTokens = kTile / kWarps;  // of a warp in the tensor core kernel
constexpr int kGroup = 64;                   // seeds that a block multiplies
constexpr int kSeedTiles = kGroup / 16;      // rows of one mma
constexpr int kSlice = 32;                   // channels that a lane's 16 bytes and its quad hold
constexpr int kSliceWords = kGroup * kSlice / 8;  // uint4 of a slice of the seeds
constexpr int kStepSlices = 2, kSteps = 4;  // loaded together, and how many such are in flight
constexpr int kQuarters = 4;                // chunks of seeds that fit in shared memory
constexpr int kPanelChannels = 64;          // on Hopper: of a row of a tile of wgmma.cuh
constexpr int kPanelWords = kGroup * kPanelChannels / 8;  // uint4 of a panel of the seeds
constexpr int kChunkSlices = 4, kRing = 3;  // of seeds that do not: slices of a chunk, and chunks

// A seed, for all blocks. Position -1: none.
struct Seed {
  int position;
  float dot, scale;  // m s, and one over the length of s - m
};

// What is kept in the workspace, from part to part.
struct Buffers {
  int64_t tiles, width, groups, seeds;  // of a row; width: tokens, in whole tiles
  int64_t slices, panels;               // of a token
  bool on_tensor_cores, on_hopper;      // the latter has panels in place of slices
  float* sums;                          // [batch, tiles, channels]
  float* mean;                          // [batch, channels]
  float* token_dots;                    // [batch, width]: m (x - m)
  float* token_scales;                  // [batch, width]: one over the length of x - m
  float* links;                         // [batch, seeds, width]
  float* link_sums;                     // [batch, groups, tiles, kGroup]
  float* factors;                       // [batch, seeds]
  float* rank;                          // [batch, context]: what the next seeds are chosen by
  uint4* panel;       // [batch, groups, words of slices or panels]: the seeds, for tensor cores
  Seed* seed;         // [batch, seeds]
  int32_t* best;      // [batch, num_seeds]
  int32_t* counts;    // [hops, batch]
  uint32_t* tickets;  // [batch, groups]: blocks that have finished
  uint8_t* was_seed;  // [batch, context]
  char* select = nullptr;  // select_topk's own
  int64_t bytes;

  explicit Buffers(const HopTokensParams& p);

  // Tokens lie at the end of their tiles: token j is column j + padding().
  __device__ int padding(const HopTokensParams& p) const { return int(width - p.context); }
};

// How the seeds of a hop are chosen.
inline SelectTopkParams selection(const HopTokensParams& p, const Buffers& w) {
  return p.seeds(w.rank, w.counts + p.part * p.batch, w.best, w.select);
}

inline int64_t slices_of_piece(const HopTokensParams& p) { return ceil_div(p.dim, kSlice); }

// Shared memory of a block: the seeds, all of them or a ring of chunks, and the mean.
inline int64_t shared_bytes(int64_t slices, bool resident) {
  const int64_t kept = resident ? slices : kRing * kChunkSlices;
  return kept * kSliceWords * int64_t(sizeof(uint4)) + slices * kSlice * int64_t(sizeof(float));
}
inline bool fits(int64_t bytes) {
  constexpr int64_t kStatic = 8 << 10;
  return bytes + kStatic <= device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

}  // namespace claa::cuda::hop_tokens

// The links on Hopper (hopper/hop_links.cu). `takes`: whether its instructions can do the work on
// this device, with these sizes and strides.
namespace claa::cuda::hopper {
#ifdef CLAA_HOPPER
bool takes(const HopTokensParams& p);
cudaError_t find_links(const HopTokensParams& p, const hop_tokens::Buffers& w, cudaStream_t stream);
#else
inline bool takes(const HopTokensParams&) { return false; }
inline cudaError_t find_links(const HopTokensParams&, const hop_tokens::Buffers&, cudaStream_t) {
  return cudaErrorNotSupported;
}
#endif
}  // namespace claa::cuda::hopper

namespace claa::cuda::hop_tokens {

inline Buffers::Buffers(const HopTokensParams& p) {
  tiles = ceil_div(p.context, kTile);
  width = tiles * kTile;
  groups = ceil_div(p.num_seeds, kGroup);
  seeds = groups * kGroup;
  slices = round_up(p.pieces * slices_of_piece(p), kStepSlices * kSteps);
  on_tensor_cores = rows_are_aligned(p.dtype, p.dim, p.states, p.states_stride_b, p.states_stride_g,
                                     p.states_stride_n) &&
                    fits(shared_bytes(slices, false));
  on_hopper = on_tensor_cores && hopper::takes(p);
  panels = p.pieces * ceil_div(p.dim, kPanelChannels);
  char* next = static_cast<char*>(p.workspace);
  const auto take = [&](auto*& array, int64_t n) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(next);
    next += round_up(n * int64_t(sizeof(*array)), 256);
  };
  take(sums, p.batch * tiles * p.channels());
  take(mean, p.batch * p.channels());
  take(token_dots, p.batch * width);
  take(token_scales, p.batch * width);
  take(links, p.batch * seeds * width);
  take(link_sums, p.batch * groups * tiles * kGroup);
  take(factors, p.batch * seeds);
  take(rank, p.batch * p.context);
  const int64_t words = on_hopper ? panels * kPanelWords : slices * kSliceWords;
  take(panel, on_tensor_cores ? p.batch * groups * words : 0);
  take(seed, p.batch * seeds);
  take(best, p.batch * p.num_seeds);
  take(counts, p.hops * p.batch);
  take(tickets, p.batch * groups);
  take(was_seed, p.batch * p.context);
  take(select, workspace_bytes(selection(p, *this)));
  bytes = next - static_cast<char*>(p.workspace);
}

// 16 bytes that are read once, if they exist; else zeros. Without a branch, so that many loads are
// on their way before the first is used.
__device__ inline uint4 load_streaming_if(bool exists, const void* from) {
  uint4 v{};
  asm volatile(
      "{\n"
      ".reg .pred exists;\n"
      "setp.ne.b32 exists, %5, 0;\n"
      "@exists ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(from), "r"(int(exists)));
  return v;
}

// Eight channels of a state.
template <class T>
__device__ void unpack(const uint4& words, float (&x)[8]) {
  T item[8];
  memcpy(item, &words, sizeof(words));
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = to_float(item[i]);
}

}  // namespace claa::cuda::hop_tokens
