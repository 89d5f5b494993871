// Element types of activations and filters, as they are numbered across the Python boundary.
#pragma once

#include <cstdint>

namespace hubert_fast::cuda {

enum class Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

inline std::int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

}  // namespace hubert_fast::cuda
