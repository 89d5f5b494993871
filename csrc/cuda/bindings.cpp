// The submodule `cuda`: the functions of first_layer.h, activations.h and gemm.h with pointers as tensors (bindings.h; null
// as None), streams as integers, dtypes as in dtype.h, sizes and strides in elements.
#include "bindings.h"

#include <cuda_runtime_api.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "activations.h"
#include "first_layer.h"
#include "gemm.h"

namespace hubert_fast::cuda {
namespace {

namespace py = pybind11;
using namespace py::literals;
using py::kw_only;
using Size = std::int64_t;
using Unlocked = py::call_guard<py::gil_scoped_release>;

Dtype dtype_of(int number) {
  if (number < 0 || number > 2) {
    throw std::invalid_argument("dtype must be 0 (float32), 1 (bfloat16) or 2 (float16); got " +
                                std::to_string(number));
  }
  return static_cast<Dtype>(number);
}

// Makes a device current for this library's own copy of the CUDA runtime. torch's copy keeps its own note of it.
void set_device(int device) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) {
    throw std::runtime_error("cudaSetDevice(" + std::to_string(device) + "): " + cudaGetErrorString(error));
  }
}

// What pybind11 is to make of Python's argument for a parameter of type T.
template <class T>
struct Given {
  using type = T;
};
template <class T>
struct Given<T*> {
  using type = Buffer<T>;
};
template <>
struct Given<Dtype> {
  using type = int;
};

template <class T>
T parameter(const typename Given<T>::type& given) {
  if constexpr (std::is_same_v<T, Dtype>) {
    return dtype_of(given);
  } else {
    return given;
  }
}

// Binds a function whose arguments have the names in `names`.
template <class... Parameters, class... Names>
void bind(py::module_& m, const char* name, void (*function)(Parameters...), const Names&... names) {
  m.def(
      name,
      [function](typename Given<Parameters>::type... given) { function(parameter<Parameters>(given)...); }, names...,
      Unlocked());
}

void bind_first_layer(py::module_& m) {
  m.attr("MOMENT_FRAMES") = kMomentFrames;
  m.attr("GROUP_NORM_BACKWARD_FRAMES") = kGroupNormBackwardFrames;
  m.attr("LAYER_NORM_BACKWARD_FRAMES") = kLayerNormBackwardFrames;
  py::class_<FirstLayer>(m, "FirstLayer", py::module_local())
      .def(py::init([](Buffer<const float> signal, Size signal_stride, Size batch, Size frames, int kernel, int stride,
                       int channels) {
             return FirstLayer{signal, signal_stride, batch, frames, kernel, stride, channels};
           }),
           kw_only(), "signal"_a, "signal_stride"_a, "batch"_a, "frames"_a, "kernel"_a, "stride"_a, "channels"_a);
  bind(m, "first_layer_moments", first_layer_moments, "layer"_a, kw_only(), "valid_samples"_a, "partial"_a, "stream"_a);
  bind(m, "first_layer_group_norm", first_layer_group_norm, "layer"_a, kw_only(), "valid_samples"_a, "partial"_a,
       "weight"_a, "norm_weight"_a, "norm_bias"_a, "epsilon"_a, "statistics"_a, "filters"_a, "stream"_a);
  bind(m, "first_layer_layer_norm", first_layer_layer_norm, "layer"_a, kw_only(), "weight"_a, "bias"_a, "norm_weight"_a,
       "statistics"_a, "filters"_a, "stream"_a);
  bind(m, "first_layer_group_norm_forward", first_layer_group_norm_forward, "layer"_a, kw_only(), "statistics"_a,
       "filters"_a, "activations"_a, "rows"_a, "dtype"_a, "stream"_a);
  bind(m, "first_layer_layer_norm_forward", first_layer_layer_norm_forward, "layer"_a, kw_only(), "statistics"_a,
       "filters"_a, "norm_bias"_a, "epsilon"_a, "activations"_a, "rows"_a, "dtype"_a, "stream"_a);
  bind(m, "first_layer_group_norm_backward", first_layer_group_norm_backward, "layer"_a, kw_only(), "statistics"_a,
       "filters"_a, "gradients"_a, "rows"_a, "partial"_a, "dtype"_a, "stream"_a);
  bind(m, "first_layer_layer_norm_backward", first_layer_layer_norm_backward, "layer"_a, kw_only(), "statistics"_a,
       "filters"_a, "norm_weight"_a, "norm_bias"_a, "epsilon"_a, "gradients"_a, "rows"_a, "partial"_a,
       "frame_partial"_a, "dtype"_a, "stream"_a);
  bind(m, "first_layer_group_norm_finish", first_layer_group_norm_finish, "layer"_a, kw_only(), "statistics"_a,
       "sums"_a, "weight"_a, "norm_weight"_a, "epsilon"_a, "weight_grad"_a, "norm_weight_grad"_a, "norm_bias_grad"_a,
       "stream"_a);
  bind(m, "first_layer_layer_norm_finish", first_layer_layer_norm_finish, "layer"_a, kw_only(), "statistics"_a,
       "sums"_a, "frame_sums"_a, "weight"_a, "bias"_a, "norm_weight"_a, "weight_grad"_a, "bias_grad"_a,
       "norm_weight_grad"_a, "norm_bias_grad"_a, "stream"_a);
}

void bind_activations(py::module_& m) {
  py::class_<Rows>(m, "Rows", py::module_local())
      .def(py::init<Size, Size, Size, int>(), kw_only(), "batch"_a, "rows"_a, "frames"_a, "channels"_a);
  py::class_<Norm>(m, "Norm", py::module_local())
      .def(py::init([](Buffer<const float> weight, Buffer<const float> bias, double epsilon) {
             return Norm{weight, bias, epsilon};
           }),
           kw_only(), "weight"_a, "bias"_a, "epsilon"_a);
  bind(m, "activation_forward", activation_forward, "rows"_a, "norm"_a, kw_only(), "z"_a, "out"_a, "out_rows"_a,
       "dtype"_a, "stream"_a);
  bind(m, "gelu_backward", gelu_backward, "rows"_a, kw_only(), "grad"_a, "grad_rows"_a, "z"_a, "out"_a, "activation"_a,
       "dtype"_a, "stream"_a);
  bind(m, "layer_norm_backward", layer_norm_backward, "rows"_a, "norm"_a, kw_only(), "grad"_a, "grad_rows"_a, "z"_a,
       "out"_a, "activation"_a, "partial"_a, "part_rows"_a, "dtype"_a, "stream"_a);
  bind(m, "clear_dead_rows", clear_dead_rows, "rows"_a, kw_only(), "z"_a, "activation"_a, "dtype"_a, "stream"_a);
  bind(m, "column_sums", column_sums, kw_only(), "x"_a, "total_rows"_a, "channels"_a, "partial"_a, "part_rows"_a,
       "dtype"_a, "stream"_a);
  bind(m, "sum_parts", sum_parts, kw_only(), "partial"_a, "outer"_a, "parts"_a, "columns"_a, "taps"_a, "channels"_a,
       "out"_a, "out_is_double"_a, "stream"_a);
}

void bind_products(py::module_& m) {
  m.def(
      "tensor_core_products_available", [](int dtype) { return tensor_core_products_available(dtype_of(dtype)); },
      "dtype"_a, Unlocked());
  m.def("overlapping_maps", &overlapping_maps, Unlocked());
  py::class_<Product>(m, "Product", py::module_local())
      .def(py::init([](Buffer<const void> input, Size input_stride, Buffer<const void> weight, Size rows, Size columns,
                       Size depth) { return Product{input, input_stride, weight, rows, columns, depth}; }),
           kw_only(), "input"_a, "input_stride"_a, "weight"_a, "rows"_a, "columns"_a, "depth"_a);
  bind(m, "product", product, "operands"_a, kw_only(), "bias"_a, "out"_a, "out_stride"_a, "dtype"_a, "stream"_a);
  bind(m, "product_gelu", product_gelu, "operands"_a, kw_only(), "bias"_a, "z"_a, "activation"_a, "dtype"_a,
       "stream"_a);
  bind(m, "product_gelu_gradient", product_gelu_gradient, "operands"_a, kw_only(), "z"_a, "out"_a, "activation"_a,
       "out_stride"_a, "dtype"_a, "stream"_a);
  bind(m, "weight_gradient", weight_gradient, kw_only(), "gradient"_a, "input"_a, "input_stride"_a, "partial"_a,
       "rows"_a, "part_rows"_a, "channels"_a, "depth"_a, "dtype"_a, "stream"_a);
}

}  // namespace
}  // namespace hubert_fast::cuda

namespace hubert_fast {

void bind_cuda(pybind11::module_& module) {
  pybind11::module_ m = module.def_submodule("cuda", "CUDA kernels; streams are integers");
  m.def("driver_version", [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
  });
  m.def("runtime_version", [] {
    int version = 0;
    return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
  });
  m.def("set_device", &cuda::set_device, pybind11::arg("device"), cuda::Unlocked());
  cuda::bind_first_layer(m);
  cuda::bind_activations(m);
  cuda::bind_products(m);
}

}  // namespace hubert_fast
