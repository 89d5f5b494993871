// GELU(z) = z Phi(z), with Phi the normal distribution function, and its derivative Phi(z) + z phi(z).
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define HUBERT_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HUBERT_FAST_HOST_DEVICE inline
#endif

namespace hubert_fast::cuda {

struct Gelu {
  float value;
  float derivative;
};

// For float32 activations: as accurate as erf of the mathematics library.
struct AccurateGelu {
  HUBERT_FAST_HOST_DEVICE static Gelu both(float z) {
    const float distribution = 0.5f * (1.0f + erff(z * 0.70710678118654752f));
    const float density = 0.39894228040143268f * expf(-0.5f * z * z);
    return {z * distribution, distribution + z * density};
  }
  HUBERT_FAST_HOST_DEVICE static float value(float z) { return z * (0.5f * (1.0f + erff(z * 0.70710678118654752f))); }
};

// For activations of 16 bits, whose rounding is 4e-3 or 5e-4: erf by a rational approximation with an absolute error of
// 1.5e-7 (Abramowitz and Stegun 7.1.26). Its exponential is the density too, so the derivative comes almost free, and the
// whole takes two instructions of the special-function unit and about 15 others.
struct FastGelu {
  HUBERT_FAST_HOST_DEVICE static Gelu both(float z) {
    const float magnitude = fabsf(z);
    const float t = reciprocal(fmaf(0.23164188f, magnitude, 1.0f));
    const float exponential = power_of_two(z * z * -0.72134752f);  // exp(-z^2 / 2)
    float series = fmaf(0.53070271f, t, -0.72657602f);
    series = fmaf(series, t, 0.71070687f);
    series = fmaf(series, t, -0.14224837f);
    series = fmaf(series, t, 0.12741480f);
    const float tail = series * t * exponential;  // Phi(-|z|)
    const float distribution = z < 0.0f ? tail : 1.0f - tail;
    return {z * distribution, fmaf(z * 0.39894228f, exponential, distribution)};
  }
  HUBERT_FAST_HOST_DEVICE static float value(float z) { return both(z).value; }

 private:
  HUBERT_FAST_HOST_DEVICE static float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
    float result;  // one instruction; a division would take care of denormals, which x >= 1 is not
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return 1.0f / x;
#endif
  }
  HUBERT_FAST_HOST_DEVICE static float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return std::exp2(x);
#endif
  }
};

}  // namespace hubert_fast::cuda
