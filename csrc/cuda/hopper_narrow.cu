// Window scores of few columns on Hopper, by TMA and wgmma: up to 64 of them.
//
// A unit is a range of keys of one (prompt, key head) with a halo of half a pooling kernel on each
// side, in tiles of 64 keys. Every block has a multiprocessor for itself and a run of units, in
// which one warp brings tile after tile into a ring of stages, as far ahead as memory needs to stay
// busy, and two warpgroups, taking turns, multiply them by all columns. Keys are the rows of the
// product, so a thread sums over columns in its registers; sums of a unit go to shared memory,
// where they are pooled.
//
// Without `lse` a block first measures the softmax of its units. What it multiplied it keeps in
// shared memory, as far as there is room: a logit of 32 columns takes half the room of its key.
// When the measures of all units of a head are there, it goes over its tiles again from the last to
// the first: what is not kept is multiplied anew, out of the stages, the L2 cache and memory.
//
// A measure says itself that it is there: all are marked as missing first, and the blocks wait for
// each other (a cooperative launch) only then, while their first keys are on the way.
//
// A launch over few keys is as long as its chain of latencies. So divisions are the host's, queries
// come by TMA, and code that is passed once is short: what is not yet in the instruction cache
// takes longer to fetch than to execute. With `lse` first keys are asked for while the kernel ahead
// still runs.
//
// Reads every key once, or up to twice without `lse`; writes every score once. Units do not depend
// on the batch where measures do, and sums go over columns in order: the same bits in any batch.

#include "csrc/cuda/hopper_narrow.cuh"

#include <cooperative_groups.h>

#include "csrc/cuda/hopper_narrow_plan.cuh"
#include "csrc/cuda/overlap.cuh"
#include "csrc/cuda/pool.cuh"

namespace claa::cuda::hopper::narrow {
namespace {

template <class T_, int kDim_, int kColumns_>
struct Shape {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kQueryBytes = kColumns * kDim * 2;
  static constexpr int kProductBytes = kTileRows * kColumns * 4;  // of a tile
};

// What a measure says while it is missing: its largest logit is a number when it is there.
constexpr uint64_t kMissing = ~uint64_t(0);

// Other blocks see all of a measure or nothing of it.
__device__ inline void store_measure(Measure* to, uint64_t bits) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(bits) : "memory");
}
__device__ inline uint64_t load_measure(const Measure* from) {
  uint64_t bits;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(bits) : "l"(from) : "memory");
  return bits;
}
__device__ inline uint64_t bits_of(const Measure& measure) {
  return uint64_t(__float_as_uint(measure.sum)) << 32 | __float_as_uint(measure.largest);
}
__device__ inline Measure measure_of(uint64_t bits) {
  return {__uint_as_float(uint32_t(bits)), __uint_as_float(uint32_t(bits >> 32))};
}

// The measures of a thread's columns in a product: 8j + 2c and 8j + 2c + 1 in lane 4r + c.
template <int kColumns>
struct ColumnMeasures {
  static constexpr int kCount = kColumns / 4;
  float largest[kCount], sum[kCount];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      largest[i] = kLowest;
      sum[i] = 0.f;
    }
  }

  // Takes in the logits of the thread's two keys; all lanes of a warp call it.
  __device__ void add(const float (&z)[kColumns / 2]) {
    // Sums are scaled down only when they would grow too much: seldom, and so half as many
    // exponentials again are saved.
    constexpr float kSlack = 16.f;
    bool is_more = false;
#pragma unroll
    for (int k = 0; k < kColumns / 2; ++k) is_more |= z[k] > largest[k / 4 * 2 + k % 2] + kSlack;
    if (__any_sync(kFullMask, is_more)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float top = fmaxf(largest[i], fmaxf(z[i / 2 * 4 + i % 2], z[i / 2 * 4 + i % 2 + 2]));
        sum[i] *= FastExp::exp(largest[i] - top);
        largest[i] = top;
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      sum[i] += FastExp::exp(z[i / 2 * 4 + i % 2] - largest[i]) +
                FastExp::exp(z[i / 2 * 4 + i % 2 + 2] - largest[i]);
  }

  // Joins lanes that have the same columns: a lane hands over half of those that it still has and
  // keeps the other half.
  template <int kStep>
  __device__ void join(int lane) {
    constexpr int kHalf = kCount * kStep / kWarp;
    const bool upper = lane & kStep;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const int j = i + kHalf;
      const Measure other{__shfl_xor_sync(kFullMask, upper ? largest[i] : largest[j], kStep),
                          __shfl_xor_sync(kFullMask, upper ? sum[i] : sum[j], kStep)};
      Measure mine{upper ? largest[j] : largest[i], upper ? sum[j] : sum[i]};
      mine.template join<FastExp>(other);
      largest[i] = mine.largest;
      sum[i] = mine.sum;
    }
  }

  // Writes all columns of the warp.
  __device__ void store(Measure* to, int lane) {
    join<16>(lane);
    join<8>(lane);
    join<4>(lane);
    const int first =
        (lane & 16 ? kCount / 2 : 0) + (lane & 8 ? kCount / 4 : 0) + (lane & 4 ? kCount / 8 : 0);
#pragma unroll
    for (int i = 0; i < kCount / 8; ++i)
      to[(first + i) / 2 * 8 + lane % 4 * 2 + (first + i) % 2] = {largest[i], sum[i]};
  }
};

template <class Shape>
__global__ __launch_bounds__(kThreads,
                             1) void narrow_kernel(const __grid_constant__ CUtensorMap key_map,
                                                   const __grid_constant__ CUtensorMap query_map,
                                                   const __grid_constant__ Params p) {
  using T = typename Shape::T;
  constexpr int kDim = Shape::kDim, kColumns = Shape::kColumns;
  constexpr int kTile = kTileBytes<kDim>;
  using Tiles = Ring<kTile>;
  extern __shared__ __align__(kAlignment) char tiles[];
  const WindowAttention& a = p.scores.attention;
  const bool is_twice = p.measures;
  const int stages = p.stages;
  char* kept = tiles + stages * kTile;
  char* queries = kept + p.kept_tiles * Shape::kProductBytes;
  Measure* of_warps = reinterpret_cast<Measure*>(queries + Shape::kQueryBytes);  // of two units
  float* shifts = reinterpret_cast<float*>(of_warps + (is_twice ? 2 * kWarps * kColumns : 0));
  Barrier* queries_loaded = reinterpret_cast<Barrier*>(shifts + kColumns);
  Tiles ring(tiles, queries_loaded + 1, stages);
  float* sums = reinterpret_cast<float*>(queries_loaded + 1 + 2 * stages);

  const int thread = threadIdx.x, warp = warp_index(), lane = thread % kWarp;
  const bool is_producer = warp == kWarps;
  const int block = int(blockIdx.x);
  const int first_unit = block * p.block_units + max(block - p.shorter_blocks, 0);
  const int end_unit = first_unit + p.block_units + (block >= p.shorter_blocks);
  const int last_units = max(end_unit - max(first_unit, p.long_units), 0);
  const int n_tiles =
      (end_unit - first_unit - last_units) * p.unit_tiles + last_units * p.last_tiles;

  // By one thread.
  const auto load_queries_of = [&](const Unit& unit) {
    queries_loaded->arrive_and_expect_tx(p.group * p.head_columns * kDim * int(sizeof(T)));
    load_queries<kDim, kColumns>(a, query_map, queries, *queries_loaded, unit.b, unit.g * p.group,
                                 0);
  };

  Unit next(p, first_unit);  // to be loaded
  if (is_producer) {
    if (lane == 0) {
      cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&key_map));
      cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&query_map));
      if (!is_twice) {
#pragma unroll 1
        for (int i = 0; i < min(kBytesPrefetched / kTile, next.loads); ++i)
          prefetch_keys<kDim>(a, key_map, next.b, next.g, next.low + i * kTileRows);
      }
      queries_loaded->init(1);
#pragma unroll 4
      for (int i = 0; i < stages; ++i) ring.loaded[i].init(1);
      cutlass::arch::fence_barrier_init();
    }
    __syncwarp();
  } else {
    if (thread == 0) {
#pragma unroll 4
      for (int i = 0; i < stages; ++i) ring.freed[i].init(kWarpgroup / kWarp);
      cutlass::arch::fence_barrier_init();
    }
    // Columns that fill up have queries of 0.
    const int columns = p.group * p.head_columns;
#pragma unroll 1
    for (int i = columns * 8 + thread; i < kColumns * 8; i += kConsumers) {
#pragma unroll
      for (int block = 0; block < kDim / kBlockItems; ++block)
        reinterpret_cast<uint4*>(queries + block * kColumns * kRowBytes)[i] = {};
    }
    cutlass::arch::fence_view_async_shared();
  }
  wait_for_kernels_ahead();

  // Where the shift of a column lies: a thread reads those of 2c, 2c + 1, 2c + 8 and 2c + 9 of 16
  // columns at once.
  const auto place_of = [](int column) {
    return column / 16 * 16 + column % 8 / 2 * 4 + column / 8 % 2 * 2 + column % 2;
  };
  const auto load_shifts = [&](const Unit& unit) {
    if (thread < kColumns)
      shifts[place_of(thread)] = -column_of_lse<FastExp>(a, unit.b, unit.g, Column(a, thread)).x;
  };
  const auto start_of = [&](const Unit& unit) {
    return Visibility::near(a.start.data ? a.start[unit.b] : 0);
  };

  int bg_of_queries = next.bg, bg_of_shifts = is_twice ? -1 : next.bg;
  if (!is_producer && is_twice) {
#pragma unroll 1
    for (int i = first_unit * kColumns + thread; i < end_unit * kColumns; i += kConsumers)
      store_measure(p.measures + i, kMissing);
  } else if (!is_producer) {
    load_shifts(next);
  }

  int index = first_unit, in_unit = 0, to_load = 0;  // the next tile, of its unit and of all
  typename Tiles::Place load_place;
  const auto load = [&](bool is_first) {
    const bool is_empty = in_unit >= next.loads;
    Barrier& loaded = ring.begin_load(load_place, is_first, is_empty ? 0 : kTile);
    if (!is_empty)
      load_keys<kDim, kTileRows>(a, key_map, ring.tile(load_place), loaded, next.b, next.g,
                                 next.low + in_unit * kTileRows);
  };
  const auto load_until = [&](int end) {
#pragma unroll 1
    for (; to_load < end; ++to_load, ring.advance(load_place)) {
      load(to_load < stages);
      if (++in_unit < next.tiles) continue;
      in_unit = 0;
      next = Unit(p, ++index);
    }
  };

  // The threads of all blocks meet, or only of this one, while the first keys are on their way.
  const auto grid = cooperative_groups::this_grid();
  cooperative_groups::grid_group::arrival_token token{};
  if (is_twice) token = grid.barrier_arrive();
  if (is_producer && lane == 0) {
    load_queries_of(next);
    load_until(min(min(kLeastBytesAhead / kTile, stages), n_tiles));
  }
  __syncwarp();  // a barrier wants whole warps
  if (is_twice) {
    grid.barrier_wait(std::move(token));
  } else {
    __syncthreads();
  }

  if (is_producer) {
    if (lane != 0) return;
    load_until(n_tiles);
    if (!is_twice) return;
#pragma unroll 1
    while (to_load > p.kept_tiles) {
      if (--in_unit < 0) {
        next = Unit(p, --index);
        in_unit = next.tiles - 1;
      }
      ring.retreat(load_place);
      if (--to_load < n_tiles - stages) load(false);
    }
    return;
  }

  uint32_t queries_parity = 0;
  queries_loaded->wait(queries_parity);
  // Queries of another head: by all threads that multiply, when none of them does.
  const auto begin_queries = [&](const Unit& unit) {
    bg_of_queries = unit.bg;
    if (thread == 0) load_queries_of(unit);
  };
  const auto end_queries = [&] { queries_loaded->wait(queries_parity ^= 1); };

  // Tiles of a unit go to the warpgroups in turn, and so do the stages.
  const int group = warp / (kWarpgroup / kWarp);
  typename Tiles::Place place{group, 0};  // of the next tile; on the way back, of the one before
  const auto advance = [&] {
    place.stage += kGroups;
    if (place.stage >= stages) place = {group, place.parity ^ 1};
  };
  const auto retreat = [&] {
    place.stage -= kGroups;
    if (place.stage < 0) place = {stages - kGroups + group, place.parity ^ 1};
  };
  const auto kept_products = [&](int f) {
    return reinterpret_cast<float4*>(kept + f * Shape::kProductBytes) + thread % kWarpgroup;
  };
  const int row = warp % 4 * 16 + lane / 4;  // of a tile; the thread also has the one 8 behind it

  if (is_twice) {
    ColumnMeasures<kColumns> measures;
    int f = group;
#pragma unroll 1
    for (int u = first_unit; u < end_unit; ++u) {
      const Unit unit(p, u);
      if (unit.bg != bg_of_queries) {
        sync_consumers<kConsumers>();
        begin_queries(unit);
        end_queries();
      }
      const int start = start_of(unit);
      measures.clear();
#pragma unroll 1
      for (int i = group; i < unit.tiles; i += kGroups, f += kGroups, advance()) {
        ring.wait(place);
        const bool is_needed_again = f >= n_tiles - stages;
        if (i >= unit.loads) {
          if (!is_needed_again) ring.free(place);
          continue;
        }
        float x[kColumns / 2];
        multiply<T, kDim, kColumns>(x, ring.tile(place), kTileRows, queries, kColumns);
        if (!is_needed_again) ring.free(place);
        if (f < p.kept_tiles) {
          float4* to = kept_products(f);
#pragma unroll
          for (int j = 0; j < kColumns / 8; ++j)
            to[j * kWarpgroup] = {x[j * 4], x[j * 4 + 1], x[j * 4 + 2], x[j * 4 + 3]};
        }
#pragma unroll
        for (int z = 0; z < kColumns / 2; ++z) x[z] = __fmul_rn(x[z], p.factor);
        const int key = unit.low + i * kTileRows;
        if (key < start || key + kTileRows > unit.measured_end) {
          const int low = key + row, high = low + 8;
          const bool has_low = low >= start && low < unit.measured_end;
          const bool has_high = high >= start && high < unit.measured_end;
#pragma unroll
          for (int z = 0; z < kColumns / 2; ++z)
            if (!(z % 4 < 2 ? has_low : has_high)) x[z] = -INFINITY;
        }
        if (key + kTileRows > p.context) {
          int query = lane % 4 * 2;
          asm("" : "+r"(query));  // here, and not for every tile
#pragma unroll
          for (int e = 0; e < kColumns / 8; ++e) {
#pragma unroll
            for (int z = 0; z < 4; ++z)
              if (key + row + z / 2 * 8 > p.context + query + z % 2) x[e * 4 + z] = -INFINITY;
            query += 8;
            if (query >= p.head_columns) query -= p.head_columns;
          }
        }
        measures.add(x);
      }
      Measure* of_unit = of_warps + (u - first_unit) % 2 * kWarps * kColumns;
      measures.store(of_unit + warp * kColumns, lane);
      sync_consumers<kConsumers>();
      // A warp joins some columns, each lane those of one warp.
      static_assert(kWarps == 8);
#pragma unroll 1
      for (int column = warp * 4 + lane % 4; column < kColumns; column += kWarps * 4) {
        Measure measure = of_unit[lane / 4 * kColumns + column];
#pragma unroll
        for (int step = 4; step < kWarp; step *= 2) measure.join_lanes<FastExp>(step);
        if (lane < 4) store_measure(p.measures + u * kColumns + column, bits_of(measure));
      }
    }
  }

  // Waits for the measures of a head. A warp joins some columns, each lane an eighth of the units.
  const auto join_shifts = [&](const Unit& unit) {
    const int units = p.head_units;
#pragma unroll 1
    for (int column = warp * 4 + lane % 4; column < kColumns; column += kWarps * 4) {
      const Column at(a, column);
      float* shift = shifts + place_of(column);
      const auto from = [&](int unit_of_head) {
        const int index = unit_of_head + 1 < units ? unit.bg * (units - 1) + unit_of_head
                                                   : p.long_units + unit.bg;
        return p.measures + int64_t(index) * kColumns + column;
      };
      Measure measure{kLowest, 0.f};
      constexpr int kBatch = 4;  // that are on their way together
#pragma unroll 1
      for (int first = lane / 4; first < units; first += kBatch * 8) {
        Measure batch[kBatch];
        bool is_missing;
        do {
          is_missing = false;
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            const int other = first + i * 8;
            const uint64_t bits =
                other < units ? load_measure(from(other)) : bits_of({kLowest, 0.f});
            is_missing |= bits == kMissing;
            batch[i] = measure_of(bits);
          }
        } while (is_missing);
        float top = measure.largest;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) top = fmaxf(top, batch[i].largest);
        measure.sum *= FastExp::exp(measure.largest - top);
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          measure.sum += batch[i].sum * FastExp::exp(batch[i].largest - top);
        measure.largest = top;
      }
      __syncwarp();
#pragma unroll
      for (int step = 4; step < kWarp; step *= 2) measure.join_lanes<FastExp>(step);
      if (lane < 4) *shift = -column_of_measure<FastExp>(a, unit.g, at, measure).x;
    }
  };

  const int step = is_twice ? -kGroups : kGroups;
  int f = n_tiles;  // tiles from here on are done; only needed to go back
#pragma unroll 1
  for (int j = first_unit; j < end_unit; ++j) {
    const Unit unit(p, is_twice ? first_unit + end_unit - 1 - j : j);
    const bool has_other_queries = unit.bg != bg_of_queries && (!is_twice || f > p.kept_tiles);
    if (has_other_queries) begin_queries(unit);
    if (unit.bg != bg_of_shifts) {
      bg_of_shifts = unit.bg;
      if (is_twice) {
        join_shifts(unit);
      } else {
        load_shifts(unit);
      }
      sync_consumers<kConsumers>();
    }
    if (has_other_queries) end_queries();
    const int start = start_of(unit);
    float4 shift[kColumns / 16];
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i)
      shift[i] = reinterpret_cast<const float4*>(shifts)[i * 4 + lane % 4];

    float sum[2] = {};  // of the thread's two keys
    const auto store = [&](int slot, int i) {
      // A lane hands over one of its keys and keeps the other; then the pairs meet.
      const bool is_odd = lane & 1;
      float mine = is_odd ? sum[1] : sum[0];
      mine += __shfl_xor_sync(kFullMask, is_odd ? sum[0] : sum[1], 1);
      mine += __shfl_xor_sync(kFullMask, mine, 2);
      const int key = i * kTileRows + row + is_odd * 8;
      if (!(lane & 2)) sums[slot * p.sums_stride + key] = unit.low + key < start ? 0.f : mine;
    };

    const int64_t rows = p.scores.pooled ? 1 : p.slots;
    float* out = p.scores.out + unit.bg * rows * p.context + unit.low;
    const int known = min(unit.end + p.halo, p.context) - unit.low;
    const int end = min(unit.end, p.context) - unit.low;

    int i = group + (is_twice ? unit.tiles - kGroups : 0);
#pragma unroll 1
    for (int n = 0; n < unit.tiles; n += kGroups, i += step) {
      if (is_twice) {
        retreat();
        f -= kGroups;
      }
      float x[kColumns / 2];
      if (is_twice && f + group < p.kept_tiles) {
        if (i >= unit.loads) continue;
        const float4* from = kept_products(f + group);
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
          const float4 four = from[j * kWarpgroup];
          x[j * 4] = four.x;
          x[j * 4 + 1] = four.y;
          x[j * 4 + 2] = four.z;
          x[j * 4 + 3] = four.w;
        }
      } else {
        ring.wait(place);
        if (i < unit.loads)
          multiply<T, kDim, kColumns>(x, ring.tile(place), kTileRows, queries, kColumns);
        ring.free(place);
        if (!is_twice) advance();
        if (i >= unit.loads) continue;
      }
      // Sums of 8 columns, which are one head's: at x[4e] of the first key, at x[4e + 2] of the
      // second.
#pragma unroll
      for (int e = 0; e < kColumns / 8; ++e) {
        const float low = e % 2 ? shift[e / 2].z : shift[e / 2].x;
        const float high = e % 2 ? shift[e / 2].w : shift[e / 2].y;
        // The product of a column that is no query is 0, or NaN if the key is infinite; its shift
        // makes nothing of 0.
        if (p.has_fillers) {
          if (low == -INFINITY) x[e * 4] = x[e * 4 + 2] = 0.f;
          if (high == -INFINITY) x[e * 4 + 1] = x[e * 4 + 3] = 0.f;
        }
#pragma unroll
        for (int z = e * 4; z < e * 4 + 4; z += 2)
          x[z] = FastExp::exp(fmaf(x[z], p.factor, low)) +
                 FastExp::exp(fmaf(x[z + 1], p.factor, high));
      }
      sum[0] = sum[1] = 0.f;
      if (p.slots == 1) {
#pragma unroll
        for (int z = 0; z < kColumns / 2; z += 2) sum[z / 2 % 2] += x[z];
        store(0, i);
        continue;
      }
      int head = 0, columns = 0;  // of the head so far
#pragma unroll
      for (int e = 0; e < kColumns / 8; ++e) {
        sum[0] += x[e * 4];
        sum[1] += x[e * 4 + 2];
        columns += 8;
        if (columns < p.head_columns) continue;
        if (head < p.slots) store(head, i);
        sum[0] = sum[1] = 0.f;
        ++head;
        columns = 0;
      }
    }
    sync_consumers<kConsumers>();

    constexpr int kBatch = 2;  // of a thread's keys at a time
#pragma unroll 1
    for (int first = unit.first - unit.low + thread; first < end; first += kBatch * kConsumers) {
      float score[kBatch] = {};
#pragma unroll 1
      for (int slot = 0; slot < p.slots; ++slot) {
        float pooled[kBatch];
        pool_tokens<kConsumers>(pooled, sums + slot * p.sums_stride, first, known, p.halo,
                                p.scores.pool_mode);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int at = first + i * kConsumers;
          if (!p.scores.pooled && at < end) out[int64_t(slot) * p.context + at] = pooled[i];
          score[i] += pooled[i];
        }
      }
      if (!p.scores.pooled) continue;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = first + i * kConsumers;
        if (at >= end) break;
        if (p.scores.pool_mode == PoolMode::avg) score[i] *= p.pool_factor;
        out[at] = score[i];
        join_running(p.scores, unit.b, unit.low + at, score[i]);
      }
    }
    if (j + 1 < end_unit) sync_consumers<kConsumers>();
  }
}

template <class Shape>
cudaError_t launch(const Plan& plan, cudaStream_t stream) {
  const WindowAttention& a = plan.params.scores.attention;
  CUtensorMap keys, queries;
  cudaError_t status = map_keys(a, kTileRows, &keys);
  if (status == cudaSuccess)
    status = map_queries(a, plan.params.group, plan.params.head_columns, &queries);
  if (status != cudaSuccess) return status;
  const auto kernel = narrow_kernel<Shape>;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                int(plan.shared_bytes));
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[2]{{.id = cudaLaunchAttributeCooperative,
                                     .val = {.cooperative = plan.params.measures != nullptr}}};
  cudaLaunchConfig_t config{.gridDim = dim3(unsigned(plan.blocks)),
                            .blockDim = dim3(kThreads),
                            .dynamicSmemBytes = size_t(plan.shared_bytes),
                            .stream = stream,
                            .attrs = attributes,
                            .numAttrs = 1};
  let_overlap(config);
  return cudaLaunchKernelEx(&config, kernel, keys, queries, plan.params);
}

}  // namespace

bool takes(const WindowScores& s) {
  const WindowAttention& a = s.attention;
  return a.group() * head_columns(a) <= kMostColumns && s.halo() <= kMostHalo;
}

int64_t workspace_bytes(const WindowScores& s) { return Plan(s).measure_bytes; }

cudaError_t run(const WindowScores& s, cudaStream_t stream) {
  const Plan plan(s);
  return with_shape(s.attention, [&](auto type, auto dim) {
    using T = decltype(type);
    return plan.columns == 32 ? launch<Shape<T, dim, 32>>(plan, stream)
                              : launch<Shape<T, dim, 64>>(plan, stream);
  });
}

}  // namespace claa::cuda::hopper::narrow
