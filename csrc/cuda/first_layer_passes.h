// What both norms' passes over layer 0 share. Notation: X[t, k] = x[stride t + k], frames t, taps k, filters w_c; design: "The
// mathematics that makes the front end fast". Sums over frames are made in two stages: parts of fixed size in float32 (double
// for the moments), then their sum in double in a fixed order. There are no atomics, so results repeat to the bit.
#pragma once

#include "first_layer.h"
#include "launch.h"
#include "vectors.h"

namespace hubert_fast::cuda {

constexpr int kThreads = 256;
constexpr int kMaxTaps = 16;
constexpr int kMaxChannels = 1024;
constexpr int kForwardFrames = 256;  // of one block
constexpr int kFinishThreads = 64;

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
__device__ inline void stage_signal(const FirstLayer& layer, std::int64_t row, std::int64_t first_frame, int count,
                                    float offset, float* staged) {
  const float* signal = layer.signal + row * layer.signal_stride + first_frame * layer.stride;
  const std::int64_t left = (layer.frames - 1 - first_frame) * layer.stride + layer.kernel;
  for (int i = thread_index(); i < count; i += kThreads) staged[i] = i < left ? signal[i] - offset : 0.0f;
}

// Where the parts of layer norm's statistics begin.
struct LayerNormStatistics {
  int kernel;
  HUBERT_FAST_HOST_DEVICE int cross() const { return kernel * kernel; }      // of taps with the bias
  HUBERT_FAST_HOST_DEVICE int constant() const { return cross() + kernel; }  // variance of the bias
  HUBERT_FAST_HOST_DEVICE int mean() const { return constant() + 1; }        // the mean filter
  HUBERT_FAST_HOST_DEVICE int mean_bias() const { return mean() + kernel; }
};

// Layer norm's 1 / sqrt(variance over channels + epsilon) of the frame whose window starts at `window`, in double: the
// quadratic form cancels where the signal has an offset that the filters take out.
__device__ inline float frame_rstd(const double* statistics, int kernel, const float* window, double epsilon) {
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

// The runs of channels that a thread reads of consecutive frames, `channels` values apart: kFrames of them are on their way
// while one is worked on.
template <class T, int kWidth, int kFrames>
class Ahead {
 public:
  __device__ Ahead(const T* first, int channels, int count) : channels_(channels) {
#pragma unroll
    for (int i = 0; i < kFrames; ++i) {
      if (i < count) runs_[i].load(first + i * channels);
    }
  }
  // The run at `at`, of a frame that has `left` more after it.
  __device__ Packed<T, kWidth> next(const T* at, int left) {
    const Packed<T, kWidth> run = runs_[0];
#pragma unroll
    for (int i = 1; i < kFrames; ++i) runs_[i - 1] = runs_[i];
    if (left >= kFrames) runs_[kFrames - 1].load(at + kFrames * channels_);
    return run;
  }

 private:
  int channels_;
  Packed<T, kWidth> runs_[kFrames];
};

// Two blocks a multiprocessor where ptxas spills nothing for that: it does under layer norm and for taps of any number.
template <class T, bool kLayerNorm, class Shape>
__global__ void __launch_bounds__(kThreads, kLayerNorm || Shape::kStride == 0 ? 1 : 2)
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
  const int live = end < frames_left ? end : static_cast<int>(frames_left);
  T* out = activations + (row * rows + first_frame) * layer.channels + channel;
  Window<Shape> window;
  if (begin < live) window.begin(staged, begin);
  int t = begin;
  for (; t < live; ++t) {
    window.advance(staged, t, layer);
    float values[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      float z = filter.apply(window, i);
      if (kLayerNorm) z = fmaf(z, rstd[t], bias[i]);
      values[i] = Activation::value(z);
    }
    store_floats<kWidth>(out + static_cast<std::int64_t>(t) * layer.channels, values);
  }
  const float zeros[kWidth] = {};
  for (; t < end; ++t) store_floats<kWidth>(out + static_cast<std::int64_t>(t) * layer.channels, zeros);
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

inline void check(const FirstLayer& layer, const char* name) {
  require(layer.batch > 0 && layer.frames > 0, name, "batch and frames must be positive");
  require(layer.kernel >= 1 && layer.kernel <= kMaxTaps, name, "kernel must be 1 to 16");
  require(layer.stride >= 1 && layer.stride <= kMaxTaps, name, "stride must be 1 to 16");
  require(layer.channels % 64 == 0 && layer.channels >= 64 && layer.channels <= kMaxChannels, name,
          "channels must be a multiple of 64, at most 1024");
  require(layer.batch == 1 || layer.signal_stride >= (layer.frames - 1) * layer.stride + layer.kernel, name,
          "signal_stride is shorter than the frames read");
}

inline int part_count(const FirstLayer& layer, std::int64_t rows, int frames, const char* name) {
  const std::int64_t parts = ceil_div(rows, frames);
  require(parts * layer.batch <= 2147483647, name, "the batch is too long");
  return static_cast<int>(parts);
}

// Calls function(T(), Shape()) with the C++ type of a dtype and the taps of a layer.
template <class Function>
void with_instance(const FirstLayer& layer, Dtype dtype, const char* name, Function function) {
  const bool is_hubert = layer.kernel == HubertTaps::kTaps && layer.stride == HubertTaps::kStride;
  with_type(dtype, name, [&](auto type) { is_hubert ? function(type, HubertTaps()) : function(type, AnyTaps()); });
}

template <bool kLayerNorm>
void first_layer_forward(const FirstLayer& layer, const double* statistics, const float* filters,
                         const float* norm_bias, double epsilon, void* activations, std::int64_t rows, Dtype dtype,
                         cudaStream_t stream) {
  const char* name = "first_layer_forward";
  check(layer, name);
  require(rows >= layer.frames, name, "rows must be at least frames");
  const int parts = part_count(layer, rows, kForwardFrames, name);
  with_instance(layer, dtype, name, [&](auto type, auto shape) {
    using T = decltype(type);
    launch(name, forward_kernel<T, kLayerNorm, decltype(shape)>, layer.batch * parts, kThreads, stream, layer,
           statistics, filters, norm_bias, epsilon, static_cast<T*>(activations), rows, parts);
  });
}

}  // namespace hubert_fast::cuda
