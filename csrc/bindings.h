// What csrc/module.cpp puts together.
#pragma once

#include <pybind11/pybind11.h>

namespace hubert_fast {

// Goes up whenever a binding changes its name, arguments or meaning, together with INTERFACE in hubert_fast/extension.py:
// the Python code refuses an extension that was built from other sources.
inline constexpr int interface_version = 2;

// Adds the submodule `cpu` with the CPU kernels.
void bind_cpu(pybind11::module_& module);

#ifdef HUBERT_FAST_WITH_CUDA
// Adds the submodule `cuda` with the CUDA kernels.
void bind_cuda(pybind11::module_& module);
#endif

}  // namespace hubert_fast
