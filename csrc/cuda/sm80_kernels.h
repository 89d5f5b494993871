// The products of gemm.h for sm_80 and every newer architecture, one function (and one file, <name>_sm80.cu) for each
// kernel. Sizes are checked before.
#pragma once

#include "gemm.h"

namespace hubert_fast::cuda::sm80 {

void product_bf16(const Product& operands, const float* bias, void* out, std::int64_t out_stride, cudaStream_t stream);
void product_fp16(const Product& operands, const float* bias, void* out, std::int64_t out_stride, cudaStream_t stream);

void product_gelu_bf16(const Product& operands, const float* bias, void* z, void* activation, std::int64_t out_stride,
                       cudaStream_t stream);
void product_gelu_fp16(const Product& operands, const float* bias, void* z, void* activation, std::int64_t out_stride,
                       cudaStream_t stream);

void product_gelu_gradient_bf16(const Product& operands, const void* z, void* out, void* activation,
                                std::int64_t out_stride, cudaStream_t stream);
void product_gelu_gradient_fp16(const Product& operands, const void* z, void* out, void* activation,
                                std::int64_t out_stride, cudaStream_t stream);

// `parts` parts of exactly `part_rows` rows each; the rows [depth] of `partial` are `partial_stride` apart.
void weight_gradient_bf16(const void* gradient, const void* input, std::int64_t input_stride, float* partial,
                          std::int64_t partial_stride, std::int64_t parts, std::int64_t part_rows,
                          std::int64_t channels, std::int64_t depth, cudaStream_t stream);
void weight_gradient_fp16(const void* gradient, const void* input, std::int64_t input_stride, float* partial,
                          std::int64_t partial_stride, std::int64_t parts, std::int64_t part_rows,
                          std::int64_t channels, std::int64_t depth, cudaStream_t stream);

}  // namespace hubert_fast::cuda::sm80
