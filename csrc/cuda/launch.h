// Starting kernels, and what the tests replace to run the same kernels on a CPU (tests/csrc/cuda).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(HUBERT_FAST_SIMULATE_CUDA)
#include "simulated_device.h"
#else
#include <cuda_runtime.h>

namespace hubert_fast::cuda {

// Starts `blocks` blocks of `threads` threads; throws std::runtime_error with the kernel's name if that fails.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), std::int64_t blocks, int threads, cudaStream_t stream,
            Arguments... arguments) {
  if (blocks == 0) return;
  if (blocks < 0 || blocks > 2147483647) {
    throw std::invalid_argument(std::string(name) + ": " + std::to_string(blocks) +
                                " blocks are more than a grid holds");
  }
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

}  // namespace hubert_fast::cuda
#endif

namespace hubert_fast::cuda {

inline void require(bool condition, const char* name, const char* what) {
  if (!condition) throw std::invalid_argument(std::string(name) + ": " + what);
}

__device__ inline int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ inline std::int64_t block_index() { return blockIdx.x; }

template <class T>
__device__ T warp_sum(T value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace hubert_fast::cuda
