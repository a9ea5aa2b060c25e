// A ring of stages in shared memory: one thread has them filled by TMA, warpgroups use them.
//
// A full barrier opens when the bytes of a stage are there, an empty barrier when all warps that
// use the stage have freed it.

#pragma once

#include <cutlass/arch/barrier.h>

#include "csrc/cuda/hopper/wgmma.cuh"

namespace claa::cuda::hopper {

using Barrier = cutlass::arch::ClusterTransactionBarrier;

// Where tile f of a ring of n stages lies: in stage f % n, in its (f / n)th phase.
struct PipelineState {
  int stage = 0;
  uint32_t phase = 0;  // modulo 2, as barriers count it
};

// A stage is always used by the same warps.
template <int kBytes>
struct Ring {
  char* tiles;
  Barrier *full, *empty;
  int stages;

  // Shared memory that a stage takes besides its tile.
  static constexpr int64_t kBarrierBytes = 2 * sizeof(Barrier);

  __device__ void advance(PipelineState& at) const {
    if (++at.stage < stages) return;
    at.stage = 0;
    at.phase ^= 1;
  }
  __device__ void retreat(PipelineState& at) const {
    if (--at.stage >= 0) return;
    at.stage = stages - 1;
    at.phase ^= 1;
  }

  __device__ Ring(char* tiles, Barrier* barriers, int stages)
      : tiles(tiles), full(barriers), empty(barriers + stages), stages(stages) {}

  // By one thread; `warps` use a stage.
  __device__ void init(int warps) {
    for (int i = 0; i < stages; ++i) {
      full[i].init(1);
      empty[i].init(warps);
    }
    cutlass::arch::fence_barrier_init();
  }

  __device__ char* tile(PipelineState at) const { return tiles + at.stage * kBytes; }
  // Waits until the stage is empty, and announces `bytes` to its full barrier, which it returns. By
  // one thread, or by a warp of which one thread announces.
  __device__ Barrier& begin_load(PipelineState at, bool is_first_phase, int bytes,
                                 bool announces = true) {
    if (!is_first_phase) empty[at.stage].wait(at.phase ^ 1);
    if (announces) full[at.stage].arrive_and_expect_tx(bytes);
    return full[at.stage];
  }
  __device__ void wait(PipelineState at) { full[at.stage].wait(at.phase); }
  // By every warp that uses the stage.
  __device__ void free(PipelineState at) {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) empty[at.stage].arrive();
  }
};

// The index of a warp, in a form that tells the compiler that all lanes have the same: so roles of
// warps need no divergent code, nor addresses in registers of each thread.
__device__ inline int warp_index() { return cutlass::canonical_warp_idx_sync(); }

// After the barriers of a block are initialised: the producer warps announce it and continue, the
// threads that multiply wait for it.
template <int kThreads>
__device__ void finish_setup(bool is_producer) {
  __syncwarp();
  if (is_producer) {
    cutlass::arch::NamedBarrier::arrive(kThreads, 1);
  } else {
    cutlass::arch::NamedBarrier::sync(kThreads, 1);
  }
}

// A barrier of the threads that multiply.
template <int kThreads>
__device__ void sync_consumers() {
  cutlass::arch::NamedBarrier::sync(kThreads, 0);
}

}  // namespace claa::cuda::hopper
