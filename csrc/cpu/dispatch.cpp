#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace hubert_fast {
namespace {

// Fastest first.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
#if defined(HUBERT_FAST_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // all that have both have F16C
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16::kernels());
  if (avx512) found.push_back(&avx512::kernels());
  if (avx2) found.push_back(&avx2::kernels());
#endif
  found.push_back(&baseline::kernels());
  return found;
}

const Kernels& find(const std::string& name) {
  std::string names;
  for (const Kernels* each : runnable()) {
    if (name == each->name) return *each;
    names += std::string(names.empty() ? "" : ", ") + each->name;
  }
  throw std::invalid_argument("instruction set '" + name + "' is not among those this machine can run: " + names);
}

const Kernels& initial() {
  const char* wanted = std::getenv("HUBERT_FAST_INSTRUCTION_SET");
  return wanted && *wanted ? find(wanted) : *runnable().front();
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& selected() {
  const Kernels* kernels = chosen;
  if (!kernels) chosen = kernels = &initial();
  return *kernels;
}

void select(const std::string& name) { chosen = &find(name); }

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const Kernels* each : runnable()) names.emplace_back(each->name);
  return names;
}

}  // namespace hubert_fast
