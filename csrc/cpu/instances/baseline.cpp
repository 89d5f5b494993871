#define HUBERT_FAST_INSTANCE baseline
#include "../rows.h"
