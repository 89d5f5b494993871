#define HUBERT_FAST_INSTANCE avx512_bf16
#include "../rows.h"
