#include "gemm_sm90.h"

const hubert_fast::cuda::ProductKernel hubert_fast::cuda::sm90::product_bf16 = product<cutlass::bfloat16_t>;
