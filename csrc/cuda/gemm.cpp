// Checks of the tensor-core products, their choice by dtype and device, and the splitting of rows that overlap.
#include "gemm.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "overlapping_maps.h"
#include "sm80_kernels.h"
#include "sm90_kernels.h"

namespace hubert_fast::cuda {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The address so many elements on; null stays null.
const void* advance(const void* address, std::int64_t elements, Dtype dtype) {
  return address == nullptr ? nullptr : static_cast<const char*>(address) + elements * element_size(dtype);
}
void* advance(void* address, std::int64_t elements, Dtype dtype) {
  return const_cast<void*>(advance(static_cast<const void*>(address), elements, dtype));
}

struct Kernels {
  decltype(&sm80::product_bf16) product;
  decltype(&sm80::product_gelu_bf16) product_gelu;
  decltype(&sm80::product_gelu_gradient_bf16) product_gelu_gradient;
  decltype(&sm80::weight_gradient_bf16) weight_gradient;
  bool tensor_maps;  // whether they load through them
};

#if defined(HUBERT_FAST_WITH_SM90)
constexpr Kernels kSm90Bf16{sm90::product_bf16, sm90::product_gelu_bf16, sm90::product_gelu_gradient_bf16,
                            sm90::weight_gradient_bf16, true};
constexpr Kernels kSm90Fp16{sm90::product_fp16, sm90::product_gelu_fp16, sm90::product_gelu_gradient_fp16,
                            sm90::weight_gradient_fp16, true};
#endif
#if defined(HUBERT_FAST_WITH_SM80)
constexpr Kernels kSm80Bf16{sm80::product_bf16, sm80::product_gelu_bf16, sm80::product_gelu_gradient_bf16,
                            sm80::weight_gradient_bf16, false};
constexpr Kernels kSm80Fp16{sm80::product_fp16, sm80::product_gelu_fp16, sm80::product_gelu_gradient_fp16,
                            sm80::weight_gradient_fp16, false};
#endif

// Those for a dtype on the current device, or null where this build has none.
const Kernels* find_kernels(Dtype dtype) {
  int device = 0, major = 0, minor = 0;
  if (dtype == Dtype::kFloat32) return nullptr;
  if (cudaGetDevice(&device) != cudaSuccess) return nullptr;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return nullptr;
  if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) return nullptr;
  [[maybe_unused]] const bool is_bf16 = dtype == Dtype::kBfloat16;
#if defined(HUBERT_FAST_WITH_SM90)
  if (major == 9 && minor == 0) return is_bf16 ? &kSm90Bf16 : &kSm90Fp16;
#endif
#if defined(HUBERT_FAST_WITH_SM80)
  if (major >= 8) return is_bf16 ? &kSm80Bf16 : &kSm80Fp16;
#endif
  return nullptr;
}

const Kernels& kernels(Dtype dtype, const char* name) {
  const Kernels* found = find_kernels(dtype);
  if (found == nullptr) {
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

// Into how many products the rows of an input, `stride` apart and `depth` long, are split so that none overlap: 1 where they
// need not be.
std::int64_t ways(const Kernels& kernels, std::int64_t stride, std::int64_t depth) {
  const bool as_they_are = stride >= depth || !kernels.tensor_maps || overlapping_maps_allowed();
  return as_they_are ? 1 : ceil_div(depth, stride);
}

// Calls run(product, first, step) for the products over rows first, first + step, ... that together are `operands`.
template <class Run>
void split_rows(const Product& operands, const Kernels& kernels, Dtype dtype, Run run) {
  const std::int64_t step = ways(kernels, operands.input_stride, operands.depth);
  for (std::int64_t first = 0; first < std::min(step, operands.rows); ++first) {
    Product part = operands;
    part.input = advance(operands.input, first * operands.input_stride, dtype);
    part.input_stride = step * operands.input_stride;
    part.rows = ceil_div(operands.rows - first, step);
    run(part, first, step);
  }
}

}  // namespace

bool tensor_core_products_available(Dtype dtype) { return find_kernels(dtype) != nullptr; }

std::optional<bool> overlapping_maps() {
  const Kernels* found = find_kernels(Dtype::kBfloat16);
  if (found == nullptr || !found->tensor_maps) return std::nullopt;
  return overlapping_maps_allowed();
}

void product(const Product& operands, const float* bias, void* out, std::int64_t out_stride, Dtype dtype,
             cudaStream_t stream) {
  const char* name = "product";
  check(operands, dtype, name);
  check_stride(out_stride, operands, name);
  const Kernels& chosen = kernels(dtype, name);
  split_rows(operands, chosen, dtype, [&](const Product& part, std::int64_t first, std::int64_t step) {
    chosen.product(part, bias, advance(out, first * out_stride, dtype), step * out_stride, stream);
  });
}

void product_gelu(const Product& operands, const float* bias, void* z, void* activation, Dtype dtype,
                  cudaStream_t stream) {
  const char* name = "product_gelu";
  check(operands, dtype, name);
  const Kernels& chosen = kernels(dtype, name);
  split_rows(operands, chosen, dtype, [&](const Product& part, std::int64_t first, std::int64_t step) {
    const std::int64_t offset = first * operands.columns;
    chosen.product_gelu(part, bias, advance(z, offset, dtype), advance(activation, offset, dtype),
                        step * operands.columns, stream);
  });
}

void product_gelu_gradient(const Product& operands, const void* z, void* out, void* activation, std::int64_t out_stride,
                           Dtype dtype, cudaStream_t stream) {
  const char* name = "product_gelu_gradient";
  check(operands, dtype, name);
  check_stride(out_stride, operands, name);
  const Kernels& chosen = kernels(dtype, name);
  split_rows(operands, chosen, dtype, [&](const Product& part, std::int64_t first, std::int64_t step) {
    const std::int64_t offset = first * out_stride;
    chosen.product_gelu_gradient(part, advance(z, offset, dtype), advance(out, offset, dtype),
                                 advance(activation, offset, dtype), step * out_stride, stream);
  });
}

void weight_gradient(const void* gradient, const void* input, std::int64_t input_stride, float* partial,
                     std::int64_t rows, std::int64_t part_rows, std::int64_t channels, std::int64_t depth, Dtype dtype,
                     cudaStream_t stream) {
  const char* name = "weight_gradient";
  require(part_rows > 0, name, "part_rows must be positive");
  check({input, input_stride, gradient, rows, channels, depth}, dtype, name);
  const Kernels& chosen = kernels(dtype, name);
  const std::int64_t whole = rows / part_rows, done = whole * part_rows, rest = rows - done;
  const void* gradient_rest = advance(gradient, done * channels, dtype);
  // Rows are what is summed here, so it is the columns that are split: into blocks without an overlap, as equal as whole tiles
  // of 256 columns allow. No sum changes, nor the number of parts.
  const std::int64_t count = ways(chosen, input_stride, depth);
  const std::int64_t width = count == 1 ? depth : std::min(input_stride, ceil_div(ceil_div(depth, count), 256) * 256);
  for (std::int64_t column = 0; column < depth; column += width) {
    const std::int64_t columns = std::min(width, depth - column);
    const void* block = advance(input, column, dtype);
    float* sums = partial + column;
    if (whole > 0) {
      chosen.weight_gradient(gradient, block, input_stride, sums, depth, whole, part_rows, channels, columns, stream);
    }
    if (rest > 0) {
      chosen.weight_gradient(gradient_rest, advance(block, done * input_stride, dtype), input_stride,
                             sums + whole * channels * depth, depth, 1, rest, channels, columns, stream);
    }
  }
}

}  // namespace hubert_fast::cuda
