#include "gemm_sm90.h"

const hubert_fast::cuda::ProductKernel hubert_fast::cuda::sm90::product_fp16 = product<cutlass::half_t>;
