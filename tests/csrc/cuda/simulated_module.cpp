// The Python module of the simulated kernels: csrc/cuda/bindings.cpp over a runtime that does nothing, and the tensor-core
// products as plain loops.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "bindings.h"
#include "cuda/gelu.h"
#include "cuda/sm80_kernels.h"
#include "cuda/sm90_kernels.h"
#include "simulated_device.h"

namespace {
struct {
  int major = 9, minor = 0;
} capability;
std::string product_namespace;  // of the last product
}  // namespace

extern "C" {
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? capability.major : capability.minor;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;  // no driver
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "simulated"; }
}

namespace hubert_fast::cuda {
namespace loops {

float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
float widen(__half x) { return __half2float(x); }
void narrow(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
void narrow(float x, __half* out) { *out = __float2half_rn(x); }

template <class T, class Finish>
void rows(const Product& operands, const float* bias, Finish finish) {
  const T* input = static_cast<const T*>(operands.input);
  const T* weight = static_cast<const T*>(operands.weight);
  for (std::int64_t r = 0; r < operands.rows; ++r) {
    for (std::int64_t c = 0; c < operands.columns; ++c) {
      float sum = bias == nullptr ? 0.0f : bias[c];
      for (std::int64_t k = 0; k < operands.depth; ++k) {
        sum += widen(input[r * operands.input_stride + k]) * widen(weight[c * operands.depth + k]);
      }
      finish(r, c, sum);
    }
  }
}

template <class T>
void product(const Product& operands, const float* bias, void* out, std::int64_t stride) {
  rows<T>(operands, bias, [&](auto r, auto c, float sum) { narrow(sum, static_cast<T*>(out) + r * stride + c); });
}

template <class T>
void product_gelu(const Product& operands, const float* bias, void* z, void* activation) {
  rows<T>(operands, bias, [&](auto r, auto c, float sum) {
    const std::int64_t index = r * operands.columns + c;
    if (z != nullptr) narrow(sum, static_cast<T*>(z) + index);
    narrow(FastGelu::value(sum), static_cast<T*>(activation) + index);
  });
}

template <class T>
void product_gelu_gradient(const Product& operands, const void* z, void* out, void* activation, std::int64_t stride) {
  rows<T>(operands, nullptr, [&](auto r, auto c, float sum) {
    const std::int64_t index = r * stride + c;
    const Gelu gelu = FastGelu::both(widen(static_cast<const T*>(z)[index]));
    narrow(sum * gelu.derivative, static_cast<T*>(out) + index);
    if (activation != nullptr) narrow(gelu.value, static_cast<T*>(activation) + index);
  });
}

template <class T>
void weight_gradient(const void* gradient, const void* input, std::int64_t stride, float* partial, std::int64_t parts,
                     std::int64_t part_rows, std::int64_t channels, std::int64_t depth) {
  for (std::int64_t part = 0; part < parts; ++part) {
    for (std::int64_t c = 0; c < channels; ++c) {
      for (std::int64_t k = 0; k < depth; ++k) {
        float sum = 0.0f;
        for (std::int64_t r = part * part_rows; r < (part + 1) * part_rows; ++r) {
          sum += widen(static_cast<const T*>(gradient)[r * channels + c]) *
                 widen(static_cast<const T*>(input)[r * stride + k]);
        }
        partial[(part * channels + c) * depth + k] = sum;
      }
    }
  }
}

}  // namespace loops

// The functions of sm80_kernels.h and sm90_kernels.h: the same loops.
#define DEFINE(arch, suffix, type)                                                                                     \
  namespace arch {                                                                                                     \
  void product_##suffix(const Product& operands, const float* bias, void* out, std::int64_t stride, cudaStream_t) {    \
    product_namespace = #arch;                                                                                         \
    loops::product<type>(operands, bias, out, stride);                                                                 \
  }                                                                                                                    \
  void product_gelu_##suffix(const Product& operands, const float* bias, void* z, void* activation, cudaStream_t) {    \
    product_namespace = #arch;                                                                                         \
    loops::product_gelu<type>(operands, bias, z, activation);                                                          \
  }                                                                                                                    \
  void product_gelu_gradient_##suffix(const Product& operands, const void* z, void* out, void* activation,             \
                                      std::int64_t stride, cudaStream_t) {                                             \
    product_namespace = #arch;                                                                                         \
    loops::product_gelu_gradient<type>(operands, z, out, activation, stride);                                          \
  }                                                                                                                    \
  void weight_gradient_##suffix(const void* gradient, const void* input, std::int64_t stride, float* partial,          \
                                std::int64_t parts, std::int64_t part_rows, std::int64_t channels, std::int64_t depth, \
                                cudaStream_t) {                                                                        \
    product_namespace = #arch;                                                                                         \
    loops::weight_gradient<type>(gradient, input, stride, partial, parts, part_rows, channels, depth);                 \
  }                                                                                                                    \
  }

DEFINE(sm80, bf16, __nv_bfloat16)
DEFINE(sm80, fp16, __half)
DEFINE(sm90, bf16, __nv_bfloat16)
DEFINE(sm90, fp16, __half)

}  // namespace hubert_fast::cuda

PYBIND11_MODULE(simulated_cuda, m) {
  hubert_fast::bind_cuda(m);
  m.def("set_schedule", [](int order, std::int64_t first_block) { simulated::schedule = {order, first_block}; });
  m.def("set_compute_capability", [](int major, int minor) { capability = {major, minor}; });
  m.def("product_namespace", [] { return product_namespace; });
  // The two GELUs: (value, derivative) of z.
  auto both = [](hubert_fast::cuda::Gelu gelu) { return pybind11::make_tuple(gelu.value, gelu.derivative); };
  m.def("fast_gelu", [both](float z) { return both(hubert_fast::cuda::FastGelu::both(z)); });
  m.def("accurate_gelu", [both](float z) { return both(hubert_fast::cuda::AccurateGelu::both(z)); });
}
