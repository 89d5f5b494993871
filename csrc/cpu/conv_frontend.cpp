#include "conv_frontend.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace hubert_fast {
namespace {

constexpr std::int64_t kForwardFrames = 64;      // of a task: enough to be worth a thread, few enough to share evenly
constexpr std::int64_t kBackwardFrames = 256;    // fewer would mean more partial sums to add up
constexpr std::int64_t kStatisticsFrames = 4096;

std::int64_t tasks(std::int64_t frames, std::int64_t each) { return (frames + each - 1) / each; }

}  // namespace

void forward(const Forward& work, int threads) {
  const Kernels& kernels = selected();
  threads = worthwhile(threads, (work.stop - work.start) * work.channels);
  const std::int64_t scratch = kernels.scratch(work);
  std::vector<float> rows(std::size_t(scratch * threads));
  parallel(int(tasks(work.stop - work.start, kForwardFrames)), threads, [&](int thread, int task) {
    const std::int64_t start = work.start + task * kForwardFrames;
    kernels.forward(work, start, std::min(start + kForwardFrames, work.stop), rows.data() + thread * scratch);
  });
}

void backward(const Backward& work, int threads) {
  const Kernels& kernels = selected();
  threads = worthwhile(threads, (work.windows_stop - work.source.start) * work.source.channels);
  const std::int64_t start = work.source.start, scratch = kernels.scratch(work.source);
  const std::int64_t values = work.sums ? std::int64_t(sum_rows(work)) * work.source.channels : 0;
  const std::int64_t count = tasks(work.windows_stop - start, kBackwardFrames);
  std::vector<float> rows(std::size_t(scratch * threads));
  std::vector<float> partial(std::size_t(values * count));
  parallel(int(count), threads, [&](int thread, int task) {
    const std::int64_t first = start + task * kBackwardFrames;
    float* sums = values ? partial.data() + task * values : nullptr;
    kernels.backward(
        work, first, std::min(first + kBackwardFrames, work.windows_stop), rows.data() + thread * scratch, sums);
  });
  for (std::int64_t task = 0; task < count; ++task)
    for (std::int64_t i = 0; i < values; ++i) work.sums[i] += double(partial[std::size_t(task * values + i)]);
}

void first_layer_statistics(const FirstLayerStatistics& work, int threads) {
  const Kernels& kernels = selected();
  std::int64_t longest = 0;
  for (int row = 0; row < work.batch; ++row) longest = std::max(longest, work.frames[row]);
  const std::int64_t ranges = tasks(longest, kStatisticsFrames);
  // First the means, then, around them, the products: squares of uncentred values would lose a small variance beside a large mean.
  for (const bool products : {false, true}) {
    const int values = products ? work.taps * work.taps : work.taps;
    double* totals = products ? work.covariances : work.means;
    std::vector<double> partial(std::size_t(work.batch * ranges * values));
    parallel(int(work.batch * ranges), threads, [&](int, int task) {
      const std::int64_t row = task / ranges, start = task % ranges * kStatisticsFrames;
      const std::int64_t stop = std::min(start + kStatisticsFrames, work.frames[row]);
      const double* means = products ? work.means + row * work.taps : nullptr;
      kernels.window_sums(
          work.signals + row * work.row_stride, work.taps, work.stride, start, stop, means,
          partial.data() + std::int64_t(task) * values);
    });
    for (int row = 0; row < work.batch; ++row) {
      const double count = double(std::max<std::int64_t>(work.frames[row], 1));
      for (int i = 0; i < values; ++i) {
        double total = 0.0;
        for (std::int64_t range = 0; range < ranges; ++range)
          total += partial[std::size_t((row * ranges + range) * values + i)];
        totals[std::int64_t(row) * values + i] = total / count;
      }
    }
  }
}

}  // namespace hubert_fast
