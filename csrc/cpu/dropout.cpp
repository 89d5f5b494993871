#include "dropout.h"

#include <algorithm>

#include "dispatch.h"
#include "parallel.h"

namespace hubert_fast {

void drop(const Drop& work, int threads) {
  const Kernels& kernels = selected();
  const std::int64_t rows = work.groups * work.rows;
  threads = worthwhile(threads, rows * work.columns);
  const std::int64_t tasks = std::min<std::int64_t>(rows, 4 * threads);
  parallel(int(tasks), threads,
           [&](int, int task) { kernels.drop(work, rows * task / tasks, rows * (task + 1) / tasks); });
}

}  // namespace hubert_fast
