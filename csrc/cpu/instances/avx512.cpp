#define HUBERT_FAST_INSTANCE avx512
#include "../rows.h"
