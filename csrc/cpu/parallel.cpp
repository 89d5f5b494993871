#include "parallel.h"

#include <atomic>
#include <cstring>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace hubert_fast {
namespace {

// Runs function(data) on a team of threads: libgomp's stable entry point, to which GCC compiles `#pragma omp parallel`.
using Team = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

// torch's own copy of libgomp, found among the libraries this process has loaded. Linking against another copy would give the
// process two pools of threads, each of which spins for a while after its work and takes the cores from the other.
Team find_team() {
#if defined(__linux__)
  std::string chosen;
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* found) {
        const std::string name = info->dlpi_name ? info->dlpi_name : "";
        std::string& best = *static_cast<std::string*>(found);
        const bool gomp = name.find("libgomp") != std::string::npos;
        const bool torchs = name.find("/torch/") != std::string::npos || name.find("/torch.libs/") != std::string::npos;
        if (gomp && (best.empty() || torchs)) best = name;
        return 0;
      },
      &chosen);
  if (chosen.empty()) return nullptr;
  void* library = dlopen(chosen.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  return library ? reinterpret_cast<Team>(dlsym(library, "GOMP_parallel")) : nullptr;
#else
  return nullptr;
#endif
}

Team team() {
  static const Team found = find_team();
  return found;
}

struct Work {
  const std::function<void(int, int)>& task;
  const int count;
  std::atomic<int> next_thread{0}, next_index{0};

  void run() {
    const int thread = next_thread++;
    for (int index = next_index++; index < count; index = next_index++) task(thread, index);
  }
};

}  // namespace

void parallel(int count, int threads, const std::function<void(int, int)>& task) {
  Work work{task, count};
  if (threads > count) threads = count;
  if (threads <= 1) return work.run();
  if (team()) return team()([](void* data) { static_cast<Work*>(data)->run(); }, &work, unsigned(threads), 0);
  std::vector<std::thread> others;
  others.reserve(std::size_t(threads) - 1);
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back([&work] { work.run(); });
  } catch (const std::system_error&) {
    // No more threads to be had: those that there are do the work.
  }
  work.run();
  for (std::thread& other : others) other.join();
}

const char* threading() { return team() ? "OpenMP (shared)" : "threads"; }

}  // namespace hubert_fast
