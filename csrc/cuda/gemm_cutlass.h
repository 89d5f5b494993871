// What the CUTLASS kernels of gemm.h share, whatever the architecture: activations of epilogues, and the launch.
// CUTLASS's macros are set before this is included (gemm_sm90.h).
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cutlass/array.h"
#include "cutlass/cutlass.h"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "gelu.h"

namespace hubert_fast::cuda {

constexpr int kAlignment = 8;  // elements of 16 bits in 16 bytes
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

// Activations of epilogues, over the fragments of float that CUTLASS hands to them.
template <class T>
struct GeluValue;
template <int N>
struct GeluValue<cutlass::Array<float, N>> {
  CUTLASS_DEVICE cutlass::Array<float, N> operator()(const cutlass::Array<float, N>& z) const {
    cutlass::Array<float, N> result;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) result[i] = FastGelu::value(z[i]);
    return result;
  }
};

template <class T>
struct GeluGradient;
template <int N>
struct GeluGradient<cutlass::Array<float, N>> {
  CUTLASS_DEVICE cutlass::Array<float, N> operator()(const cutlass::Array<float, N>& upstream,
                                                     const cutlass::Array<float, N>& z) const {
    cutlass::Array<float, N> result;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) result[i] = upstream[i] * FastGelu::both(z[i]).derivative;
    return result;
  }
};

inline void require(cutlass::Status status, const char* kernel, const char* step) {
  if (status == cutlass::Status::kSuccess) return;
  std::string message = std::string(kernel) + ": " + step + ": " + cutlass::cutlassGetStatusString(status);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) message += std::string(" (") + cudaGetErrorString(error) + ")";
  throw std::runtime_error(message);
}

template <class Kernel>
void run(const typename Kernel::Arguments& arguments, const char* name, cudaStream_t stream) {
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  require(Gemm::can_implement(arguments), name, "sizes");
  if (Gemm::get_workspace_size(arguments) != 0) {
    throw std::runtime_error(std::string(name) + ": this kernel was meant to need no workspace");
  }
  Gemm gemm;
  require(gemm.initialize(arguments, nullptr, stream), name, "set-up");
  require(gemm.run(stream), name, "launch");
}

}  // namespace hubert_fast::cuda
