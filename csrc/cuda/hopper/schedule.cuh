// How the blocks of a score kernel divide the keys: into key ranges, of which a block has a run.
//
// A key range is some keys of one (prompt, key head), with a halo of half a pooling kernel on each
// side that it multiplies too. All but the last ones of the heads are equally long; they come
// first, head after head, and the heads' last ranges come at the end.
//
// Short prompts are bound by latency: divisions are precomputed on the host.

#pragma once

#include <cutlass/fast_math.h>

#include "csrc/cuda/hopper/wgmma.cuh"
#include "csrc/cuda/window_attention.cuh"

namespace claa::cuda::hopper {

template <class Divmod>
struct ScheduleOf {
  int block_ranges, shorter_blocks;  // the blocks after these have one range more
  int range_keys, head_ranges;
  int long_ranges;  // of all heads; after them come the heads' last ranges, which may be short
  Divmod head_long_ranges;
  cutlass::FastDivmod kv_heads;
  int keys, context;
  int halo;  // at least that of the pooling kernel
};
using Schedule = ScheduleOf<cutlass::FastDivmod>;

// On the host, and for a schedule that the device makes: preparing a FastDivmod takes a 64-bit
// division.
template <class Int>
struct PlainDivmod {
  Int divisor;

  __host__ __device__ void operator()(Int& quotient, Int& remainder, Int dividend) const {
    quotient = dividend / divisor;
    remainder = dividend - quotient * divisor;
  }
};
using PromptSchedule = ScheduleOf<PlainDivmod<int>>;

// The key ranges of this block: [first, end).
struct Run {
  int first, end;

  __device__ __forceinline__ Run(int first, int end) : first(first), end(end) {}
  __device__ __forceinline__ explicit Run(const Schedule& s) {
    const int block = int(blockIdx.x);
    first = block * s.block_ranges + max(block - s.shorter_blocks, 0);
    end = first + s.block_ranges + (block >= s.shorter_blocks);
  }
};

struct KeyRange {
  int bg, b, g;
  int in_head;  // its number
  bool is_last;
  int begin, end;            // keys whose scores it gives
  int halo_begin, halo_end;  // the same with the halo

  // Which keys these are either kernel says for itself.
  template <class Divmod>
  __device__ __forceinline__ KeyRange(const ScheduleOf<Divmod>& s, int index) {
    is_last = index >= s.long_ranges;
    s.head_long_ranges(bg, in_head, index);
    if (is_last) {
      bg = index - s.long_ranges;
      in_head = s.head_ranges - 1;
    }
    s.kv_heads(b, g, bg);
  }
};

// ---- host: planning

// Without `lse` ranges are planned for 8 heads, whatever there are: the partials of the softmax,
// and so the results, depend neither on the batch nor on the other heads.
constexpr int64_t kPlannedHeads = 8;

// The cost of the most loaded block. Blocks take runs of ranges, of which those from `long_ranges`
// on may be short; where they do not come out even, the later blocks have one range more.
// cost_of(n, n_last) is the cost of n ranges of which n_last are the last of their heads.
template <class Int, class Divmod, class Cost>
__host__ __device__ Int most_loaded_block(Int long_ranges, Int ranges, const Divmod& most_blocks,
                                          Cost cost_of) {
  Int blocks = ranges, n = 1, longer = 0;
  if (ranges > most_blocks.divisor) {
    blocks = most_blocks.divisor;
    most_blocks(n, longer, ranges);
  }
  const auto cost_from = [&](Int first, Int n) {
    return cost_of(n, min(max(first + n - long_ranges, Int(0)), n));
  };
  const Int cost = cost_from(0, n);
  return longer ? max(cost, cost_from((blocks - longer) * n, Int(n + 1))) : cost;
}

// How the keys of a head are divided.
template <class Int>
struct DivisionOf {
  Int tiles;  // of a range, with its halo
  Int head_ranges;
  Int last_tiles;  // of the last range
};
using Division = DivisionOf<int64_t>;  // on the host; the device counts in 32 bits

// The cost of the most loaded block of a division; cost_of(n, n_last) as above.
template <class Int, class Divmod, class Cost>
__host__ __device__ Int cost_of_division(const DivisionOf<Int>& d, Int heads,
                                         const Divmod& most_blocks, Cost cost_of) {
  return most_loaded_block(Int(heads * (d.head_ranges - 1)), Int(heads * d.head_ranges),
                           most_blocks, cost_of);
}

// The division that costs the least, of those with `longest` to `shortest` tiles to a range.
// divide(tiles) gives a division, cost_of(division, n, n_last) the cost of a block.
template <class Divide, class Cost>
Division best_division(int64_t longest, int64_t shortest, int64_t heads, int64_t most_blocks,
                       Divide divide, Cost cost_of) {
  Division best{};
  int64_t least_cost = INT64_MAX;
  for (int64_t tiles = longest; tiles >= shortest; --tiles) {
    const Division d = divide(tiles);
    const int64_t cost =
        cost_of_division(d, heads, PlainDivmod<int64_t>{most_blocks},
                         [&](int64_t n, int64_t n_last) { return cost_of(d, n, n_last); });
    if (cost >= least_cost) continue;
    least_cost = cost;
    best = d;
  }
  return best;
}

inline Schedule schedule_of(const WindowScores& s, const Division& d, int64_t keys, int64_t blocks,
                            int64_t halo) {
  const WindowAttention& a = s.attention;
  const int64_t heads = a.batch * a.kv_heads, ranges = heads * d.head_ranges;
  return {.block_ranges = int(ranges / blocks),
          .shorter_blocks = int(blocks - ranges % blocks),
          .range_keys = int(d.tiles * kTileRows - 2 * halo),
          .head_ranges = int(d.head_ranges),
          .long_ranges = int(ranges - heads),
          .head_long_ranges = cutlass::FastDivmod(int(max(d.head_ranges - 1, int64_t(1)))),
          .kv_heads = cutlass::FastDivmod(int(a.kv_heads)),
          .keys = int(keys),
          .context = int(a.context()),
          .halo = int(halo)};
}

}  // namespace claa::cuda::hopper
