// Key ranges of window scores of few query rows: what they are, how many, and what they cost.
#pragma once

#include "csrc/cuda/hopper/prompts.cuh"
#include "csrc/cuda/hopper/scores.cuh"

namespace claa::cuda::hopper::narrow {

constexpr int kWarpgroups = kScoreWarpgroups, kConsumers = kScoreConsumers;
constexpr int kWarps = kConsumers / kWarp;  // that multiply
constexpr int kThreads = kConsumers + kWarp;
constexpr int kMostRows = 64;
constexpr int kMostTiles = 34;  // of a range, with one sum per key
constexpr int kMostStages = 16;

// Keys on their way to a multiprocessor: more would only lengthen the queues in which everything
// else waits too.
constexpr int kMostBytesAhead = 128 << 10, kLeastBytesAhead = 64 << 10;
// Of these, what is asked for while the kernels ahead end.
constexpr int kBytesPrefetched = 32 << 10;

// Without `lse` tiles begin at multiples of 16 keys, as keys in pages want it.
constexpr int64_t kHaloAlign = 8;
// In eighths of a tile. Without `lse` a block whose ranges are of two heads waits twice.
constexpr int kRangeCost = 16, kHeadCost = 40;

// The first range of a head begins at key 0 and has the keys of its missing halo besides; the
// others have range_keys keys. All but the last are whole tiles.
struct NarrowRange : KeyRange {
  int partial_end;  // of the keys from halo_begin on, those whose partials it takes
  int key_tiles;    // tiles that have keys
  int tiles;        // and empty ones, so that each warpgroup has as many
  int context;      // of the prompt

  template <class Divmod>
  __device__ __forceinline__ NarrowRange(const ScheduleOf<Divmod>& s, int index)
      : KeyRange(s, index) {
    halo_begin = in_head * s.range_keys;
    halo_end = is_last ? s.keys : halo_begin + s.range_keys + 2 * s.halo;
    begin = in_head ? halo_begin + s.halo : 0;
    end = is_last ? s.keys : halo_end - s.halo;
    partial_end = is_last ? s.keys : halo_begin + s.range_keys;
    key_tiles = (halo_end - halo_begin + kTileRows - 1) / kTileRows;
    tiles = tiles_of(halo_end - halo_begin);
    context = s.context;
  }

  __device__ __forceinline__ static int tiles_of(int keys) {
    constexpr int kTurn = kWarpgroups * kTileRows;
    return (keys + kTurn - 1) / kTurn * kWarpgroups;
  }
};

// How the keys of a head are divided into ranges of so many tiles.
template <class Int>
__host__ __device__ DivisionOf<Int> divide_keys(Int tiles, Int keys, Int halo) {
  const Int rows = tiles * kTileRows, range_keys = rows - 2 * halo;
  const Int head_ranges = 1 + (max(keys - rows, Int(0)) + range_keys - 1) / range_keys;
  return {tiles, head_ranges,
          Int((keys - (head_ranges - 1) * range_keys + kTileRows - 1) / kTileRows)};
}

// The cost of a block's n ranges, of which n_last are the last of their heads.
template <class Int>
__host__ __device__ Int cost_of_ranges(const DivisionOf<Int>& d, Int n, Int n_last, Int head_cost) {
  const bool has_heads = n_last ? n > 1 : (d.head_ranges - 1) % n != 0;
  return n * kRangeCost + 8 * ((n - n_last) * d.tiles + n_last * d.last_tiles) +
         (has_heads ? head_cost : 0);
}

// The shortest range of two passes: no block has more than a few of a single prompt. So there is a
// limit to their number that is not far from it.
template <class Int, class Divmod>
__host__ __device__ Int least_tiles(Int keys, Int halo, const Divmod& blocks, Int most_tiles) {
  Int share, rest;  // of the tiles of the keys, rounded up
  blocks(share, rest, (keys + kTileRows - 1) / kTileRows + blocks.divisor - 1);
  return max(min(share, most_tiles), Int(2 * halo / kTileRows + 1));
}

// The schedule of one prompt, by a warp: the division that the host would find, each lane tries
// some. Prompts without a context have no ranges.
__device__ inline PromptSchedule plan_prompt(const ScoreParams& p, int b, Units& ranges) {
  const WindowAttention& a = p.attention();
  const int keys = int(a.pages.length(b, a.total)), context = keys - int(a.window);
  const int halo = p.schedule.halo, kv_heads = int(a.kv_heads), lane = threadIdx.x % kWarp;
  DivisionOf<int> division{};
  if (context > 0) {
    const int shortest = least_tiles(keys, halo, p.blocks, p.most_tiles);
    unsigned best = ~0u;  // the cost, and of equal ones the longest range
    for (int tiles = p.most_tiles - lane; tiles >= shortest; tiles -= kWarp) {
      const DivisionOf<int> d = divide_keys(tiles, keys, halo);
      const int of_block = cost_of_division(d, int(kPlannedHeads), p.blocks, [&](int n, int last) {
        return cost_of_ranges(d, n, last, kHeadCost);
      });
      const unsigned found = unsigned(of_block) << 6 | unsigned(63 - tiles);
      if (found < best) division = d;
      best = min(best, found);
    }
    static_assert(kMostTiles < 64);
    const int cost = kRangeCost + 8 * division.tiles;
    const int last_cost = kRangeCost + 8 * division.last_tiles, rest = cost % last_cost;
    // At least so much that a block that takes last ranges has no more work than one that takes
    // another.
    const int short_cost = last_cost + (2 * last_cost > cost ? rest : rest - rest / 2);
    division.tiles = 63 - int(__reduce_min_sync(kFullMask, best) & 63);
    const int finder = (p.most_tiles - division.tiles) % kWarp;
    division.head_ranges = __shfl_sync(kFullMask, division.head_ranges, finder);
    ranges = {.count = kv_heads * (division.head_ranges - 1),
              .cost = kRangeCost + 8 * division.tiles,
              .short_count = kv_heads,
              .short_cost = __shfl_sync(kFullMask, short_cost, finder)};
  }
  return {.block_ranges = 0,
          .shorter_blocks = 0,
          .range_keys = division.tiles * kTileRows - 2 * halo,
          .head_ranges = division.head_ranges,
          .long_ranges = ranges.count,
          .head_long_ranges = {max(division.head_ranges - 1, 1)},
          .kv_heads = p.schedule.kv_heads,
          .keys = keys,
          .context = context,
          .halo = halo};
}

}  // namespace claa::cuda::hopper::narrow
