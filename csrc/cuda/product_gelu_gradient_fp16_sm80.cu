#include "gemm_sm80.h"
#include "sm80_kernels.h"

namespace hubert_fast::cuda::sm80 {

void product_gelu_gradient_fp16(const Product& operands, const void* z, void* out, void* activation,
                                std::int64_t out_stride, cudaStream_t stream) {
  product_gelu_gradient<cutlass::half_t>(operands, z, out, activation, out_stride, stream);
}

}  // namespace hubert_fast::cuda::sm80
