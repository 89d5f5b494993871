#include "overlapping_maps.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

namespace hubert_fast::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// As CUTLASS finds it: through the runtime, so that nothing is linked to the driver.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  constexpr auto kName = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(kName, &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(kName, &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error(std::string("the CUDA driver has no ") + kName);
  }
  return reinterpret_cast<Encode>(function);
}

// Whether the driver takes the map of an operand of gemm_sm90.h in small: [2, 4, 96] of 16 bits, with rows 64 elements apart.
// The driver reads no memory.
bool driver_takes_overlapping_maps() {
  alignas(16) static char memory[16];
  const cuuint64_t extents[] = {96, 4, 2};
  const cuuint64_t strides[] = {64 * 2, 4 * 64 * 2};  // in bytes, without that of the columns
  const cuuint32_t box[] = {64, 4, 1}, every_element[] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      find_encode()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, memory, extents, strides, box, every_element,
                    CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  // What is wrong with the arguments. Anything else, such as no context, says nothing about them.
  if (result == CUDA_ERROR_INVALID_VALUE) return false;
  if (result == CUDA_SUCCESS) return true;
  throw std::runtime_error("cuTensorMapEncodeTiled failed with CUresult " + std::to_string(static_cast<int>(result)));
}

std::optional<bool> wanted() {
  const char* value = std::getenv("HUBERT_FAST_OVERLAPPING_MAPS");
  const std::string text = value == nullptr ? "" : value;
  if (text.empty()) return std::nullopt;
  if (text == "0" || text == "1") return text == "1";
  throw std::invalid_argument("HUBERT_FAST_OVERLAPPING_MAPS is '" + text + "'; accepted are 0, 1 or unset");
}

}  // namespace

bool overlapping_maps_allowed() {
  static std::mutex mutex;
  static std::map<int, bool> answers;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) throw std::runtime_error("there is no CUDA device");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = answers.find(device);
  if (known != answers.end()) return known->second;
  const std::optional<bool> overruled = wanted();
  const bool answer = overruled ? *overruled : driver_takes_overlapping_maps();
  answers.emplace(device, answer);
  return answer;
}

}  // namespace hubert_fast::cuda
