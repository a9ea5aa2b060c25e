// The contract between the border (src/claa_ops) and the kernels (csrc).
//
// One params struct per op. Pointers are raw, strides count elements, the last dimension is
// contiguous unless a stride says otherwise, outputs are contiguous. Nothing in csrc knows what a
// tensor is. The caller has checked every size and allocated every buffer; kernels do neither.
//
// The kernels of both devices take the same params.
//
// CPU: an op is a number of units, which threads take as they become free (`Schedule` below). What
// a unit computes does not depend on which thread computes it, or when, so results do not depend on
// the number of threads.

#pragma once

#include <cstdint>

#ifdef CLAA_CUDA
#include <cuda_runtime_api.h>
#define CLAA_HOST_DEVICE __host__ __device__
#else
#define CLAA_HOST_DEVICE
#endif

namespace claa {

enum class DType : uint8_t { f32, f16, bf16 };
enum class PoolMode : uint8_t { avg, max };

// int32 or int64 integers, as the caller has them.
struct Indices {
  const void* data;  // may be nullptr where the op says so
  bool is_int32;

  CLAA_HOST_DEVICE int64_t operator[](int64_t i) const {
    return is_int32 ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
  }
};

// Keys that lie in the pages of an engine's cache. A page has 2^log2_size tokens; the pages of a
// prompt are those that its row of the table names, in the order of its tokens.
struct Pages {
  const int32_t* table = nullptr;    // [requests, blocks]; nullptr: the keys lie in no pages
  const int32_t* rows = nullptr;     // [batch]: the row of each prompt; nullptr: its own number
  const int32_t* lengths = nullptr;  // [batch]: how many keys each prompt has
  const float* key_scale = nullptr;  // the factor on e4m3 keys, may be nullptr
  int64_t count = 0;                 // pages in memory
  int64_t table_stride = 0;
  int log2_size = 0;
  bool is_e4m3 = false;  // the keys; else they have the dtype of query

  // Always inlined, for the same reason as `tiers_of` below.
  CLAA_HOST_DEVICE __attribute__((always_inline)) inline const int32_t* of(int64_t b) const {
    return table + (rows ? rows[b] : b) * table_stride;
  }
  CLAA_HOST_DEVICE __attribute__((always_inline)) inline int64_t length(int64_t b,
                                                                        int64_t most) const {
    const int64_t keys = lengths[b];
    return keys < 0 ? 0 : keys < most ? keys : most;
  }
};

// The query rows of an op and the keys they are multiplied with. Query head h reads key head
// h / group(). Each op says itself how many query rows there are and how far apart they lie.
struct QueryKey {
  const void* query;  // [batch, heads, query rows, dim]
  const void* key;    // [batch, kv_heads, total, dim]
  Indices start;      // [batch]: the first valid key; may be nullptr
  void* workspace;    // scratch memory, as much as the device asks for

  DType dtype;  // of query and key
  int64_t batch, heads, kv_heads, total, dim;
  int64_t query_stride_b, query_stride_h;
  int64_t key_stride_b, key_stride_g, key_stride_n;
  float scale;
  int64_t workers;  // CPU: threads available, each with its own part of the workspace

  // With pages `key` is [pages, kv_heads, tokens of a page, dim], key_stride_b leads from page to
  // page, and `total` is the most keys that a prompt may have.
  Pages pages{};

  // In 32 bits: a 64-bit division takes a GPU hundreds of cycles.
  CLAA_HOST_DEVICE int64_t group() const { return int32_t(heads) / int32_t(kv_heads); }
};

// The last `window` queries of a prompt and all its keys, for the ops that score tokens.
// Query row i stands at position total - window + i; context = total - window.
struct WindowAttention : QueryKey {
  int64_t window = 0, query_stride_w = 0;
  const float* lse = nullptr;  // [batch, heads, window], may be nullptr
  int64_t lse_stride_b = 0, lse_stride_h = 0;
  const void* sink_logits = nullptr;  // [heads], may be nullptr
  DType sinks_dtype = DType::f32;
  float softcap = 0.f;         // 0: none
  int64_t sliding_window = 0;  // 0: none

  CLAA_HOST_DEVICE int64_t context() const { return total - window; }
  bool has_queries() const { return heads > 0 && window > 0; }
};

struct ScoreWindowParams {
  WindowAttention attention;
  float* out;  // [batch, heads, context]
};

struct ScoreTokensParams {
  WindowAttention attention;
  float* out;  // [batch, kv_heads, context]
  int64_t kernel_size;
  PoolMode pool_mode;
};

struct PoolHeadsParams {
  const float* scores;  // [batch, heads, context]
  float* out;           // [batch, kv_heads, context]
  int64_t batch, heads, kv_heads, context;
  int64_t scores_stride_b, scores_stride_h;
  int64_t kernel_size;
  PoolMode pool_mode;
};

struct AggregateScoresParams {
  const float* running;  // [batch, context]
  const float* scores;   // [batch, kv_heads, context]
  float* out;            // [batch, context], may be `running`
  int64_t batch, kv_heads, context;
  int64_t running_stride_b, scores_stride_b, scores_stride_g, out_stride_b;
};

struct ScoreLayerParams {
  WindowAttention attention;
  float* out;      // [batch, kv_heads, context]
  float* running;  // [batch, context], becomes the maximum of itself and the scores
  int64_t running_stride_b;
  int64_t kernel_size;
  PoolMode pool_mode;

  // The op in two steps: score_tokens, then aggregate_scores in place. Always inlined, for the same
  // reason as `tiers_of` below.
  CLAA_HOST_DEVICE __attribute__((always_inline)) inline ScoreTokensParams scores() const {
    return {.attention = attention, .out = out, .kernel_size = kernel_size, .pool_mode = pool_mode};
  }
  CLAA_HOST_DEVICE __attribute__((always_inline)) inline AggregateScoresParams maximum() const {
    const int64_t context = attention.context();
    return {.running = running,
            .scores = out,
            .out = running,
            .batch = attention.batch,
            .kv_heads = attention.kv_heads,
            .context = context,
            .running_stride_b = running_stride_b,
            .scores_stride_b = attention.kv_heads * context,
            .scores_stride_g = context,
            .out_stride_b = running_stride_b};
  }
};

// The keys lie in pages. The columns of a prompt's context are updated, no other is touched.
struct ScoreLayerPagedParams {
  WindowAttention attention;
  float* running;  // [batch, context]
  int64_t running_stride_b;
  int64_t kernel_size;
  PoolMode pool_mode;
};

// What is kept of a row of `context` tokens with a score and `window` more: four tiers, best first:
// window, sinks, scored tokens, padding; `n_empty` entries of the row's k remain.
struct Tiers {
  int64_t n_window, n_sinks, n_scored, n_padding, n_empty;
  int64_t first_valid, first;  // the first token that is not padding, and after the sinks
};
// Always inlined: the linker could keep an out-of-line copy that was compiled for an instruction
// set the processor does not have.
CLAA_HOST_DEVICE __attribute__((always_inline)) inline Tiers tiers_of(
    int64_t context, int64_t window, int64_t num_sinks, int64_t start, int64_t k, int64_t count) {
  Tiers t;
  t.first_valid = start < 0 ? 0 : start < context ? start : context;
  const int64_t wanted = count < 0 ? 0 : count < k ? count : k;
  t.n_empty = k - wanted;
  t.n_window = wanted < window ? wanted : window;
  t.n_sinks = num_sinks < context - t.first_valid ? num_sinks : context - t.first_valid;
  if (t.n_sinks > wanted - t.n_window) t.n_sinks = wanted - t.n_window;
  t.first = t.first_valid + t.n_sinks;
  t.n_scored = wanted - t.n_window - t.n_sinks;
  if (t.n_scored > context - t.first) t.n_scored = context - t.first;
  t.n_padding = wanted - t.n_window - t.n_sinks - t.n_scored;
  return t;
}

// One row of a selection.
struct SelectRow {
  const float* scores;      // [context]
  int64_t context, window;  // tokens with a score, and those after them
  int64_t out;              // where in the output its entries begin
  Tiers tiers;
};

struct SelectTopkParams {
  const float* scores;  // [batch, inner, context]
  Indices start;        // [batch], may be nullptr
  Indices counts;       // [batch], may be nullptr
  void* out;            // [batch, inner, k], int32 or int64
  void* workspace;      // scratch memory, as much as the device asks for
  bool out_is_int32;
  int64_t batch, inner, context, k, window, num_sinks;
  int64_t scores_stride_b, scores_stride_inner;

  CLAA_HOST_DEVICE int64_t rows() const { return batch * inner; }
  // Always inlined, for the same reason as `tiers_of` above.
  CLAA_HOST_DEVICE __attribute__((always_inline)) inline SelectRow row(uint32_t i) const {
    const uint32_t b = i / uint32_t(inner);
    return {
        .scores = scores + b * scores_stride_b + (i - b * uint32_t(inner)) * scores_stride_inner,
        .context = context,
        .window = window,
        .out = i * k,
        .tiers = tiers_of(context, window, num_sinks, start.data ? start[b] : 0, k,
                          counts.data ? counts[b] : k)};
  }
};

// Rows are moved as bytes: sizes and strides of key and value count bytes here.
struct GatherKvParams {
  const char* key;    // [batch, kv_heads, total] rows of key_row_bytes
  const char* value;  // [batch, kv_heads, total] rows of value_row_bytes
  Indices index;      // [batch, kv_heads or 1, kept]; -1 gives a row of zeros
  char* key_out;      // [batch, kv_heads, kept] rows
  char* value_out;    // [batch, kv_heads, kept] rows
  int64_t batch, kv_heads, total, kept;
  int64_t key_row_bytes, value_row_bytes;
  int64_t key_stride_b, key_stride_g, key_stride_n;
  int64_t value_stride_b, value_stride_g, value_stride_n;
  int64_t index_stride_b, index_stride_g;  // in elements; stride_g is 0 for a shared index
};

// Rows are moved as bytes: sizes and strides of x count bytes here.
struct GatherTokensParams {
  const char* x;  // [batch, total] rows of row_bytes
  Indices index;  // [batch, kept]; -1 gives a row of zeros
  char* out;      // [batch, kept] rows
  int64_t batch, total, kept;
  int64_t row_bytes;
  int64_t x_stride_b, x_stride_n;  // stride_b is 0 for an x shared by the batch
  int64_t index_stride_b;          // in elements
};

struct PeakAttentionParams : QueryKey {
  int64_t queries = 0, query_stride_t = 0;
  const float* running = nullptr;  // [batch, queries, total], may be nullptr
  int64_t running_stride_b = 0, running_stride_t = 0;
  float* out = nullptr;  // [batch, queries, total]
};

// The keys lie in pages. The columns of a prompt's keys are updated, no other is touched.
struct PeakAttentionPagedParams : QueryKey {
  int64_t queries = 0, query_stride_t = 0;
  float* running = nullptr;  // [batch, queries, total]
  int64_t running_stride_b = 0, running_stride_t = 0;
};

struct RankVarianceParams {
  const float* scores;  // [layers, batch, context]
  float* out;           // [batch]
  void* workspace;      // scratch memory, as much as the device asks for
  int64_t layers, batch, context, k;
  int64_t scores_stride_l, scores_stride_b;
  int64_t workers;
};

// One call of the op runs its parts one after the other: the mean of the states, then each hop.
struct HopTokensParams {
  static constexpr int64_t kMean = -1;
  int64_t part;  // kMean, or the number of a hop

  const float* scores;  // [batch, context]
  const void* states;   // [batch, pieces, total, dim], of which the first `context` tokens count
  Indices start;        // [batch]: the first valid token; may be nullptr
  float* out;           // [batch, hops, context]
  void* workspace;      // kept from part to part; as much as the device asks for

  DType dtype;  // of states
  int64_t batch, context, pieces, dim;
  int64_t scores_stride_b;
  int64_t states_stride_b, states_stride_g, states_stride_n;
  int64_t hops, num_seeds;  // num_seeds <= context
  float temperature;
  int64_t gap, kernel_size;
  PoolMode pool_mode;
  int64_t workers;  // CPU: threads available, each with its own part of the workspace

  CLAA_HOST_DEVICE int64_t channels() const { return pieces * dim; }  // of a token

  // Always inlined, for the same reason as `tiers_of` above.
  CLAA_HOST_DEVICE __attribute__((always_inline)) inline int64_t first_valid(int64_t b) const {
    const int64_t first = start.data ? start[b] : 0;
    return first < 0 ? 0 : first < context ? first : context;
  }
  // How many seeds a hop of a row with so many valid tokens has: fewer where fewer are left.
  CLAA_HOST_DEVICE __attribute__((always_inline)) inline int64_t seeds_of(int64_t hop,
                                                                          int64_t valid) const {
    const int64_t left = valid - hop * num_seeds;
    return left < 0 ? 0 : left < num_seeds ? left : num_seeds;
  }
  // How a hop chooses its seeds: the first by `scores`, others by `rank`, [batch, context].
  CLAA_HOST_DEVICE __attribute__((always_inline)) inline SelectTopkParams seeds(
      const float* rank, const int32_t* counts, int32_t* best, void* scratch) const {
    const bool is_first = part <= 0;
    return {.scores = is_first ? scores : rank,
            .start = start,
            .counts = {counts, true},
            .out = best,
            .workspace = scratch,
            .out_is_int32 = true,
            .batch = batch,
            .inner = 1,
            .context = context,
            .k = num_seeds,
            .window = 0,
            .num_sinks = 0,
            .scores_stride_b = is_first ? scores_stride_b : context,
            .scores_stride_inner = 0};
  }
};

// ---- prompts of several lengths, packed, and an engine's pages

// Entries of several requests, one request after the other. A limit outside [0, capacity] stands
// for the nearest within, and a request that ends before it begins has no entries. Always inlined,
// for the same reason as `tiers_of` above.
struct Packed {
  Indices starts;  // [requests + 1]: where the entries of each request begin, and where all end
  int64_t requests, capacity;

  CLAA_HOST_DEVICE __attribute__((always_inline)) inline int64_t begin(int64_t r) const {
    const int64_t start = starts[r];
    return start < 0 ? 0 : start < capacity ? start : capacity;
  }
  CLAA_HOST_DEVICE __attribute__((always_inline)) inline int64_t end(int64_t r) const {
    const int64_t from = begin(r), to = begin(r + 1);
    return to < from ? from : to;
  }
  // The request of entry i, or -1: the last one that begins at or before i, if i is in it.
  CLAA_HOST_DEVICE __attribute__((always_inline)) inline int64_t request_of(int64_t i) const {
    int64_t lowest = 0, beyond = requests;
    while (beyond - lowest > 1) {
      const int64_t middle = (lowest + beyond) / 2;
      if (begin(middle) <= i)
        lowest = middle;
      else
        beyond = middle;
    }
    return requests > 0 && begin(lowest) <= i && i < end(lowest) ? lowest : -1;
  }
};

// Which pages hold the tokens of each request: token t is row t % block of page t / block.
struct PageTable {
  Indices pages;  // [requests, width]
  int64_t width, stride;
  int64_t num_pages, block;  // rows of a page

  struct Place {
    int64_t page, row;
  };
  // Always inlined, for the same reason as `tiers_of` above; in 32 bits, as `group` above.
  CLAA_HOST_DEVICE __attribute__((always_inline)) inline Place place_of(int64_t r,
                                                                        int64_t token) const {
    const uint32_t number = uint32_t(token) / uint32_t(block);
    return {.page = pages[r * stride + number], .row = token - int64_t(number) * block};
  }
  CLAA_HOST_DEVICE __attribute__((always_inline)) inline bool holds(int64_t token) const {
    return token >= 0 && token < width * block;
  }
  CLAA_HOST_DEVICE __attribute__((always_inline)) inline bool exists(int64_t page) const {
    return page >= 0 && page < num_pages;
  }
};

// Rows in pages, moved as bytes: sizes and strides count bytes.
struct PagedRows {
  char* first;  // [num_pages, block] rows of row_bytes, or [num_pages, block, heads] of them
  int64_t row_bytes;
  int64_t page_stride, row_stride, head_stride;

  CLAA_HOST_DEVICE __attribute__((always_inline)) inline int64_t offset(
      PageTable::Place place) const {
    return place.page * page_stride + place.row * row_stride;
  }
};

struct SelectTopkPackedParams {
  const float* scores;  // [requests, context]
  Indices lengths;      // [requests]: tokens of each, window included
  Packed packed;        // of `out`
  int32_t* out;         // [capacity]
  void* workspace;      // scratch memory, as much as the device asks for
  int64_t context;      // of the longest request
  int64_t window, num_sinks;
  int64_t scores_stride_r;

  CLAA_HOST_DEVICE int64_t rows() const { return packed.requests; }
  // Always inlined, for the same reason as `tiers_of` above.
  CLAA_HOST_DEVICE __attribute__((always_inline)) inline SelectRow row(uint32_t r) const {
    int64_t length = lengths[r];
    length = length < 0 ? 0 : length < context + window ? length : context + window;
    const int64_t in_window = length < window ? length : window;
    const int64_t out = packed.begin(r);
    return {.scores = scores + r * scores_stride_r,
            .context = length - in_window,
            .window = in_window,
            .out = out,
            .tiers =
                tiers_of(length - in_window, in_window, num_sinks, 0, packed.end(r) - out, length)};
  }
  // Where the entries begin that belong to no request.
  CLAA_HOST_DEVICE __attribute__((always_inline)) inline int64_t unused() const {
    return packed.begin(packed.requests);
  }
};

// Rows are moved as bytes: sizes and strides of x count bytes here.
struct GatherRowsParams {
  const char* x;  // [total] rows of row_bytes
  Indices index;  // [kept]; -1 gives a row of zeros
  char* out;      // [kept] rows
  int64_t total, kept;
  int64_t row_bytes, x_stride;
};

struct StorePagesParams {
  const char* x;  // [count] rows of pages.row_bytes
  Indices slots;  // [count]: page * block + row; -1 is stored nowhere
  PagedRows pages;
  int64_t num_pages, block;
  int64_t count, x_stride;  // x_stride counts bytes
};

struct GatherPagesParams {
  PagedRows pages;
  PageTable table;
  Packed packed;  // of `index` and `out`
  Indices index;  // [capacity]: tokens of the request; -1 gives a row of zeros
  char* out;      // [capacity] rows
};

struct KeptMetadataParams {
  int32_t* seq_lens;               // [batch]
  int64_t* slots;                  // [batch, queries]
  Indices logical, prompts, kept;  // [batch]
  PageTable table;
  int64_t batch, queries;

  // Entries that request b holds in the layers behind its selection. Always inlined, for the same
  // reason as `tiers_of` above.
  CLAA_HOST_DEVICE __attribute__((always_inline)) inline int64_t length(int64_t b) const {
    const int64_t tokens = logical[b];
    if (tokens <= 0 || tokens < prompts[b]) return 0;
    return tokens - prompts[b] + kept[b];
  }
  // Where the i-th of its new tokens goes, the last of `length` entries; -1: nowhere.
  CLAA_HOST_DEVICE __attribute__((always_inline)) inline int64_t slot(int64_t b, int64_t length,
                                                                      int64_t i) const {
    const int64_t entry = length - queries + i;
    if (length == 0 || entry < 0) return -1;
    const PageTable::Place place = table.place_of(b, entry);
    return place.page * table.block + place.row;
  }
};

struct CompactPagesParams {
  PagedRows key, value;  // [num_pages, block, kv_heads]
  PageTable table;
  Packed packed;           // of `index`
  Indices index;           // [kv_heads or 1, capacity]: tokens of the request, ascending
  int64_t index_stride_g;  // 0 for a shared index
  int64_t kv_heads;
};

#define CLAA_FOR_EACH_OP(DECLARE)   \
  DECLARE(ScoreWindowParams)        \
  DECLARE(PoolHeadsParams)          \
  DECLARE(ScoreTokensParams)        \
  DECLARE(AggregateScoresParams)    \
  DECLARE(ScoreLayerParams)         \
  DECLARE(ScoreLayerPagedParams)    \
  DECLARE(SelectTopkParams)         \
  DECLARE(GatherKvParams)           \
  DECLARE(GatherTokensParams)       \
  DECLARE(PeakAttentionParams)      \
  DECLARE(PeakAttentionPagedParams) \
  DECLARE(RankVarianceParams)       \
  DECLARE(HopTokensParams)          \
  DECLARE(SelectTopkPackedParams)   \
  DECLARE(GatherRowsParams)         \
  DECLARE(StorePagesParams)         \
  DECLARE(GatherPagesParams)        \
  DECLARE(KeptMetadataParams)       \
  DECLARE(CompactPagesParams)

namespace cpu {

// The instruction sets that the kernels are built for, and the one in use: the best that the
// processor has and `limit_isa` allows. Tests use the limit to run every build.
enum class Isa : int { plain, avx2, avx512, avx512_bf16 };
Isa active_isa();
void limit_isa(Isa best);

// The work of one call: `rounds`, each in up to kSteps steps, each of as many independent units as
// `units` says (the first 0 ends the steps). A step begins when the step before it is complete in
// its own round. Rounds do not wait for each other, but only `rounds_at_once` have scratch memory
// and are open at a time. When all are complete, `last_units` more follow. A unit costs about
// `unit_cost` bytes of traffic.
constexpr int kSteps = 3;
struct Schedule {
  int64_t units[kSteps];
  int64_t unit_cost;
  int64_t rounds = 1, rounds_at_once = 1;
  int64_t last_units = 0;
  int64_t workspace_bytes = 0;
};

// What one worker does next: the units [begin, end) of a step. At any time a worker has one
// portion, and a slot belongs to one round, so each worker and each slot has scratch memory of its
// own.
struct Portion {
  int64_t worker;
  int64_t begin = 0, end = 0;
  int64_t round = 0, slot = 0;  // round `rounds`: the last units
  int step = 0;
  int64_t prepared = -1;  // the kernel's note of what the worker's scratch memory holds
};

#define CLAA_DECLARE_CPU_OP(Params)   \
  Schedule schedule(const Params& p); \
  void run(const Params& p, Portion& portion);
CLAA_FOR_EACH_OP(CLAA_DECLARE_CPU_OP)

}  // namespace cpu

#ifdef CLAA_CUDA
namespace cuda {

// CUDA: `run` enqueues the whole op on `stream`, on the current device; it neither waits nor
// allocates, so it can be captured in a graph.
#define CLAA_DECLARE_CUDA_OP(Params)        \
  int64_t workspace_bytes(const Params& p); \
  cudaError_t run(const Params& p, cudaStream_t stream);
CLAA_FOR_EACH_OP(CLAA_DECLARE_CUDA_OP)

}  // namespace cuda
#endif
}  // namespace claa
