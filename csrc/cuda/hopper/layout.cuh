// The shared memory of a score kernel, from its front:
//
// | stages     | tiles of keys, on their way or in use                       |
// | kept       | products that the second pass will find here                |
// | queries    | all query rows of a key head                                |
// | partials   | of the softmax, before they are joined                      |
// | minus_lse  | the negative logsumexp of every query row, in FastExp's unit |
// | sums       | over the query rows, of every key of a range                |
// | prompts    | how the keys of each are divided, where they lie in pages   |
// | barriers   | of the queries, then of the stages                          |

#pragma once

#include "csrc/cuda/hopper/pipeline.cuh"

namespace claa::cuda::hopper {

// Where each of these begins, in bytes. The host plans with it, and hands it to the kernel.
struct Layout {
  int stages;  // their number; the first tile is at 0
  int kept, queries, partials, minus_lse, sums, prompts, barriers;
  int bytes;

  struct Sizes {
    int64_t tile_bytes, kept_bytes;
    int64_t query_rows, row_bytes;
    int64_t partials, sums;
    int64_t prompt_bytes = 0;
  };

  static Layout of(const Sizes& n, int64_t stages) {
    int64_t end = 0;
    const auto place = [&](int64_t bytes) {
      const int64_t at = end;
      end += bytes;
      return int(at);
    };
    Layout layout{};
    layout.stages = int(stages);
    place(stages * n.tile_bytes);
    layout.kept = place(n.kept_bytes);
    layout.queries = place(n.query_rows * n.row_bytes);
    layout.partials = place(n.partials * int64_t(sizeof(SoftmaxPartial)));
    layout.minus_lse = place(n.query_rows * int64_t(sizeof(float)));
    layout.sums = place(n.sums * int64_t(sizeof(float)));
    layout.prompts = place(round_up(n.prompt_bytes, 8));
    layout.barriers = place(int64_t(sizeof(Barrier)) + stages * Ring<1>::kBarrierBytes);
    layout.bytes = int(end);
    return layout;
  }
};

// The memory itself.
struct SharedMemory {
  char *stages, *kept, *queries;
  SoftmaxPartial* partials;
  float *minus_lse, *sums;
  char* prompts;
  Barrier *queries_full, *of_stages;

  __device__ __forceinline__ SharedMemory(char* base, const Layout& layout)
      : stages(base),
        kept(base + layout.kept),
        queries(base + layout.queries),
        partials(reinterpret_cast<SoftmaxPartial*>(base + layout.partials)),
        minus_lse(reinterpret_cast<float*>(base + layout.minus_lse)),
        sums(reinterpret_cast<float*>(base + layout.sums)),
        prompts(base + layout.prompts),
        queries_full(reinterpret_cast<Barrier*>(base + layout.barriers)),
        of_stages(queries_full + 1) {}
};

}  // namespace claa::cuda::hopper
