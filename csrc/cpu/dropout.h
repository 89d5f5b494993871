// Dropout over a whole call, on several threads.
#pragma once

#include "kernels.h"

namespace hubert_fast {

void drop(const Drop& work, int threads);

}  // namespace hubert_fast
