#include "gemm_sm80.h"

const hubert_fast::cuda::ProductGeluGradientKernel hubert_fast::cuda::sm80::product_gelu_gradient_bf16 =
    product_gelu_gradient<cutlass::bfloat16_t>;
