// The positions of the best scores of each row, ascending: shared by select_topk and
// select_topk_packed. Params say what a row is (`SelectRow` in csrc/kernels.h).
//
// Latency bound: a row is read once from memory, and the time goes into synchronising blocks.
// Scores become integers that grow with the score. Three histograms (12, 12 and 8 bits), each of
// the scores that share the threshold's digits so far, give the threshold and how many of the
// scores equal to it are wanted; where all scores that share its digits are wanted, the search ends
// early. Counts are integers, so nothing depends on the order of atomics. Then every warp stages
// the positions of its kept tokens, in order, in shared memory, sums over the warps before it tell
// where they go, and they are copied there: the output ascends without a sort, and a tie goes to
// the lower position.
//
// A team of blocks shares a row, every warp of it a contiguous part:
//
// | longest row       | team |
// |-------------------|------|
// | up to 8k tokens   | one block, tokens in registers |
// | up to 128k tokens | a cluster of 8 blocks, tokens in registers |
// | longer            | a grid: as many blocks as hold the row in registers, if the device runs so |
// |                   | many at once; else tokens are read from the L2 cache in every pass |
//
// In each pass a block of a cluster sends the sums of 32 groups of its bins to all blocks, then the
// bins of the group that holds the threshold. As these come block by block, they also tell how many
// tokens the blocks before this one keep. Where there are no clusters (before sm_90), and in a
// grid, the blocks add up their bins in device memory and wait for each other there.

#pragma once

#include <cstddef>
#include <cub/warp/warp_scan.cuh>

#include "csrc/cuda/cluster.cuh"
#include "csrc/cuda/overlap.cuh"

namespace claa::cuda::select {

constexpr int kMaxThreads = 1024;
constexpr int kVector = 4;  // tokens in 16 bytes
constexpr int kHighBits = 12, kMiddleBits = 12, kLowBits = 8;
constexpr int kBinGroups = kWarp;  // of the bins of a histogram
constexpr int kGrid = 0;           // blocks of a team: as many as at run time

// Inclusive sum over the lanes of a warp.
__device__ inline uint32_t prefix_sum(uint32_t value) {
  typename cub::WarpScan<uint32_t>::TempStorage none;  // shuffles alone
  cub::WarpScan<uint32_t>(none).InclusiveSum(value, value);
  return value;
}

template <int kWords>
struct alignas(4 * kWords) Words {
  uint32_t word[kWords];
};

// One pass: a histogram, and what the blocks of a cluster send each other about it.
template <int kBlocks, int kBins_>
struct Histogram {
  static constexpr int kBins = kBins_, kGroupBins = kBins / kBinGroups;
  static constexpr int kPerLane = kGroupBins < kWarp ? 1 : kGroupBins / kWarp;
  static constexpr int kLanes = kGroupBins / kPerLane;  // that have bins of a bin group

  alignas(16) uint32_t bins[kBins];
  uint32_t group_sums[kBinGroups];
  uint32_t sums_of[max(kBlocks, 1)][kBinGroups];
  uint32_t bins_of[max(kBlocks, 1)][kGroupBins];
  Mailbox sums_box, bins_box;

  __device__ Words<kPerLane> of_group(int group) const {
    const int lane = min(int(threadIdx.x) % kWarp, kLanes - 1);
    return *reinterpret_cast<const Words<kPerLane>*>(bins + group * kGroupBins + lane * kPerLane);
  }
};

// Where the threshold lies among counters: of bin groups, or of bins.
struct Threshold {
  uint32_t at;      // its counter
  uint32_t wanted;  // how many of this counter's scores are wanted
  uint32_t count;   // how many it has
  uint32_t above;   // in the blocks before this one: scores of higher counters
  uint32_t equal;   // and of this counter
};

// By one warp: the counter that has the wanted-th score from the top. Each block of a team has
// kLanes * kPerLane of them, the blocks' counters one after the other.
template <int kBlocks, int kLanes, int kPerLane>
__device__ Threshold find_threshold_counter(const uint32_t* counters, uint32_t rank,
                                            uint32_t wanted) {
  const int lane = threadIdx.x % kWarp;
  const int lowest = (kLanes - 1 - min(lane, kLanes - 1)) * kPerLane;  // lane 0 has the highest
  uint32_t counts[kPerLane] = {}, aheads[kPerLane] = {};
#pragma unroll 4  // more loads at a time need more registers than there are
  for (int block = 0; block < kBlocks; ++block) {
    const auto words =
        *reinterpret_cast<const Words<kPerLane>*>(counters + block * kLanes * kPerLane + lowest);
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
  Threshold found{0, wanted - (through - here), counts[kPerLane - 1], 0, aheads[kPerLane - 1]};
  uint32_t at = kPerLane - 1, above = 0;
#pragma unroll
  for (int i = kPerLane - 2; i >= 0; --i) {
    if (at == i + 1 && found.wanted > found.count) {
      at = i;
      above += found.equal;
      found.wanted -= found.count;
      found.count = counts[i];
      found.equal = aheads[i];
    }
  }
  found.at = __shfl_sync(kFullMask, lowest + at, owner);
  found.wanted = __shfl_sync(kFullMask, found.wanted, owner);
  found.count = __shfl_sync(kFullMask, found.count, owner);
  if constexpr (kBlocks > 1) {
    found.above = __reduce_add_sync(kFullMask, lane < owner ? ahead : lane == owner ? above : 0u);
    found.equal = __shfl_sync(kFullMask, found.equal, owner);
  }
  return found;
}

// What the blocks of a grid team share of a row in device memory. All zero at first.
struct GridScratch {
  uint32_t arrived;
  uint32_t padding[31];
  uint32_t bins[(1 << kHighBits) + (1 << kMiddleBits) + (1 << kLowBits)];
  uint32_t block_sums[2];  // of the blocks' scores above and at the threshold; one pair per block
};

__host__ __device__ constexpr int64_t scratch_bytes(int64_t blocks) {
  return round_up(int64_t(offsetof(GridScratch, block_sums)) + 8 * blocks, 128);
}

template <int kBlocks>
struct Shared {
  Histogram<kBlocks, 1 << kHighBits> high;
  Histogram<kBlocks, 1 << kMiddleBits> middle;
  Histogram<kBlocks, 1 << kLowBits> low;
  uint32_t warp_sums[2][kWarp];
  Threshold found;
};

// The bin of a histogram that holds the threshold, for all threads of the team.
template <int kBlocks, class H>
__device__ Threshold find_threshold_bin(H& histogram, Threshold& found, uint32_t rank,
                                        uint32_t wanted) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  __syncthreads();
  for (int group = warp; group < kBinGroups; group += warps) {
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
      const Threshold group =
          find_threshold_counter<kBlocks, kBinGroups, 1>(histogram.sums_of[0], rank, wanted);
      const auto bins = histogram.of_group(group.at);
      if (lane < H::kLanes)
        send(bins.word, &histogram.bins_of[rank][lane * H::kPerLane], histogram.bins_box, warp);
      if (warp == 0) {
        receive(histogram.bins_box);
        Threshold bin = find_threshold_counter<kBlocks, H::kLanes, H::kPerLane>(
            histogram.bins_of[0], rank, group.wanted);
        bin.at += group.at * H::kGroupBins;
        bin.above += group.above;
        if (lane == 0) found = bin;
      }
    }
  } else if (warp == 0) {
    const Threshold group =
        find_threshold_counter<1, kBinGroups, 1>(histogram.group_sums, 0, wanted);
    Threshold bin = find_threshold_counter<1, H::kLanes, H::kPerLane>(
        histogram.bins + group.at * H::kGroupBins, 0, group.wanted);
    bin.at += group.at * H::kGroupBins;
    if (lane == 0) found = bin;
  }
  __syncthreads();
  return found;
}

// This block in the team of a row.
template <int kBlocks>
struct Member {
  static constexpr bool kCluster = kBlocks > 1, kIsGrid = kBlocks == kGrid;
  int lane, warp, warps;
  uint32_t blocks, row, rank;
  GridScratch* scratch = nullptr;
  uint32_t turns = 0;  // barriers of the grid team so far

  __device__ __forceinline__ explicit Member(uint32_t team_blocks)
      : lane(threadIdx.x % kWarp),
        warp(threadIdx.x / kWarp),
        warps(blockDim.x / kWarp),
        blocks(kIsGrid ? team_blocks : kBlocks),
        row(blockIdx.x / blocks),
        rank(kCluster  ? cluster_rank()
             : kIsGrid ? blockIdx.x - row * blocks
                       : 0) {}

  // The sum over the block's warps before this one.
  __device__ __forceinline__ uint32_t sum_of_warps_before(uint32_t sum, uint32_t* warp_sums) const {
    if (lane == 0) warp_sums[warp] = sum;
    __syncthreads();
    return __reduce_add_sync(kFullMask, lane < warp ? warp_sums[lane] : 0u);
  }

  // A barrier of the blocks of a grid team.
  __device__ __forceinline__ void wait_for_team() {
    ++turns;
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(&scratch->arrived, 1u);
      while (*static_cast<volatile uint32_t*>(&scratch->arrived) < turns * blocks) {
      }
      __threadfence();
    }
    __syncthreads();
  }

  // Adds up the bins of a grid team; the blocks of a cluster mail theirs (find_threshold_bin).
  template <int kBins>
  __device__ __forceinline__ void add_up(uint32_t (&bins)[kBins], int first_bin) {
    if constexpr (kIsGrid) {
      if (blocks == 1) return;
      uint32_t* sums = scratch->bins + first_bin;
      __syncthreads();
      for (int i = threadIdx.x; i < kBins; i += blockDim.x)
        if (bins[i]) atomicAdd(sums + i, bins[i]);
      wait_for_team();
      for (int i = threadIdx.x; i < kBins; i += blockDim.x) bins[i] = __ldcg(sums + i);
    }
  }

  // For a warp whose counts of scores above and at the threshold these are: adds to `above_before`
  // and `ties_before`, which are of the block's warps before it, those of the blocks before.
  __device__ __forceinline__ void add_blocks_before(uint32_t above, uint32_t ties,
                                                    uint32_t& above_before, uint32_t& ties_before) {
    uint32_t* block_sums = scratch->block_sums;
    if (warp == warps - 1 && lane == 0) {
      block_sums[2 * rank] = above_before + above;
      block_sums[2 * rank + 1] = ties_before + ties;
    }
    wait_for_team();
    uint32_t above_ahead = 0, ties_ahead = 0;
    for (int block = lane; block < rank; block += kWarp) {
      above_ahead += __ldcg(block_sums + 2 * block);
      ties_ahead += __ldcg(block_sums + 2 * block + 1);
    }
    above_before += __reduce_add_sync(kFullMask, above_ahead);
    ties_before += __reduce_add_sync(kFullMask, ties_ahead);
  }
};

// The tokens of a warp, of which orders[] has one tile: lane l has the kVector neighbours from
// v * kWarp * kVector + l * kVector on at orders[v * kVector], for each of kVectors vectors v. A
// token that does not exist has order 0, which no score has.
template <int kItems, bool kResident>
struct Tokens {
  static constexpr int kVectors = kItems / kVector, kTile = kItems * kWarp;
  static_assert(kVectors <= 4);  // counts of each, up to 128, share a word (`enumerate`)
  const float* scores;           // of the warp's first token, at a 16-byte boundary
  int from, end;                 // tokens of the warp that exist
  int lane;
  uint32_t orders[kItems];

  __device__ __forceinline__ bool is_whole(int vector) const {
    return vector >= from && vector + kWarp * kVector <= end;
  }
  __device__ __forceinline__ bool exists(int j) const { return j >= from && j < end; }

  __device__ __forceinline__ void load(int tile) {
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
  }

  // Makes orders of the scores that were loaded.
  __device__ __forceinline__ void convert(int tile) {
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
  }

  // Calls visit(tile) with the orders of each tile in turn.
  template <class Visit>
  __device__ __forceinline__ void for_each_tile(Visit visit) {
    if constexpr (kResident) {
      visit(0);
    } else {
      for (int tile = 0; tile < end; tile += kTile) {
        load(tile);
        convert(tile);
        visit(tile);
      }
    }
  }

  // Calls visit(i, number) for the tile's tokens of a kind in order; returns how many there are.
  template <class IsWanted, class Visit>
  __device__ __forceinline__ uint32_t enumerate(IsWanted is_wanted, Visit visit) {
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
  }
};

// What needs no input: empty histograms, and open mailboxes.
template <int kBlocks>
__device__ __forceinline__ void set_up(Shared<kBlocks>& shared) {
  const auto clear = [&](auto& bins) {
    for (int i = threadIdx.x; i < sizeof(bins) / 16; i += blockDim.x)
      reinterpret_cast<uint4*>(bins)[i] = {};
  };
  clear(shared.high.bins);
  clear(shared.middle.bins);
  clear(shared.low.bins);
  if constexpr (kBlocks > 1) {
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
  if constexpr (kBlocks > 1) cluster_arrive();
}

// Writes what is kept whatever its score, by thread `thread` of the team's `threads`. Returns where
// the scored tokens go.
template <class Index>
__device__ __forceinline__ Index* write_unscored(const SelectRow& row, Index* out, int64_t thread,
                                                 int64_t threads) {
  const auto [n_window, n_sinks, n_scored, n_padding, n_empty, first_valid, first] = row.tiers;
  for (int64_t i = thread; i < n_empty; i += threads) out[i] = Index(-1);
  out += n_empty;
  for (int64_t i = thread; i < n_padding; i += threads) out[i] = Index(i);
  out += n_padding;
  for (int64_t i = thread; i < n_sinks; i += threads) out[i] = Index(first_valid + i);
  out += n_sinks;
  for (int64_t i = thread; i < n_window; i += threads)
    out[n_scored + i] = Index(row.context + row.window - n_window + i);
  return out;
}

// The best `wanted` of a row: the scores above `cut`, and of the ties with it the first `ties`.
struct Selection {
  uint32_t threshold, cut, ties;
  uint32_t above, equal;  // in the blocks before this one of a cluster: above and at the threshold

  // Where all scores at the threshold are kept, none counts as a tie.
  __device__ __forceinline__ bool has_ties() const { return ties > 0; }
};

// Up to three histograms, each of the digit after the one before.
template <int kBlocks, class Tokens>
__device__ __forceinline__ Selection find_threshold(Tokens& tokens, Shared<kBlocks>& shared,
                                                    Member<kBlocks>& member, uint32_t wanted) {
  const uint32_t rank = member.rank;
  tokens.for_each_tile([&](int) {
#pragma unroll
    for (uint32_t order : tokens.orders)
      atomicAdd(&shared.high.bins[order >> (32 - kHighBits)], 1u);
  });
  if constexpr (kBlocks > 1) cluster_wait();  // all blocks expect mail
  member.add_up(shared.high.bins, 0);
  Threshold found = find_threshold_bin<kBlocks>(shared.high, shared.found, rank, wanted);
  uint32_t above = found.above;
  uint32_t threshold = found.at << (32 - kHighBits);
  if (found.wanted < found.count) {
    tokens.for_each_tile([&](int) {
#pragma unroll
      for (uint32_t order : tokens.orders) {
        const uint32_t rest = order - threshold;
        if (rest < 1u << (32 - kHighBits)) atomicAdd(&shared.middle.bins[rest >> kLowBits], 1u);
      }
    });
    member.add_up(shared.middle.bins, 1 << kHighBits);
    found = find_threshold_bin<kBlocks>(shared.middle, shared.found, rank, found.wanted);
    above += found.above;
    threshold += found.at << kLowBits;
    if (found.wanted < found.count) {
      tokens.for_each_tile([&](int) {
#pragma unroll
        for (uint32_t order : tokens.orders) {
          const uint32_t rest = order - threshold;
          if (rest < 1u << kLowBits) atomicAdd(&shared.low.bins[rest], 1u);
        }
      });
      member.add_up(shared.low.bins, (1 << kHighBits) + (1 << kMiddleBits));
      found = find_threshold_bin<kBlocks>(shared.low, shared.found, rank, found.wanted);
      above += found.above;
      threshold += found.at;
    }
  }
  const bool has_ties = found.wanted < found.count;
  return {.threshold = threshold,
          .cut = has_ties ? threshold : threshold - 1,
          .ties = has_ties ? found.wanted : 0,
          .above = above,
          .equal = found.equal};
}

// Writes the kept tokens of this warp, whose first token is `begin`. `stage` has room for a tile.
template <class Index, int kBlocks, class Tokens>
__device__ __forceinline__ void write_scored(Tokens& tokens, const Selection& selection,
                                             Shared<kBlocks>& shared, Member<kBlocks>& member,
                                             uint16_t* stage, int64_t begin, Index* out) {
  constexpr bool kIsGrid = kBlocks == kGrid;
  const int lane = member.lane;
  const bool has_ties = selection.has_ties();
  const uint32_t threshold = selection.threshold, cut = selection.cut;
  const auto is_tie = [&](uint32_t order) { return has_ties && order == threshold; };

  // How many of the ties fall to this warp: as many as the warps and blocks before it leave.
  uint32_t my_above = 0, my_ties = 0;
  if (has_ties || kIsGrid) {
    tokens.for_each_tile([&](int) {
      if constexpr (kIsGrid) {
#pragma unroll
        for (uint32_t order : tokens.orders) my_above += order > cut;
      }
      if (has_ties) {
#pragma unroll
        for (uint32_t order : tokens.orders) my_ties += order == threshold;
      }
    });
    my_ties = __reduce_add_sync(kFullMask, my_ties);
  }
  [[maybe_unused]] uint32_t above_before = 0;
  uint32_t ties_before = selection.equal;
  if constexpr (!kIsGrid) {
    if (has_ties) ties_before += member.sum_of_warps_before(my_ties, shared.warp_sums[0]);
  } else {
    my_above = __reduce_add_sync(kFullMask, my_above);
    above_before = member.sum_of_warps_before(my_above, shared.warp_sums[0]);
    ties_before = member.sum_of_warps_before(my_ties, shared.warp_sums[1]);
    if (member.blocks > 1) member.add_blocks_before(my_above, my_ties, above_before, ties_before);
  }
  // For this warp and those after it.
  uint32_t left = selection.ties - min(ties_before, selection.ties);
  const bool drops_ties = left > 0 && left < my_ties;
  const uint32_t warp_cut = left > 0 ? cut - 1 : cut;

  const auto stage_tile = [&] {
    if (drops_ties)
      left -= min(left, tokens.enumerate(is_tie, [&](int i, uint32_t number) {
        if (number >= left) tokens.orders[i] = 0;
      }));
    const auto in_tile = uint16_t(lane * kVector);
    return tokens.enumerate([&](uint32_t order) { return order > warp_cut; },
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
    const uint32_t to = member.sum_of_warps_before(kept, shared.warp_sums[1]);
    const uint32_t equal = has_ties ? min(selection.equal, selection.ties) : selection.equal;
    write_tile(0, kept, selection.above + equal + to);
  } else {
    uint32_t to = above_before + min(ties_before, selection.ties);
    tokens.for_each_tile([&](int tile) {
      const uint32_t kept = stage_tile();
      __syncwarp();
      write_tile(tile, kept, to);
      __syncwarp();
      to += kept;
    });
  }
}

// Entries of the output that belong to no row become -1, by the threads of all teams.
__device__ __forceinline__ void write_unused(const SelectTopkParams&) {}
__device__ __forceinline__ void write_unused(const SelectTopkPackedParams& p) {
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = p.unused() + int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
       i < p.packed.capacity; i += threads)
    p.out[i] = -1;
}

template <class Params, class Index, int kBlocks, int kItems, bool kResident>
__global__ __launch_bounds__(kMaxThreads, 1) void select_kernel(const Params p,
                                                                uint32_t team_blocks,
                                                                int64_t per_warp) {
  using RowTokens = Tokens<kItems, kResident>;
  extern __shared__ __align__(16) char dynamic[];
  auto& shared = *reinterpret_cast<Shared<kBlocks>*>(dynamic);
  set_up(shared);
  wait_for_kernels_ahead();
  write_unused(p);

  // ---- the row, and this warp's tokens of it; the team's first token is at a 16-byte boundary
  Member<kBlocks> member(team_blocks);
  auto* stage =
      reinterpret_cast<uint16_t*>(dynamic + sizeof(shared)) + member.warp * RowTokens::kTile;
  const SelectRow row = p.row(member.row);
  Index* out = static_cast<Index*>(p.out) + row.out;
  const int64_t first = row.tiers.first, candidates = row.context - first;
  const int64_t n_scored = row.tiers.n_scored;
  const int64_t aligned =
      first - int64_t(reinterpret_cast<uintptr_t>(row.scores + first) / sizeof(float) % kVector);
  const int64_t begin = aligned + int64_t(member.rank * member.warps + member.warp) * per_warp;
  RowTokens tokens;
  tokens.from = int(max<int64_t>(first - begin, 0));
  tokens.end = int(max<int64_t>(min(per_warp, row.context - begin), 0));
  tokens.scores = row.scores + begin;
  tokens.lane = member.lane;
  if constexpr (kResident) tokens.load(0);

  // ---- what is kept whatever its score, and rows of which all or nothing is kept
  const int64_t thread = int64_t(member.rank) * blockDim.x + threadIdx.x,
                threads = int64_t(member.blocks) * blockDim.x;
  out = write_unscored(row, out, thread, threads);
  if (n_scored == candidates) {
    for (int64_t i = thread; i < candidates; i += threads) out[i] = Index(first + i);
    return;  // the whole team
  }
  if (n_scored == 0) return;

  // ---- the threshold, then the tokens above it
  if constexpr (kResident) tokens.convert(0);
  if constexpr (kBlocks == kGrid)
    member.scratch = reinterpret_cast<GridScratch*>(static_cast<char*>(p.workspace) +
                                                    member.row * scratch_bytes(member.blocks));
  const Selection selection = find_threshold(tokens, shared, member, uint32_t(n_scored));
  write_scored(tokens, selection, shared, member, stage, begin, out);
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
  bool is_grid() const { return kBlocks == kGrid && blocks > 1; }
};

// Calls fn with the smallest team that holds a row in registers, or else with one as large as the
// device runs at once.
template <class Params, class Fn>
auto with_team(const Params& p, Fn fn) {
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
  while (!grid.holds(p.context) && p.rows() * (grid.blocks + 1) <= multiprocessors) ++grid.blocks;
  if (grid.holds(p.context)) return fn(grid);
  return fn(Team<kGrid, 8, false>{grid.blocks, grid.threads});
}

template <class Index, class Params, class Team>
cudaError_t launch(const Params& p, Team team, cudaStream_t stream) {
  const auto kernel = select_kernel<Params, Index, Team::kBlocks, Team::kItems, Team::kResident>;
  const int64_t rows = p.rows();
  const int shared_bytes =
      int(sizeof(Shared<Team::kBlocks>)) + team.threads * Team::kItems * int(sizeof(uint16_t));
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status == cudaSuccess && team.is_grid())
    status = cudaMemsetAsync(p.workspace, 0, rows * scratch_bytes(team.blocks), stream);
  if (status != cudaSuccess) return status;

  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(rows * team.blocks));
  config.blockDim = dim3(team.threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (team.is_grid()) {
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

template <class Params>
int64_t workspace_bytes(const Params& p) {
  return with_team(
      p, [&](auto team) { return team.is_grid() ? p.rows() * scratch_bytes(team.blocks) : 0; });
}

template <class Index, class Params>
cudaError_t run(const Params& p, cudaStream_t stream) {
  return with_team(p, [&](auto team) { return launch<Index>(p, team, stream); });
}

}  // namespace claa::cuda::select
