// Thread-block clusters where the architecture has them (sm_90 on); elsewhere, and with kCluster
// false, a cluster is one block.

#pragma once

#include <cooperative_groups.h>

namespace claa::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
using Cluster = cooperative_groups::cluster_group;
#else
struct Cluster {
  __device__ static unsigned block_rank() { return 0; }
  __device__ static unsigned num_blocks() { return 1; }
  __device__ static void sync() { __syncthreads(); }
  template <class T>
  __device__ static T* map_shared_rank(T* mine, unsigned) {
    return mine;
  }
};
#endif

template <bool kCluster>
__device__ inline unsigned cluster_rank() {
  if constexpr (kCluster) {
    return Cluster::block_rank();
  } else {
    return 0;
  }
}

template <bool kCluster>
__device__ inline unsigned cluster_size() {
  if constexpr (kCluster) {
    return Cluster::num_blocks();
  } else {
    return 1;
  }
}

template <bool kCluster>
__device__ inline void cluster_sync() {
  if constexpr (kCluster) {
    Cluster::sync();
  } else {
    __syncthreads();
  }
}

// The same variable in the shared memory of another block of the cluster.
template <bool kCluster, class T>
__device__ inline const T* shared_of(const T* mine, unsigned rank) {
  if constexpr (kCluster) {
    return Cluster::map_shared_rank(const_cast<T*>(mine), rank);
  } else {
    return mine;
  }
}

}  // namespace claa::cuda
