// Work shared among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace hubert_fast {

// Calls task(thread, index) once for each 0 <= index < count, on at most `threads` threads; `thread` is below that number and
// no two tasks run on one at a time. Which thread runs which index is left to chance, so results must not depend on it. After a fork
// libgomp's threads are gone, for torch as for this: a child that computes sets the number of threads to 1, as DataLoader's do.
void parallel(int count, int threads, const std::function<void(int thread, int index)>& task);

// How many of `threads` a pass over so many values is worth waking up: one for 32,768, as PyTorch's own passes count.
inline int worthwhile(int threads, std::int64_t values) {
  return int(std::clamp<std::int64_t>(values / (1 << 15), 1, threads));
}

// "OpenMP (shared)" where the OpenMP runtime that torch has loaded lends its threads, "threads" where new ones are started.
const char* threading();

}  // namespace hubert_fast
