// Checks of the tensor-core products, and their choice by dtype and device.
#include "gemm.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "gemm_kernels.h"
#include "overlapping_maps.h"

namespace hubert_fast::cuda {
namespace {

struct Kernels {
  ProductKernel product;
  ProductGeluKernel product_gelu;
  ProductGeluGradientKernel product_gelu_gradient;
  WeightGradientKernel weight_gradient;
};

// (major, minor) of the current device; (0, 0) where there is none.
std::pair<int, int> compute_capability() {
  int device = 0, major = 0, minor = 0;
  const bool found = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  return found ? std::pair(major, minor) : std::pair(0, 0);
}

// Those for a dtype on the current device, or none.
std::optional<Kernels> find_kernels(Dtype dtype) {
  if (dtype == Dtype::kFloat32) return std::nullopt;
  [[maybe_unused]] const bool is_bf16 = dtype == Dtype::kBfloat16;
#if defined(HUBERT_FAST_WITH_SM90)
  if (overlapping_maps().value_or(false)) {
    return is_bf16 ? Kernels{sm90::product_bf16, sm90::product_gelu_bf16, sm90::product_gelu_gradient_bf16,
                             sm90::weight_gradient_bf16}
                   : Kernels{sm90::product_fp16, sm90::product_gelu_fp16, sm90::product_gelu_gradient_fp16,
                             sm90::weight_gradient_fp16};
  }
#endif
#if defined(HUBERT_FAST_WITH_SM80)
  if (compute_capability().first >= 8) {
    return is_bf16 ? Kernels{sm80::product_bf16, sm80::product_gelu_bf16, sm80::product_gelu_gradient_bf16,
                             sm80::weight_gradient_bf16}
                   : Kernels{sm80::product_fp16, sm80::product_gelu_fp16, sm80::product_gelu_gradient_fp16,
                             sm80::weight_gradient_fp16};
  }
#endif
  return std::nullopt;
}

Kernels kernels(Dtype dtype, const char* name) {
  const std::optional<Kernels> found = find_kernels(dtype);
  if (!found) {
    throw std::runtime_error(std::string(name) +
                             ": this build has no kernel for this GPU (HUBERT_FAST_CUDA_ARCHS), or there is no GPU");
  }
  return *found;
}

void require(bool condition, const char* name, const char* what) {
  if (!condition) throw std::invalid_argument(std::string(name) + ": " + what);
}

// Coordinates have 32 bits and run past an extent to the end of its last tile, of 256 at most.
constexpr std::int64_t kMaxExtent = 2147483648 - 256;

void check(const Product& operands, Dtype dtype, const char* name) {
  require(dtype != Dtype::kFloat32, name, "elements must be bfloat16 or float16");
  require(operands.rows > 0 && operands.rows <= kMaxExtent, name, "rows must be positive and at most 2^31 - 256");
  require(operands.columns > 0 && operands.columns % 8 == 0 && operands.columns <= kMaxExtent, name,
          "columns must be a positive multiple of 8, at most 2^31 - 256");
  require(operands.depth > 0 && operands.depth % 8 == 0 && operands.depth <= kMaxExtent, name,
          "depth must be a positive multiple of 8, at most 2^31 - 256");
  require(operands.input_stride > 0 && operands.input_stride % 8 == 0, name,
          "input_stride must be a positive multiple of 8");
}

void check_stride(std::int64_t stride, const Product& operands, const char* name) {
  require(stride >= operands.columns && stride % 8 == 0, name,
          "out_stride must be a multiple of 8 of at least columns");
}

}  // namespace

bool tensor_core_products_available(Dtype dtype) { return find_kernels(dtype).has_value(); }

std::optional<bool> overlapping_maps() {
#if defined(HUBERT_FAST_WITH_SM90)
  if (compute_capability() == std::pair(9, 0)) return overlapping_maps_allowed();
#endif
  return std::nullopt;
}

void product(const Product& operands, const float* bias, void* out, std::int64_t out_stride, Dtype dtype,
             cudaStream_t stream) {
  const char* name = "product";
  check(operands, dtype, name);
  check_stride(out_stride, operands, name);
  kernels(dtype, name).product(operands, bias, out, out_stride, stream);
}

void product_gelu(const Product& operands, const float* bias, void* z, void* activation, Dtype dtype,
                  cudaStream_t stream) {
  const char* name = "product_gelu";
  check(operands, dtype, name);
  kernels(dtype, name).product_gelu(operands, bias, z, activation, operands.columns, stream);
}

void product_gelu_gradient(const Product& operands, const void* z, void* out, void* activation, std::int64_t out_stride,
                           Dtype dtype, cudaStream_t stream) {
  const char* name = "product_gelu_gradient";
  check(operands, dtype, name);
  check_stride(out_stride, operands, name);
  kernels(dtype, name).product_gelu_gradient(operands, z, out, activation, out_stride, stream);
}

void weight_gradient(const void* gradient, const void* input, std::int64_t input_stride, float* partial,
                     std::int64_t rows, std::int64_t part_rows, std::int64_t channels, std::int64_t depth, Dtype dtype,
                     cudaStream_t stream) {
  const char* name = "weight_gradient";
  require(part_rows > 0, name, "part_rows must be positive");
  check({input, input_stride, gradient, rows, channels, depth}, dtype, name);
  const WeightGradientKernel kernel = kernels(dtype, name).weight_gradient;
  const std::int64_t whole = rows / part_rows, done = whole * part_rows;
  if (whole > 0) {
    kernel(gradient, input, input_stride, partial, whole, part_rows, channels, depth, stream);
  }
  if (done < rows) {
    // The rows that are left; elements have 16 bits.
    gradient = static_cast<const std::uint16_t*>(gradient) + done * channels;
    input = static_cast<const std::uint16_t*>(input) + done * input_stride;
    partial += whole * channels * depth;
    kernel(gradient, input, input_stride, partial, 1, rows - done, channels, depth, stream);
  }
}

}  // namespace hubert_fast::cuda
