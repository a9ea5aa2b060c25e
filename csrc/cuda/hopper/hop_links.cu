// The links of hop_tokens on Hopper, by TMA and wgmma.
//
// A block takes tiles of 128 tokens in turn. One thread brings their states, 64 channels at a time,
// and those of the seeds: once, if they fit beside a few stages, else with every stage. A warpgroup
// multiplies them, seeds as rows, and in the first hop measures each token while it is there.
//
// Memory bound: 16 KB of a stage take 900 cycles of a multiprocessor's share of the bandwidth,
// their products 300.

#include "csrc/cuda/hop_tokens_links.cuh"
#include "csrc/cuda/hopper/launch.cuh"
#include "csrc/cuda/hopper/tma.cuh"

namespace claa::cuda::hopper {
namespace {

using namespace hop_tokens;

constexpr int kConsumers = kWarpgroup;
constexpr int kBlock = kConsumers + kWarp;                                       // threads
constexpr int kTokenBytes = kTile * kRowBytes, kSeedBytes = kGroup * kRowBytes;  // of a panel
constexpr int kLeastStages = 4, kMostStages = 8;
constexpr int64_t kStaticBytes = 7 << 10;
static_assert(kTile == kConsumers && kGroup == kTileRows && kPanelChannels == kPanelItems);

template <bool kResident>
constexpr int kStageBytes = kResident ? kTokenBytes : kTokenBytes + kSeedBytes;

// Shared memory, from its front: the stages, the seeds if they stay, the mean state, barriers.
struct Plan {
  bool resident;
  int blocks, stages;  // blocks: of a row of [batch, groups]
  int seeds, mean, barriers;
  int bytes;

  Plan(const Buffers& w, int blocks) : blocks(blocks) {
    const int64_t panels = w.panels, mean_bytes = panels * kPanelChannels * int64_t(sizeof(float));
    const int64_t room = most_shared_bytes() - kStaticBytes - mean_bytes;
    const int64_t each = kTokenBytes + Ring<1>::kBarrierBytes;
    resident = panels * kSeedBytes + kLeastStages * each <= room;
    const int64_t kept = resident ? panels * kSeedBytes : 0;
    const int64_t stage = resident ? kTokenBytes : kTokenBytes + kSeedBytes;
    stages = int(min((room - kept) / (stage + Ring<1>::kBarrierBytes), int64_t(kMostStages)));
    seeds = int(stages * stage);
    mean = int(seeds + kept);
    barriers = int(mean + mean_bytes);
    bytes = int(barriers + stages * Ring<1>::kBarrierBytes);
  }
};

// By one thread: all stages of all tiles of the block.
template <bool kResident>
__device__ void produce(const HopTokensParams& p, const Buffers& w, const LinkRow& at,
                        const CUtensorMap& map, Ring<kStageBytes<kResident>>& ring,
                        char* resident) {
  const int per_piece = int(ceil_div(p.dim, kPanelChannels)), panels = int(w.panels);
  const uint4* seeds = w.panel + at.row * panels * kPanelWords;
  PipelineState state;
  int f = 0;
  for (int tile = at.block; tile < at.tiles; tile += at.blocks) {
    const bool brings_seeds = !kResident || tile == at.block;
    for (int panel = 0; panel < panels; ++panel, ++f, ring.advance(state)) {
      Barrier& full =
          ring.begin_load(state, f < ring.stages, kTokenBytes + (brings_seeds ? kSeedBytes : 0));
      const int piece = panel / per_piece;
      cute::SM90_TMA_LOAD_4D::copy(
          &map, reinterpret_cast<uint64_t*>(&full),
          uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL), ring.tile(state),
          panel % per_piece * kPanelChannels, int(p.context) - (tile + 1) * kTile,
          coordinate(piece, p.states_stride_g), coordinate(at.b, p.states_stride_b));
      if (brings_seeds)
        cute::SM90_BULK_COPY_G2S::copy(
            seeds + panel * kPanelWords, reinterpret_cast<uint64_t*>(&full),
            kResident ? resident + panel * kSeedBytes : ring.tile(state) + kTokenBytes, kSeedBytes);
    }
  }
}

// m (x - m), and the squared length of x - m, of the thread's token.
struct TokenLength {
  float dot = 0.f, square = 0.f;

  // `mean`: of the panel's channels.
  template <class T>
  __device__ void add(const char* tokens, const float* mean) {
    const int row = threadIdx.x;
    float panel_dot = 0.f, panel_square = 0.f;
#pragma unroll
    for (int c = 0; c < kPanelChannels / 8; ++c) {
      float x[8];
      unpack<T>(*reinterpret_cast<const uint4*>(tokens + row * kRowBytes + (c ^ row % 8) * 16), x);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float m = mean[c * 8 + j], centred = x[j] - m;
        panel_square += centred * centred;
        panel_dot += m * centred;
      }
    }
    dot += panel_dot;
    square += panel_square;
  }
};

// Writes the links of a tile, whose first token is j0, and the sums of each seed. How the products
// lie: start_products in wgmma.cuh. `tokens`: the dot and the scale of each.
__device__ inline void write_tile(const LinkRow& at, const float (&x)[kTile / 2],
                                  const float2* tokens, const Seed* seeds, int j0, float* links,
                                  int64_t width, float* sums) {
  const int lane = threadIdx.x % kWarp, r = lane / 4, c = lane % 4;
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int s = threadIdx.x / kWarp * 16 + lower * 8 + r;
    const Seed seed = seeds[s];
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kTile / 8; ++i) {
      const int t = 8 * i + 2 * c;
      const float4 two = *reinterpret_cast<const float4*>(tokens + t);
      const float first = at.link(x[4 * i + 2 * lower] - two.x - seed.dot, two.y, seed, j0 + t);
      const float second =
          at.link(x[4 * i + 2 * lower + 1] - two.z - seed.dot, two.w, seed, j0 + t + 1);
      *reinterpret_cast<float2*>(links + s * width + t) = make_float2(first, second);
      sum += first + second;
    }
    sum += __shfl_xor_sync(kFullMask, sum, 1);
    sum += __shfl_xor_sync(kFullMask, sum, 2);
    if (c == 0) sums[s] = sum;
  }
}

template <class T, bool kFirstHop, bool kResident>
__device__ void consume(const HopTokensParams& p, const Buffers& w, const LinkRow& at,
                        Ring<kStageBytes<kResident>>& ring, const char* resident, const float* mean,
                        const Seed* seeds, float2 (&tokens)[2][kTile]) {
  const int panels = int(w.panels), t = threadIdx.x;
  PipelineState state;
  for (int tile = at.block, turn = 0; tile < at.tiles; tile += at.blocks, turn ^= 1) {
    const int column = int(w.width) - (tile + 1) * kTile;
    const int64_t mine = at.b * w.width + column + t;
    float2 token{};
    if constexpr (!kFirstHop) token = {w.token_dots[mine], w.token_scales[mine]};
    [[maybe_unused]] TokenLength length;
    float x[kTile / 2];
    PipelineState before;
    for (int panel = 0; panel < panels; ++panel, ring.advance(state)) {
      ring.wait(state);
      const char* of_tokens = ring.tile(state);
      const char* of_seeds = kResident ? resident + panel * kSeedBytes : of_tokens + kTokenBytes;
      start_products<T, kPanelChannels, kTile>(x, in_panels(of_seeds, kGroup),
                                               in_panels(of_tokens, kTile), panel > 0);
      if constexpr (kFirstHop) length.template add<T>(of_tokens, mean + panel * kPanelChannels);
      if (panel > 0) {
        cute::warpgroup_wait<1>();
        ring.free(before);
      }
      before = state;
    }
    finish_products<0>(x);
    ring.free(before);
    if constexpr (kFirstHop) {
      token = {length.dot, length.square == 0.f ? 0.f : 1.f / sqrtf(length.square)};
      if (at.is_first_group(w)) {
        w.token_dots[mine] = token.x;
        w.token_scales[mine] = token.y;
      }
    }
    tokens[turn][t] = token;
    sync_consumers<kConsumers>();
    write_tile(at, x, tokens[turn], seeds, column - w.padding(p),
               w.links + at.row * kGroup * w.width + column, w.width,
               w.link_sums + (at.row * w.tiles + tile) * kGroup);
  }
}

template <class T, bool kFirstHop, bool kResident>
__global__ __launch_bounds__(kBlock, 1) void link_kernel(const __grid_constant__ CUtensorMap map,
                                                         const HopTokensParams p, const Buffers w,
                                                         const Plan plan) {
  extern __shared__ __align__(kAlignment) char shared[];
  __shared__ __align__(16) float parts[kJoined<kBlock>];
  __shared__ __align__(16) float2 tokens[2][kTile];
  __shared__ Seed seeds[kGroup];
  wait_for_kernels_ahead();
  const LinkRow at(p, w, plan.blocks);
  Ring<kStageBytes<kResident>> ring(shared, reinterpret_cast<Barrier*>(shared + plan.barriers),
                                    plan.stages);
  char* resident = shared + plan.seeds;
  auto* mean = reinterpret_cast<float*>(shared + plan.mean);
  if (threadIdx.x == kConsumers) ring.init(kConsumers / kWarp);
  if (threadIdx.x < kGroup) seeds[threadIdx.x] = w.seed[at.row * kGroup + threadIdx.x];
  if constexpr (kFirstHop) {
    const int per_piece = int(ceil_div(p.dim, kPanelChannels)) * kPanelChannels;
    for (int i = threadIdx.x; i < w.panels * kPanelChannels; i += kBlock) {
      const int piece = i / per_piece, d = i % per_piece;
      mean[i] = d < p.dim ? w.mean[(at.b * p.pieces + piece) * p.dim + d] : 0.f;
    }
  }
  __syncthreads();
  if (warp_index() == kConsumers / kWarp) {
    if (threadIdx.x == kConsumers) produce<kResident>(p, w, at, map, ring, resident);
    __syncwarp();
  } else {
    consume<T, kFirstHop, kResident>(p, w, at, ring, resident, mean, seeds, tokens);
  }
  join_sums<kBlock>(w, at, parts);
}

template <class T, bool kFirstHop>
cudaError_t launch(const HopTokensParams& p, const Buffers& w, cudaStream_t stream) {
  CUtensorMap map;
  const cudaError_t status =
      map_rows(p.dtype, p.states, p.dim, {p.batch, p.pieces, p.context},
               {p.states_stride_b, p.states_stride_g, p.states_stride_n}, 1, kTile, &map);
  if (status != cudaSuccess) return status;
  const int64_t rows = p.batch * w.groups;
  const Plan plan(w, int(min(ceil_div(int64_t(multiprocessors()), rows), w.tiles)));
  return launch_kernel(
      plan.resident ? link_kernel<T, kFirstHop, true> : link_kernel<T, kFirstHop, false>,
      {.blocks = rows * plan.blocks,
       .threads = kBlock,
       .shared_bytes = plan.bytes,
       .overlaps = true},
      stream, map, p, w, plan);
}

}  // namespace

bool takes(const HopTokensParams& p) {
  const auto fits = [](int64_t size, int64_t stride) {
    return stride == 0 || map_fits(size, stride);
  };
  // Of smaller ones half of a panel and more would be empty.
  return device_fits() && p.dim >= kPanelChannels && p.context <= kMaxTotal &&
         map_fits(p.context, p.states_stride_n) && fits(p.batch, p.states_stride_b) &&
         fits(p.pieces, p.states_stride_g);
}

cudaError_t find_links(const HopTokensParams& p, const Buffers& w, cudaStream_t stream) {
  const bool is_first = p.part == 0;
  if (p.dtype == DType::f16)
    return is_first ? launch<__half, true>(p, w, stream) : launch<__half, false>(p, w, stream);
  return is_first ? launch<__nv_bfloat16, true>(p, w, stream)
                  : launch<__nv_bfloat16, false>(p, w, stream);
}

}  // namespace claa::cuda::hopper
