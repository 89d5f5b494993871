// What csrc/module.cpp puts together.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace hubert_fast {

// Memory that Python owns, given as a tensor (or whatever else has a method data_ptr), as its address, or as None for null.
template <class T>
struct Buffer {
  T* address = nullptr;
  operator T*() const { return address; }
};

// Goes up whenever a binding changes its name, arguments or meaning, together with INTERFACE in hubert_fast/extension.py:
// the Python code refuses an extension that was built from other sources.
inline constexpr int interface_version = 6;

// Adds the submodule `cpu` with the CPU kernels.
void bind_cpu(pybind11::module_& module);

#ifdef HUBERT_FAST_WITH_CUDA
// Adds the submodule `cuda` with the CUDA kernels.
void bind_cuda(pybind11::module_& module);
#endif

}  // namespace hubert_fast

template <class T>
struct pybind11::detail::type_caster<hubert_fast::Buffer<T>> {
  PYBIND11_TYPE_CASTER(hubert_fast::Buffer<T>, const_name("Buffer"));

  bool load(handle given, bool) {
    if (given.is_none()) return true;
    const bool is_address = PyLong_Check(given.ptr());
    if (!is_address && !hasattr(given, "data_ptr")) return false;  // pybind11 then names the arguments and what was given
    const object number = is_address ? reinterpret_borrow<object>(given) : given.attr("data_ptr")();
    value.address = static_cast<T*>(PyLong_AsVoidPtr(number.ptr()));
    if (PyErr_Occurred() == nullptr) return true;
    PyErr_Clear();
    return false;
  }
};
