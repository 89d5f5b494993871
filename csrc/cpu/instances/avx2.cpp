#define HUBERT_FAST_INSTANCE avx2
#include "../rows.h"
