// Messages between the blocks of a thread-block cluster (sm_90 on): a block writes into another's
// shared memory, and the last byte of what a mailbox waits for opens it. Nothing is read from
// another block, so a block may end as soon as it has got its own mail.
//
// For older architectures these functions do nothing; kernels that use clusters are not launched
// there.

#pragma once

#include <cstdint>

namespace claa::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define CLAA_CLUSTER_ASM(...) asm volatile(__VA_ARGS__)
#else
#define CLAA_CLUSTER_ASM(...)
#endif

__device__ inline uint32_t cluster_rank() {
  uint32_t rank = 0;
  CLAA_CLUSTER_ASM("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier of all threads of the cluster, in two halves. It orders no memory but mailboxes.
__device__ inline void cluster_arrive() {
  CLAA_CLUSTER_ASM("barrier.cluster.arrive.relaxed.aligned;" ::);
}
__device__ inline void cluster_wait() {
  CLAA_CLUSTER_ASM("barrier.cluster.wait.aligned;" :: : "memory");
}

// Opens once.
using Mailbox = uint64_t;

__device__ inline uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// By one thread, before it arrives at a barrier that the senders wait for.
__device__ inline void expect([[maybe_unused]] Mailbox& box, [[maybe_unused]] uint32_t bytes) {
  CLAA_CLUSTER_ASM("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&box)) : "memory");
  CLAA_CLUSTER_ASM("fence.mbarrier_init.release.cluster;" :: : "memory");
  CLAA_CLUSTER_ASM(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&box)),
      "r"(bytes) : "memory");
}

// Writes kWords words to `to` in the shared memory of block `rank`, where `box` expects them. Both
// are named by this block's own variables.
template <int kWords>
__device__ inline void send([[maybe_unused]] const uint32_t (&words)[kWords],
                            [[maybe_unused]] uint32_t* to, [[maybe_unused]] Mailbox& box,
                            [[maybe_unused]] uint32_t rank) {
  static_assert(kWords == 1 || kWords == 4);
  [[maybe_unused]] uint32_t their_to = 0, their_box = 0;
  CLAA_CLUSTER_ASM(
      "mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(their_to) : "r"(shared_address(to)), "r"(rank));
  CLAA_CLUSTER_ASM(
      "mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(their_box) : "r"(shared_address(&box)),
      "r"(rank));
  if constexpr (kWords == 1)
    CLAA_CLUSTER_ASM(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
            their_to),
        "r"(words[0]), "r"(their_box) : "memory");
  else
    CLAA_CLUSTER_ASM(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], "
        "{%1, %2, %3, %4}, [%5];" ::"r"(their_to),
        "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(their_box) : "memory");
}

__device__ inline void receive([[maybe_unused]] Mailbox& box) {
  CLAA_CLUSTER_ASM(
      "{\n"
      ".reg .pred opened;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 opened, [%0], 0;\n"
      "@!opened bra again;\n"
      "}" ::"r"(shared_address(&box)) : "memory");
}

#undef CLAA_CLUSTER_ASM

}  // namespace claa::cuda
