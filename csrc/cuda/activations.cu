// Elementwise passes of the later layers: bound by memory, so each value is read once and written once, in runs of 16 bytes.
#include "activations.h"
#include "launch.h"
#include "vectors.h"

namespace hubert_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kWidth = 8;
constexpr int kMaxChannels = 1024;
constexpr int kPassRows = 64;  // of one block, in passes that sum nothing

// Sequence and position of a row in a buffer of `rows` rows a sequence, moved on without a division a row.
struct Position {
  std::int64_t sequence;
  std::int64_t t;
  HUBERT_FAST_HOST_DEVICE Position(std::int64_t row, std::int64_t rows) : sequence(row / rows), t(row % rows) {}
  HUBERT_FAST_HOST_DEVICE void advance(std::int64_t count, std::int64_t rows) {
    t += count;
    while (t >= rows) {
      t -= rows;
      ++sequence;
    }
  }
};

// A thread keeps kWidth channels and walks over the rows of its block in steps of `step`.
struct ColumnShare {
  int channel;
  int first;
  int step;
  bool active;
  HUBERT_FAST_HOST_DEVICE ColumnShare(int channels, int thread) {
    const int groups = channels / kWidth;
    step = kThreads / groups;
    channel = thread % groups * kWidth;
    first = thread / groups;
    active = first < step;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) gelu_forward_kernel(Rows rows, const T* z, T* out, std::int64_t out_rows) {
  using Activation = typename GeluFor<T>::type;
  const ColumnShare share(rows.channels, thread_index());
  if (!share.active) return;
  const std::int64_t total = rows.batch * out_rows;
  const std::int64_t start = block_index() * kPassRows;
  const std::int64_t end = start + kPassRows < total ? start + kPassRows : total;
  Position at(start + share.first, out_rows);
  for (std::int64_t row = start + share.first; row < end; row += share.step, at.advance(share.step, out_rows)) {
    float values[kWidth] = {};
    if (at.t < rows.frames) {
      load_floats<kWidth>(z + (at.sequence * rows.rows + at.t) * rows.channels + share.channel, values);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) values[i] = Activation::value(values[i]);
    }
    store_floats<kWidth>(out + row * rows.channels + share.channel, values);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gelu_backward_kernel(Rows rows, const T* grad, std::int64_t grad_rows, const T* z, T* out, T* activation) {
  using Activation = typename GeluFor<T>::type;
  const ColumnShare share(rows.channels, thread_index());
  if (!share.active) return;
  const std::int64_t total = rows.batch * rows.rows;
  const std::int64_t start = block_index() * kPassRows;
  const std::int64_t end = start + kPassRows < total ? start + kPassRows : total;
  Position at(start + share.first, rows.rows);
  for (std::int64_t row = start + share.first; row < end; row += share.step, at.advance(share.step, rows.rows)) {
    float gradient[kWidth] = {}, value[kWidth] = {};
    const std::int64_t index = row * rows.channels + share.channel;
    if (at.t < rows.frames) {
      load_floats<kWidth>(grad + (at.sequence * grad_rows + at.t) * rows.channels + share.channel, gradient);
      load_floats<kWidth>(z + index, value);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const Gelu gelu = Activation::both(value[i]);
        gradient[i] *= gelu.derivative;
        value[i] = gelu.value;
      }
    }
    store_floats<kWidth>(out + index, gradient);
    if (activation != nullptr) store_floats<kWidth>(activation + index, value);
  }
}

// One warp a row: lane l holds runs l, l + 32, ... of kWidth channels, kRuns of them at most.
template <int kRuns>
struct RowOfWarp {
  float values[kRuns][kWidth];

  HUBERT_FAST_HOST_DEVICE static int channel(int lane, int run) { return (lane + 32 * run) * kWidth; }

  template <class T>
  __device__ void load(const T* from, int channels, int lane) {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      if (channel(lane, run) < channels) {
        load_floats<kWidth>(from + channel(lane, run), values[run]);
      } else {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) values[run][i] = 0.0f;
      }
    }
  }
  template <class T>
  __device__ void store(T* to, int channels, int lane) const {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      if (channel(lane, run) < channels) store_floats<kWidth>(to + channel(lane, run), values[run]);
    }
  }
  // Subtracts the mean over channels and returns 1 / sqrt(variance + epsilon); runs past the end stay 0.
  __device__ float centre(int channels, int lane, float epsilon) {
    const float inverse = 1.0f / static_cast<float>(channels);
    float sum = 0.0f;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum += values[run][i];
    }
    const float mean = warp_sum(sum) * inverse;
    float squares = 0.0f;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      if (channel(lane, run) >= channels) continue;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        values[run][i] -= mean;
        squares = fmaf(values[run][i], values[run][i], squares);
      }
    }
    return 1.0f / sqrtf(fmaf(warp_sum(squares), inverse, epsilon));
  }
};

template <class T, int kRuns>
__global__ void __launch_bounds__(kThreads)
    layer_norm_forward_kernel(Rows rows, Norm norm, const T* z, T* out, std::int64_t out_rows) {
  using Activation = typename GeluFor<T>::type;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const std::int64_t total = rows.batch * out_rows;
  const std::int64_t start = block_index() * kPassRows;
  const std::int64_t end = start + kPassRows < total ? start + kPassRows : total;
  RowOfWarp<kRuns> gain, bias;
  gain.load(norm.weight, rows.channels, lane);
  bias.load(norm.bias, rows.channels, lane);
  Position at(start + warp, out_rows);
  for (std::int64_t row = start + warp; row < end; row += kWarps, at.advance(kWarps, out_rows)) {
    RowOfWarp<kRuns> x = {};
    if (at.t < rows.frames) {
      x.load(z + (at.sequence * rows.rows + at.t) * rows.channels, rows.channels, lane);
      const float rstd = x.centre(rows.channels, lane, static_cast<float>(norm.epsilon));
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const float y = fmaf(x.values[run][i] * rstd, gain.values[run][i], bias.values[run][i]);
          x.values[run][i] = Activation::value(y);
        }
      }
    }
    x.store(out + row * rows.channels, rows.channels, lane);
  }
}

// dz = r (g dy - mean(g dy) - x_hat mean(g dy x_hat)), means over channels, dy = grad GELU'(y), y = g x_hat + b.
template <class T, int kRuns>
__global__ void __launch_bounds__(kThreads)
    layer_norm_backward_kernel(Rows rows, Norm norm, const T* grad, std::int64_t grad_rows, const T* z, T* out,
                               T* activation, float* partial, std::int64_t part_rows) {
  using Activation = typename GeluFor<T>::type;
  __shared__ float scratch[kWarps * kRuns * 32 * kWidth];
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const std::int64_t total = rows.batch * rows.rows;
  const std::int64_t start = block_index() * part_rows;
  const std::int64_t end = start + part_rows < total ? start + part_rows : total;
  const float inverse = 1.0f / static_cast<float>(rows.channels);
  RowOfWarp<kRuns> gain_sums = {}, bias_sums = {}, z_sums = {};
  Position at(start + warp, rows.rows);
  for (std::int64_t row = start + warp; row < end; row += kWarps, at.advance(kWarps, rows.rows)) {
    RowOfWarp<kRuns> x = {}, dy = {};
    if (at.t < rows.frames) {
      x.load(z + row * rows.channels, rows.channels, lane);
      dy.load(grad + (at.sequence * grad_rows + at.t) * rows.channels, rows.channels, lane);
      const float rstd = x.centre(rows.channels, lane, static_cast<float>(norm.epsilon));
      RowOfWarp<kRuns> result = {};
      float first = 0.0f, second = 0.0f;
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        const int channel = RowOfWarp<kRuns>::channel(lane, run);
        if (channel >= rows.channels) continue;
        float gain[kWidth], bias[kWidth];  // read again for each row, from the cache: registers hold the sums
        load_floats<kWidth>(norm.weight + channel, gain);
        load_floats<kWidth>(norm.bias + channel, bias);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const float normalised = x.values[run][i] * rstd;
          const Gelu gelu = Activation::both(fmaf(normalised, gain[i], bias[i]));
          const float gradient = dy.values[run][i] * gelu.derivative;
          result.values[run][i] = gelu.value;
          gain_sums.values[run][i] = fmaf(gradient, normalised, gain_sums.values[run][i]);
          bias_sums.values[run][i] += gradient;
          x.values[run][i] = normalised;
          dy.values[run][i] = gradient * gain[i];
          first += dy.values[run][i];
          second = fmaf(dy.values[run][i], normalised, second);
        }
      }
      if (activation != nullptr) result.store(activation + row * rows.channels, rows.channels, lane);
      first = warp_sum(first) * inverse;
      second = warp_sum(second) * inverse;
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        if (RowOfWarp<kRuns>::channel(lane, run) >= rows.channels) continue;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          dy.values[run][i] = rstd * (dy.values[run][i] - first - x.values[run][i] * second);
          z_sums.values[run][i] += dy.values[run][i];
        }
      }
    } else if (activation != nullptr) {
      x.store(activation + row * rows.channels, rows.channels, lane);
    }
    dy.store(out + row * rows.channels, rows.channels, lane);
  }
  const RowOfWarp<kRuns>* sums[3] = {&gain_sums, &bias_sums, &z_sums};
#pragma unroll
  for (int which = 0; which < 3; ++which) {
    __syncthreads();
    sums[which]->store(scratch + warp * rows.channels, rows.channels, lane);
    __syncthreads();
    for (int c = thread_index(); c < rows.channels; c += kThreads) {
      float sum = scratch[c];
      for (int other = 1; other < kWarps; ++other) sum += scratch[other * rows.channels + c];
      partial[(block_index() * 3 + which) * rows.channels + c] = sum;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) clear_dead_rows_kernel(Rows rows, T* z, T* activation, std::int64_t dead) {
  const ColumnShare share(rows.channels, thread_index());
  if (!share.active) return;
  const float zeros[kWidth] = {};
  const std::int64_t total = rows.batch * dead;
  const std::int64_t start = block_index() * kPassRows;
  const std::int64_t end = start + kPassRows < total ? start + kPassRows : total;
  Position at(start + share.first, dead);
  for (std::int64_t row = start + share.first; row < end; row += share.step, at.advance(share.step, dead)) {
    const std::int64_t index = (at.sequence * rows.rows + rows.frames + at.t) * rows.channels + share.channel;
    if (z != nullptr) store_floats<kWidth>(z + index, zeros);
    if (activation != nullptr) store_floats<kWidth>(activation + index, zeros);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(const T* x, std::int64_t total, int channels, float* partial, std::int64_t part_rows) {
  __shared__ float scratch[kThreads * kWidth];
  const ColumnShare share(channels, thread_index());
  float sums[kWidth] = {};
  if (share.active) {
    const std::int64_t start = block_index() * part_rows;
    const std::int64_t end = start + part_rows < total ? start + part_rows : total;
    for (std::int64_t row = start + share.first; row < end; row += share.step) {
      float values[kWidth];
      load_floats<kWidth>(x + row * channels + share.channel, values);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sums[i] += values[i];
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) scratch[share.first * channels + share.channel + i] = sums[i];
  }
  __syncthreads();
  for (int c = thread_index(); c < channels; c += kThreads) {
    float sum = scratch[c];
    for (int other = 1; other < share.step; ++other) sum += scratch[other * channels + c];
    partial[block_index() * channels + c] = sum;
  }
}

// 32 columns a block; its 8 warps take every eighth part each.
template <class Out>
__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const float* partial, std::int64_t parts, std::int64_t columns, std::int64_t column_blocks,
                     std::int64_t taps, std::int64_t channels, Out* out) {
  __shared__ double scratch[kWarps][32];
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const std::int64_t outer = block_index() / column_blocks;
  const std::int64_t column = block_index() % column_blocks * 32 + lane;
  double sum = 0.0;
  if (column < columns) {
    const float* from = partial + outer * parts * columns + column;
#pragma unroll 4
    for (std::int64_t part = warp; part < parts; part += kWarps) sum += from[part * columns];
  }
  scratch[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && column < columns) {
    for (int other = 1; other < kWarps; ++other) sum += scratch[other][lane];
    std::int64_t place = column;
    if (taps > 1) {
      const std::int64_t within = column % (taps * channels);
      place += within % channels * taps + within / channels - within;
    }
    out[outer * columns + place] = static_cast<Out>(sum);
  }
}

void check(const Rows& rows, const char* name) {
  require(rows.batch > 0 && rows.frames > 0 && rows.rows >= rows.frames, name,
          "batch and frames must be positive and rows at least frames");
  require(rows.channels % 64 == 0 && rows.channels >= 64 && rows.channels <= kMaxChannels, name,
          "channels must be a multiple of 64, at most 1024");
}

// Runs of 8 channels that a lane holds of a row: 512 channels fill two, 1,024 four.
constexpr int kFewRuns = 2;
constexpr int kManyRuns = 4;
bool few_runs(const Rows& rows) { return rows.channels <= kFewRuns * 32 * kWidth; }

}  // namespace

void activation_forward(const Rows& rows, const Norm& norm, const void* z, void* out, std::int64_t out_rows,
                        Dtype dtype, cudaStream_t stream) {
  const char* name = "activation_forward";
  check(rows, name);
  require(out_rows >= rows.frames, name, "out_rows must be at least frames");
  const std::int64_t blocks = ceil_div(rows.batch * out_rows, kPassRows);
  with_type(dtype, name, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(z);
    T* to = static_cast<T*>(out);
    if (norm.weight == nullptr) {
      launch(name, gelu_forward_kernel<T>, blocks, kThreads, stream, rows, from, to, out_rows);
    } else {
      launch(name, few_runs(rows) ? layer_norm_forward_kernel<T, kFewRuns> : layer_norm_forward_kernel<T, kManyRuns>,
             blocks, kThreads, stream, rows, norm, from, to, out_rows);
    }
  });
}

void gelu_backward(const Rows& rows, const void* grad, std::int64_t grad_rows, const void* z, void* out,
                   void* activation, Dtype dtype, cudaStream_t stream) {
  const char* name = "gelu_backward";
  check(rows, name);
  require(grad_rows >= rows.frames, name, "grad_rows must be at least frames");
  require(grad != out || grad_rows == rows.rows, name, "in place needs grad_rows == rows");
  with_type(dtype, name, [&](auto element) {
    using T = decltype(element);
    launch(name, gelu_backward_kernel<T>, ceil_div(rows.batch * rows.rows, kPassRows), kThreads, stream, rows,
           static_cast<const T*>(grad), grad_rows, static_cast<const T*>(z), static_cast<T*>(out),
           static_cast<T*>(activation));
  });
}

void layer_norm_backward(const Rows& rows, const Norm& norm, const void* grad, std::int64_t grad_rows, const void* z,
                         void* out, void* activation, float* partial, std::int64_t part_rows, Dtype dtype,
                         cudaStream_t stream) {
  const char* name = "layer_norm_backward";
  check(rows, name);
  require(grad_rows >= rows.frames, name, "grad_rows must be at least frames");
  require(grad != out || grad_rows == rows.rows, name, "in place needs grad_rows == rows");
  require(part_rows > 0, name, "part_rows must be positive");
  with_type(dtype, name, [&](auto element) {
    using T = decltype(element);
    launch(name, few_runs(rows) ? layer_norm_backward_kernel<T, kFewRuns> : layer_norm_backward_kernel<T, kManyRuns>,
           ceil_div(rows.batch * rows.rows, part_rows), kThreads, stream, rows, norm, static_cast<const T*>(grad),
           grad_rows, static_cast<const T*>(z), static_cast<T*>(out), static_cast<T*>(activation), partial, part_rows);
  });
}

void clear_dead_rows(const Rows& rows, void* z, void* activation, Dtype dtype, cudaStream_t stream) {
  const char* name = "clear_dead_rows";
  check(rows, name);
  const std::int64_t dead = rows.rows - rows.frames;
  if (dead == 0) return;
  with_type(dtype, name, [&](auto element) {
    using T = decltype(element);
    launch(name, clear_dead_rows_kernel<T>, ceil_div(rows.batch * dead, kPassRows), kThreads, stream, rows,
           static_cast<T*>(z), static_cast<T*>(activation), dead);
  });
}

void column_sums(const void* x, std::int64_t total_rows, int channels, float* partial, std::int64_t part_rows,
                 Dtype dtype, cudaStream_t stream) {
  const char* name = "column_sums";
  require(total_rows > 0 && part_rows > 0, name, "sizes must be positive");
  require(channels % 64 == 0 && channels >= 64 && channels <= kMaxChannels, name,
          "channels must be a multiple of 64, at most 1024");
  with_type(dtype, name, [&](auto element) {
    using T = decltype(element);
    launch(name, column_sums_kernel<T>, ceil_div(total_rows, part_rows), kThreads, stream, static_cast<const T*>(x),
           total_rows, channels, partial, part_rows);
  });
}

void sum_parts(const float* partial, std::int64_t outer, std::int64_t parts, std::int64_t columns, std::int64_t taps,
               std::int64_t channels, void* out, bool out_is_double, cudaStream_t stream) {
  const char* name = "sum_parts";
  require(outer > 0 && parts > 0 && columns > 0 && taps > 0 && channels > 0, name, "sizes must be positive");
  require(columns % (taps * channels) == 0, name, "columns must be a multiple of taps * channels");
  const std::int64_t column_blocks = ceil_div(columns, 32), blocks = outer * column_blocks;
  if (out_is_double) {
    launch(name, sum_parts_kernel<double>, blocks, kThreads, stream, partial, parts, columns, column_blocks, taps,
           channels, static_cast<double*>(out));
  } else {
    launch(name, sum_parts_kernel<float>, blocks, kThreads, stream, partial, parts, columns, column_blocks, taps,
           channels, static_cast<float*>(out));
  }
}

}  // namespace hubert_fast::cuda
