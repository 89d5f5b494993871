// The submodule `cuda`: the functions of first_layer.h, activations.h and gemm.h with pointers and streams as integers (null
// pointers as 0), dtypes as in dtype.h, sizes and strides in elements.
#include "bindings.h"

#include <cuda_runtime_api.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "activations.h"
#include "first_layer.h"
#include "gemm.h"

namespace hubert_fast::cuda {
namespace {

namespace py = pybind11;
using py::arg;
using Address = std::uintptr_t;
using Size = std::int64_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}
void* data(Address address) { return pointer<void>(address); }
cudaStream_t queue(Address address) { return pointer<CUstream_st>(address); }

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

void bind_first_layer(py::module_& m) {
  using unlocked = py::call_guard<py::gil_scoped_release>;
  m.attr("MOMENT_FRAMES") = kMomentFrames;
  m.attr("GROUP_NORM_BACKWARD_FRAMES") = kGroupNormBackwardFrames;
  m.attr("LAYER_NORM_BACKWARD_FRAMES") = kLayerNormBackwardFrames;
  py::class_<FirstLayer>(m, "FirstLayer", py::module_local())
      .def(py::init([](Address signal, Size signal_stride, Size batch, Size frames, int kernel, int stride,
                       int channels) {
             return FirstLayer{pointer<const float>(signal), signal_stride, batch, frames, kernel, stride, channels};
           }),
           py::kw_only(), arg("signal"), arg("signal_stride"), arg("batch"), arg("frames"), arg("kernel"),
           arg("stride"), arg("channels"));
  m.def(
      "first_layer_moments",
      [](const FirstLayer& layer, Address valid_samples, Address partial, Address stream) {
        first_layer_moments(layer, pointer<const Size>(valid_samples), pointer<double>(partial), queue(stream));
      },
      arg("layer"), py::kw_only(), arg("valid_samples"), arg("partial"), arg("stream"), unlocked());
  m.def(
      "first_layer_group_norm",
      [](const FirstLayer& layer, Address valid_samples, Address partial, Address weight, Address norm_weight,
         Address norm_bias, double epsilon, Address statistics, Address filters, Address stream) {
        first_layer_group_norm(layer, pointer<const Size>(valid_samples), pointer<const double>(partial),
                               pointer<const float>(weight), pointer<const float>(norm_weight),
                               pointer<const float>(norm_bias), epsilon, pointer<double>(statistics),
                               pointer<float>(filters), queue(stream));
      },
      arg("layer"), py::kw_only(), arg("valid_samples"), arg("partial"), arg("weight"), arg("norm_weight"),
      arg("norm_bias"), arg("epsilon"), arg("statistics"), arg("filters"), arg("stream"), unlocked());
  m.def(
      "first_layer_layer_norm",
      [](const FirstLayer& layer, Address weight, Address bias, Address norm_weight, Address statistics,
         Address filters, Address stream) {
        first_layer_layer_norm(layer, pointer<const float>(weight), pointer<const float>(bias),
                               pointer<const float>(norm_weight), pointer<double>(statistics), pointer<float>(filters),
                               queue(stream));
      },
      arg("layer"), py::kw_only(), arg("weight"), arg("bias"), arg("norm_weight"), arg("statistics"), arg("filters"),
      arg("stream"), unlocked());
  m.def(
      "first_layer_forward",
      [](const FirstLayer& layer, Address statistics, Address filters, Address norm_bias, double epsilon,
         Address activations, Size rows, int dtype, Address stream) {
        if (norm_bias == 0) {
          first_layer_group_norm_forward(layer, pointer<const double>(statistics), pointer<const float>(filters),
                                         data(activations), rows, dtype_of(dtype), queue(stream));
        } else {
          first_layer_layer_norm_forward(layer, pointer<const double>(statistics), pointer<const float>(filters),
                                         pointer<const float>(norm_bias), epsilon, data(activations), rows,
                                         dtype_of(dtype), queue(stream));
        }
      },
      arg("layer"), py::kw_only(), arg("statistics"), arg("filters"), arg("norm_bias"), arg("epsilon"),
      arg("activations"), arg("rows"), arg("dtype"), arg("stream"), unlocked());
  m.def(
      "first_layer_group_norm_backward",
      [](const FirstLayer& layer, Address statistics, Address filters, Address gradients, Size rows, Address partial,
         int dtype, Address stream) {
        first_layer_group_norm_backward(layer, pointer<const double>(statistics), pointer<const float>(filters),
                                        data(gradients), rows, pointer<float>(partial), dtype_of(dtype), queue(stream));
      },
      arg("layer"), py::kw_only(), arg("statistics"), arg("filters"), arg("gradients"), arg("rows"), arg("partial"),
      arg("dtype"), arg("stream"), unlocked());
  m.def(
      "first_layer_layer_norm_backward",
      [](const FirstLayer& layer, Address statistics, Address filters, Address norm_weight, Address norm_bias,
         double epsilon, Address gradients, Size rows, Address partial, Address frame_partial, int dtype,
         Address stream) {
        first_layer_layer_norm_backward(layer, pointer<const double>(statistics), pointer<const float>(filters),
                                        pointer<const float>(norm_weight), pointer<const float>(norm_bias), epsilon,
                                        data(gradients), rows, pointer<float>(partial), pointer<float>(frame_partial),
                                        dtype_of(dtype), queue(stream));
      },
      arg("layer"), py::kw_only(), arg("statistics"), arg("filters"), arg("norm_weight"), arg("norm_bias"),
      arg("epsilon"), arg("gradients"), arg("rows"), arg("partial"), arg("frame_partial"), arg("dtype"), arg("stream"),
      unlocked());
  m.def(
      "first_layer_group_norm_finish",
      [](const FirstLayer& layer, Address statistics, Address sums, Address weight, Address norm_weight, double epsilon,
         Address weight_grad, Address norm_weight_grad, Address norm_bias_grad, Address stream) {
        first_layer_group_norm_finish(layer, pointer<const double>(statistics), pointer<const double>(sums),
                                      pointer<const float>(weight), pointer<const float>(norm_weight), epsilon,
                                      pointer<float>(weight_grad), pointer<float>(norm_weight_grad),
                                      pointer<float>(norm_bias_grad), queue(stream));
      },
      arg("layer"), py::kw_only(), arg("statistics"), arg("sums"), arg("weight"), arg("norm_weight"), arg("epsilon"),
      arg("weight_grad"), arg("norm_weight_grad"), arg("norm_bias_grad"), arg("stream"), unlocked());
  m.def(
      "first_layer_layer_norm_finish",
      [](const FirstLayer& layer, Address statistics, Address sums, Address frame_sums, Address weight, Address bias,
         Address norm_weight, Address weight_grad, Address bias_grad, Address norm_weight_grad, Address norm_bias_grad,
         Address stream) {
        first_layer_layer_norm_finish(layer, pointer<const double>(statistics), pointer<const double>(sums),
                                      pointer<const double>(frame_sums), pointer<const float>(weight),
                                      pointer<const float>(bias), pointer<const float>(norm_weight),
                                      pointer<float>(weight_grad), pointer<float>(bias_grad),
                                      pointer<float>(norm_weight_grad), pointer<float>(norm_bias_grad), queue(stream));
      },
      arg("layer"), py::kw_only(), arg("statistics"), arg("sums"), arg("frame_sums"), arg("weight"), arg("bias"),
      arg("norm_weight"), arg("weight_grad"), arg("bias_grad"), arg("norm_weight_grad"), arg("norm_bias_grad"),
      arg("stream"), unlocked());
}

void bind_activations(py::module_& m) {
  using unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<Rows>(m, "Rows", py::module_local()).def(
      py::init([](Size batch, Size rows, Size frames, int channels) { return Rows{batch, rows, frames, channels}; }),
      py::kw_only(), arg("batch"), arg("rows"), arg("frames"), arg("channels"));
  m.def(
      "activation_forward",
      [](const Rows& rows, Address norm_weight, Address norm_bias, double epsilon, Address z, Address out,
         Size out_rows, int dtype, Address stream) {
        const Norm norm{pointer<const float>(norm_weight), pointer<const float>(norm_bias), epsilon};
        activation_forward(rows, norm, data(z), data(out), out_rows, dtype_of(dtype), queue(stream));
      },
      arg("rows"), py::kw_only(), arg("norm_weight"), arg("norm_bias"), arg("epsilon"), arg("z"), arg("out"),
      arg("out_rows"), arg("dtype"), arg("stream"), unlocked());
  m.def(
      "gelu_backward",
      [](const Rows& rows, Address grad, Size grad_rows, Address z, Address out, Address activation, int dtype,
         Address stream) {
        gelu_backward(rows, data(grad), grad_rows, data(z), data(out), data(activation), dtype_of(dtype),
                      queue(stream));
      },
      arg("rows"), py::kw_only(), arg("grad"), arg("grad_rows"), arg("z"), arg("out"), arg("activation"), arg("dtype"),
      arg("stream"), unlocked());
  m.def(
      "layer_norm_backward",
      [](const Rows& rows, Address norm_weight, Address norm_bias, double epsilon, Address grad, Size grad_rows,
         Address z, Address out, Address activation, Address partial, Size part_rows, int dtype, Address stream) {
        const Norm norm{pointer<const float>(norm_weight), pointer<const float>(norm_bias), epsilon};
        layer_norm_backward(rows, norm, data(grad), grad_rows, data(z), data(out), data(activation),
                            pointer<float>(partial), part_rows, dtype_of(dtype), queue(stream));
      },
      arg("rows"), py::kw_only(), arg("norm_weight"), arg("norm_bias"), arg("epsilon"), arg("grad"), arg("grad_rows"),
      arg("z"), arg("out"), arg("activation"), arg("partial"), arg("part_rows"), arg("dtype"), arg("stream"),
      unlocked());
  m.def(
      "clear_dead_rows",
      [](const Rows& rows, Address z, Address activation, int dtype, Address stream) {
        clear_dead_rows(rows, data(z), data(activation), dtype_of(dtype), queue(stream));
      },
      arg("rows"), py::kw_only(), arg("z"), arg("activation"), arg("dtype"), arg("stream"), unlocked());
  m.def(
      "column_sums",
      [](Address x, Size total_rows, int channels, Address partial, Size part_rows, int dtype, Address stream) {
        column_sums(data(x), total_rows, channels, pointer<float>(partial), part_rows, dtype_of(dtype), queue(stream));
      },
      py::kw_only(), arg("x"), arg("total_rows"), arg("channels"), arg("partial"), arg("part_rows"), arg("dtype"),
      arg("stream"), unlocked());
  m.def(
      "sum_parts",
      [](Address partial, Size outer, Size parts, Size columns, Address out, bool out_is_double, Address stream) {
        if (out_is_double) {
          sum_parts(pointer<const float>(partial), outer, parts, columns, pointer<double>(out), queue(stream));
        } else {
          sum_parts(pointer<const float>(partial), outer, parts, columns, pointer<float>(out), queue(stream));
        }
      },
      py::kw_only(), arg("partial"), arg("outer"), arg("parts"), arg("columns"), arg("out"), arg("out_is_double"),
      arg("stream"), unlocked());
}

void bind_products(py::module_& m) {
  using unlocked = py::call_guard<py::gil_scoped_release>;
  m.def(
      "tensor_core_products_available", [](int dtype) { return tensor_core_products_available(dtype_of(dtype)); },
      arg("dtype"), unlocked());
  m.def("overlapping_maps", &overlapping_maps, unlocked());
  py::class_<Product>(m, "Product", py::module_local())
      .def(py::init([](Address input, Size input_stride, Address weight, Size rows, Size columns, Size depth) {
             return Product{data(input), input_stride, data(weight), rows, columns, depth};
           }),
           py::kw_only(), arg("input"), arg("input_stride"), arg("weight"), arg("rows"), arg("columns"), arg("depth"));
  m.def(
      "product",
      [](const Product& operands, Address bias, Address out, Size out_stride, int dtype, Address stream) {
        product(operands, pointer<const float>(bias), data(out), out_stride, dtype_of(dtype), queue(stream));
      },
      arg("operands"), py::kw_only(), arg("bias"), arg("out"), arg("out_stride"), arg("dtype"), arg("stream"),
      unlocked());
  m.def(
      "product_gelu",
      [](const Product& operands, Address bias, Address z, Address activation, int dtype, Address stream) {
        product_gelu(operands, pointer<const float>(bias), data(z), data(activation), dtype_of(dtype), queue(stream));
      },
      arg("operands"), py::kw_only(), arg("bias"), arg("z"), arg("activation"), arg("dtype"), arg("stream"),
      unlocked());
  m.def(
      "product_gelu_gradient",
      [](const Product& operands, Address z, Address out, Address activation, Size out_stride, int dtype,
         Address stream) {
        product_gelu_gradient(operands, data(z), data(out), data(activation), out_stride, dtype_of(dtype),
                              queue(stream));
      },
      arg("operands"), py::kw_only(), arg("z"), arg("out"), arg("activation"), arg("out_stride"), arg("dtype"),
      arg("stream"), unlocked());
  m.def(
      "weight_gradient",
      [](Address gradient, Address input, Size input_stride, Address partial, Size rows, Size part_rows, Size channels,
         Size depth, int dtype, Address stream) {
        weight_gradient(data(gradient), data(input), input_stride, pointer<float>(partial), rows, part_rows, channels,
                        depth, dtype_of(dtype), queue(stream));
      },
      py::kw_only(), arg("gradient"), arg("input"), arg("input_stride"), arg("partial"), arg("rows"), arg("part_rows"),
      arg("channels"), arg("depth"), arg("dtype"), arg("stream"), unlocked());
}

}  // namespace
}  // namespace hubert_fast::cuda

namespace hubert_fast {

void bind_cuda(pybind11::module_& module) {
  pybind11::module_ m = module.def_submodule("cuda", "CUDA kernels; pointers and streams are integers");
  m.def("driver_version", [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
  });
  m.def("runtime_version", [] {
    int version = 0;
    return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
  });
  m.def("set_device", &cuda::set_device, pybind11::arg("device"), pybind11::call_guard<pybind11::gil_scoped_release>());
  cuda::bind_first_layer(m);
  cuda::bind_activations(m);
  cuda::bind_products(m);
}

}  // namespace hubert_fast
