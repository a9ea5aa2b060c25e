// Window scores of up to 64 query rows on Hopper, by TMA and wgmma.
//
// A key range comes in tiles of 64 keys. Every block has a multiprocessor for itself and a run of
// ranges, in which one producer warp brings tile after tile into a ring of stages, as far ahead as
// memory needs to stay busy, and two warpgroups, taking turns, multiply them by all query rows.
// Keys are the rows of the product, so a thread sums over query rows in its registers; sums of a
// range go to shared memory, where they are pooled.
//
// Without `lse` there are two passes. In the first a block takes the softmax partials of its ranges
// and keeps the products in shared memory, as far as there is room: those of 32 query rows take
// half the room of their keys. When the partials of all ranges of a head are there, the second pass
// goes over the tiles again, from the last to the first: what was not kept is multiplied again, out
// of the stages, the L2 cache and memory.
//
// A partial is its own ready flag: all are marked as missing first, and only this marking needs a
// barrier of all blocks (a cooperative launch), while their first keys are on the way.
//
// Short prompts are bound by latency: divisions are precomputed on the host, queries come by TMA,
// and code that runs once is kept short, since what is not yet in the instruction cache takes
// longer to fetch than to execute. With `lse` the first keys are asked for while the kernel ahead
// still runs.
//
// Keys may lie in pages. Each block then plans the ranges of every prompt by itself, as the host
// does for keys in rows: those of a prompt are the same either way. Tiles begin at multiples of the
// rows that TMA brings at a time.
//
// Reads every key once, or up to twice without `lse`; writes every score once. Ranges do not depend
// on the batch where partials do, and sums go over query rows in order: the same bits in any batch.

#include <cooperative_groups.h>

#include "csrc/cuda/hopper/launch.cuh"
#include "csrc/cuda/hopper/pool_and_write.cuh"
#include "csrc/cuda/hopper/prompts.cuh"
#include "csrc/cuda/hopper/queries.cuh"
#include "csrc/cuda/hopper/scores.cuh"
#include "csrc/cuda/hopper/softmax_partials.cuh"
#include "csrc/cuda/overlap.cuh"

namespace claa::cuda::hopper::narrow {
namespace {

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

template <class T_, int kDim_, int kRows_, bool kPaged_>
struct Shape {
  using T = T_;
  static constexpr bool kPaged = kPaged_;
  static constexpr int kDim = kDim_;
  static constexpr int kRows = kRows_;                         // query rows, with padding rows
  static constexpr int kTile = kTileBytes<kDim>;               // of keys
  static constexpr int kProductBytes = kTileRows * kRows * 4;  // of a tile
};

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

// ---- partials in device memory

// The bits of a missing partial: the max of one that is there is a number.
constexpr uint64_t kMissing = ~uint64_t(0);

// Other blocks see all of a partial or nothing of it.
__device__ inline void store_partial(SoftmaxPartial* to, uint64_t bits) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(bits) : "memory");
}
__device__ inline uint64_t load_partial(const SoftmaxPartial* from) {
  uint64_t bits;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(bits) : "l"(from) : "memory");
  return bits;
}
__device__ inline uint64_t bits_of(const SoftmaxPartial& partial) {
  return uint64_t(__float_as_uint(partial.sum)) << 32 | __float_as_uint(partial.max);
}
__device__ inline SoftmaxPartial partial_of(uint64_t bits) {
  return {__uint_as_float(uint32_t(bits)), __uint_as_float(uint32_t(bits >> 32))};
}

// ---- planning

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

// ---- the kernel

// What all threads of a block know.
template <class Shape>
struct Block {
  using Tiles = Ring<Shape::kTile>;
  const ScoreParams& p;
  const Maps& maps;
  SharedMemory memory;
  PromptTable<PromptSchedule> prompts;  // with pages
  Tiles ring;
  Queries<Shape::kDim, Shape::kRows> queries;
  Run run;
  bool two_pass;
  int n_tiles;  // of the run

  __device__ __forceinline__ Block(const ScoreParams& p, const Maps& maps, char* shared)
      : p(p),
        maps(maps),
        memory(shared, p.layout),
        prompts(memory.prompts, p.attention()),
        ring(memory.stages, memory.of_stages, p.layout.stages),
        queries{memory.queries, memory.queries_full},
        run(0, 0),
        two_pass(p.partials),
        n_tiles(0) {}

  // By all threads.
  __device__ __forceinline__ void take_run() {
    if constexpr (Shape::kPaged) {
      prompts.template make<kThreads>(
          [&](int b, Units& ranges) { return plan_prompt(p, b, ranges); });
      const int block = int(blockIdx.x);
      run = {prompts.first_unit_of(block, p.blocks), prompts.first_unit_of(block + 1, p.blocks)};
      for (int i = run.first + int(threadIdx.x) % kWarp; i < run.end; i += kWarp)
        n_tiles += range_at(i).tiles;
      n_tiles = __reduce_add_sync(kFullMask, n_tiles);
    } else {
      const Schedule& s = p.schedule;
      run = Run(s);
      const int last_ranges = max(run.end - max(run.first, s.long_ranges), 0);
      n_tiles =
          (run.end - run.first - last_ranges) * NarrowRange::tiles_of(s.range_keys + 2 * s.halo) +
          last_ranges * NarrowRange::tiles_of(s.keys - (s.head_ranges - 1) * s.range_keys);
    }
  }

  // Barriers of what is loaded. By one thread.
  __device__ __forceinline__ void init_full() const {
    const auto prefetch = [](const CUtensorMap& map) {
      cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&map));
    };
    prefetch(maps.keys.map);
    prefetch(maps.queries);
    queries.full->init(1);
#pragma unroll 4
    for (int i = 0; i < ring.stages; ++i) ring.full[i].init(1);
    cutlass::arch::fence_barrier_init();
  }

  __device__ __forceinline__ NarrowRange range_at(int index) const {
    if constexpr (Shape::kPaged) {
      const int b = prompts.prompt_of(index);
      NarrowRange range(prompts[b].plan, index - prompts[b].first);
      range.b = b;
      range.bg += b * int(p.attention().kv_heads);
      return range;
    } else {
      return NarrowRange(p.schedule, index);
    }
  }

  // Where the partials of a range's head begin: those of its ranges but the last, and of the last.
  struct HeadPartials {
    int long_ranges, last_range, ranges;
  };
  __device__ __forceinline__ HeadPartials partials_of_head(const NarrowRange& range) const {
    const auto from = [&](const auto& s, int first, int head) {
      return HeadPartials{first + head * (s.head_ranges - 1), first + s.long_ranges + head,
                          s.head_ranges};
    };
    if constexpr (Shape::kPaged)
      return from(prompts[range.b].plan, prompts[range.b].first, range.g);
    else
      return from(p.schedule, 0, range.bg);
  }
};

// One warp: one lane brings the queries of the first range and keys in rows, all of them keys in
// pages.
template <class Shape>
struct Producer {
  static constexpr int kDim = Shape::kDim;
  Block<Shape>& block;
  PagedKeys paged;
  NarrowRange range;            // of the next tile
  int index, in_range, loaded;  // number of the range; of the tile in it, and in the run
  PipelineState state;

  __device__ __forceinline__ explicit Producer(Block<Shape>& block, const NarrowRange& first)
      : block(block), range(first), index(block.run.first), in_range(0), loaded(0) {}

  // Keys that may be asked for before the kernels ahead have ended. By one thread.
  __device__ __forceinline__ void prefetch() const {
#pragma unroll 1
    for (int i = 0; i < min(kBytesPrefetched / Shape::kTile, range.key_tiles); ++i)
      prefetch_keys<kDim>(block.p.attention(), block.maps.keys.map, range.b, range.g,
                          range.halo_begin + i * kTileRows);
  }

  __device__ __forceinline__ void load_tile(bool is_first_phase, int direction) {
    const bool has_keys = in_range < range.key_tiles;
    Barrier& full = block.ring.begin_load(state, is_first_phase, has_keys ? Shape::kTile : 0,
                                          !Shape::kPaged || threadIdx.x == kConsumers);
    if (!has_keys) return;
    const WindowAttention& a = block.p.attention();
    const int first = range.halo_begin + in_range * kTileRows;
    if constexpr (Shape::kPaged)
      paged.template load<kDim, kTileRows>(a, block.maps.keys, block.ring.tile(state), full,
                                           range.b, range.context + int(a.window), range.halo_end,
                                           range.g, first, direction);
    else
      load_keys<kDim, kTileRows>(a, block.maps.keys.map, block.ring.tile(state), full, range.b,
                                 range.g, first);
  }

  // Loads tiles up to the end-th of the run.
  __device__ __forceinline__ void load_until(int end) {
#pragma unroll 1
    for (; loaded < end; ++loaded, block.ring.advance(state)) {
      load_tile(loaded < block.ring.stages, 1);
      if (++in_range < range.tiles) continue;
      in_range = 0;
      range = block.range_at(++index);
    }
  }

  // For the second pass: from the last to the first, those that neither lie in the stages still nor
  // were kept as products.
  __device__ __forceinline__ void load_again() {
#pragma unroll 1
    while (loaded > block.p.kept_tiles) {
      if (--in_range < 0) {
        range = block.range_at(--index);
        in_range = range.tiles - 1;
      }
      block.ring.retreat(state);
      if (--loaded < block.n_tiles - block.ring.stages) load_tile(false, -1);
    }
  }
};

// Two warpgroups. Tiles of a range go to them in turn, and so do the stages.
template <class Shape>
struct Consumer {
  using T = typename Shape::T;
  static constexpr int kDim = Shape::kDim, kRows = Shape::kRows;
  Block<Shape>& block;
  const ScoreParams& p;
  int thread, warp, lane, warpgroup;
  int row;              // of a tile: the thread's first key; the other one is 8 rows after it
  int bg_of_lse;        // whose logsumexp lies in shared memory
  PipelineState state;  // of the next tile; in the second of two passes, of the one before
  int f;                // the same tile's number in the run, of two passes

  __device__ __forceinline__ explicit Consumer(Block<Shape>& block)
      : block(block),
        p(block.p),
        thread(threadIdx.x),
        warp(warp_index()),
        lane(thread % kWarp),
        warpgroup(warp / (kWarpgroup / kWarp)),
        row(warp % 4 * 16 + lane / 4),
        state{warpgroup, 0},
        f(0) {}

  __device__ __forceinline__ void advance() {
    state.stage += kWarpgroups;
    if (state.stage >= block.ring.stages) state = {warpgroup, state.phase ^ 1};
  }
  __device__ __forceinline__ void retreat() {
    state.stage -= kWarpgroups;
    if (state.stage < 0) state = {block.ring.stages - kWarpgroups + warpgroup, state.phase ^ 1};
  }

  // ---- setup

  __device__ __forceinline__ void set_up() {
    if (thread == 0) {
#pragma unroll 4
      for (int i = 0; i < block.ring.stages; ++i) block.ring.empty[i].init(kWarpgroup / kWarp);
      cutlass::arch::fence_barrier_init();
    }
    block.queries.clear_padding_rows(p, thread);
  }

  // The partials of the run are marked, or the logsumexp of the first range is loaded.
  __device__ __forceinline__ void begin(const NarrowRange& first) {
    bg_of_lse = block.two_pass ? -1 : first.bg;
    if (block.two_pass) {
#pragma unroll 1
      for (int i = block.run.first * kRows + thread; i < block.run.end * kRows; i += kConsumers)
        store_partial(p.partials + i, kMissing);
    } else {
      load_lse(first);
    }
  }

  // Queries of another head: all threads that multiply call it, when none of them uses those
  // before.
  __device__ __forceinline__ void begin_queries(const NarrowRange& range) {
    block.queries.bg = range.bg;
    if (thread == 0) block.queries.load(p, block.maps.queries, range);
  }
  __device__ __forceinline__ void end_queries() {
    block.queries.phase ^= 1;
    block.queries.wait();
  }

  // Where the logsumexp of a query row lies: a thread reads those of its columns of the product,
  // 2c, 2c + 1, 2c + 8 and 2c + 9 of 16, as one float4.
  __device__ __forceinline__ static int place_of(int row) {
    return row / 16 * 16 + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2;
  }
  __device__ __forceinline__ void load_lse(const NarrowRange& range) {
    if (thread < kRows)
      block.memory.minus_lse[place_of(thread)] = minus_lse_of(p.attention(), range, thread);
  }

  // ---- first pass

  // The products of a tile that are kept, as a thread has them in registers, float4 by float4.
  __device__ __forceinline__ float4* kept_products(int tile) {
    return reinterpret_cast<float4*>(block.memory.kept + tile * Shape::kProductBytes) +
           thread % kWarpgroup;
  }
  __device__ __forceinline__ void keep(const float (&x)[kRows / 2], int tile) {
    float4* to = kept_products(tile);
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j)
      to[j * kWarpgroup] = {x[j * 4], x[j * 4 + 1], x[j * 4 + 2], x[j * 4 + 3]};
  }

  // Logits from `key` on become -infinity where a query does not see the key, or where another
  // range takes its partial.
  __device__ __forceinline__ void mask(float (&x)[kRows / 2], const NarrowRange& range,
                                       int first_valid, int key) {
    if (key < first_valid || key + kTileRows > range.partial_end) {
      const int upper = key + row, lower = upper + 8;
      const bool has_upper = upper >= first_valid && upper < range.partial_end;
      const bool has_lower = lower >= first_valid && lower < range.partial_end;
#pragma unroll
      for (int z = 0; z < kRows / 2; ++z)
        if (!(z % 4 < 2 ? has_upper : has_lower)) x[z] = -INFINITY;
    }
    if (key + kTileRows > range.context) {
      int query = lane % 4 * 2;
      // Opaque, so that the compiler cannot hoist the arithmetic of heads out of this rare branch.
      asm("" : "+r"(query));
#pragma unroll
      for (int e = 0; e < kRows / 8; ++e) {
#pragma unroll
        for (int z = 0; z < 4; ++z)
          if (key + row + z / 2 * 8 > range.context + query + z % 2) x[e * 4 + z] = -INFINITY;
        query += 8;
        if (query >= p.head_rows) query -= p.head_rows;
      }
    }
  }

  // Joins the partials of a range's warps, and shows them to the other blocks. A warp joins some
  // query rows, each lane those of one warp.
  __device__ __forceinline__ void publish(PartialsOfColumns<kRows>& partials, int index) {
    // Two ranges take turns in shared memory: with one barrier for each, a warp may be one ahead.
    SoftmaxPartial* of_warps =
        block.memory.partials + (index - block.run.first) % 2 * kWarps * kRows;
    partials.store(of_warps + warp * kRows, lane);
    sync_consumers<kConsumers>();
    static_assert(kWarps == 8);
#pragma unroll 1
    for (int row = warp * 4 + lane % 4; row < kRows; row += kWarps * 4) {
      SoftmaxPartial partial = of_warps[lane / 4 * kRows + row];
#pragma unroll
      for (int step = 4; step < kWarp; step *= 2) partial.join_lanes<FastExp>(step);
      if (lane < 4) store_partial(p.partials + index * kRows + row, bits_of(partial));
    }
  }

  __device__ __forceinline__ void first_pass() {
    PartialsOfColumns<kRows> partials;
    f = warpgroup;
#pragma unroll 1
    for (int index = block.run.first; index < block.run.end; ++index) {
      const NarrowRange range = block.range_at(index);
      if (range.bg != block.queries.bg) {
        sync_consumers<kConsumers>();
        begin_queries(range);
        end_queries();
      }
      const int first_valid = first_valid_key(p.attention(), range);
      partials.clear();
#pragma unroll 1
      for (int i = warpgroup; i < range.tiles; i += kWarpgroups, f += kWarpgroups, advance()) {
        block.ring.wait(state);
        const bool is_needed_again = f >= block.n_tiles - block.ring.stages;
        if (i >= range.key_tiles) {
          if (!is_needed_again) block.ring.free(state);
          continue;
        }
        // Keys `row` and `row + 8` of the tile by query rows: lane 4r + c has of the first key rows
        // 8j + 2c and 8j + 2c + 1 at x[4j] and x[4j + 1], of the second the same at x[4j + 2] and
        // x[4j + 3].
        float x[kRows / 2];
        multiply<T, kDim, kRows>(x,
                                 key_rows<kDim, Shape::kPaged>(block.ring.tile(state), kTileRows),
                                 in_panels(block.queries.rows, kRows));
        if (!is_needed_again) block.ring.free(state);
        if (f < p.kept_tiles) keep(x, f);
#pragma unroll
        for (int z = 0; z < kRows / 2; ++z) x[z] = __fmul_rn(x[z], p.scale_log2);
        mask(x, range, first_valid, range.halo_begin + i * kTileRows);
        partials.add(x);
      }
      publish(partials, index);
    }
  }

  // The logsumexp of a head, when the partials of all its ranges are there. A warp joins some query
  // rows, each lane an eighth of the ranges.
  __device__ __forceinline__ void join_partials(const NarrowRange& range) {
    const auto [long_ranges, last_range, ranges] = block.partials_of_head(range);
#pragma unroll 1
    for (int row = warp * 4 + lane % 4; row < kRows; row += kWarps * 4) {
      float* minus_lse = block.memory.minus_lse + place_of(row);
      const auto from = [&](int in_head) {
        const int index = in_head + 1 < ranges ? long_ranges + in_head : last_range;
        return p.partials + int64_t(index) * kRows + row;
      };
      SoftmaxPartial partial{kLowest, 0.f};
      constexpr int kBatch = 4;  // loads in flight
#pragma unroll 1
      for (int first = lane / 4; first < ranges; first += kBatch * 8) {
        SoftmaxPartial batch[kBatch];
        bool is_missing;
        do {
          is_missing = false;
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            const int other = first + i * 8;
            const uint64_t bits =
                other < ranges ? load_partial(from(other)) : bits_of({kLowest, 0.f});
            is_missing |= bits == kMissing;
            batch[i] = partial_of(bits);
          }
        } while (is_missing);
        float top = partial.max;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) top = fmaxf(top, batch[i].max);
        partial.sum *= FastExp::exp(partial.max - top);
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          partial.sum += batch[i].sum * FastExp::exp(batch[i].max - top);
        partial.max = top;
      }
      __syncwarp();
#pragma unroll
      for (int step = 4; step < kWarp; step *= 2) partial.join_lanes<FastExp>(step);
      if (lane < 4) *minus_lse = minus_lse_of(p.attention(), range, row, partial);
    }
  }

  // ---- second pass

  // Queries and logsumexp of a range, where they are another head's than those before.
  __device__ __forceinline__ void prepare(const NarrowRange& range) {
    const bool has_other_queries =
        range.bg != block.queries.bg && (!block.two_pass || f > p.kept_tiles);
    if (has_other_queries) begin_queries(range);
    if (range.bg != bg_of_lse) {
      bg_of_lse = range.bg;
      if (block.two_pass) {
        join_partials(range);
      } else {
        load_lse(range);
      }
      sync_consumers<kConsumers>();
    }
    if (has_other_queries) end_queries();
  }

  // The products of tile i of a range, out of those that were kept or anew. False if it has no
  // keys.
  __device__ __forceinline__ bool products_of(float (&x)[kRows / 2], const NarrowRange& range,
                                              int i) {
    if (block.two_pass && f + warpgroup < p.kept_tiles) {
      if (i >= range.key_tiles) return false;
      const float4* from = kept_products(f + warpgroup);
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j) {
        const float4 four = from[j * kWarpgroup];
        x[j * 4] = four.x;
        x[j * 4 + 1] = four.y;
        x[j * 4 + 2] = four.z;
        x[j * 4 + 3] = four.w;
      }
      return true;
    }
    block.ring.wait(state);
    if (i < range.key_tiles)
      multiply<T, kDim, kRows>(x, key_rows<kDim, Shape::kPaged>(block.ring.tile(state), kTileRows),
                               in_panels(block.queries.rows, kRows));
    block.ring.free(state);
    if (!block.two_pass) advance();
    return i < range.key_tiles;
  }

  // Probabilities, summed over the thread's columns of 8 query rows, which are one head's: at x[4e]
  // of the first key, at x[4e + 2] of the second.
  __device__ __forceinline__ void add_pairs(float (&x)[kRows / 2],
                                            const float4 (&minus_lse)[kRows / 16]) {
#pragma unroll
    for (int e = 0; e < kRows / 8; ++e) {
      const float even = e % 2 ? minus_lse[e / 2].z : minus_lse[e / 2].x;
      const float odd = e % 2 ? minus_lse[e / 2].w : minus_lse[e / 2].y;
      // The product of a padding row is 0, or NaN if the key is infinite; of 0 its logsumexp makes
      // no probability.
      if (p.has_padding_rows) {
        if (even == -INFINITY) x[e * 4] = x[e * 4 + 2] = 0.f;
        if (odd == -INFINITY) x[e * 4 + 1] = x[e * 4 + 3] = 0.f;
      }
#pragma unroll
      for (int z = e * 4; z < e * 4 + 4; z += 2)
        x[z] = FastExp::exp(fmaf(x[z], p.scale_log2, even)) +
               FastExp::exp(fmaf(x[z + 1], p.scale_log2, odd));
    }
  }

  // Sums over all query rows, or over those of each head, into shared memory.
  __device__ __forceinline__ void add_heads(const float (&x)[kRows / 2], const NarrowRange& range,
                                            int first_valid, int i) {
    const int first_key = i * kTileRows + warp % 4 * 16;  // of the warp
    float sum[2] = {};                                    // of the thread's two keys
    const auto store = [&](int slot) {
      store_sums(block.memory.sums + slot * p.sums_stride + first_key, sum[0], sum[1],
                 range.halo_begin + first_key, first_valid);
    };
    if (p.slots == 1) {
#pragma unroll
      for (int z = 0; z < kRows / 2; z += 2) sum[z / 2 % 2] += x[z];
      store(0);
      return;
    }
    int head = 0, rows = 0;  // of the head so far
#pragma unroll
    for (int e = 0; e < kRows / 8; ++e) {
      sum[0] += x[e * 4];
      sum[1] += x[e * 4 + 2];
      rows += 8;
      if (rows < p.head_rows) continue;
      if (head < p.slots) store(head);
      sum[0] = sum[1] = 0.f;
      ++head;
      rows = 0;
    }
  }

  __device__ __forceinline__ void add_range(const NarrowRange& range) {
    const int first_valid = first_valid_key(p.attention(), range);
    float4 minus_lse[kRows / 16];  // of the thread's columns: [j] of 16j + 2c, + 1, + 8 and + 9
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i)
      minus_lse[i] = reinterpret_cast<const float4*>(block.memory.minus_lse)[i * 4 + lane % 4];
    const int step = block.two_pass ? -kWarpgroups : kWarpgroups;
    int i = warpgroup + (block.two_pass ? range.tiles - kWarpgroups : 0);
#pragma unroll 1
    for (int n = 0; n < range.tiles; n += kWarpgroups, i += step) {
      if (block.two_pass) {
        retreat();
        f -= kWarpgroups;
      }
      float x[kRows / 2];  // as in the first pass
      if (!products_of(x, range, i)) continue;
      add_pairs(x, minus_lse);
      add_heads(x, range, first_valid, i);
    }
  }

  __device__ __forceinline__ void second_pass() {
    f = block.n_tiles;  // tiles from here on are done; only needed to go back
#pragma unroll 1
    for (int j = block.run.first; j < block.run.end; ++j) {
      const NarrowRange range =
          block.range_at(block.two_pass ? block.run.first + block.run.end - 1 - j : j);
      prepare(range);
      add_range(range);
      sync_consumers<kConsumers>();
      pool_and_write<false>(p, range, range.context, p.slots, thread,
                            [&](int slot) { return block.memory.sums + slot * p.sums_stride; });
      if (j + 1 < block.run.end) sync_consumers<kConsumers>();
    }
  }
};

template <class Shape>
__global__ __launch_bounds__(kThreads, 1) void narrow_kernel(
    const __grid_constant__ Maps maps, const __grid_constant__ ScoreParams p) {
  extern __shared__ __align__(kAlignment) char shared[];
  Block<Shape> block(p, maps, shared);
  Consumer<Shape> consumer(block);
  const bool is_producer = warp_index() == kWarps, is_first_lane = threadIdx.x == kConsumers;
  const bool is_loading = Shape::kPaged ? is_producer : is_first_lane;

  // ---- setup
  const auto set_up = [&] {
    if (is_producer) {
      if (is_first_lane) block.init_full();
      __syncwarp();
    } else {
      consumer.set_up();
    }
  };
  if constexpr (Shape::kPaged) {
    // One of the kernels ahead may write the lengths, of which the run is made.
    wait_for_kernels_ahead();
    prefetch_prompts<kThreads>(p.attention());
    set_up();
  }
  block.take_run();
  const bool has_ranges = !Shape::kPaged || block.run.first < block.run.end;
  const NarrowRange first = block.range_at(block.run.first);
  Producer<Shape> producer(block, first);
  if constexpr (!Shape::kPaged) {
    if (is_first_lane && !block.two_pass) producer.prefetch();
    set_up();
    wait_for_kernels_ahead();
  }
  block.queries.bg = first.bg;
  if (!is_producer) consumer.begin(first);

  // The threads of all blocks meet, or only of this one, while the first keys are on their way.
  const auto grid = cooperative_groups::this_grid();
  cooperative_groups::grid_group::arrival_token token{};
  if (block.two_pass) token = grid.barrier_arrive();
  if (is_first_lane && has_ranges) block.queries.load(p, maps.queries, first);
  if (is_loading && has_ranges) {
    producer.load_until(
        min(min(kLeastBytesAhead / Shape::kTile, block.ring.stages), block.n_tiles));
  }
  __syncwarp();  // a barrier wants whole warps
  if (block.two_pass) {
    grid.barrier_wait(std::move(token));
  } else {
    __syncthreads();
  }
  if (!has_ranges) return;

  if (is_producer) {
    if (!is_loading) return;
    producer.load_until(block.n_tiles);
    if (block.two_pass) producer.load_again();
  } else {
    block.queries.wait();
    if (block.two_pass) consumer.first_pass();
    consumer.second_pass();
  }
}

// ---- host

// How the work is divided: key ranges over blocks; shared memory over stages, kept products and
// sums.
struct Plan {
  ScoreParams params;
  int64_t query_rows, blocks, partial_bytes;

  explicit Plan(const WindowScores& s);
};

// On each side of a range.
int64_t range_halo(const WindowScores& s) {
  return s.attention.lse ? s.halo() : round_up(s.halo(), kHaloAlign);
}

int64_t most_tiles(const WindowScores& s) {
  return max(int64_t(kWarpgroups), kMostTiles / s.slots());
}

Division divide(const WindowScores& s, int64_t keys) {
  const WindowAttention& a = s.attention;
  const int64_t heads = a.lse ? a.batch * a.kv_heads : kPlannedHeads;
  const int64_t head_cost = a.lse ? 0 : kHeadCost, halo = range_halo(s);
  const int64_t blocks = multiprocessors(), longest = most_tiles(s);
  return best_division(
      longest,
      a.lse ? 2 * halo / kTileRows + 1
            : least_tiles(keys, halo, PlainDivmod<int64_t>{blocks}, longest),
      heads, blocks, [&](int64_t tiles) { return divide_keys(tiles, keys, halo); },
      [&](const Division& d, int64_t n, int64_t n_last) {
        return cost_of_ranges(d, n, n_last, head_cost);
      });
}

// The most ranges that a head may have whose prompt has up to so many keys. Where the shortest one
// is a block's share: four times as many as blocks, because three quarters of it may be halo.
// Beyond that: as the longest range divides the keys.
int64_t most_head_ranges(const WindowScores& s, int64_t keys) {
  const int64_t halo = range_halo(s), shortest = 2 * halo / kTileRows + 1;
  const auto ranges_of = [&](int64_t tiles) {
    return 1 + ceil_div(keys, tiles * kTileRows - 2 * halo);
  };
  return min(ranges_of(shortest),
             max(int64_t(4 * multiprocessors() + 2), ranges_of(most_tiles(s))));
}

Plan::Plan(const WindowScores& s) {
  const WindowAttention& a = s.attention;
  query_rows = a.group() * head_rows(a) <= 32 ? 32 : kMostRows;
  const int64_t keys = a.lse ? a.context() : a.total;
  const Division division = divide(s, keys);
  // With pages the prompts are planned on the device: here for the longest that they may be.
  const bool is_paged = a.pages.table;
  const int64_t ranges = a.batch * a.kv_heads * division.head_ranges;
  const int64_t most_ranges = is_paged ? a.batch * a.kv_heads * most_head_ranges(s, keys) : ranges;
  blocks = is_paged ? multiprocessors() : min(ranges, int64_t(multiprocessors()));
  partial_bytes = a.lse ? 0 : most_ranges * query_rows * int64_t(sizeof(SoftmaxPartial));

  const int64_t range_tiles = round_up(is_paged ? most_tiles(s) : division.tiles, kWarpgroups);
  const int64_t row_bytes = padded_dim(a) * 2, tile_bytes = kTileRows * row_bytes;
  const int64_t product_bytes = kTileRows * query_rows * int64_t(sizeof(float));
  const int64_t sums_stride = range_tiles * kTileRows;
  Layout::Sizes sizes{.tile_bytes = tile_bytes,
                      .kept_bytes = 0,
                      .query_rows = query_rows,
                      .row_bytes = row_bytes,
                      .partials = a.lse ? 0 : 2 * kWarps * query_rows,
                      .sums = s.slots() * sums_stride,
                      .prompt_bytes = is_paged ? PromptTable<PromptSchedule>::bytes(a) : 0};
  const int64_t room = most_shared_bytes() - Layout::of(sizes, 0).bytes;
  const int64_t stage_bytes = tile_bytes + Ring<1>::kBarrierBytes;
  const auto stages_of = [&](int64_t bytes) {
    const int64_t most = min(room / stage_bytes, int64_t(kMostStages));
    return min(bytes / tile_bytes, most) / kWarpgroups * kWarpgroups;
  };
  int64_t stages = stages_of(kMostBytesAhead), kept_tiles = 0;
  if (!a.lse && product_bytes < tile_bytes) {
    const int64_t block_tiles = ceil_div(ranges, blocks) * round_up(division.tiles, kWarpgroups);
    const int64_t beside =
        (room - block_tiles * product_bytes) / stage_bytes / kWarpgroups * kWarpgroups;
    stages = min(stages, max(stages_of(kLeastBytesAhead), beside));
    kept_tiles = min((room - stages * stage_bytes) / product_bytes, block_tiles);
  } else if (!a.lse) {
    stages = stages_of(room);  // the last keys stay in them
  }
  sizes.kept_bytes = kept_tiles * product_bytes;
  params = score_params(s, schedule_of(s, division, keys, blocks, range_halo(s)),
                        Layout::of(sizes, stages), query_rows, sums_stride, kept_tiles);
  params.most_tiles = int(most_tiles(s));
  params.blocks = cutlass::FastDivmod(multiprocessors());
}

template <class Shape>
cudaError_t launch(const Plan& plan, cudaStream_t stream) {
  return launch_scores(narrow_kernel<Shape>, plan.params, plan.blocks, kThreads, stream);
}

}  // namespace

bool takes(const WindowScores& s) {
  const WindowAttention& a = s.attention;
  return a.group() * head_rows(a) <= kMostRows && s.halo() <= kMostHalo;
}

namespace {

template <bool kPaged>
cudaError_t run_of(const WindowScores& s, cudaStream_t stream) {
  const Plan plan(s);
  return with_shape(s.attention, [&](auto type, auto dim) {
    using T = decltype(type);
    return plan.query_rows == 32 ? launch<Shape<T, dim, 32, kPaged>>(plan, stream)
                                 : launch<Shape<T, dim, 64, kPaged>>(plan, stream);
  });
}

}  // namespace

int64_t workspace_bytes(const WindowScores& s) {
  WindowScores launched = s;
  if (s.attention.pages.table) launched.attention.batch = min(s.attention.batch, kMostPrompts);
  return Plan(launched).partial_bytes;
}

cudaError_t run(const WindowScores& s, cudaStream_t stream) {
  if (!s.attention.pages.table) return run_of<false>(s, stream);
  return for_some_prompts(s.attention, [&](const WindowAttention& part, int64_t first) {
    WindowScores scores = s;
    scores.attention = part;
    scores.running += first * s.running_stride_b;
    return run_of<true>(scores, stream);
  });
}

}  // namespace claa::cuda::hopper::narrow
