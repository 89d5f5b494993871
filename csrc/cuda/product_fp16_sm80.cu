#include "gemm_sm80.h"

const hubert_fast::cuda::ProductKernel hubert_fast::cuda::sm80::product_fp16 = product<cutlass::half_t>;
