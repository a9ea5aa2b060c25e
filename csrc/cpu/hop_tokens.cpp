// hop_tokens: scores of the tokens that a chain of facts leads to, hop by hop.
//
// The first part sums the states, tile by tile of tokens, to their mean. A hop has three steps:
//   seeds   of each prompt: the best tokens; their directions, side by side in vector lanes
//   links   of a tile: exp((cosine - 1) / temperature) of each token and seed, and the sums of each
//           seed. A cosine is at most 1, so no maximum is needed first
//   scores  of a tile: exponentials over the sums of all tiles, the largest of each token, pooled
// A token's state is centred as it is converted to floats, so nothing cancels in its products. The
// products cost 2 * num_seeds operations for each number of the states; all else is little.
//
// Tiles are counted from the last token, so the tiles, and with them every sum, are the same for a
// prompt alone and for the same prompt with left padding.

#include "csrc/cpu/attention.h"
#include "csrc/cpu/pool.h"

namespace claa::cpu::CLAA_ISA {

namespace {

struct HopPlan {
  const HopTokensParams& p;
  int64_t tiles, channels, row_stride, halo, scratch_floats;
  float *scratch, *sums, *mean, *panel, *links, *partials, *rank;
  int32_t *seeds, *counts;
  uint8_t* was_seed;
  int64_t bytes;

  explicit HopPlan(const HopTokensParams& params) : p(params) {
    tiles = ceil_div(p.context, kTileKeys);
    channels = p.channels();
    row_stride = round_up(p.num_seeds, kRowAlign);
    halo = min(p.kernel_size / 2, p.context);
    scratch_floats = round_up(max(kBlockKeys * channels, kTileKeys + 2 * halo) + row_stride, 16);
    char* next = static_cast<char*>(p.workspace);
    const auto take = [&](auto*& array, int64_t n) {
      array = reinterpret_cast<decltype(+array)>(next);
      next += round_up(n * int64_t(sizeof(*array)), 64);
    };
    take(scratch, p.workers * scratch_floats);      // of a worker
    take(sums, p.batch * tiles * channels);         // [batch, tiles, channels]
    take(mean, p.batch * channels);                 // [batch, channels]
    take(panel, p.batch * row_stride * channels);   // [batch]: directions of the seeds
    take(links, p.batch * p.context * row_stride);  // [batch, context, seeds]
    take(partials, p.batch * tiles * row_stride);   // [batch, tiles, seeds]
    take(rank, p.batch * p.context);                // [batch, context]: for the next seeds
    take(seeds, p.batch * p.num_seeds);             // [batch, num_seeds]; -1: none
    take(counts, p.batch);                          // [batch]: how many there are
    take(was_seed, p.batch * p.context);            // [batch, context]
    bytes = next - static_cast<char*>(p.workspace);
  }
};

// The tokens of a tile that are not padding.
struct TokenTile {
  int64_t b, tile, begin, end;  // without padding
  int64_t all_begin;            // with it

  TokenTile(const HopPlan& plan, int64_t unit) : b(unit / plan.tiles), tile(unit % plan.tiles) {
    end = plan.p.context - tile * kTileKeys;
    all_begin = max(int64_t(0), end - kTileKeys);
    begin = max(all_begin, min(plan.p.first_valid(b), end));
  }
};

// The state of a token as floats, piece after piece.
template <class T>
void load_state(const HopTokensParams& p, int64_t b, int64_t j, float* to) {
  const char* states = static_cast<const char*>(p.states);
  for (int64_t g = 0; g < p.pieces; ++g)
    convert_row<T>(
        states +
            (b * p.states_stride_b + g * p.states_stride_g + j * p.states_stride_n) * T::kBytes,
        p.dim, to + g * p.dim);
}

// The same without the mean; returns one over its length, 0 for a state that has none.
template <class T>
float load_centred(const HopPlan& plan, int64_t b, int64_t j, float* to) {
  load_state<T>(plan.p, b, j, to);
  const float* mean = plan.mean + b * plan.channels;
  Vec squares[4] = {};
  float square = 0.f;
  int64_t d = 0;
  for (; d + 4 * kLanes <= plan.channels; d += 4 * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec x = load<Vec>(to + d + i * kLanes) - load<Vec>(mean + d + i * kLanes);
      store(to + d + i * kLanes, x);
      squares[i] = multiply_add(x, x, squares[i]);
    }
  }
  for (; d < plan.channels; ++d) {
    to[d] -= mean[d];
    square += to[d] * to[d];
  }
  const Vec all = (squares[0] + squares[1]) + (squares[2] + squares[3]);
  for (int64_t lane = 0; lane < kLanes; ++lane) square += all[lane];
  return square == 0.f ? 0.f : 1.f / __builtin_sqrtf(square);
}

inline void add_to(float* sum, const float* x, int64_t n) {
  for (int64_t d = 0; d < n; ++d) sum[d] += x[d];
}

// sums[b, tile] = the sum of the tile's states.
template <class T>
void sum_states(const HopPlan& plan, const TokenTile& tile, float* scratch) {
  const int64_t n = plan.channels;
  float *sum = plan.sums + (tile.b * plan.tiles + tile.tile) * n, *part = scratch + n;
  for (int64_t d = 0; d < n; ++d) sum[d] = 0.f;
  for (int64_t block = tile.end; block > tile.begin; block -= kSumBlock) {
    for (int64_t d = 0; d < n; ++d) part[d] = 0.f;
    for (int64_t j = block - 1; j >= max(block - kSumBlock, tile.begin); --j) {
      load_state<T>(plan.p, tile.b, j, scratch);
      add_to(part, scratch, n);
    }
    add_to(sum, part, n);
  }
  for (int64_t j = tile.all_begin; j < tile.end; ++j)
    plan.was_seed[tile.b * plan.p.context + j] = 0;
}

void find_mean(const HopPlan& plan, int64_t b) {
  const int64_t n = plan.channels, tokens = plan.p.context - plan.p.first_valid(b);
  float* mean = plan.mean + b * n;
  for (int64_t d = 0; d < n; ++d) mean[d] = 0.f;
  for (int64_t t = 0; t < plan.tiles; ++t) add_to(mean, plan.sums + (b * plan.tiles + t) * n, n);
  for (int64_t d = 0; d < n; ++d) mean[d] /= float(max(tokens, int64_t(1)));
}

// The seeds of a prompt, and their directions in the order in which a product reads them.
template <class T>
void find_seeds(const HopPlan& plan, int64_t b, float* scratch) {
  const HopTokensParams& p = plan.p;
  plan.counts[b] = int32_t(p.seeds_of(p.part, p.context - p.first_valid(b)));
  Portion row{.worker = 0, .begin = b, .end = b + 1};
  cpu::run(p.seeds(plan.rank, plan.counts, plan.seeds, nullptr), row);

  const int32_t* seeds = plan.seeds + b * p.num_seeds;
  float* panel = plan.panel + b * plan.row_stride * plan.channels;
  for (int64_t first = 0; first < p.num_seeds; first += 2 * kLanes) {
    const int64_t width = block_rows(p.num_seeds - first);
    for (int64_t lane = 0; lane < width; ++lane) {
      const int64_t s = first + lane < p.num_seeds ? seeds[first + lane] : -1;
      const float scale = s < 0 ? 0.f : load_centred<T>(plan, b, s, scratch);
      for (int64_t d = 0; d < plan.channels; ++d)
        panel[d * width + lane] = s < 0 ? 0.f : scratch[d] * scale;
      if (s >= 0) plan.was_seed[b * p.context + s] = 1;
    }
    panel += width * plan.channels;
  }
}

// Products become exponentials; those of seeds that are near the token, or missing, become 0.
inline void exponentials(const HopPlan& plan, int64_t j, float scale, const int32_t* seeds,
                         float* links) {
  const float beta = 1.f / plan.p.temperature;
  const int32_t gap = int32_t(min(plan.p.gap, plan.p.context));
  for_each_vector(plan.row_stride, [&](auto lanes, int64_t r) {
    using V = decltype(lanes);
    const auto s = load<IntOf<V>>(seeds + r);
    const auto distance = s > int32_t(j) ? s - int32_t(j) : int32_t(j) - s;
    const V e = exp((load<V>(links + r) * scale - 1.f) * beta);
    store(links + r, (distance <= gap) | (s < 0) ? V{} : e);
  });
}

// links[b, j] for the tokens of a tile, and their sums.
template <class T>
void link_tokens(const HopPlan& plan, const TokenTile& tile, float* scratch) {
  const int64_t n = plan.channels, rows = plan.row_stride;
  auto* seeds = reinterpret_cast<int32_t*>(scratch);
  scratch += rows;
  for (int64_t r = 0; r < rows; ++r)
    seeds[r] = r < plan.p.num_seeds ? plan.seeds[tile.b * plan.p.num_seeds + r] : -1;
  const float* panel = plan.panel + tile.b * rows * n;
  float* links = plan.links + tile.b * plan.p.context * rows;
  const auto multiply = [&](auto n_keys, int64_t j) {
    float scale[kBlockKeys];
    for (int64_t i = 0; i < n_keys(); ++i)
      scale[i] = load_centred<T>(plan, tile.b, j + i, scratch + i * n);
    multiply_rows<FloatStep, n_keys()>(panel, plan.p.num_seeds, n,
                                       reinterpret_cast<const char*>(scratch), 4 * n, {}, 1.f,
                                       links + j * rows, rows);
    for (int64_t i = 0; i < n_keys(); ++i)
      exponentials(plan, j + i, scale[i], seeds, links + (j + i) * rows);
  };
  int64_t j = tile.begin;
  for (; j + kBlockKeys <= tile.end; j += kBlockKeys) multiply(Constant<int(kBlockKeys)>{}, j);
  for (; j < tile.end; ++j) multiply(Constant<1>{}, j);

  float* sums = plan.partials + (tile.b * plan.tiles + tile.tile) * rows;
  for_each_vector(rows, [&](auto lanes, int64_t r) {
    using V = decltype(lanes);
    V total = {};
    for (int64_t block = tile.end; block > tile.begin; block -= kSumBlock) {
      V part = {};
      for (int64_t i = block - 1; i >= max(block - kSumBlock, tile.begin); --i)
        part += load<V>(links + i * rows + r);
      total += part;
    }
    store(sums + r, total);
  });
}

// One over the sum of each seed; 0 where nothing is linked to it.
inline void find_factors(const HopPlan& plan, int64_t b, float* factors) {
  for_each_vector(plan.row_stride, [&](auto lanes, int64_t r) {
    using V = decltype(lanes);
    V total = {};
    for (int64_t t = 0; t < plan.tiles; ++t)
      total += load<V>(plan.partials + (b * plan.tiles + t) * plan.row_stride + r);
    store(factors + r, total == 0.f ? V{} : 1.f / total);
  });
}

// The largest link of a token. No link is 0 but those that do not count.
inline float best_link(const HopPlan& plan, const float* links, const float* factors) {
  float best = 0.f;
  for_each_vector(plan.row_stride, [&](auto lanes, int64_t r) {
    using V = decltype(lanes);
    const V e = load<V>(links + r), link = e == 0.f ? V{} : e * load<V>(factors + r);
    for (int64_t i = 0; i < int64_t(sizeof(V) / 4); ++i) best = max_or_nan(best, link[i]);
  });
  return best;
}

void score_tile(const HopPlan& plan, const TokenTile& tile, float* scratch) {
  const HopTokensParams& p = plan.p;
  float* out = p.out + (tile.b * p.hops + p.part) * p.context;
  float* rank = plan.rank + tile.b * p.context;
  for (int64_t j = tile.all_begin; j < tile.begin; ++j) out[j] = rank[j] = 0.f;
  if (tile.begin == tile.end) return;
  const int64_t low = max(p.first_valid(tile.b), tile.begin - plan.halo);
  const int64_t high = min(tile.end + plan.halo, p.context);
  const float* links = plan.links + tile.b * p.context * plan.row_stride;
  float *factors = scratch, *best = scratch + plan.row_stride;
  find_factors(plan, tile.b, factors);
  for (int64_t j = low; j < high; ++j)
    best[j - low] = best_link(plan, links + j * plan.row_stride, factors);
  pool_row(best, low, high, tile.begin, tile.end, p.kernel_size, p.pool_mode, false,
           out + tile.begin);
  const uint8_t* was_seed = plan.was_seed + tile.b * p.context;
  for (int64_t j = tile.begin; j < tile.end; ++j) rank[j] = was_seed[j] ? -1.f : out[j];
}

}  // namespace

Schedule schedule(const HopTokensParams& p) {
  const HopPlan plan(p);
  const int64_t tiles = p.batch * plan.tiles;
  const bool is_mean = p.part == HopTokensParams::kMean;
  return {.units = {is_mean ? tiles : p.batch, is_mean ? p.batch : tiles, is_mean ? 0 : tiles},
          .unit_cost = kTileKeys * plan.channels * (is_mean ? 1 : plan.row_stride),
          .workspace_bytes = plan.bytes};
}

void run(const HopTokensParams& p, Portion& portion) {
  const HopPlan plan(p);
  float* scratch = plan.scratch + portion.worker * plan.scratch_floats;
  const int step = portion.step + (p.part == HopTokensParams::kMean ? 0 : 2);
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = portion.begin; i < portion.end; ++i) {
      switch (step) {
        case 0: sum_states<T>(plan, TokenTile(plan, i), scratch); break;
        case 1: find_mean(plan, i); break;
        case 2: find_seeds<T>(plan, i, scratch); break;
        case 3: link_tokens<T>(plan, TokenTile(plan, i), scratch); break;
        case 4: score_tile(plan, TokenTile(plan, i), scratch); break;
      }
    }
  });
}

}  // namespace claa::cpu::CLAA_ISA
