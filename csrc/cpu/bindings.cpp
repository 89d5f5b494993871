// `_C.cpu`: the CPU kernels. The caller keeps their buffers alive and has checked the sizes.
#include "../bindings.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "conv_frontend.h"
#include "dispatch.h"
#include "dropout.h"
#include "parallel.h"

namespace py = pybind11;

namespace hubert_fast {
namespace {

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "bfloat16") return Dtype::kBFloat16;
  throw std::invalid_argument("dtype must be 'float32' or 'bfloat16'; got '" + name + "'");
}

void check_taps(int taps) {
  require(taps >= 1 && taps <= kMaxTaps,
          "taps must be in 1.." + std::to_string(kMaxTaps) + "; got " + std::to_string(taps));
}

FirstLayer first_layer(Buffer<const float> signal, Buffer<const float> filters, Buffer<const float> centre,
                       Buffer<const float> shift, int taps, int stride) {
  check_taps(taps);
  require(stride >= 1, "stride must be positive; got " + std::to_string(stride));
  return {signal, filters, centre, shift, taps, stride};
}

LayerNorm layer_norm(Buffer<const float> weight, Buffer<const float> bias, float eps) { return {weight, bias, eps}; }

Windows windows(Buffer<void> data, int kernel, int stride, std::int64_t rows) {
  require(kernel >= 1 && stride >= 1 && rows >= 0, "windows need a positive kernel and stride and no negative rows");
  return {data, kernel, stride, rows};
}

BlockGradient block_gradient(Buffer<const void> head, Buffer<const void> tail, int split, int stride) {
  require(stride >= 1 && split >= 0 && split <= stride, "split must be in 0..stride, and stride positive");
  return {head, tail, split, stride};
}

constexpr Windows kNowhere{nullptr, 1, 1, 0};

// `first` outlives the result, which points at it.
Forward source(
    const std::string& dtype, int channels, const std::optional<FirstLayer>& first, Buffer<const void> preactivations,
    const std::optional<LayerNorm>& norm, std::int64_t start, std::int64_t stop, const std::optional<Windows>& windows) {
  require(channels >= 16 && channels % 16 == 0,
          "channels must be a positive multiple of 16; got " + std::to_string(channels));
  require(first.has_value() != (preactivations != nullptr), "exactly one of first_layer and preactivations is needed");
  require(0 <= start && start <= stop, "frames must satisfy 0 <= start <= stop");
  return {dtype_of(dtype), channels, first ? &*first : nullptr, preactivations,
          norm.value_or(LayerNorm{nullptr, nullptr, 0.0f}), start, stop, windows.value_or(kNowhere)};
}

void call_forward(
    const std::string& dtype, int channels, const std::optional<FirstLayer>& first, Buffer<const void> preactivations,
    const std::optional<LayerNorm>& norm, std::int64_t start, std::int64_t stop, const Windows& windows, int threads) {
  require(threads >= 1, "threads must be positive; got " + std::to_string(threads));
  forward(source(dtype, channels, first, preactivations, norm, start, stop, windows), threads);
}

void call_backward(
    const std::string& dtype, int channels, const std::optional<FirstLayer>& first, Buffer<const void> preactivations,
    const std::optional<LayerNorm>& norm, std::int64_t start, std::int64_t stop, const std::optional<Windows>& windows,
    std::int64_t windows_stop, const BlockGradient& gradient, Buffer<void> preactivation_gradient, Buffer<double> sums,
    int threads) {
  require(threads >= 1, "threads must be positive; got " + std::to_string(threads));
  require(windows_stop >= stop, "windows_stop must be at least stop");
  require(sums || !(first || norm), "layer 0 and layers with a norm need sums");
  backward({source(dtype, channels, first, preactivations, norm, start, stop, windows), windows_stop, gradient,
            preactivation_gradient, sums},
           threads);
}

void call_statistics(Buffer<const float> signals, std::int64_t row_stride, int batch, int taps, int stride,
                     Buffer<const std::int64_t> frames, Buffer<double> means, Buffer<double> covariances, int threads) {
  require(threads >= 1 && batch >= 1 && stride >= 1, "threads, batch and stride must be positive");
  check_taps(taps);
  first_layer_statistics({signals, row_stride, batch, taps, stride, frames, means, covariances}, threads);
}

void call_drop(Buffer<const float> values, Buffer<float> out, std::int64_t groups, std::int64_t rows, std::int64_t columns,
               Buffer<const std::int64_t> index, std::int64_t first, std::int64_t stride, std::int64_t seed, int threshold,
               float scale, int threads) {
  require(threads >= 1, "threads must be positive; got " + std::to_string(threads));
  require(groups >= 0 && rows >= 0 && columns >= 0, "groups, rows and columns may not be negative");
  require(threshold >= 0 && threshold < 1 << 16, "threshold must be in 0..65535; got " + std::to_string(threshold));
  drop({values, out, index, groups, rows, columns, first, stride, std::uint64_t(seed), std::uint32_t(threshold), scale},
       threads);
}

}  // namespace

void bind_cpu(py::module_& module) {
  py::module_ cpu = module.def_submodule("cpu", "Passes of the convolutional front end on the CPU, and dropout.");
  using py::arg;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<FirstLayer>(cpu, "FirstLayer", py::module_local())
      .def(py::init(&first_layer), arg("signal"), arg("filters"), arg("centre"), arg("shift"), arg("taps"), arg("stride"));
  py::class_<LayerNorm>(cpu, "LayerNorm", py::module_local()).def(py::init(&layer_norm), arg("weight"), arg("bias"), arg("eps"));
  py::class_<Windows>(cpu, "Windows", py::module_local())
      .def(py::init(&windows), arg("data"), arg("kernel"), arg("stride"), arg("rows"));
  py::class_<BlockGradient>(cpu, "BlockGradient", py::module_local())
      .def(py::init(&block_gradient), arg("head"), arg("tail"), arg("split"), arg("stride"));
  cpu.attr("max_taps") = kMaxTaps;
  cpu.def("instruction_set", [] { return selected().name; }, "The instances of the kernels that run.");
  cpu.def("instruction_sets", &available, "Those that this machine can run, fastest first.");
  cpu.def("use_instruction_set", &select, arg("name"));
  cpu.def("threading", &threading);
  cpu.def("forward", &call_forward, py::kw_only(), arg("dtype"), arg("channels"), arg("first_layer") = py::none(),
          arg("preactivations") = py::none(), arg("norm") = py::none(), arg("start"), arg("stop"), arg("windows"),
          arg("threads"), Unlocked());
  cpu.def("backward", &call_backward, py::kw_only(), arg("dtype"), arg("channels"), arg("first_layer") = py::none(),
          arg("preactivations") = py::none(), arg("norm") = py::none(), arg("start"), arg("stop"),
          arg("windows") = py::none(), arg("windows_stop"), arg("gradient"), arg("preactivation_gradient") = py::none(),
          arg("sums") = py::none(), arg("threads"), Unlocked());
  cpu.def("first_layer_statistics", &call_statistics, py::kw_only(), arg("signals"), arg("row_stride"), arg("batch"),
          arg("taps"), arg("stride"), arg("frames"), arg("means"), arg("covariances"), arg("threads"), Unlocked());
  cpu.def("drop", &call_drop, py::kw_only(), arg("values"), arg("out"), arg("groups"), arg("rows"), arg("columns"),
          arg("index") = py::none(), arg("first"), arg("stride"), arg("seed"), arg("threshold"), arg("scale"),
          arg("threads"), Unlocked());
}

}  // namespace hubert_fast
