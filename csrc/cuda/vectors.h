// Runs of consecutive channels, moved between memory and float registers by accesses of 16 (or 8) bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "dtype.h"
#include "gelu.h"
#include "launch.h"

namespace hubert_fast::cuda {

using Bfloat16 = __nv_bfloat16;
using Float16 = __half;

// Calls function(T()) with the C++ type of a dtype.
template <class Function>
void with_type(Dtype dtype, const char* name, Function function) {
  switch (dtype) {
    case Dtype::kFloat32:
      return function(float());
    case Dtype::kBfloat16:
      return function(Bfloat16());
    case Dtype::kFloat16:
      return function(Float16());
  }
  require(false, name, "unknown dtype");
}

// Which GELU is exact for a type.
template <class T>
struct GeluFor {
  using type = FastGelu;
};
template <>
struct GeluFor<float> {
  using type = AccurateGelu;
};

HUBERT_FAST_HOST_DEVICE void unpack(std::uint32_t bits, Bfloat16, float* out) {
  const std::uint32_t low = bits << 16, high = bits & 0xffff0000u;
  memcpy(&out[0], &low, 4);
  memcpy(&out[1], &high, 4);
}
HUBERT_FAST_HOST_DEVICE void unpack(std::uint32_t bits, Float16, float* out) {
  __half2 pair;
  memcpy(static_cast<void*>(&pair), &bits, 4);
  const float2 both = __half22float2(pair);
  out[0] = both.x;
  out[1] = both.y;
}
HUBERT_FAST_HOST_DEVICE std::uint32_t pack(float first, float second, Bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  std::uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}
HUBERT_FAST_HOST_DEVICE std::uint32_t pack(float first, float second, Float16) {
  const __half2 pair = __floats2half2_rn(first, second);
  std::uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

// kWidth values as they lie in memory: a load can be issued long before its values are converted.
template <class T, int kWidth>
struct Packed {
  static constexpr int kBytes = kWidth * static_cast<int>(sizeof(T));
  static constexpr int kWords = kBytes / 4;
  static_assert(kBytes == 8 || kBytes % 16 == 0, "runs are moved by 8 or 16 bytes");
  std::uint32_t words[kWords];

  HUBERT_FAST_HOST_DEVICE void load(const T* from) {
    if constexpr (kBytes == 8) {
      const uint2 part = *reinterpret_cast<const uint2*>(from);
      words[0] = part.x, words[1] = part.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) {
        const uint4 part = reinterpret_cast<const uint4*>(from)[i];
        words[4 * i] = part.x, words[4 * i + 1] = part.y, words[4 * i + 2] = part.z, words[4 * i + 3] = part.w;
      }
    }
  }
  HUBERT_FAST_HOST_DEVICE void store(T* to) const {
    if constexpr (kBytes == 8) {
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) {
        reinterpret_cast<uint4*>(to)[i] =
            make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
      }
    }
  }
  HUBERT_FAST_HOST_DEVICE void to_floats(float* out) const {
    if constexpr (sizeof(T) == 4) {
      memcpy(out, words, kBytes);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) unpack(words[i], T(), out + 2 * i);
    }
  }
  HUBERT_FAST_HOST_DEVICE void from_floats(const float* in) {
    if constexpr (sizeof(T) == 4) {
      memcpy(words, in, kBytes);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = pack(in[2 * i], in[2 * i + 1], T());
    }
  }
};

template <int kWidth, class T>
HUBERT_FAST_HOST_DEVICE void load_floats(const T* from, float* out) {
  Packed<T, kWidth> packed;
  packed.load(from);
  packed.to_floats(out);
}

template <int kWidth, class T>
HUBERT_FAST_HOST_DEVICE void store_floats(T* to, const float* in) {
  Packed<T, kWidth> packed;
  packed.from_floats(in);
  packed.store(to);
}

}  // namespace hubert_fast::cuda
