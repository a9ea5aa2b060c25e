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

struct Params {
  int block_units, longer_blocks;  // the first blocks have one unit more
  int unit_keys, unit_tiles;
  cutlass::FastDivmod head_units, kv_heads;
  int all, context, halo;  // keys
  int stages, kept_tiles;
  int slots, sums_stride;
  int group, head_columns;
  float factor;
  Measure* measures;  // [batch * kv_heads, head_units, columns]; nullptr with `lse`
  WindowScores scores;
};

struct Unit {
  int bg, b, g;
  int first, end;    // keys whose scores it gives
  int low;           // the first key, with the halo
  int measured_end;  // of its keys from low on, those that no other unit measures
  int loads;         // tiles; those up to unit_tiles are empty

  __device__ Unit(const Params& p, int index) {
    int in_head;
    p.head_units(bg, in_head, index);
    p.kv_heads(b, g, bg);
    const bool is_last = in_head + 1 == p.head_units.divisor;
    first = in_head * p.unit_keys;
    end = is_last ? p.all : first + p.unit_keys;
    low = max(first - p.halo, 0);
    measured_end = is_last ? p.all : end - p.halo;
    loads = (min(end + p.halo, p.all) - low + kTileRows - 1) / kTileRows;
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

    // The size of units for which the busiest block has the least to do, in eighths of a tile. With
    // `lse` loads hide all but the pooling of the last unit; without, a block whose units are of
    // two heads waits twice.
    constexpr int64_t kUnitCost = 16;
    const int64_t head_cost = is_twice ? 24 : 0, pool_cost = is_twice ? 0 : 1;
    const int64_t most = max(round_up(s.halo() ? 2 : 1, kGroups), kMostTiles / s.slots());
    int64_t unit_keys = 0, unit_tiles = 0, least_cost = INT64_MAX;
    for (int64_t tiles = most; tiles * kTileRows > 2 * s.halo(); --tiles) {
      const int64_t units = ceil_div(all, tiles * kTileRows - 2 * s.halo());
      const int64_t in_block = ceil_div(units * planned, most_blocks);
      const int64_t even_tiles = round_up(tiles, kGroups);
      const int64_t cost = in_block * (8 * even_tiles + kUnitCost) +
                           (units % in_block ? head_cost : 0) + pool_cost * tiles;
      if (cost > least_cost) continue;
      least_cost = cost;
      unit_keys = ceil_div(all, units);
      unit_tiles = even_tiles;
    }
    const int64_t head_units = ceil_div(all, unit_keys), units = heads * head_units;
    blocks = min(units, most_blocks);
    measure_bytes = is_twice ? units * columns * int64_t(sizeof(Measure)) : 0;

    const int64_t tile_bytes = kTileRows * padded_dim(a) * 2, sums_stride = unit_tiles * kTileRows;
    const int64_t stage_bytes = tile_bytes + Ring<1>::kBarrierBytes;
    const int64_t fixed =
        columns * padded_dim(a) * 2 + 2 * kWarps * columns * int64_t(sizeof(Measure)) +
        (columns + s.slots() * sums_stride) * int64_t(sizeof(float)) + int64_t(sizeof(Barrier));
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
              .longer_blocks = int(units % blocks),
              .unit_keys = int(unit_keys),
              .unit_tiles = int(unit_tiles),
              .head_units = cutlass::FastDivmod(int(head_units)),
              .kv_heads = cutlass::FastDivmod(int(a.kv_heads)),
              .all = int(all),
              .context = int(a.context()),
              .halo = int(s.halo()),
              .stages = int(stages),
              .kept_tiles = int(kept_tiles),
              .slots = int(s.slots()),
              .sums_stride = int(sums_stride),
              .group = int(a.group()),
              .head_columns = head_columns(a),
              .factor = a.scale * FastExp::kUnit,
              .measures = is_twice ? static_cast<Measure*>(a.workspace) : nullptr,
              .scores = s};
  }
};

}  // namespace claa::cuda::hopper::narrow
