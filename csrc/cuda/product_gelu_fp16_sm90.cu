#include "gemm_sm90.h"
#include "sm90_kernels.h"

namespace hubert_fast::cuda::sm90 {

void product_gelu_fp16(const Product& operands, const float* bias, void* z, void* activation, std::int64_t out_stride,
                       cudaStream_t stream) {
  product_gelu<cutlass::half_t>(operands, bias, z, activation, out_stride, stream);
}

}  // namespace hubert_fast::cuda::sm90
