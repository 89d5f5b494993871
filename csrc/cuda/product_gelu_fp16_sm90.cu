#include "gemm_sm90.h"

const hubert_fast::cuda::ProductGeluKernel hubert_fast::cuda::sm90::product_gelu_fp16 = product_gelu<cutlass::half_t>;
