// select_topk: positions of the k best scores, ascending.
//
// Latency bound: a row is read once from memory, and what takes time is to agree. Scores become
// integers that grow with the score. Three histograms (12, 12, 8 bits) of those that share the
// threshold's digits so far give the threshold and how many of the scores equal to it are wanted;
// where all that share its digits are wanted, that is early. Counts are integers, so nothing
// depends on the order of atomics. Then every warp puts the positions of its kept tokens in order
// into shared memory and knows how many they are, sums over the warps before it tell where they go,
// and they are copied there: the output ascends without a sort, and a tie goes to the lower
// position.
//
// A team of blocks shares a row, every warp of it a contiguous part:
//   up to 8k tokens     one block, tokens in registers
//   up to 128k tokens   a cluster of 8 blocks, tokens in registers. In each pass a block sends the
//                       sums of 32 groups of its bins to all blocks, then, of the group that holds
//                       the threshold, the bins. As these come block by block, they also tell how
//                       many tokens the blocks before this one keep.
//   longer, or where there are no clusters (before sm_90)
//                       as many blocks as it takes to hold the row in registers, if the device runs
//                       so many at once; else tokens are read again in every pass, from the L2
//                       cache. The blocks add their bins up in device memory and wait for each
//                       other there.

#include <cstddef>

#include "csrc/cuda/cluster.cuh"
#include "csrc/cuda/overlap.cuh"

namespace claa::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kVector = 4;  // tokens in 16 bytes
constexpr int kHighBits = 12, kMiddleBits = 12, kLowBits = 8;
constexpr int kGroups = kWarp;  // of the bins of a histogram
constexpr int kGrid = 0;        // blocks of a team that is no cluster

// Inclusive sum over the lanes of a warp.
__device__ uint32_t prefix_sum(uint32_t value) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const uint32_t other = __shfl_up_sync(kFullMask, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

template <int kWords>
struct alignas(4 * kWords) Words {
  uint32_t word[kWords];
};

// One pass: a histogram, and what the blocks of a cluster send each other about it.
template <int kBlocks, int kBins_>
struct Histogram {
  static constexpr int kBins = kBins_, kGroupBins = kBins / kGroups;
  static constexpr int kPerLane = kGroupBins < kWarp ? 1 : kGroupBins / kWarp;
  static constexpr int kLanes = kGroupBins / kPerLane;  // that have bins of a group

  alignas(16) uint32_t bins[kBins];
  uint32_t group_sums[kGroups];
  uint32_t sums_of[max(kBlocks, 1)][kGroups];
  uint32_t bins_of[max(kBlocks, 1)][kGroupBins];
  Mailbox sums_box, bins_box;

  __device__ Words<kPerLane> of_group(int group) const {
    const int lane = min(int(threadIdx.x) % kWarp, kLanes - 1);
    return *reinterpret_cast<const Words<kPerLane>*>(bins + group * kGroupBins + lane * kPerLane);
  }
};

// Where the threshold lies among counters.
struct Place {
  uint32_t at;      // its counter
  uint32_t wanted;  // how many of this counter's scores are wanted
  uint32_t count;   // how many it has
  uint32_t above;   // in the blocks before: scores of higher counters
  uint32_t equal;   // and of this one
};

// By one warp: the counter that has the wanted-th score from the top. Each block of a team has
// kLanes * kPerLane of them, one block's right behind the other's.
template <int kBlocks, int kLanes, int kPerLane>
__device__ Place find(const uint32_t* counters, uint32_t rank, uint32_t wanted) {
  const int lane = threadIdx.x % kWarp;
  const int low = (kLanes - 1 - min(lane, kLanes - 1)) * kPerLane;  // lane 0 has the highest
  uint32_t counts[kPerLane] = {}, aheads[kPerLane] = {};
#pragma unroll 4  // more loads at a time need more registers than there are
  for (int block = 0; block < kBlocks; ++block) {
    const auto words =
        *reinterpret_cast<const Words<kPerLane>*>(counters + block * kLanes * kPerLane + low);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      counts[i] += words.word[i];
      if (block < rank) aheads[i] += words.word[i];
    }
  }
  uint32_t here = 0, ahead = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    here += counts[i];
    ahead += aheads[i];
  }
  if (lane >= kLanes) here = 0;
  const uint32_t through = prefix_sum(here);
  const int owner = __ffs(__ballot_sync(kFullMask, through >= wanted)) - 1;
  Place place{0, wanted - (through - here), counts[kPerLane - 1], 0, aheads[kPerLane - 1]};
  uint32_t at = kPerLane - 1, above = 0;
#pragma unroll
  for (int i = kPerLane - 2; i >= 0; --i) {
    if (at == i + 1 && place.wanted > place.count) {
      at = i;
      above += place.equal;
      place.wanted -= place.count;
      place.count = counts[i];
      place.equal = aheads[i];
    }
  }
  place.at = __shfl_sync(kFullMask, low + at, owner);
  place.wanted = __shfl_sync(kFullMask, place.wanted, owner);
  place.count = __shfl_sync(kFullMask, place.count, owner);
  if constexpr (kBlocks > 1) {
    place.above = __reduce_add_sync(kFullMask, lane < owner ? ahead : lane == owner ? above : 0u);
    place.equal = __shfl_sync(kFullMask, place.equal, owner);
  }
  return place;
}

// The blocks of a row in device memory. All zero at first.
struct Meeting {
  uint32_t arrived;
  uint32_t padding[31];
  uint32_t bins[(1 << kHighBits) + (1 << kMiddleBits) + (1 << kLowBits)];
  uint32_t block_sums[2];  // of the blocks' scores above and at the threshold; one pair per block
};

__host__ __device__ constexpr int64_t meeting_bytes(int64_t blocks) {
  return round_up(int64_t(offsetof(Meeting, block_sums)) + 8 * blocks, 128);
}

// A barrier of the blocks of a row, the `turn`-th.
__device__ void wait_for_all(Meeting* meeting, uint32_t blocks, uint32_t turn) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(&meeting->arrived, 1u);
    while (*static_cast<volatile uint32_t*>(&meeting->arrived) < turn * blocks) {
    }
    __threadfence();
  }
  __syncthreads();
}

template <int kBlocks>
struct Shared {
  Histogram<kBlocks, 1 << kHighBits> high;
  Histogram<kBlocks, 1 << kMiddleBits> middle;
  Histogram<kBlocks, 1 << kLowBits> low;
  uint32_t warp_sums[2][kWarp];
  Place found;
};

// Behind a histogram: its bin that holds the threshold, for all threads of the team.
template <int kBlocks, class H>
__device__ Place agree(H& histogram, Place& found, uint32_t rank, uint32_t wanted) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  __syncthreads();
  for (int group = warp; group < kGroups; group += warps) {
    const auto words = histogram.of_group(group);
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < H::kPerLane; ++i) sum += words.word[i];
    sum = __reduce_add_sync(kFullMask, lane < H::kLanes ? sum : 0u);
    if (lane == 0) histogram.group_sums[group] = sum;
  }
  __syncthreads();
  if constexpr (kBlocks > 1) {
    if (warp < kBlocks) {  // mails block `warp`
      const uint32_t sum[1] = {histogram.group_sums[lane]};
      send(sum, &histogram.sums_of[rank][lane], histogram.sums_box, warp);
      receive(histogram.sums_box);
      const Place group = find<kBlocks, kGroups, 1>(histogram.sums_of[0], rank, wanted);
      const auto bins = histogram.of_group(group.at);
      if (lane < H::kLanes)
        send(bins.word, &histogram.bins_of[rank][lane * H::kPerLane], histogram.bins_box, warp);
      if (warp == 0) {
        receive(histogram.bins_box);
        Place bin = find<kBlocks, H::kLanes, H::kPerLane>(histogram.bins_of[0], rank, group.wanted);
        bin.at += group.at * H::kGroupBins;
        bin.above += group.above;
        if (lane == 0) found = bin;
      }
    }
  } else if (warp == 0) {
    const Place group = find<1, kGroups, 1>(histogram.group_sums, 0, wanted);
    Place bin =
        find<1, H::kLanes, H::kPerLane>(histogram.bins + group.at * H::kGroupBins, 0, group.wanted);
    bin.at += group.at * H::kGroupBins;
    if (lane == 0) found = bin;
  }
  __syncthreads();
  return found;
}

template <class Index, int kBlocks, int kItems, bool kResident>
__global__ __launch_bounds__(kMaxThreads, 1) void select_kernel(const SelectTopkParams p,
                                                                uint32_t team_blocks,
                                                                int64_t per_warp) {
  constexpr bool kCluster = kBlocks > 1, kIsGrid = kBlocks == kGrid;
  constexpr int kVectors = kItems / kVector, kTile = kItems * kWarp;
  static_assert(kVectors <= 4);  // counts of each, up to 128, share a word

  extern __shared__ __align__(16) char dynamic[];
  auto& shared = *reinterpret_cast<Shared<kBlocks>*>(dynamic);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  auto* stage = reinterpret_cast<uint16_t*>(dynamic + sizeof(shared)) + warp * kTile;

  // What needs no input.
  const auto clear = [&](auto& bins) {
    for (int i = threadIdx.x; i < sizeof(bins) / 16; i += blockDim.x)
      reinterpret_cast<uint4*>(bins)[i] = {};
  };
  clear(shared.high.bins);
  clear(shared.middle.bins);
  clear(shared.low.bins);
  if constexpr (kCluster) {
    const auto expect_mail = [&](auto& histogram) {
      expect(histogram.sums_box, sizeof(histogram.sums_of));
      expect(histogram.bins_box, sizeof(histogram.bins_of));
    };
    if (threadIdx.x == 0) {
      expect_mail(shared.high);
      expect_mail(shared.middle);
      expect_mail(shared.low);
    }
  }
  __syncthreads();
  if constexpr (kCluster) cluster_arrive();
  wait_for_kernels_ahead();

  const uint32_t blocks = kIsGrid ? team_blocks : kBlocks;
  const uint32_t row = blockIdx.x / blocks, b = row / uint32_t(p.inner);
  const uint32_t rank = kCluster ? cluster_rank() : kIsGrid ? blockIdx.x - row * blocks : 0;
  const float* scores =
      p.scores + b * p.scores_stride_b + (row - b * uint32_t(p.inner)) * p.scores_stride_inner;
  Index* out = static_cast<Index*>(p.out) + row * p.k;
  const auto [n_window, n_sinks, n_scored, n_padding, n_empty, first_valid, first] = p.tiers(b);
  const int64_t candidates = p.context - first;

  // The tokens of this warp; the team's first is on a 16-byte boundary. Of a tile a lane has
  // kVectors times kVector neighbours. A token that is not there has order 0, which no score has.
  const int64_t aligned =
      first - int64_t(reinterpret_cast<uintptr_t>(scores + first) / sizeof(float) % kVector);
  const int64_t begin = aligned + int64_t(rank * warps + warp) * per_warp;
  const int from = int(max<int64_t>(first - begin, 0));
  const int end = int(max<int64_t>(min(per_warp, p.context - begin), 0));
  scores += begin;
  uint32_t orders[kItems];
  const auto is_whole = [&](int vector) {
    return vector >= from && vector + kWarp * kVector <= end;
  };
  const auto exists = [&](int j) { return j >= from && j < end; };
  const auto load = [&](int tile) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int vector = tile + v * kWarp * kVector, j = vector + lane * kVector;
      if (is_whole(vector)) {
        const auto four = *reinterpret_cast<const uint4*>(scores + j);
        orders[v * kVector] = four.x;
        orders[v * kVector + 1] = four.y;
        orders[v * kVector + 2] = four.z;
        orders[v * kVector + 3] = four.w;
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          orders[v * kVector + i] = exists(j + i) ? __float_as_uint(scores[j + i]) : 0;
      }
    }
  };
  const auto convert = [&](int tile) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int vector = tile + v * kWarp * kVector, j = vector + lane * kVector;
#pragma unroll
      for (int i = v * kVector; i < (v + 1) * kVector; ++i)
        orders[i] = order_of(__uint_as_float(orders[i]));
      if (!is_whole(vector)) {
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          if (!exists(j + i)) orders[v * kVector + i] = 0;
      }
    }
  };
  const auto for_each_tile = [&](auto visit) {
    if constexpr (kResident) {
      visit(0);
    } else {
      for (int tile = 0; tile < end; tile += kTile) {
        load(tile);
        convert(tile);
        visit(tile);
      }
    }
  };
  if constexpr (kResident) load(0);

  const int64_t thread = int64_t(rank) * blockDim.x + threadIdx.x,
                threads = int64_t(blocks) * blockDim.x;
  for (int64_t i = thread; i < n_empty; i += threads) out[i] = Index(-1);
  out += n_empty;
  for (int64_t i = thread; i < n_padding; i += threads) out[i] = Index(i);
  out += n_padding;
  for (int64_t i = thread; i < n_sinks; i += threads) out[i] = Index(first_valid + i);
  out += n_sinks;
  for (int64_t i = thread; i < n_window; i += threads)
    out[n_scored + i] = Index(p.context + p.window - n_window + i);
  if (n_scored == candidates) {
    for (int64_t i = thread; i < candidates; i += threads) out[i] = Index(first + i);
    return;  // the whole team
  }
  if (n_scored == 0) return;

  if constexpr (kResident) convert(0);

  [[maybe_unused]] Meeting* meeting = nullptr;
  [[maybe_unused]] uint32_t turn = 0;
  if constexpr (kIsGrid)
    meeting =
        reinterpret_cast<Meeting*>(static_cast<char*>(p.workspace) + row * meeting_bytes(blocks));
  // Adds the team's bins up, where blocks do not mail them.
  const auto share = [&](auto& bins, int first_bin) {
    if constexpr (kIsGrid) {
      if (blocks == 1) return;
      constexpr int kBins = sizeof(bins) / sizeof(bins[0]);
      uint32_t* sums = meeting->bins + first_bin;
      __syncthreads();
      for (int i = threadIdx.x; i < kBins; i += blockDim.x)
        if (bins[i]) atomicAdd(sums + i, bins[i]);
      wait_for_all(meeting, blocks, ++turn);
      for (int i = threadIdx.x; i < kBins; i += blockDim.x) bins[i] = __ldcg(sums + i);
    }
  };

  for_each_tile([&](int) {
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      atomicAdd(&shared.high.bins[orders[i] >> (32 - kHighBits)], 1u);
  });
  if constexpr (kCluster) cluster_wait();  // all blocks expect mail
  share(shared.high.bins, 0);
  Place found = agree<kBlocks>(shared.high, shared.found, rank, uint32_t(n_scored));
  uint32_t above = found.above;
  uint32_t threshold = found.at << (32 - kHighBits);
  if (found.wanted < found.count) {
    for_each_tile([&](int) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const uint32_t rest = orders[i] - threshold;
        if (rest < 1u << (32 - kHighBits)) atomicAdd(&shared.middle.bins[rest >> kLowBits], 1u);
      }
    });
    share(shared.middle.bins, 1 << kHighBits);
    found = agree<kBlocks>(shared.middle, shared.found, rank, found.wanted);
    above += found.above;
    threshold += found.at << kLowBits;
    if (found.wanted < found.count) {
      for_each_tile([&](int) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const uint32_t rest = orders[i] - threshold;
          if (rest < 1u << kLowBits) atomicAdd(&shared.low.bins[rest], 1u);
        }
      });
      share(shared.low.bins, (1 << kHighBits) + (1 << kMiddleBits));
      found = agree<kBlocks>(shared.low, shared.found, rank, found.wanted);
      above += found.above;
      threshold += found.at;
    }
  }
  // Kept are the scores above `cut`, and of the ties with the threshold the first `ties`.
  const bool has_ties = found.wanted < found.count;
  const uint32_t ties = has_ties ? found.wanted : 0;
  const uint32_t cut = has_ties ? threshold : threshold - 1;
  const auto is_tie = [&](uint32_t order) { return has_ties && order == threshold; };

  // The sum over the warps before this one.
  const auto before_warp = [&](uint32_t sum, uint32_t* warp_sums) {
    if (lane == 0) warp_sums[warp] = sum;
    __syncthreads();
    return __reduce_add_sync(kFullMask, lane < warp ? warp_sums[lane] : 0u);
  };
  uint32_t my_sure = 0, my_ties = 0;
  if (has_ties || kIsGrid) {
    for_each_tile([&](int) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if constexpr (kIsGrid) my_sure += orders[i] > cut;
        my_ties += is_tie(orders[i]);
      }
    });
    my_ties = __reduce_add_sync(kFullMask, my_ties);
  }
  [[maybe_unused]] uint32_t sure_before = 0;
  uint32_t ties_before = found.equal;
  if constexpr (!kIsGrid) {
    if (has_ties) ties_before += before_warp(my_ties, shared.warp_sums[0]);
  } else {
    my_sure = __reduce_add_sync(kFullMask, my_sure);
    sure_before = before_warp(my_sure, shared.warp_sums[0]);
    ties_before = before_warp(my_ties, shared.warp_sums[1]);
    if (blocks > 1) {
      uint32_t* block_sums = meeting->block_sums;
      if (warp == warps - 1 && lane == 0) {
        block_sums[2 * rank] = sure_before + my_sure;
        block_sums[2 * rank + 1] = ties_before + my_ties;
      }
      wait_for_all(meeting, blocks, ++turn);
      uint32_t sure_ahead = 0, ties_ahead = 0;
      for (int block = lane; block < rank; block += kWarp) {
        sure_ahead += __ldcg(block_sums + 2 * block);
        ties_ahead += __ldcg(block_sums + 2 * block + 1);
      }
      sure_before += __reduce_add_sync(kFullMask, sure_ahead);
      ties_before += __reduce_add_sync(kFullMask, ties_ahead);
    }
  }
  uint32_t left = ties - min(ties_before, ties);  // for this warp and those behind it
  const bool drops_ties = left > 0 && left < my_ties;
  const uint32_t warp_cut = left > 0 ? cut - 1 : cut;

  // Visits a tile's tokens of a kind in order, with their number; returns how many there are.
  const auto enumerate = [&](auto is_wanted, auto visit) {
    uint32_t mine = 0;  // counts of the vectors, a byte each
#pragma unroll
    for (int i = 0; i < kItems; ++i) mine += is_wanted(orders[i]) ? 1u << i / kVector * 8 : 0;
    const uint32_t through = prefix_sum(mine), all = __shfl_sync(kFullMask, through, kWarp - 1);
    uint32_t before = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      uint32_t number = before + ((through - mine) >> v * 8 & 255);
#pragma unroll
      for (int i = v * kVector; i < (v + 1) * kVector; ++i)
        if (is_wanted(orders[i])) visit(i, number++);
      before += all >> v * 8 & 255;
    }
    return before;
  };
  const auto stage_tile = [&] {
    if (drops_ties)
      left -= min(left, enumerate(is_tie, [&](int i, uint32_t number) {
                    if (number >= left) orders[i] = 0;
                  }));
    const auto in_tile = uint16_t(lane * kVector);
    return enumerate([&](uint32_t order) { return order > warp_cut; },
                     [&](int i, uint32_t number) {
                       stage[number] =
                           in_tile + uint16_t(i / kVector * kWarp * kVector + i % kVector);
                     });
  };
  const auto write_tile = [&](int tile, uint32_t kept, uint32_t to) {
    for (uint32_t i = lane; i < kept; i += kWarp) out[to + i] = Index(begin + tile + stage[i]);
  };
  if constexpr (!kIsGrid) {
    const uint32_t kept = stage_tile();
    const uint32_t to = before_warp(kept, shared.warp_sums[1]);
    write_tile(0, kept, above + (has_ties ? min(found.equal, ties) : found.equal) + to);
  } else {
    uint32_t to = sure_before + min(ties_before, ties);
    for_each_tile([&](int tile) {
      const uint32_t kept = stage_tile();
      __syncwarp();
      write_tile(tile, kept, to);
      __syncwarp();
      to += kept;
    });
  }
}

// The blocks that share a row, and their threads. kResident: they hold it in registers.
template <int kBlocks_, int kItems_, bool kResident_>
struct Team {
  static constexpr int kBlocks = kBlocks_, kItems = kItems_;
  static constexpr bool kResident = kResident_;
  int64_t blocks;
  int threads;

  int64_t warps() const { return blocks * (threads / kWarp); }
  // Up to three of the tokens lie before the row, from a 16-byte boundary on.
  bool holds(int64_t context) const { return context + kVector - 1 <= warps() * kItems * kWarp; }
  bool meets_in_memory() const { return kBlocks == kGrid && blocks > 1; }
};

// Calls fn with the smallest team that holds a row in registers, or else with one as large as the
// device runs at once.
template <class Fn>
auto with_team(const SelectTopkParams& p, Fn fn) {
  const Team<1, 16, true> block{1, 512};
  const Team<8, 8, true> small_cluster{8, 512};
  const Team<8, 16, true> large_cluster{8, 1024};
  if (block.holds(p.context)) return fn(block);
  if (device_attribute(cudaDevAttrClusterLaunch)) {
    if (small_cluster.holds(p.context)) return fn(small_cluster);
    if (large_cluster.holds(p.context)) return fn(large_cluster);
  }
  Team<kGrid, 16, true> grid{1, kMaxThreads};
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  while (!grid.holds(p.context) && p.batch * p.inner * (grid.blocks + 1) <= multiprocessors)
    ++grid.blocks;
  if (grid.holds(p.context)) return fn(grid);
  return fn(Team<kGrid, 8, false>{grid.blocks, grid.threads});
}

template <class Index, class Team>
cudaError_t launch(const SelectTopkParams& p, Team team, cudaStream_t stream) {
  const auto kernel = select_kernel<Index, Team::kBlocks, Team::kItems, Team::kResident>;
  const int64_t rows = p.batch * p.inner;
  const int shared_bytes =
      int(sizeof(Shared<Team::kBlocks>)) + team.threads * Team::kItems * int(sizeof(uint16_t));
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status == cudaSuccess && team.meets_in_memory())
    status = cudaMemsetAsync(p.workspace, 0, rows * meeting_bytes(team.blocks), stream);
  if (status != cudaSuccess) return status;

  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(rows * team.blocks));
  config.blockDim = dim3(team.threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (team.meets_in_memory()) {
    config.numAttrs = 1;
    attributes[0].id = cudaLaunchAttributeCooperative;  // all blocks run at once
    attributes[0].val.cooperative = 1;
  } else {
    config.numAttrs = Team::kBlocks > 1;
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {unsigned(team.blocks), 1, 1};
    let_overlap(config);
  }
  constexpr int kPart = Team::kResident ? kVector * kWarp : Team::kItems * kWarp;
  const int64_t per_warp = round_up(ceil_div(p.context + kVector - 1, team.warps()), kPart);
  return cudaLaunchKernelEx(&config, kernel, p, uint32_t(team.blocks), per_warp);
}

}  // namespace

int64_t workspace_bytes(const SelectTopkParams& p) {
  return with_team(p, [&](auto team) {
    return team.meets_in_memory() ? p.batch * p.inner * meeting_bytes(team.blocks) : 0;
  });
}

cudaError_t run(const SelectTopkParams& p, cudaStream_t stream) {
  return with_team(p, [&](auto team) {
    return p.out_is_int32 ? launch<int32_t>(p, team, stream) : launch<int64_t>(p, team, stream);
  });
}

}  // namespace claa::cuda
