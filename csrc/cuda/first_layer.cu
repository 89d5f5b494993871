// Layer 0 in closed form. Notation: X[t, k] = x[stride t + k], frames t, taps k, filters w_c; design: "The mathematics that
// makes the front end fast". Sums over frames are made in two stages: parts of fixed size in float32 (double for the
// moments), then their sum in double in a fixed order. There are no atomics, so results repeat to the bit.
#include "first_layer.h"
#include "launch.h"
#include "vectors.h"

namespace hubert_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxTaps = 16;
constexpr int kMaxChannels = 1024;
constexpr int kForwardFrames = 256;  // of one block

HUBERT_FAST_HOST_DEVICE std::int64_t valid_frames(const FirstLayer& layer, const std::int64_t* valid_samples,
                                                  std::int64_t row) {
  if (valid_samples == nullptr) return layer.frames;
  const std::int64_t samples = valid_samples[row];
  if (samples < layer.kernel) return 0;
  const std::int64_t frames = (samples - layer.kernel) / layer.stride + 1;
  return frames < layer.frames ? frames : layer.frames;
}

// The pair (j, k), j <= k, of product number `index` of `kernel` taps: (0, 0), (0, 1), ..., (1, 1), ...
HUBERT_FAST_HOST_DEVICE void product_pair(int index, int kernel, int* j, int* k) {
  int first = 0;
  while (index >= kernel - first) {
    index -= kernel - first;
    ++first;
  }
  *j = first;
  *k = first + index;
}

HUBERT_FAST_HOST_DEVICE int product_index(int j, int k, int kernel) {
  const int low = j < k ? j : k, high = j < k ? k : j;
  return low * kernel - low * (low - 1) / 2 + high - low;
}

// What all blocks that stage a stretch of the signal do: samples [start, start + count) of a row, less `offset`; zero where
// the row ends before.
__device__ void stage_signal(const FirstLayer& layer, std::int64_t row, std::int64_t first_frame, int count,
                             float offset, float* staged) {
  const float* signal = layer.signal + row * layer.signal_stride + first_frame * layer.stride;
  const std::int64_t left = (layer.frames - 1 - first_frame) * layer.stride + layer.kernel;
  for (int i = thread_index(); i < count; i += kThreads) staged[i] = i < left ? signal[i] - offset : 0.0f;
}

__global__ void __launch_bounds__(kThreads)
    moments_kernel(FirstLayer layer, const std::int64_t* valid_samples, double* partial, int parts) {
  __shared__ float staged[kMomentFrames * kMaxTaps + kMaxTaps];
  __shared__ double sums[kThreads];
  const std::int64_t row = block_index() / parts;
  const std::int64_t first_frame = block_index() % parts * kMomentFrames;
  stage_signal(layer, row, first_frame, (kMomentFrames - 1) * layer.stride + layer.kernel, 0.0f, staged);
  __syncthreads();

  const std::int64_t left = valid_frames(layer, valid_samples, row) - first_frame;
  const int frames = left < 0 ? 0 : left < kMomentFrames ? static_cast<int>(left) : kMomentFrames;
  const double shift = layer.signal[row * layer.signal_stride];
  const int count = layer.kernel + layer.kernel * (layer.kernel + 1) / 2;
  const int slices = kThreads / count;
  const int quantity = thread_index() % count, slice = thread_index() / count;
  double sum = 0.0;
  if (slice < slices) {
    int j = quantity, k = 0;
    const bool is_product = quantity >= layer.kernel;
    if (is_product) product_pair(quantity - layer.kernel, layer.kernel, &j, &k);
    for (int t = slice; t < frames; t += slices) {
      const float* window = staged + t * layer.stride;
      const double first = window[j] - shift;
      sum += is_product ? first * (window[k] - shift) : first;
    }
  }
  sums[thread_index()] = sum;
  __syncthreads();
  if (thread_index() < count) {
    for (int other = 1; other < slices; ++other) sum += sums[other * count + thread_index()];
    partial[block_index() * count + thread_index()] = sum;
  }
}

// One block a row of the batch.
__global__ void __launch_bounds__(kThreads)
    group_norm_kernel(FirstLayer layer, const std::int64_t* valid_samples, const double* partial, int parts,
                      const float* weight, const float* norm_weight, const float* norm_bias, double epsilon,
                      double* statistics, float* filters) {
  __shared__ double sums[kThreads];
  __shared__ double mean[kMaxTaps];
  __shared__ double covariance[kMaxTaps * kMaxTaps];
  __shared__ float offset;
  const std::int64_t row = block_index();
  const int kernel = layer.kernel;
  const int count = kernel + kernel * (kernel + 1) / 2;
  const int slices = kThreads / count;
  const int quantity = thread_index() % count, slice = thread_index() / count;
  double sum = 0.0;
  if (slice < slices) {
    for (int part = slice; part < parts; part += slices) sum += partial[(row * parts + part) * count + quantity];
  }
  sums[thread_index()] = sum;
  __syncthreads();
  if (thread_index() < count) {
    for (int other = 1; other < slices; ++other) sum += sums[other * count + thread_index()];
    sums[thread_index()] = sum;
  }
  __syncthreads();

  const std::int64_t frames = valid_frames(layer, valid_samples, row);
  const double inverse = 1.0 / static_cast<double>(frames < 1 ? 1 : frames);
  const double shift = frames < 1 ? 0.0 : layer.signal[row * layer.signal_stride];
  const int size = kernel + kernel * kernel + 1;
  if (thread_index() < kernel) mean[thread_index()] = sums[thread_index()] * inverse;
  __syncthreads();
  if (thread_index() < kernel * kernel) {
    const int j = thread_index() / kernel, k = thread_index() % kernel;
    const double value = sums[kernel + product_index(j, k, kernel)] * inverse - mean[j] * mean[k];
    covariance[thread_index()] = value;
    statistics[row * size + kernel + thread_index()] = value;
  }
  __syncthreads();
  if (thread_index() < kernel) {
    mean[thread_index()] += shift;
    statistics[row * size + thread_index()] = mean[thread_index()];
  }
  __syncthreads();
  if (thread_index() == 0) {
    double total = 0.0;
    for (int k = 0; k < kernel; ++k) total += mean[k];
    offset = static_cast<float>(total / kernel);
    statistics[row * size + size - 1] = offset;
  }
  __syncthreads();
  for (int c = thread_index(); c < layer.channels; c += kThreads) {
    double variance = 0.0, centre = 0.0;
    for (int j = 0; j < kernel; ++j) {
      double inner = 0.0;
      for (int k = 0; k < kernel; ++k) inner += covariance[j * kernel + k] * weight[c * kernel + k];
      variance += inner * weight[c * kernel + j];
      centre += (mean[j] - offset) * weight[c * kernel + j];
    }
    const double scale = norm_weight[c] / sqrt((variance > 0.0 ? variance : 0.0) + epsilon);
    float* column = filters + row * (kernel + 1) * layer.channels + c;
    for (int k = 0; k < kernel; ++k) {
      column[static_cast<std::int64_t>(k) * layer.channels] = static_cast<float>(scale * weight[c * kernel + k]);
    }
    column[static_cast<std::int64_t>(kernel) * layer.channels] = static_cast<float>(norm_bias[c] - scale * centre);
  }
}

// Where the parts of layer norm's statistics begin.
struct LayerNormStatistics {
  int kernel;
  HUBERT_FAST_HOST_DEVICE int cross() const { return kernel * kernel; }      // of taps with the bias
  HUBERT_FAST_HOST_DEVICE int constant() const { return cross() + kernel; }  // variance of the bias
  HUBERT_FAST_HOST_DEVICE int mean() const { return constant() + 1; }        // the mean filter
  HUBERT_FAST_HOST_DEVICE int mean_bias() const { return mean() + kernel; }
};

// One block. Tap `kernel` stands for the bias.
__global__ void __launch_bounds__(kThreads)
    layer_norm_kernel(FirstLayer layer, const float* weight, const float* bias, const float* norm_weight,
                      double* statistics, float* filters) {
  __shared__ double mean[kMaxTaps + 1];
  const int kernel = layer.kernel, channels = layer.channels;
  const LayerNormStatistics at{kernel};
  auto tap = [&](int c, int k) -> double {
    if (k < kernel) return weight[c * kernel + k];
    return bias == nullptr ? 0.0 : bias[c];
  };
  if (thread_index() <= kernel) {
    const int k = thread_index();
    double sum = 0.0;
    for (int c = 0; c < channels; ++c) sum += tap(c, k);
    mean[k] = sum / channels;
    statistics[k < kernel ? at.mean() + k : at.mean_bias()] = mean[k];
  }
  __syncthreads();
  // Pairs of taps, the bias among them: (kernel + 1)^2 may be a few more than there are threads.
  for (int pair = thread_index(); pair < (kernel + 1) * (kernel + 1); pair += kThreads) {
    const int j = pair / (kernel + 1), k = pair % (kernel + 1);
    double sum = 0.0;
    for (int c = 0; c < channels; ++c) sum += (tap(c, j) - mean[j]) * (tap(c, k) - mean[k]);
    sum /= channels;
    if (j < kernel && k < kernel) statistics[j * kernel + k] = sum;
    if (j < kernel && k == kernel) statistics[at.cross() + j] = sum;
    if (j == kernel && k == kernel) statistics[at.constant()] = sum;
  }
  for (int c = thread_index(); c < channels; c += kThreads) {
    for (int k = 0; k <= kernel; ++k) {
      filters[k * channels + c] = static_cast<float>((tap(c, k) - mean[k]) * norm_weight[c]);
    }
  }
}

// Layer norm's 1 / sqrt(variance over channels + epsilon) of the frame whose window starts at `window`, in double: the
// quadratic form cancels where the signal has an offset that the filters take out.
__device__ float frame_rstd(const double* statistics, int kernel, const float* window, double epsilon) {
  const LayerNormStatistics at{kernel};
  double variance = statistics[at.constant()];
  for (int j = 0; j < kernel; ++j) {
    double inner = 0.5 * statistics[j * kernel + j] * window[j] + statistics[at.cross() + j];
    for (int k = j + 1; k < kernel; ++k) inner += statistics[j * kernel + k] * window[k];
    variance += 2.0 * inner * window[j];
  }
  return static_cast<float>(1.0 / sqrt((variance > 0.0 ? variance : 0.0) + epsilon));
}

// How the threads of a block share frames and channels: a thread keeps kWidth channels and walks over a run of frames. A
// frame's threads fill whole warps, so that sums over channels stay within them.
template <int kWidth>
struct Share {
  int groups;  // threads with channels
  int slots;   // frames at a time
  int group;
  int slot;
  bool active;
  HUBERT_FAST_HOST_DEVICE Share(int channels, int thread) {
    groups = channels / kWidth;
    const int padded = (groups + 31) / 32 * 32;
    slots = kThreads / padded;
    group = thread % padded;
    slot = thread / padded;
    active = group < groups && slot < slots;
  }
};

// Taps and stride that are known when compiling, or (kStride 0) up to 16 taps and any stride.
template <int kTaps_, int kStride_>
struct Taps {
  static constexpr int kTaps = kTaps_;
  static constexpr int kStride = kStride_;
};
using HubertTaps = Taps<10, 5>;
using AnyTaps = Taps<kMaxTaps, 0>;

// A window of the staged signal in registers, moved on by one frame at a time.
template <class Shape>
struct Window {
  float x[Shape::kTaps];

  __device__ void begin(const float* staged, int frame) {
    if constexpr (Shape::kStride > 0) {
#pragma unroll
      for (int k = 0; k < Shape::kTaps - Shape::kStride; ++k)
        x[k + Shape::kStride] = staged[frame * Shape::kStride + k];
    }
  }
  __device__ void advance(const float* staged, int frame, const FirstLayer& layer) {
    if constexpr (Shape::kStride > 0) {
      constexpr int kKept = Shape::kTaps - Shape::kStride;
#pragma unroll
      for (int k = 0; k < kKept; ++k) x[k] = x[k + Shape::kStride];
#pragma unroll
      for (int k = kKept; k < Shape::kTaps; ++k) x[k] = staged[frame * Shape::kStride + k];
    } else {
#pragma unroll
      for (int k = 0; k < Shape::kTaps; ++k) x[k] = k < layer.kernel ? staged[frame * layer.stride + k] : 0.0f;
    }
  }
};

template <class Shape, int kWidth>
struct Filters {
  float taps[Shape::kTaps][kWidth];
  float shift[kWidth];

  __device__ void load(const float* filters, const FirstLayer& layer, int channel) {
#pragma unroll
    for (int k = 0; k < Shape::kTaps; ++k) {
      if (Shape::kStride > 0 || k < layer.kernel) {
        load_floats<kWidth>(filters + static_cast<std::int64_t>(k) * layer.channels + channel, taps[k]);
      } else {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) taps[k][i] = 0.0f;
      }
    }
    load_floats<kWidth>(filters + static_cast<std::int64_t>(layer.kernel) * layer.channels + channel, shift);
  }
  __device__ float apply(const Window<Shape>& window, int i) const {
    float sum = shift[i];
#pragma unroll
    for (int k = 0; k < Shape::kTaps; ++k) sum = fmaf(taps[k][i], window.x[k], sum);
    return sum;
  }
};

template <class Shape>
constexpr int staged_samples(int frames) {
  return frames * (Shape::kStride > 0 ? Shape::kStride : kMaxTaps) + kMaxTaps;
}

// One block a multiprocessor is enough for ptxas: for two it would spill a few registers of layer norm's on sm_80.
template <class T, bool kLayerNorm, class Shape>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(FirstLayer layer, const double* statistics, const float* filters, const float* norm_bias,
                   double epsilon, T* activations, std::int64_t rows, int parts) {
  constexpr int kWidth = 8;
  using Activation = typename GeluFor<T>::type;
  __shared__ float staged[staged_samples<Shape>(kForwardFrames)];
  __shared__ float rstd[kLayerNorm ? kForwardFrames : 1];
  const std::int64_t row = block_index() / parts;
  const std::int64_t first_frame = block_index() % parts * kForwardFrames;
  const int kernel = layer.kernel;
  float offset = 0.0f;
  if (!kLayerNorm) {
    const int size = kernel + kernel * kernel + 1;
    offset = static_cast<float>(statistics[row * size + size - 1]);
    filters += row * (kernel + 1) * layer.channels;
  }
  stage_signal(layer, row, first_frame, (kForwardFrames - 1) * layer.stride + kernel, offset, staged);
  __syncthreads();
  if (kLayerNorm) {
    for (int t = thread_index(); t < kForwardFrames; t += kThreads) {
      rstd[t] = frame_rstd(statistics, kernel, staged + t * layer.stride, epsilon);
    }
    __syncthreads();
  }

  const Share<kWidth> share(layer.channels, thread_index());
  if (!share.active) return;
  const int channel = share.group * kWidth;
  Filters<Shape, kWidth> filter;
  filter.load(filters, layer, channel);
  float bias[kWidth];
  if (kLayerNorm) load_floats<kWidth>(norm_bias + channel, bias);

  const int run = (kForwardFrames + share.slots - 1) / share.slots;
  const int begin = share.slot * run;
  const std::int64_t rows_left = rows - first_frame, frames_left = layer.frames - first_frame;
  int end = begin + run < kForwardFrames ? begin + run : kForwardFrames;
  if (end > rows_left) end = static_cast<int>(rows_left);
  T* out = activations + (row * rows + first_frame) * layer.channels + channel;
  Window<Shape> window;
  if (begin < end) window.begin(staged, begin);
  for (int t = begin; t < end; ++t) {
    window.advance(staged, t, layer);
    float values[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      float z = filter.apply(window, i);
      if (kLayerNorm) z = fmaf(z, rstd[t], bias[i]);
      values[i] = t < frames_left ? Activation::value(z) : 0.0f;
    }
    store_floats<kWidth>(out + static_cast<std::int64_t>(t) * layer.channels, values);
  }
}

// Sums over the slots of one quantity that each thread holds for its channels, written for the block.
template <int kWidth>
__device__ void reduce_slots(const Share<kWidth>& share, int channels, const float* values, float* scratch,
                             float* out) {
  __syncthreads();
  if (share.active) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) scratch[share.slot * channels + share.group * kWidth + i] = values[i];
  }
  __syncthreads();
  for (int c = thread_index(); c < channels; c += kThreads) {
    float sum = scratch[c];
    for (int slot = 1; slot < share.slots; ++slot) sum += scratch[slot * channels + c];
    out[c] = sum;
  }
}

template <class T, class Shape, int kWidth>
__global__ void __launch_bounds__(kThreads)
    group_norm_backward_kernel(FirstLayer layer, const double* statistics, const float* filters, T* gradients,
                               std::int64_t rows, float* partial, int parts) {
  constexpr int kFrames = kGroupNormBackwardFrames;
  using Activation = typename GeluFor<T>::type;
  __shared__ float staged[staged_samples<Shape>(kFrames)];
  __shared__ float scratch[kThreads * kWidth];
  const std::int64_t row = block_index() / parts;
  const std::int64_t first_frame = block_index() % parts * kFrames;
  const int kernel = layer.kernel, size = kernel + kernel * kernel + 1;
  const float offset = static_cast<float>(statistics[row * size + size - 1]);
  stage_signal(layer, row, first_frame, (kFrames - 1) * layer.stride + kernel, offset, staged);
  __syncthreads();

  const Share<kWidth> share(layer.channels, thread_index());
  const int channel = share.group * kWidth;
  float products[Shape::kTaps][kWidth] = {};
  float total[kWidth] = {};
  if (share.active) {
    Filters<Shape, kWidth> filter;
    filter.load(filters + row * (kernel + 1) * layer.channels, layer, channel);
    const int run = (kFrames + share.slots - 1) / share.slots;
    const int begin = share.slot * run;
    const std::int64_t left = layer.frames - first_frame;
    int end = begin + run < kFrames ? begin + run : kFrames;
    if (end > left) end = static_cast<int>(left);
    T* at = gradients + (row * rows + first_frame + begin) * layer.channels + channel;
    Window<Shape> window;
    Packed<T, kWidth> next;
    if (begin < end) {
      window.begin(staged, begin);
      next.load(at);
    }
    for (int t = begin; t < end; ++t, at += layer.channels) {
      const Packed<T, kWidth> packed = next;
      if (t + 1 < end) next.load(at + layer.channels);
      float values[kWidth];
      packed.to_floats(values);
      window.advance(staged, t, layer);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const Gelu gelu = Activation::both(filter.apply(window, i));
        const float gradient = values[i] * gelu.derivative;
        values[i] = gelu.value;
        total[i] += gradient;
#pragma unroll
        for (int k = 0; k < Shape::kTaps; ++k) products[k][i] = fmaf(gradient, window.x[k], products[k][i]);
      }
      store_floats<kWidth>(at, values);
    }
  }
  float* out = partial + block_index() * (kernel + 1) * layer.channels;
#pragma unroll
  for (int k = 0; k < Shape::kTaps; ++k) {
    if (k < kernel) reduce_slots(share, layer.channels, products[k], scratch, out + k * layer.channels);
  }
  reduce_slots(share, layer.channels, total, scratch, out + kernel * layer.channels);
}

__device__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// With y = norm_weight x_hat + norm_bias, dy = grad GELU'(y), r the frame's 1 / sqrt(variance + epsilon):
// dz = r (norm_weight dy - s1 - x_hat s2), s1 = mean over channels of norm_weight dy, s2 = that of norm_weight dy x_hat.
// As x_hat is r times a linear function of the frame's window, sums over frames of dz and dz X fall into sums of r dy and
// r dy X, one of each a channel, and sums of r s1, r s1 X, r^2 s2 X X^T, r^2 s2 X and r^2 s2, which no channel enters.
template <class T, class Shape>
__global__ void __launch_bounds__(kThreads)
    layer_norm_backward_kernel(FirstLayer layer, const double* statistics, const float* filters,
                               const float* norm_weight, const float* norm_bias, double epsilon, T* gradients,
                               std::int64_t rows, float* partial, float* frame_partial, int parts) {
  constexpr int kWidth = 4;
  constexpr int kFrames = kLayerNormBackwardFrames;
  constexpr int kWarps = kThreads / 32;
  using Activation = typename GeluFor<T>::type;
  __shared__ float staged[staged_samples<Shape>(kFrames)];
  __shared__ float rstd[kFrames];
  // Sums over a frame's channels, by the warp that made them; afterwards [0] holds r s1 and r^2 s2.
  __shared__ float channel_sums[kFrames][kWarps][2];
  __shared__ float scratch[kThreads * kWidth];
  const std::int64_t row = block_index() / parts;
  const std::int64_t first_frame = block_index() % parts * kFrames;
  const int kernel = layer.kernel;
  const std::int64_t left = layer.frames - first_frame;
  const int frames = left < kFrames ? static_cast<int>(left) : kFrames;
  stage_signal(layer, row, first_frame, (kFrames - 1) * layer.stride + kernel, 0.0f, staged);
  __syncthreads();
  for (int t = thread_index(); t < kFrames; t += kThreads) {
    rstd[t] = frame_rstd(statistics, kernel, staged + t * layer.stride, epsilon);
  }
  __syncthreads();

  const Share<kWidth> share(layer.channels, thread_index());
  const int warps = (share.groups + 31) / 32;  // of a frame
  const int channel = share.active ? share.group * kWidth : 0;
  float products[Shape::kTaps][kWidth] = {};
  float scaled_total[kWidth] = {}, total[kWidth] = {};
  if (share.slot < share.slots) {  // whole warps, as they sum over their channels together
    Filters<Shape, kWidth> filter;
    filter.load(filters, layer, channel);
    float gain[kWidth], bias[kWidth];
    load_floats<kWidth>(norm_weight + channel, gain);
    load_floats<kWidth>(norm_bias + channel, bias);
    const int run = (kFrames + share.slots - 1) / share.slots;
    const int begin = share.slot * run;
    const int end = begin + run < frames ? begin + run : frames;
    T* at = gradients + (row * rows + first_frame + begin) * layer.channels + channel;
    Window<Shape> window;
    if (begin < end) window.begin(staged, begin);
    for (int t = begin; t < end; ++t, at += layer.channels) {
      window.advance(staged, t, layer);
      float first = 0.0f, second = 0.0f;
      if (share.active) {
        float values[kWidth];
        load_floats<kWidth>(at, values);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const float normalised = filter.apply(window, i) * rstd[t];  // norm_weight x_hat
          const Gelu gelu = Activation::both(normalised + bias[i]);
          const float gradient = values[i] * gelu.derivative;
          values[i] = gelu.value;
          first = fmaf(gain[i], gradient, first);
          second = fmaf(normalised, gradient, second);
          total[i] += gradient;
          const float scaled = gradient * rstd[t];
          scaled_total[i] += scaled;
#pragma unroll
          for (int k = 0; k < Shape::kTaps; ++k) products[k][i] = fmaf(scaled, window.x[k], products[k][i]);
        }
        store_floats<kWidth>(at, values);
      }
      first = warp_sum(first);
      second = warp_sum(second);
      if (share.group % 32 == 0) {
        channel_sums[t][share.group / 32][0] = first;
        channel_sums[t][share.group / 32][1] = second;
      }
    }
  }
  __syncthreads();
  const float inverse = 1.0f / static_cast<float>(layer.channels);
  for (int t = thread_index(); t < frames; t += kThreads) {
    float first = 0.0f, second = 0.0f;
    for (int warp = 0; warp < warps; ++warp) {
      first += channel_sums[t][warp][0];
      second += channel_sums[t][warp][1];
    }
    channel_sums[t][0][0] = first * inverse * rstd[t];
    channel_sums[t][0][1] = second * inverse * rstd[t] * rstd[t];
  }
  __syncthreads();
  // In the order of frame_partial: r s1 X, r s1, r^2 s2 X, r^2 s2, r^2 s2 X X^T.
  const int linear = kernel + 1;
  const int sums = 2 * linear + kernel * (kernel + 1) / 2;
  for (int quantity = thread_index(); quantity < sums; quantity += kThreads) {
    const int which = quantity < linear ? 0 : 1;
    int j = which == 0 ? quantity : quantity - linear, k = kernel;
    if (quantity >= 2 * linear) product_pair(quantity - 2 * linear, kernel, &j, &k);
    float sum = 0.0f;
    for (int t = 0; t < frames; ++t) {
      const float* window = staged + t * layer.stride;
      const float first = j < kernel ? window[j] : 1.0f, second = k < kernel ? window[k] : 1.0f;
      sum = fmaf(channel_sums[t][0][which], first * second, sum);
    }
    frame_partial[block_index() * sums + quantity] = sum;
  }

  float* out = partial + block_index() * (kernel + 2) * layer.channels;
#pragma unroll
  for (int k = 0; k < Shape::kTaps; ++k) {
    if (k < kernel) reduce_slots(share, layer.channels, products[k], scratch, out + k * layer.channels);
  }
  reduce_slots(share, layer.channels, scaled_total, scratch, out + kernel * layer.channels);
  reduce_slots(share, layer.channels, total, scratch, out + (kernel + 1) * layer.channels);
}

constexpr int kFinishThreads = 64;

// With P = sum_t dz (X[t] - m), S0 = sum_t dz, r the channel's 1 / sqrt(variance + epsilon), C the covariance of the taps:
// d norm_bias = S0, d norm_weight = r w . P, dw = norm_weight r (P - d norm_weight r C w), each summed over the batch.
__global__ void __launch_bounds__(kFinishThreads)
    group_norm_finish_kernel(FirstLayer layer, const double* statistics, const double* sums, const float* weight,
                             const float* norm_weight, double epsilon, float* weight_grad, float* norm_weight_grad,
                             float* norm_bias_grad) {
  const int c = static_cast<int>(block_index()) * kFinishThreads + thread_index();
  if (c >= layer.channels) return;
  const int kernel = layer.kernel, size = kernel + kernel * kernel + 1;
  double filter[kMaxTaps], grad[kMaxTaps];
#pragma unroll
  for (int k = 0; k < kMaxTaps; ++k) {
    filter[k] = k < kernel ? static_cast<double>(weight[c * kernel + k]) : 0.0;
    grad[k] = 0.0;
  }
  double gain_grad = 0.0, bias_grad = 0.0;
  for (std::int64_t row = 0; row < layer.batch; ++row) {
    const double* mean = statistics + row * size;
    const double* covariance = mean + kernel;
    const double offset = mean[size - 1];
    const double* column = sums + row * (kernel + 1) * layer.channels + c;
    const double total = column[static_cast<std::int64_t>(kernel) * layer.channels];
    double centred[kMaxTaps], spread[kMaxTaps];
    double variance = 0.0, along = 0.0;
#pragma unroll
    for (int j = 0; j < kMaxTaps; ++j) {
      centred[j] = spread[j] = 0.0;
      if (j >= kernel) continue;
      centred[j] = column[static_cast<std::int64_t>(j) * layer.channels] - total * (mean[j] - offset);
#pragma unroll
      for (int k = 0; k < kMaxTaps; ++k) {
        if (k < kernel) spread[j] += covariance[j * kernel + k] * filter[k];
      }
      variance += spread[j] * filter[j];
      along += centred[j] * filter[j];
    }
    const double rstd = 1.0 / sqrt((variance > 0.0 ? variance : 0.0) + epsilon);
    const double own = rstd * along;
    gain_grad += own;
    bias_grad += total;
#pragma unroll
    for (int k = 0; k < kMaxTaps; ++k) grad[k] += norm_weight[c] * rstd * (centred[k] - own * rstd * spread[k]);
  }
#pragma unroll
  for (int k = 0; k < kMaxTaps; ++k) {
    if (k < kernel) weight_grad[c * kernel + k] = static_cast<float>(grad[k]);
  }
  norm_weight_grad[c] = static_cast<float>(gain_grad);
  norm_bias_grad[c] = static_cast<float>(bias_grad);
}

__global__ void __launch_bounds__(kFinishThreads)
    layer_norm_finish_kernel(FirstLayer layer, const double* statistics, const double* sums, const double* frame_sums,
                             const float* weight, const float* bias, const float* norm_weight, float* weight_grad,
                             float* bias_grad, float* norm_weight_grad, float* norm_bias_grad) {
  const int c = static_cast<int>(block_index()) * kFinishThreads + thread_index();
  if (c >= layer.channels) return;
  const int kernel = layer.kernel, linear = kernel + 1;
  const LayerNormStatistics at{kernel};
  const double* s1 = frame_sums;            // r s1 X, r s1
  const double* s2 = frame_sums + linear;   // r^2 s2 X, r^2 s2
  const double* s2_products = s2 + linear;  // r^2 s2 X X^T
  auto sum = [&](int index) { return sums[static_cast<std::int64_t>(index) * layer.channels + c]; };
  auto tap = [&](int k) { return weight[c * kernel + k] - statistics[at.mean() + k]; };
  const double centred_bias = (bias == nullptr ? 0.0 : bias[c]) - statistics[at.mean_bias()];
  double gain_grad = centred_bias * sum(kernel), through_bias = centred_bias * s2[kernel];
  for (int j = 0; j < kernel; ++j) {
    double through = centred_bias * s2[j];
    for (int k = 0; k < kernel; ++k) through += s2_products[product_index(j, k, kernel)] * tap(k);
    weight_grad[c * kernel + j] = static_cast<float>(norm_weight[c] * sum(j) - s1[j] - through);
    gain_grad += tap(j) * sum(j);
    through_bias += tap(j) * s2[j];
  }
  if (bias_grad != nullptr) {
    bias_grad[c] = static_cast<float>(norm_weight[c] * sum(kernel) - s1[kernel] - through_bias);
  }
  norm_weight_grad[c] = static_cast<float>(gain_grad);
  norm_bias_grad[c] = static_cast<float>(sum(kernel + 1));
}

void check(const FirstLayer& layer, const char* name) {
  require(layer.batch > 0 && layer.frames > 0, name, "batch and frames must be positive");
  require(layer.kernel >= 1 && layer.kernel <= kMaxTaps, name, "kernel must be 1 to 16");
  require(layer.stride >= 1 && layer.stride <= kMaxTaps, name, "stride must be 1 to 16");
  require(layer.channels % 64 == 0 && layer.channels >= 64 && layer.channels <= kMaxChannels, name,
          "channels must be a multiple of 64, at most 1024");
  require(layer.batch == 1 || layer.signal_stride >= (layer.frames - 1) * layer.stride + layer.kernel, name,
          "signal_stride is shorter than the frames read");
}

int part_count(const FirstLayer& layer, std::int64_t rows, int frames, const char* name) {
  const std::int64_t parts = ceil_div(rows, frames);
  require(parts * layer.batch <= 2147483647, name, "the batch is too long");
  return static_cast<int>(parts);
}

bool is_hubert(const FirstLayer& layer) {
  return layer.kernel == HubertTaps::kTaps && layer.stride == HubertTaps::kStride;
}

// Calls function(T()) with the C++ type of a dtype.
template <class Function>
void with_type(Dtype dtype, const char* name, Function function) {
  switch (dtype) {
    case Dtype::kFloat32:
      return function(float());
    case Dtype::kBfloat16:
      return function(Bfloat16());
    case Dtype::kFloat16:
      return function(Float16());
  }
  require(false, name, "unknown dtype");
}

}  // namespace

void first_layer_moments(const FirstLayer& layer, const std::int64_t* valid_samples, double* partial,
                         cudaStream_t stream) {
  const char* name = "first_layer_moments";
  check(layer, name);
  const int parts = part_count(layer, layer.frames, kMomentFrames, name);
  launch(name, moments_kernel, layer.batch * parts, kThreads, stream, layer, valid_samples, partial, parts);
}

void first_layer_group_norm(const FirstLayer& layer, const std::int64_t* valid_samples, const double* partial,
                            const float* weight, const float* norm_weight, const float* norm_bias, double epsilon,
                            double* statistics, float* filters, cudaStream_t stream) {
  const char* name = "first_layer_group_norm";
  check(layer, name);
  const int parts = part_count(layer, layer.frames, kMomentFrames, name);
  launch(name, group_norm_kernel, layer.batch, kThreads, stream, layer, valid_samples, partial, parts, weight,
         norm_weight, norm_bias, epsilon, statistics, filters);
}

void first_layer_layer_norm(const FirstLayer& layer, const float* weight, const float* bias, const float* norm_weight,
                            double* statistics, float* filters, cudaStream_t stream) {
  const char* name = "first_layer_layer_norm";
  check(layer, name);
  launch(name, layer_norm_kernel, 1, kThreads, stream, layer, weight, bias, norm_weight, statistics, filters);
}

void first_layer_forward(const FirstLayer& layer, const double* statistics, const float* filters,
                         const float* norm_bias, double epsilon, void* activations, std::int64_t rows, Dtype dtype,
                         cudaStream_t stream) {
  const char* name = "first_layer_forward";
  check(layer, name);
  require(rows >= layer.frames, name, "rows must be at least frames");
  const int parts = part_count(layer, rows, kForwardFrames, name);
  with_type(dtype, name, [&](auto element) {
    using T = decltype(element);
    auto start = [&](auto kernel) {
      launch(name, kernel, layer.batch * parts, kThreads, stream, layer, statistics, filters, norm_bias, epsilon,
             static_cast<T*>(activations), rows, parts);
    };
    if (norm_bias == nullptr) {
      is_hubert(layer) ? start(forward_kernel<T, false, HubertTaps>) : start(forward_kernel<T, false, AnyTaps>);
    } else {
      is_hubert(layer) ? start(forward_kernel<T, true, HubertTaps>) : start(forward_kernel<T, true, AnyTaps>);
    }
  });
}

void first_layer_group_norm_backward(const FirstLayer& layer, const double* statistics, const float* filters,
                                     void* gradients, std::int64_t rows, float* partial, Dtype dtype,
                                     cudaStream_t stream) {
  const char* name = "first_layer_group_norm_backward";
  check(layer, name);
  require(rows >= layer.frames, name, "rows must be at least frames");
  const int parts = part_count(layer, layer.frames, kGroupNormBackwardFrames, name);
  with_type(dtype, name, [&](auto element) {
    using T = decltype(element);
    auto start = [&](auto kernel) {
      launch(name, kernel, layer.batch * parts, kThreads, stream, layer, statistics, filters,
             static_cast<T*>(gradients), rows, partial, parts);
    };
    is_hubert(layer) ? start(group_norm_backward_kernel<T, HubertTaps, 8>)
                     : start(group_norm_backward_kernel<T, AnyTaps, 4>);
  });
}

void first_layer_layer_norm_backward(const FirstLayer& layer, const double* statistics, const float* filters,
                                     const float* norm_weight, const float* norm_bias, double epsilon, void* gradients,
                                     std::int64_t rows, float* partial, float* frame_partial, Dtype dtype,
                                     cudaStream_t stream) {
  const char* name = "first_layer_layer_norm_backward";
  check(layer, name);
  require(rows >= layer.frames, name, "rows must be at least frames");
  const int parts = part_count(layer, layer.frames, kLayerNormBackwardFrames, name);
  with_type(dtype, name, [&](auto element) {
    using T = decltype(element);
    auto start = [&](auto kernel) {
      launch(name, kernel, layer.batch * parts, kThreads, stream, layer, statistics, filters, norm_weight, norm_bias,
             epsilon, static_cast<T*>(gradients), rows, partial, frame_partial, parts);
    };
    is_hubert(layer) ? start(layer_norm_backward_kernel<T, HubertTaps>) : start(layer_norm_backward_kernel<T, AnyTaps>);
  });
}

void first_layer_group_norm_finish(const FirstLayer& layer, const double* statistics, const double* sums,
                                   const float* weight, const float* norm_weight, double epsilon, float* weight_grad,
                                   float* norm_weight_grad, float* norm_bias_grad, cudaStream_t stream) {
  const char* name = "first_layer_group_norm_finish";
  check(layer, name);
  launch(name, group_norm_finish_kernel, ceil_div(layer.channels, kFinishThreads), kFinishThreads, stream, layer,
         statistics, sums, weight, norm_weight, epsilon, weight_grad, norm_weight_grad, norm_bias_grad);
}

void first_layer_layer_norm_finish(const FirstLayer& layer, const double* statistics, const double* sums,
                                   const double* frame_sums, const float* weight, const float* bias,
                                   const float* norm_weight, float* weight_grad, float* bias_grad,
                                   float* norm_weight_grad, float* norm_bias_grad, cudaStream_t stream) {
  const char* name = "first_layer_layer_norm_finish";
  check(layer, name);
  launch(name, layer_norm_finish_kernel, ceil_div(layer.channels, kFinishThreads), kFinishThreads, stream, layer,
         statistics, sums, frame_sums, weight, bias, norm_weight, weight_grad, bias_grad, norm_weight_grad,
         norm_bias_grad);
}

}  // namespace hubert_fast::cuda
