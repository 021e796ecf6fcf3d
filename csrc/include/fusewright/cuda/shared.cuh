// Shared memory of a block.
#pragma once

#include <cuda_runtime.h>

#if !defined(__CUDACC__)
#include <typeinfo>
#endif

namespace fusewright::cuda {

#if defined(__CUDACC__)

// The block's variable of type T, one for each type: a struct declared where it is used has its own.
// As everywhere in shared memory, nothing is constructed.
template <class T>
__device__ __forceinline__ T& block_shared() {
  __shared__ __align__(alignof(T)) unsigned char storage[sizeof(T)];
  return *reinterpret_cast<T*>(storage);
}

// The dynamic shared memory that the launch asked for, aligned to 16 bytes; for the pattern of the 128-byte swizzle, to
// 1024.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  if constexpr (alignof(T) > 16) {
    extern __shared__ __align__(1024) unsigned char aligned_dynamic_storage[];
    return reinterpret_cast<T*>(aligned_dynamic_storage);
  } else {
    extern __shared__ uint4 dynamic_storage[];
    return reinterpret_cast<T*>(dynamic_storage);
  }
}

#else

template <class T>
T& block_shared() {
  static const char key = 0;
  return *static_cast<T*>(emulation::static_shared(&key, sizeof(T), alignof(T), typeid(T).name()));
}

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(emulation::dynamic_shared());
}

#endif

}  // namespace fusewright::cuda
