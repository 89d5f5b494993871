// The kernels behind gemm.h, each in a file of its own, <name>_<dtype>_<architecture>.cu. Sizes are checked before.
#pragma once

#include "gemm.h"

namespace hubert_fast::cuda {

using ProductKernel = void (*)(const Product& operands, const float* bias, void* out, std::int64_t out_stride,
                               cudaStream_t stream);

// Rows of `z` and `activation` are `out_stride` apart.
using ProductGeluKernel = void (*)(const Product& operands, const float* bias, void* z, void* activation,
                                   std::int64_t out_stride, cudaStream_t stream);

using ProductGeluGradientKernel = void (*)(const Product& operands, const void* z, void* out, void* activation,
                                           std::int64_t out_stride, cudaStream_t stream);

// `parts` parts of exactly `part_rows` rows each.
using WeightGradientKernel = void (*)(const void* gradient, const void* input, std::int64_t input_stride,
                                      float* partial, std::int64_t parts, std::int64_t part_rows,
                                      std::int64_t channels, std::int64_t depth, cudaStream_t stream);

// For sm_80 and every newer architecture.
namespace sm80 {
extern const ProductKernel product_bf16, product_fp16;
extern const ProductGeluKernel product_gelu_bf16, product_gelu_fp16;
extern const ProductGeluGradientKernel product_gelu_gradient_bf16, product_gelu_gradient_fp16;
extern const WeightGradientKernel weight_gradient_bf16, weight_gradient_fp16;
}  // namespace sm80

// For sm_90a.
namespace sm90 {
extern const ProductKernel product_bf16, product_fp16;
extern const ProductGeluKernel product_gelu_bf16, product_gelu_fp16;
extern const ProductGeluGradientKernel product_gelu_gradient_bf16, product_gelu_gradient_fp16;
extern const WeightGradientKernel weight_gradient_bf16, weight_gradient_fp16;
}  // namespace sm90

}  // namespace hubert_fast::cuda
