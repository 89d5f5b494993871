// The matrix products of the later layers on tensor cores, with what follows each of them fused into its epilogue.
//
// All are products over the rows of a whole batch in channels-last layout, where the window of an output row is `depth`
// contiguous values of its input and the windows of two rows may overlap (design: "Layers 1-6").
// Pointers are device memory aligned to 16 bytes; strides are in elements and multiples of 8; `columns` and `depth` are
// multiples of 8. Elements are bfloat16 or float16 (`dtype`) except where float is written; products accumulate in float32.
// Every function throws std::invalid_argument for sizes it cannot take and std::runtime_error for a failed launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>

#include "dtype.h"

namespace hubert_fast::cuda {

// One operand pair: out[r, c] = sum_k input[r * input_stride + k] * weight[c, k], for `rows` rows and `columns` columns.
struct Product {
  const void* input;          // [rows, depth], rows `input_stride` apart
  std::int64_t input_stride;  // may be less than depth
  const void* weight;         // [columns, depth], contiguous; for product_gelu_gradient [depth, columns]
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t depth;
};

// Whether these products are there for a dtype on the current device: those for sm_90a on Hopper (compute capability 9.0),
// those for sm_80 (sm80_kernels.h) on every other GPU of 8.0 or newer, and on Hopper where a build has no others.
bool tensor_core_products_available(Dtype dtype);

// Whether these products load rows that overlap as they are on the current device (overlapping_maps.h); if not, each product
// with such rows is split into several without, and its result is the same to the bit. Null where the question does not
// arise, because products there do not load through tensor maps or there are none.
std::optional<bool> overlapping_maps();

// out = product + bias. `bias` is [columns] float, or null; rows of `out` are `out_stride` apart.
void product(const Product& operands, const float* bias, void* out, std::int64_t out_stride, Dtype dtype,
             cudaStream_t stream);

// z = product + bias, activation = GELU(z). Either layout is [rows, columns] contiguous; `z` may be null: not kept.
void product_gelu(const Product& operands, const float* bias, void* z, void* activation, Dtype dtype,
                  cudaStream_t stream);

// out = product * GELU'(z), activation = GELU(z), for the data gradient of a layer whose input was GELU(z). `weight` is
// [depth, columns], as the layer's own weight lies: its outputs are what is summed over here.
// Rows of `z`, `out` and `activation` are `out_stride` apart. `activation` may be null: not wanted.
void product_gelu_gradient(const Product& operands, const void* z, void* out, void* activation, std::int64_t out_stride,
                           Dtype dtype, cudaStream_t stream);

// partial[s, c, k] = sum over the rows r of part s of gradient[r, c] * input[r * input_stride + k], float.
// Parts have `part_rows` rows each, the last one what is left: ceil(rows / part_rows) parts. Whole parts are one launch, a
// shorter last one is another, which takes as long as a whole part if it is nearly as long: better a few rows or none.
// gradient is [rows, channels] contiguous; partial is [parts, channels, depth] contiguous.
void weight_gradient(const void* gradient, const void* input, std::int64_t input_stride, float* partial,
                     std::int64_t rows, std::int64_t part_rows, std::int64_t channels, std::int64_t depth, Dtype dtype,
                     cudaStream_t stream);

}  // namespace hubert_fast::cuda
