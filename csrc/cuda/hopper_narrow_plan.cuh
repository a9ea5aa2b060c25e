// How the kernel of hopper_narrow.cu divides its work: units of keys over blocks, shared memory
// over stages, kept products and sums.

#pragma once

#include <cutlass/fast_math.h>

#include "csrc/cuda/hopper.cuh"
#include "csrc/cuda/window_attention.cuh"

namespace claa::cuda::hopper::narrow {

constexpr int kGroups = 2;  // warpgroups that multiply
constexpr int kConsumers = kGroups * kWarpgroup;
constexpr int kWarps = kConsumers / kWarp;
constexpr int kThreads = kConsumers + kWarp;
constexpr int kMostColumns = 64;
constexpr int kMostHalo = 32;
constexpr int kMostTiles = 34;  // of a unit, with one sum per key
constexpr int kMostStages = 16;

// Keys on their way to a multiprocessor: these are enough, more only lengthen the queues in which
// everything else waits too.
constexpr int kMostBytesAhead = 128 << 10, kLeastBytesAhead = 64 << 10;
// Of these, what is asked for while the kernels ahead end.
constexpr int kBytesPrefetched = 32 << 10;

struct Params {
  int block_units, shorter_blocks;  // the blocks behind these have one unit more
  int unit_keys, unit_tiles, last_tiles;
  int long_units;  // of all heads; behind them come the heads' last units, which may be short
  cutlass::FastDivmod head_long_units, kv_heads;
  int head_units;
  int all, context, halo;  // keys
  int stages, kept_tiles;
  int slots, sums_stride;
  int group, head_columns;
  bool has_fillers;  // columns that are no queries
  float factor, pool_factor;
  Measure* measures;  // [units, columns], in the order of the units; nullptr with `lse`
  WindowScores scores;
};

struct Unit {
  int bg, b, g;
  int first, end;    // keys whose scores it gives
  int low;           // the first key, with the halo
  int measured_end;  // of its keys from low on, those that no other unit measures
  int tiles, loads;  // tiles, as many for each warpgroup, and how many of them have keys

  __device__ Unit(const Params& p, int index) {
    int in_head;
    const bool is_last = index >= p.long_units;
    p.head_long_units(bg, in_head, index);
    if (is_last) {
      bg = index - p.long_units;
      in_head = p.head_units - 1;
    }
    p.kv_heads(b, g, bg);
    low = in_head * p.unit_keys;
    const int high = is_last ? p.all : low + p.unit_keys + 2 * p.halo;
    first = in_head ? low + p.halo : 0;
    end = is_last ? p.all : high - p.halo;
    tiles = is_last ? p.last_tiles : p.unit_tiles;
    measured_end = is_last ? p.all : low + p.unit_keys;
    loads = (high - low + kTileRows - 1) / kTileRows;
  }
};

inline int columns_of(const WindowAttention& a) {
  return a.group() * head_columns(a) <= 32 ? 32 : kMostColumns;
}

// Fills the sizes, and says how many blocks and how much memory the kernel wants.
struct Plan {
  Params params;
  int64_t columns, blocks, shared_bytes, measure_bytes;

  explicit Plan(const WindowScores& s) : columns(columns_of(s.attention)) {
    const WindowAttention& a = s.attention;
    const bool is_twice = !a.lse;
    const int64_t all = is_twice ? a.total : a.context();
    const int64_t heads = a.batch * a.kv_heads, planned = is_twice ? kPlannedHeads : heads;
    const int64_t most_blocks = device_attribute(cudaDevAttrMultiProcessorCount);

    // The size of units for which the busiest block has the least to do, in eighths of a tile.
    // Without `lse` a block whose units are of two heads waits twice.
    constexpr int64_t kUnitCost = 16;
    const int64_t head_cost = is_twice ? 40 : 0;
    int64_t unit_rows = 0, head_units = 0, least_cost = INT64_MAX;
    for (int64_t tiles = max(int64_t(kGroups), kMostTiles / s.slots());
         tiles * kTileRows > 2 * s.halo(); --tiles) {
      const int64_t rows = tiles * kTileRows, keys = rows - 2 * s.halo();
      const int64_t in_head = 1 + ceil_div(max(all - rows, int64_t(0)), keys);
      const int64_t last_tiles = ceil_div(all - (in_head - 1) * keys, kTileRows);
      const int64_t long_units = planned * (in_head - 1), units = planned * in_head;
      const int64_t cost = busiest_block(long_units, units, most_blocks, [&](auto n, auto n_last) {
        const bool has_heads = n_last ? n > 1 : (in_head - 1) % n != 0;
        return n * kUnitCost + 8 * ((n - n_last) * tiles + n_last * last_tiles) +
               (has_heads ? head_cost : 0);
      });
      if (cost >= least_cost) continue;
      least_cost = cost;
      unit_rows = rows;
      head_units = in_head;
    }
    const int64_t unit_keys = unit_rows - 2 * s.halo(), units = heads * head_units;
    const int64_t last_rows = all - (head_units - 1) * unit_keys;
    const int64_t unit_tiles = round_up(unit_rows / kTileRows, kGroups);
    const int64_t last_tiles = round_up(ceil_div(last_rows, kTileRows), kGroups);
    blocks = min(units, most_blocks);
    measure_bytes = is_twice ? units * columns * int64_t(sizeof(Measure)) : 0;

    const int64_t tile_bytes = kTileRows * padded_dim(a) * 2, sums_stride = unit_tiles * kTileRows;
    const int64_t stage_bytes = tile_bytes + Ring<1>::kBarrierBytes;
    const int64_t fixed = columns * padded_dim(a) * 2 +
                          (is_twice ? 2 * kWarps * columns * int64_t(sizeof(Measure)) : 0) +
                          (columns + s.slots() * sums_stride) * int64_t(sizeof(float)) +
                          int64_t(sizeof(Barrier));
    const int64_t room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - fixed;
    const auto stages_of = [&](int64_t bytes) {
      const int64_t most = min(room / stage_bytes, int64_t(kMostStages));
      return min(bytes / tile_bytes, most) / kGroups * kGroups;
    };
    const int64_t product_bytes = kTileRows * columns * int64_t(sizeof(float));
    int64_t stages = stages_of(kMostBytesAhead), kept_tiles = 0;
    if (is_twice && product_bytes < tile_bytes) {
      const int64_t block_tiles = ceil_div(units, blocks) * unit_tiles;
      const int64_t beside = (room - block_tiles * product_bytes) / stage_bytes / kGroups * kGroups;
      stages = min(stages, max(stages_of(kLeastBytesAhead), beside));
      kept_tiles = min((room - stages * stage_bytes) / product_bytes, block_tiles);
    } else if (is_twice) {
      stages = stages_of(room);  // the last keys stay in them
    }
    shared_bytes = fixed + stages * stage_bytes + kept_tiles * product_bytes;
    params = {.block_units = int(units / blocks),
              .shorter_blocks = int(blocks - units % blocks),
              .unit_keys = int(unit_keys),
              .unit_tiles = int(unit_tiles),
              .last_tiles = int(last_tiles),
              .long_units = int(units - heads),
              .head_long_units = cutlass::FastDivmod(int(max(head_units - 1, int64_t(1)))),
              .kv_heads = cutlass::FastDivmod(int(a.kv_heads)),
              .head_units = int(head_units),
              .all = int(all),
              .context = int(a.context()),
              .halo = int(s.halo()),
              .stages = int(stages),
              .kept_tiles = int(kept_tiles),
              .slots = int(s.slots()),
              .sums_stride = int(sums_stride),
              .group = int(a.group()),
              .head_columns = head_columns(a),
              .has_fillers = a.group() * a.window != columns,
              .factor = a.scale * FastExp::kUnit,
              .pool_factor = 1.f / float(2 * s.halo() + 1),
              .measures = is_twice ? static_cast<Measure*>(a.workspace) : nullptr,
              .scores = s};
  }
};

}  // namespace claa::cuda::hopper::narrow
