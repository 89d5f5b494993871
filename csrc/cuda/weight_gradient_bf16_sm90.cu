#include "gemm_sm90.h"

const hubert_fast::cuda::WeightGradientKernel hubert_fast::cuda::sm90::weight_gradient_bf16 =
    weight_gradient<cutlass::bfloat16_t>;
