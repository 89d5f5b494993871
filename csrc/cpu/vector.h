// Vectors of floats for whatever instruction set a file is compiled for, on GCC's and Clang's vector extensions.
//
// Everything here lies in the namespace of one instance (see instances/), and nothing inline of the standard library is used:
// the linker may keep any copy of an inline function, also one that was compiled for instructions this machine does not have.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace hubert_fast {
namespace HUBERT_FAST_INSTANCE {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t HalfBits __attribute__((vector_size(kLanes * 2)));

struct BFloat16 {
  std::uint16_t bits;
};

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline Floats broadcast(float value) { return value - Floats{}; }

inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof(value)); }

inline Floats load(const BFloat16* from) {
  HalfBits bits;
  std::memcpy(&bits, from, sizeof(bits));
  return bit_cast<Floats>(__builtin_convertvector(bits, Bits) << 16);
}

// Rounds to nearest, ties to even; a NaN stays one.
inline void store(BFloat16* to, Floats value) {
#if defined(__AVX512BF16__)
  const __m256bh narrow = _mm512_cvtneps_pbh(bit_cast<__m512>(value));
  std::memcpy(to, &narrow, sizeof(narrow));
#else
  const Bits bits = bit_cast<Bits>(value);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits kept = value == value ? rounded : Bits{} + 0x7fc0u;
  const HalfBits narrow = __builtin_convertvector(kept, HalfBits);
  std::memcpy(to, &narrow, sizeof(narrow));
#endif
}

inline float sum(Floats value) {
  float lanes[kLanes];
  std::memcpy(lanes, &value, sizeof(value));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

}  // namespace HUBERT_FAST_INSTANCE
}  // namespace hubert_fast
