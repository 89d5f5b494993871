// The Python module hubert_fast._C: kernels that know nothing of torch, over buffers (bindings.h), sizes and strides.

#include <algorithm>
#include <string>

#include "bindings.h"
#include "facts.h"

namespace py = pybind11;

namespace hubert_fast {
namespace {

// "a,b" as ["a", "b"]; "" as [].
py::list split(const std::string& text) {
  py::list parts;
  for (std::string::size_type begin = 0; begin < text.size();) {
    const auto end = std::min(text.find(',', begin), text.size());
    parts.append(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

py::object text_or_none(const std::string& text) {
  return text.empty() ? py::object(py::none()) : py::object(py::str(text));
}

// No date and no path: the same sources give the same bytes.
py::dict build_facts() {
  py::dict result;
  result["compiler"] = facts::compiler;
  result["build_type"] = facts::build_type;
  result["cpu_variants"] = split(facts::cpu_variants);
  result["cuda"] = text_or_none(facts::cuda);
  result["cuda_archs"] = split(facts::cuda_archs);
  result["cuda_ptx"] = text_or_none(facts::cuda_ptx);
  result["cuda_why_not"] = text_or_none(facts::cuda_why_not);
  result["cutlass"] = text_or_none(facts::cutlass);
  return result;
}

}  // namespace
}  // namespace hubert_fast

PYBIND11_MODULE(_C, m) {
  m.attr("interface") = hubert_fast::interface_version;
  m.def("build_facts", &hubert_fast::build_facts, "How this module was built: compiler, CPU variants, CUDA, CUTLASS.");
  hubert_fast::bind_cpu(m);
#ifdef HUBERT_FAST_WITH_CUDA
  hubert_fast::bind_cuda(m);
#endif
}
