// GELU(x) = x Phi(x), exact (no tanh), and its derivative Phi(x) + x phi(x), from one exponential and one division.
#pragma once

#include "vector.h"

namespace hubert_fast {
namespace HUBERT_FAST_INSTANCE {

// exp(-h) for 0 <= h <= 87. Cody and Waite's reduction to 2^n e^r with |r| <= ln(2)/2, then the Taylor polynomial of degree 7,
// whose first term left out is below 6e-9.
inline Floats exp_of_negative(Floats h) {
  const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = h * -1.44269504f + to_integer;
  const Floats n = shifted - to_integer;
  Floats r = -h - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Bits exponent = bit_cast<Bits>(shifted) << 23;  // the low bits of `shifted` are n in two's complement
  return bit_cast<Floats>(bit_cast<Bits>(p) + exponent);
}

struct NormalTail {
  Floats upper;    // Q(|x|) = 1 - Phi(|x|)
  Floats density;  // exp(-x^2 / 2), phi(x) without its constant
};

// Q(a) = exp(-a^2/2) t P(t) with t = 1 / (1 + 0.34 a): the form of Hastings (Abramowitz and Stegun 26.2.17) with a polynomial
// fitted here to a relative error of 1.0e-8 for 0 <= a <= 14. Past a = 13.1 the exponential is below 1e-37 and taken for 0.
inline NormalTail normal_tail(Floats x) {
  const Floats a = bit_cast<Floats>(bit_cast<Bits>(x) & 0x7fffffffu);
  const Floats t = 1.0f / (a * 0.34f + 1.0f);
  Floats p = broadcast(-0.0250054542f);
  p = p * t + 0.134277478f;
  p = p * t - 0.262863934f;
  p = p * t + 0.191162631f;
  p = p * t - 0.0376963355f;
  p = p * t + 0.112652622f;
  p = p * t + 0.115811229f;
  p = p * t + 0.136037543f;
  p = p * t + 0.135624245f;
  const Floats half_square = x * x * 0.5f;
  const Floats density = half_square < 86.0f ? exp_of_negative(half_square) : Floats{};
  return {density * (t * p), density};
}

inline Floats gelu(Floats x) {
  const Floats tail = normal_tail(x).upper;
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

struct GeluAndSlope {
  Floats value, slope;
};

inline GeluAndSlope gelu_and_slope(Floats x) {
  const NormalTail tail = normal_tail(x);
  const Floats cdf = x < 0.0f ? tail.upper : 1.0f - tail.upper;
  return {x * cdf, cdf + x * (tail.density * 0.398942280f)};
}

}  // namespace HUBERT_FAST_INSTANCE
}  // namespace hubert_fast
