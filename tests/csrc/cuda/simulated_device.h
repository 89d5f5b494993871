// Runs CUDA kernels on a CPU: csrc/cuda/*.cu compile as C++ with -DHUBERT_FAST_SIMULATE_CUDA and this folder on the path.
//
// The threads of a block are fibers of one thread, so a kernel runs as written, with its barriers and shuffles; sanitizers see
// every access. Reversed and shuffled orders of threads and blocks change no result unless there is a race. A barrier that
// some threads have left behind, or a shuffle that not all lanes of a warp reach, ends the program with a message.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

namespace simulated {

struct Index {
  unsigned x = 0;
};

// In which order blocks and threads run, and which blocks run at all (buffers too large to touch are tested at their end).
struct Schedule {
  int order = 0;  // 0: ascending, 1: descending, 2: shuffled
  std::int64_t first_block = 0;
};
extern Schedule schedule;

void run_grid(std::int64_t blocks, int threads, const std::function<void()>& kernel);
void barrier();
std::uint64_t exchange(std::uint64_t bits, int lane_mask);

}  // namespace simulated

extern simulated::Index blockIdx;
extern simulated::Index threadIdx;

inline void __syncthreads() { simulated::barrier(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= 8);
  (void)mask;
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = simulated::exchange(bits, lane_mask);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

namespace hubert_fast::cuda {

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), std::int64_t blocks, int threads, cudaStream_t stream,
            Arguments... arguments) {
  (void)name, (void)stream;
  simulated::run_grid(blocks, threads, [&] { kernel(arguments...); });
}

}  // namespace hubert_fast::cuda
