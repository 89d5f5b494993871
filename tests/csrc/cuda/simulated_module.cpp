// The Python module of the simulated kernels: csrc/cuda/bindings.cpp over a runtime that does nothing, and the tensor-core
// products as plain loops.
#include <cuda.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
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
int current_device = 0;
std::string product_namespace;  // of the last product
struct {
  bool takes_overlapping_maps = true;
  int encoded = 0;
} driver;

bool divides(std::uint64_t step, std::uint64_t number) { return number % step == 0; }

// What the driver's documentation asks of a map of 16-bit elements without interleave and with a swizzle of 128 bytes. That
// rows do not overlap is asked only where `driver` says so.
CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      const cuuint64_t* extents, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  ++driver.encoded;
  bool good = divides(64, reinterpret_cast<std::uintptr_t>(map)) && type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 &&
              divides(16, reinterpret_cast<std::uintptr_t>(address)) && address != nullptr && rank >= 1 && rank <= 5 &&
              interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && swizzle == CU_TENSOR_MAP_SWIZZLE_128B &&
              divides(16, box[0] * 2) && box[0] * 2 <= 128;
  for (cuuint32_t i = 0; good && i < rank; ++i) {
    good = extents[i] > 0 && extents[i] <= 1ull << 32 && box[i] > 0 && box[i] <= 256 && steps[i] > 0 && steps[i] <= 8;
    if (!good || i + 1 == rank) continue;
    const cuuint64_t inner = i == 0 ? 2 : strides[i - 1];
    good = divides(16, strides[i]) && strides[i] < 1ull << 40 &&
           (driver.takes_overlapping_maps || strides[i] >= extents[i] * inner);
  }
  return good ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
}  // namespace

extern "C" {
cudaError_t cudaSetDevice(int device) {
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
#if CUDART_VERSION >= 12050
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = name == std::string("cuTensorMapEncodeTiled") && version == 12000;
#else
cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* found) {
  const bool known = name == std::string("cuTensorMapEncodeTiled");
#endif
  *function = known ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
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
void rows(const Product& operands, const float* bias, bool by_depth, Finish finish) {
  const T* input = static_cast<const T*>(operands.input);
  const T* weight = static_cast<const T*>(operands.weight);
  for (std::int64_t r = 0; r < operands.rows; ++r) {
    for (std::int64_t c = 0; c < operands.columns; ++c) {
      float sum = bias == nullptr ? 0.0f : bias[c];
      for (std::int64_t k = 0; k < operands.depth; ++k) {
        const std::int64_t place = by_depth ? k * operands.columns + c : c * operands.depth + k;
        sum += widen(input[r * operands.input_stride + k]) * widen(weight[place]);
      }
      finish(r, c, sum);
    }
  }
}

template <class T>
void product(const Product& operands, const float* bias, void* out, std::int64_t stride) {
  rows<T>(operands, bias, false,
          [&](auto r, auto c, float sum) { narrow(sum, static_cast<T*>(out) + r * stride + c); });
}

template <class T>
void product_gelu(const Product& operands, const float* bias, void* z, void* activation, std::int64_t stride) {
  rows<T>(operands, bias, false, [&](auto r, auto c, float sum) {
    const std::int64_t index = r * stride + c;
    if (z != nullptr) narrow(sum, static_cast<T*>(z) + index);
    narrow(FastGelu::value(sum), static_cast<T*>(activation) + index);
  });
}

template <class T>
void product_gelu_gradient(const Product& operands, const void* z, void* out, void* activation, std::int64_t stride) {
  rows<T>(operands, nullptr, true, [&](auto r, auto c, float sum) {
    const std::int64_t index = r * stride + c;
    const Gelu gelu = FastGelu::both(widen(static_cast<const T*>(z)[index]));
    narrow(sum * gelu.derivative, static_cast<T*>(out) + index);
    if (activation != nullptr) narrow(gelu.value, static_cast<T*>(activation) + index);
  });
}

template <class T>
void weight_gradient(const void* gradient, const void* input, std::int64_t stride, float* partial,
                     std::int64_t partial_stride, std::int64_t parts, std::int64_t part_rows, std::int64_t channels,
                     std::int64_t depth) {
  for (std::int64_t part = 0; part < parts; ++part) {
    for (std::int64_t c = 0; c < channels; ++c) {
      for (std::int64_t k = 0; k < depth; ++k) {
        float sum = 0.0f;
        for (std::int64_t r = part * part_rows; r < (part + 1) * part_rows; ++r) {
          sum += widen(static_cast<const T*>(gradient)[r * channels + c]) *
                 widen(static_cast<const T*>(input)[r * stride + k]);
        }
        partial[(part * channels + c) * partial_stride + k] = sum;
      }
    }
  }
}

}  // namespace loops

// Called by every product with the namespace that was chosen and the strides of its input.
void called(const char* arch, std::int64_t input_stride, std::int64_t depth) {
  product_namespace = arch;
  if (product_namespace == "sm90" && !driver.takes_overlapping_maps && input_stride < depth) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with CUresult 1");
  }
}

// The functions of sm80_kernels.h and sm90_kernels.h: the same loops.
#define DEFINE(arch, suffix, type)                                                                                     \
  namespace arch {                                                                                                     \
  void product_##suffix(const Product& operands, const float* bias, void* out, std::int64_t stride, cudaStream_t) {    \
    called(#arch, operands.input_stride, operands.depth);                                                              \
    loops::product<type>(operands, bias, out, stride);                                                                 \
  }                                                                                                                    \
  void product_gelu_##suffix(const Product& operands, const float* bias, void* z, void* activation,                    \
                             std::int64_t stride, cudaStream_t) {                                                      \
    called(#arch, operands.input_stride, operands.depth);                                                              \
    loops::product_gelu<type>(operands, bias, z, activation, stride);                                                  \
  }                                                                                                                    \
  void product_gelu_gradient_##suffix(const Product& operands, const void* z, void* out, void* activation,             \
                                      std::int64_t stride, cudaStream_t) {                                             \
    called(#arch, operands.input_stride, operands.depth);                                                              \
    loops::product_gelu_gradient<type>(operands, z, out, activation, stride);                                          \
  }                                                                                                                    \
  void weight_gradient_##suffix(const void* gradient, const void* input, std::int64_t stride, float* partial,          \
                                std::int64_t partial_stride, std::int64_t parts, std::int64_t part_rows,               \
                                std::int64_t channels, std::int64_t depth, cudaStream_t) {                             \
    called(#arch, stride, depth);                                                                                      \
    loops::weight_gradient<type>(gradient, input, stride, partial, partial_stride, parts, part_rows, channels, depth); \
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
  // A driver of its own for a device of its own, as what was found out about a device is kept.
  m.def("set_driver", [](bool takes_overlapping_maps) { driver = {takes_overlapping_maps, 0}; });
  m.def("maps_encoded", [] { return driver.encoded; });
  // The two GELUs: (value, derivative) of z.
  auto both = [](hubert_fast::cuda::Gelu gelu) { return pybind11::make_tuple(gelu.value, gelu.derivative); };
  m.def("fast_gelu", [both](float z) { return both(hubert_fast::cuda::FastGelu::both(z)); });
  m.def("accurate_gelu", [both](float z) { return both(hubert_fast::cuda::AccurateGelu::both(z)); });
}
