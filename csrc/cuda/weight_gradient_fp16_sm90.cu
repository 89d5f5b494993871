#include "gemm_sm90.h"
#include "sm90_kernels.h"

namespace hubert_fast::cuda::sm90 {

void weight_gradient_fp16(const void* gradient, const void* input, std::int64_t input_stride, float* partial,
                          std::int64_t partial_stride, std::int64_t parts, std::int64_t part_rows,
                          std::int64_t channels, std::int64_t depth, cudaStream_t stream) {
  weight_gradient_parts<cutlass::half_t>(gradient, input, input_stride, partial, partial_stride, parts, part_rows,
                                         channels, depth, stream);
}

}  // namespace hubert_fast::cuda::sm90
