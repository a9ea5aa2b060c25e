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
#include "csrc/cuda/hopper/narrow/consumer.cuh"
#include "csrc/cuda/hopper/narrow/producer.cuh"
#include "csrc/cuda/overlap.cuh"

namespace claa::cuda::hopper::narrow {
namespace {

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
