#include "gemm_sm80.h"

const hubert_fast::cuda::ProductKernel hubert_fast::cuda::sm80::product_bf16 = product<cutlass::bfloat16_t>;
