#include "gemm_sm80.h"

const hubert_fast::cuda::ProductGeluKernel hubert_fast::cuda::sm80::product_gelu_bf16 =
    product_gelu<cutlass::bfloat16_t>;
