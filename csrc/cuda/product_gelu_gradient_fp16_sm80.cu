#include "gemm_sm80.h"

const hubert_fast::cuda::ProductGeluGradientKernel hubert_fast::cuda::sm80::product_gelu_gradient_fp16 =
    product_gelu_gradient<cutlass::half_t>;
