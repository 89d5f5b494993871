// Checks of the tensor-core products and their choice by dtype.
#include "gemm.h"

#include <stdexcept>
#include <string>

#include "sm90_kernels.h"

namespace hubert_fast::cuda {

#if defined(HUBERT_FAST_WITH_SM90)

namespace {

void require(bool condition, const char* name, const char* what) {
  if (!condition) throw std::invalid_argument(std::string(name) + ": " + what);
}

constexpr std::int64_t kMaxExtent = 2147483647;

void check(const Product& operands, Dtype dtype, const char* name) {
  require(dtype != Dtype::kFloat32, name, "elements must be bfloat16 or float16");
  require(operands.rows > 0 && operands.rows <= kMaxExtent, name, "rows must be positive and fit 31 bits");
  require(operands.columns > 0 && operands.columns % 8 == 0 && operands.columns <= kMaxExtent, name,
          "columns must be a positive multiple of 8");
  require(operands.depth > 0 && operands.depth % 8 == 0 && operands.depth <= kMaxExtent, name,
          "depth must be a positive multiple of 8");
  require(operands.input_stride > 0 && operands.input_stride % 8 == 0, name,
          "input_stride must be a positive multiple of 8");
}

void check_stride(std::int64_t stride, const Product& operands, const char* name) {
  require(stride >= operands.columns && stride % 8 == 0, name,
          "out_stride must be a multiple of 8 of at least columns");
}

}  // namespace

bool tensor_core_products_available(Dtype dtype) {
  if (dtype == Dtype::kFloat32) return false;
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) return false;
  return major == 9 && minor == 0;
}

void product(const Product& operands, const float* bias, void* out, std::int64_t out_stride, Dtype dtype,
             cudaStream_t stream) {
  check(operands, dtype, "product");
  check_stride(out_stride, operands, "product");
  const auto run = dtype == Dtype::kBfloat16 ? sm90::product_bf16 : sm90::product_fp16;
  run(operands, bias, out, out_stride, stream);
}

void product_gelu(const Product& operands, const float* bias, void* z, void* activation, Dtype dtype,
                  cudaStream_t stream) {
  check(operands, dtype, "product_gelu");
  const auto run = dtype == Dtype::kBfloat16 ? sm90::product_gelu_bf16 : sm90::product_gelu_fp16;
  run(operands, bias, z, activation, stream);
}

void product_gelu_gradient(const Product& operands, const void* z, void* out, void* activation, std::int64_t out_stride,
                           Dtype dtype, cudaStream_t stream) {
  check(operands, dtype, "product_gelu_gradient");
  check_stride(out_stride, operands, "product_gelu_gradient");
  const auto run = dtype == Dtype::kBfloat16 ? sm90::product_gelu_gradient_bf16 : sm90::product_gelu_gradient_fp16;
  run(operands, z, out, activation, out_stride, stream);
}

void weight_gradient(const void* gradient, const void* input, std::int64_t input_stride, float* partial,
                     std::int64_t rows, std::int64_t part_rows, std::int64_t channels, std::int64_t depth, Dtype dtype,
                     cudaStream_t stream) {
  const char* name = "weight_gradient";
  require(part_rows > 0, name, "part_rows must be positive");
  check({input, input_stride, gradient, rows, channels, depth}, dtype, name);
  const auto run = dtype == Dtype::kBfloat16 ? sm90::weight_gradient_bf16 : sm90::weight_gradient_fp16;
  const std::int64_t whole = rows / part_rows, rest = rows % part_rows;
  if (whole > 0) run(gradient, input, input_stride, partial, whole, part_rows, channels, depth, stream);
  if (rest > 0) {
    const std::int64_t done = whole * part_rows;
    const char* gradient_rest = static_cast<const char*>(gradient) + done * channels * element_size(dtype);
    const char* input_rest = static_cast<const char*>(input) + done * input_stride * element_size(dtype);
    run(gradient_rest, input_rest, input_stride, partial + whole * channels * depth, 1, rest, channels, depth, stream);
  }
}

#else  // no kernels for sm_90a in this build

namespace {
[[noreturn]] void refuse(const char* name) {
  throw std::runtime_error(std::string(name) + ": this build has no kernels for sm_90a (HUBERT_FAST_CUDA_ARCHS)");
}
}  // namespace

bool tensor_core_products_available(Dtype) { return false; }

void product(const Product&, const float*, void*, std::int64_t, Dtype, cudaStream_t) { refuse("product"); }

void product_gelu(const Product&, const float*, void*, void*, Dtype, cudaStream_t) { refuse("product_gelu"); }

void product_gelu_gradient(const Product&, const void*, void*, void*, std::int64_t, Dtype, cudaStream_t) {
  refuse("product_gelu_gradient");
}

void weight_gradient(const void*, const void*, std::int64_t, float*, std::int64_t, std::int64_t, std::int64_t,
                     std::int64_t, Dtype, cudaStream_t) {
  refuse("weight_gradient");
}

#endif

}  // namespace hubert_fast::cuda
