// Runs the CPU kernels over many shapes in buffers of exactly the size they may touch, for a sanitizer to watch, and checks that the
// number of threads changes no bit. Prints the number of cases.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "conv_frontend.h"
#include "dispatch.h"
#include "dropout.h"

using namespace hubert_fast;

namespace {

std::mt19937 generator(1);

int draw(int least, int most) { return least + int(generator() % unsigned(most - least + 1)); }

// Exactly `count` values on the heap: a vector may own more memory than that.
template <class T>
std::unique_ptr<T[]> noise(std::int64_t count) {
  std::unique_ptr<T[]> values(new T[std::size_t(count)]);
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = float(int(generator() % 2001) - 1000) * 1e-3f;
    if constexpr (sizeof(T) == 2) {
      std::uint32_t bits;
      std::memcpy(&bits, &value, 4);
      values[i] = T(bits >> 16);
    } else {
      values[i] = T(value);
    }
  }
  return values;
}

struct Result {
  std::vector<unsigned char> windows, gradient;
  std::vector<double> sums;
  bool operator==(const Result& other) const {
    return windows == other.windows && gradient == other.gradient && sums == other.sums;
  }
};

template <class T>
void one_case() {
  const int channels = 16 * draw(1, 5);
  const bool first = draw(0, 1), norm = draw(0, 1);
  const int taps = draw(0, 1) ? 10 : draw(1, kMaxTaps), signal_stride = draw(1, 6);
  const int kernel = draw(1, 5), stride = draw(1, 4), rows = draw(1, 300);
  const std::int64_t start = draw(0, 20), windows_stop = start + std::int64_t(rows - 1) * stride + kernel;
  const std::int64_t stop = draw(0, 1) ? windows_stop : start + draw(1, int(windows_stop - start));
  const auto signal = noise<float>((windows_stop - 1) * signal_stride + taps);
  const auto filters = noise<float>(taps * channels), centre = noise<float>(taps), shift = noise<float>(channels);
  const auto weight = noise<float>(channels), bias = noise<float>(channels);
  const auto preactivations = noise<T>(windows_stop * channels);
  const int split = draw(0, stride);
  const std::int64_t blocks = (stop - start + stride - 1) / stride;
  const auto head = noise<T>(blocks * split * channels), tail = noise<T>(blocks * (stride - split) * channels);
  const FirstLayer layer{signal.get(), filters.get(), centre.get(), shift.get(), taps, signal_stride};

  const auto run = [&](int threads, bool with_gradient) {
    Result result;
    const std::unique_ptr<T[]> windows(new T[std::size_t(std::int64_t(rows) * kernel * channels)]());
    const std::unique_ptr<T[]> gradient(new T[std::size_t((stop - start) * channels)]());
    Forward work{sizeof(T) == 2 ? Dtype::kBFloat16 : Dtype::kFloat32,
                 channels,
                 first ? &layer : nullptr,
                 first ? nullptr : preactivations.get(),
                 {norm ? weight.get() : nullptr, norm ? bias.get() : nullptr, 1e-5f},
                 start,
                 with_gradient ? stop : windows_stop,
                 {windows.get(), kernel, stride, rows}};
    if (with_gradient) {
      Backward backward_work{
          work, windows_stop, {head.get(), tail.get(), split, stride}, first ? nullptr : gradient.get(), nullptr};
      result.sums.assign(std::size_t(sum_rows(backward_work)) * channels, 0.0);
      backward_work.sums = result.sums.data();
      backward(backward_work, threads);
    } else {
      forward(work, threads);
    }
    const auto bytes = [](const void* data, std::size_t size) {
      const auto* from = static_cast<const unsigned char*>(data);
      return std::vector<unsigned char>(from, from + size);
    };
    result.windows = bytes(windows.get(), std::size_t(rows) * kernel * channels * sizeof(T));
    result.gradient = bytes(gradient.get(), std::size_t((stop - start) * channels) * sizeof(T));
    return result;
  };
  const Result plain = run(1, false), with_gradient = run(1, true);
  const bool same = plain == run(3, false) && with_gradient == run(3, true) && plain.windows == with_gradient.windows;
  if (!same) {
    std::printf("%s: results differ between threads, or between the passes\n", selected().name);
    std::exit(1);
  }
}

void statistics_case() {
  const int batch = draw(1, 3), taps = draw(1, kMaxTaps), stride = draw(1, 5), most = draw(1, 9000);
  const std::int64_t samples = std::int64_t(most - 1) * stride + taps;
  const auto signals = noise<float>(batch * samples);
  const std::unique_ptr<std::int64_t[]> frames(new std::int64_t[std::size_t(batch)]);
  for (int row = 0; row < batch; ++row) frames[row] = draw(0, most);
  std::vector<double> means(std::size_t(batch * taps)), covariances(std::size_t(batch * taps * taps));
  for (const int threads : {1, 3}) {
    const std::vector<double> before = covariances;
    first_layer_statistics(
        {signals.get(), samples, batch, taps, stride, frames.get(), means.data(), covariances.data()}, threads);
    for (const double value : covariances)
      if (!std::isfinite(value)) std::exit(2);
    if (threads > 1 && before != covariances) std::exit(3);
  }
}

void dropout_case() {
  const std::int64_t groups = draw(0, 3), rows = draw(0, 40), columns = draw(0, 1) ? draw(0, 100) : draw(900, 1100);
  const auto given = noise<float>(groups * rows * columns);
  const std::unique_ptr<std::int64_t[]> index(new std::int64_t[std::size_t(rows)]);
  for (std::int64_t row = 0; row < rows; ++row) index[row] = draw(0, 100000);
  const bool indexed = draw(0, 1);
  const auto run = [&](int threads) {
    std::vector<float> out(given.get(), given.get() + groups * rows * columns);
    const float* values = threads == 1 ? given.get() : out.data();  // in place
    drop({values, out.data(), indexed ? index.get() : nullptr, groups, rows, columns, 7, 1000000, 3, 6554, 1.1f}, threads);
    return out;
  };
  if (run(1) != run(3)) {
    std::printf("%s: dropout differs between threads\n", selected().name);
    std::exit(1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 40;
  int count = 0;
  for (const std::string& name : available()) {
    select(name);
    for (int i = 0; i < cases; ++i, count += 4) {
      one_case<float>();
      one_case<std::uint16_t>();
      statistics_case();
      dropout_case();
    }
  }
  std::printf("%d cases\n", count);
}
