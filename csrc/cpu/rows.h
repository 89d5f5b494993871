// The kernels over ranges of frames, compiled once for each instruction set. One thread runs one range.
//
// Rows go through a float32 block in the first-level cache: it is filled from the waveform (layer 0) or from stored
// preactivations, normalised where there is a norm, and leaves through GELU into the next GEMM's operand.
#pragma once

#include "gelu.h"
#include "kernels.h"
#include "masks.h"
#include "vector.h"

#define HUBERT_FAST_STRING(name) #name
#define HUBERT_FAST_NAME(name) HUBERT_FAST_STRING(name)

namespace hubert_fast {
namespace HUBERT_FAST_INSTANCE {
namespace {

constexpr int kBlock = 8;  // frames: 16 KiB of float32 at 512 channels

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Rows start .. start + count of layer 0 before its norm. Filters of two vectors of channels stay in registers over the block.
template <int kTaps, int kVectors>
inline void convolve_channels(
    const FirstLayer& layer, int channels, int channel, const float (*windows)[kMaxTaps], int count, float* rows) {
  Floats filters[kVectors][kTaps], shift[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    shift[v] = load(layer.shift + channel + v * kLanes);
    for (int k = 0; k < kTaps; ++k) filters[v][k] = load(layer.filters + k * channels + channel + v * kLanes);
  }
  for (int i = 0; i < count; ++i) {
    Floats z[kVectors];
    for (int v = 0; v < kVectors; ++v) z[v] = shift[v];
    for (int k = 0; k < kTaps; ++k) {
      const Floats x = broadcast(windows[i][k]);
      for (int v = 0; v < kVectors; ++v) z[v] += filters[v][k] * x;
    }
    for (int v = 0; v < kVectors; ++v) store(rows + std::int64_t(i) * channels + channel + v * kLanes, z[v]);
  }
}

inline void convolve_any(
    const FirstLayer& layer, int channels, const float (*windows)[kMaxTaps], int count, float* rows) {
  for (int c = 0; c < channels; c += kLanes) {
    for (int i = 0; i < count; ++i) {
      Floats z = load(layer.shift + c);
      for (int k = 0; k < layer.taps; ++k) z += load(layer.filters + k * channels + c) * broadcast(windows[i][k]);
      store(rows + std::int64_t(i) * channels + c, z);
    }
  }
}

inline void read_windows(const FirstLayer& layer, std::int64_t start, int count, float (*windows)[kMaxTaps]) {
  for (int i = 0; i < count; ++i) {
    const float* signal = layer.signal + (start + i) * layer.stride;
    for (int k = 0; k < layer.taps; ++k) windows[i][k] = signal[k] - layer.centre[k];
  }
}

inline void convolve(const FirstLayer& layer, int channels, const float (*windows)[kMaxTaps], int count, float* rows) {
  if (layer.taps != 10) return convolve_any(layer, channels, windows, count, rows);
  constexpr int kPair = kLanes == 16 ? 2 : 1;  // 20 filters fit into 32 registers, and only AVX-512 has those
  int c = 0;
  for (; c + kPair * kLanes <= channels; c += kPair * kLanes)
    convolve_channels<10, kPair>(layer, channels, c, windows, count, rows);
  for (; c < channels; c += kLanes) convolve_channels<10, 1>(layer, channels, c, windows, count, rows);
}

// Fills rows with the preactivations of frames start .. start + count; for layer 0 also the centred windows.
template <class T>
inline void read_rows(
    const Forward& work, std::int64_t start, int count, float (*windows)[kMaxTaps], float* rows) {
  if (work.first_layer) {
    read_windows(*work.first_layer, start, count, windows);
    convolve(*work.first_layer, work.channels, windows, count, rows);
    return;
  }
  const T* from = static_cast<const T*>(work.preactivations) + start * work.channels;
  const std::int64_t values = std::int64_t(count) * work.channels;
  for (std::int64_t i = 0; i < values; i += kLanes) store(rows + i, load(from + i));
}

// Replaces a row by (row - mean) / sqrt(variance + eps) and returns 1 / sqrt(variance + eps). The variance is of centred values.
inline float standardise(float* row, int channels, float eps) {
  Floats total{};
  for (int c = 0; c < channels; c += kLanes) total += load(row + c);
  const Floats mean = broadcast(sum(total) / float(channels));
  Floats squares{};
  for (int c = 0; c < channels; c += kLanes) {
    const Floats centred = load(row + c) - mean;
    squares += centred * centred;
    store(row + c, centred);
  }
  const float rstd = 1.0f / __builtin_sqrtf(sum(squares) / float(channels) + eps);
  for (int c = 0; c < channels; c += kLanes) store(row + c, load(row + c) * rstd);
  return rstd;
}

template <bool kNorm>
inline Floats normalised(const LayerNorm& norm, const float* row, int c) {
  const Floats x = load(row + c);
  return kNorm ? x * load(norm.weight + c) + load(norm.bias + c) : x;
}

// The places of one input row in the windows: rows t with kernel position row - stride t in 0 .. kernel - 1.
template <class T>
class Places {
 public:
  Places(const Windows& windows, std::int64_t row, int channels)
      : windows_(windows), channels_(channels), t_(row / windows.stride), position_(row % windows.stride) {
    skip();
  }
  bool more() const { return windows_.data && position_ < windows_.kernel && t_ >= 0; }
  T* here() const {
    return static_cast<T*>(windows_.data) + (t_ * windows_.kernel + position_) * std::int64_t(channels_);
  }
  void next() {
    --t_;
    position_ += windows_.stride;
    skip();
  }

 private:
  void skip() {  // windows past the last row that is asked for
    while (t_ >= windows_.rows) {
      --t_;
      position_ += windows_.stride;
    }
  }
  const Windows& windows_;
  int channels_;
  std::int64_t t_, position_;
};

template <class T>
inline void copy_to_other_places(Places<T>& places, int channels) {
  if (!places.more()) return;
  const T* first = places.here();
  for (places.next(); places.more(); places.next()) std::memcpy(places.here(), first, sizeof(T) * channels);
}

template <class T, bool kNorm>
inline void write_activations(const Forward& work, const float* row, std::int64_t frame) {
  Places<T> places(work.windows, frame - work.start, work.channels);
  if (!places.more()) return;
  T* out = places.here();
  for (int c = 0; c < work.channels; c += kLanes) store(out + c, gelu(normalised<kNorm>(work.norm, row, c)));
  copy_to_other_places(places, work.channels);
}

template <class T, bool kNorm>
void forward_rows(const Forward& work, std::int64_t start, std::int64_t stop, float* rows) {
  float windows[kBlock][kMaxTaps];
  for (std::int64_t first = start; first < stop; first += kBlock) {
    const int count = int(least(kBlock, stop - first));
    read_rows<T>(work, first, count, windows, rows);
    for (int i = 0; i < count; ++i) {
      float* row = rows + std::int64_t(i) * work.channels;
      if (kNorm) standardise(row, work.channels, work.norm.eps);
      write_activations<T, kNorm>(work, row, first + i);
    }
  }
}

template <class T>
inline const T* gradient_row(const BlockGradient& gradient, std::int64_t row, int channels) {
  const std::int64_t block = row / gradient.stride;
  const int phase = int(row % gradient.stride), rest = gradient.stride - gradient.split;
  if (phase < gradient.split)
    return static_cast<const T*>(gradient.head) + (block * gradient.split + phase) * std::int64_t(channels);
  return static_cast<const T*>(gradient.tail) + (block * rest + phase - gradient.split) * std::int64_t(channels);
}

// Turns a row of preactivations (standardised ones under a norm) into the gradient of the convolution's output.
//
// LayerNorm's, for y = weight x + bias over standardised x and g = dy weight: rstd (g - mean(g) - x mean(g x)).
template <class T, bool kNorm>
inline void backward_row(
    const Backward& work, float* row, std::int64_t frame, float rstd, float* weight_sum, float* bias_sum, float* scaled) {
  const Forward& source = work.source;
  const int channels = source.channels;
  const std::int64_t index = frame - source.start;
  Places<T> places(source.windows, index, channels);
  T* out = places.more() ? places.here() : nullptr;
  const T* upstream = gradient_row<T>(work.gradient, index, channels);
  Floats total{}, products{};
  for (int c = 0; c < channels; c += kLanes) {
    const GeluAndSlope at = gelu_and_slope(normalised<kNorm>(source.norm, row, c));
    if (out) store(out + c, at.value);
    const Floats gradient = load(upstream + c) * at.slope;
    if (!kNorm) {
      store(row + c, gradient);
      continue;
    }
    const Floats x = load(row + c), g = gradient * load(source.norm.weight + c);
    store(weight_sum + c, load(weight_sum + c) + gradient * x);
    store(bias_sum + c, load(bias_sum + c) + gradient);
    store(scaled + c, g);
    total += g;
    products += g * x;
  }
  copy_to_other_places(places, channels);
  if (!kNorm) return;
  const float mean = sum(total) / float(channels), projection = sum(products) / float(channels);
  for (int c = 0; c < channels; c += kLanes)
    store(row + c, (load(scaled + c) - mean - load(row + c) * projection) * rstd);
}

// Adds a block's rows of dz, and for layer 0 dz times each tap, to the partial sums. kTaps 0: as many as `taps` says, or none.
template <int kTaps>
inline void add_products(
    const float* rows, const float (*windows)[kMaxTaps], int taps, int count, int channels, float* sums) {
  const int used = kTaps ? kTaps : taps;
  for (int c = 0; c < channels; c += kLanes) {
    Floats total = load(sums + c), products[kTaps ? kTaps : kMaxTaps];
    for (int k = 0; k < used; ++k) products[k] = load(sums + (1 + k) * channels + c);
    for (int i = 0; i < count; ++i) {
      const Floats dz = load(rows + std::int64_t(i) * channels + c);
      total += dz;
      for (int k = 0; k < used; ++k) products[k] += dz * broadcast(windows[i][k]);
    }
    store(sums + c, total);
    for (int k = 0; k < used; ++k) store(sums + (1 + k) * channels + c, products[k]);
  }
}

template <class T, bool kNorm>
void backward_rows(const Backward& work, std::int64_t start, std::int64_t stop, float* rows, float* partial_sums) {
  const Forward& source = work.source;
  const int channels = source.channels;
  const FirstLayer* first_layer = source.first_layer;
  const int taps = first_layer ? first_layer->taps : 0;
  float* scaled = rows + std::int64_t(kBlock) * channels;
  float* weight_sum = partial_sums ? partial_sums + std::int64_t(1 + taps) * channels : nullptr;
  float* bias_sum = partial_sums ? weight_sum + channels : nullptr;
  float windows[kBlock][kMaxTaps];
  // Frames from source.stop on have no gradient: they only complete the last windows.
  const std::int64_t gradient_stop = least(stop, source.stop);
  for (std::int64_t first = start; first < gradient_stop; first += kBlock) {
    const int count = int(least(kBlock, gradient_stop - first));
    read_rows<T>(source, first, count, windows, rows);
    for (int i = 0; i < count; ++i) {
      float* row = rows + std::int64_t(i) * channels;
      const float rstd = kNorm ? standardise(row, channels, source.norm.eps) : 1.0f;
      backward_row<T, kNorm>(work, row, first + i, rstd, weight_sum, bias_sum, scaled);
    }
    if (taps == 10) {
      add_products<10>(rows, windows, taps, count, channels, partial_sums);
    } else if (partial_sums) {
      add_products<0>(rows, windows, taps, count, channels, partial_sums);
    }
    if (work.preactivation_gradient) {
      T* out = static_cast<T*>(work.preactivation_gradient) + (first - source.start) * channels;
      const std::int64_t values = std::int64_t(count) * channels;
      for (std::int64_t i = 0; i < values; i += kLanes) store(out + i, load(rows + i));
    }
  }
  const std::int64_t rest = start > source.stop ? start : source.stop;
  if (rest < stop) forward_rows<T, kNorm>(source, rest, stop, rows);
}

std::int64_t scratch(const Forward& work) { return std::int64_t(kBlock + 1) * work.channels; }

void forward(const Forward& work, std::int64_t start, std::int64_t stop, float* rows) {
  const bool norm = work.norm.weight != nullptr;
  if (work.dtype == Dtype::kFloat32)
    norm ? forward_rows<float, true>(work, start, stop, rows) : forward_rows<float, false>(work, start, stop, rows);
  else
    norm ? forward_rows<BFloat16, true>(work, start, stop, rows) : forward_rows<BFloat16, false>(work, start, stop, rows);
}

void backward(const Backward& work, std::int64_t start, std::int64_t stop, float* rows, float* sums) {
  const bool norm = work.source.norm.weight != nullptr;
  if (work.source.dtype == Dtype::kFloat32)
    norm ? backward_rows<float, true>(work, start, stop, rows, sums)
         : backward_rows<float, false>(work, start, stop, rows, sums);
  else
    norm ? backward_rows<BFloat16, true>(work, start, stop, rows, sums)
         : backward_rows<BFloat16, false>(work, start, stop, rows, sums);
}

void window_sums(
    const float* signal, int taps, int stride, std::int64_t start, std::int64_t stop, const double* means, double* sums) {
  double window[kMaxTaps];
  const int values = means ? taps * taps : taps;
  for (int i = 0; i < values; ++i) sums[i] = 0.0;
  for (std::int64_t t = start; t < stop; ++t) {
    const float* from = signal + t * stride;
    for (int k = 0; k < taps; ++k) window[k] = double(from[k]) - (means ? means[k] : 0.0);
    if (means) {
      for (int i = 0; i < taps; ++i)
        for (int j = 0; j < taps; ++j) sums[i * taps + j] += window[i] * window[j];
    } else {
      for (int k = 0; k < taps; ++k) sums[k] += window[k];
    }
  }
}

}  // namespace

const Kernels& kernels() {
  static const Kernels table = {
      HUBERT_FAST_NAME(HUBERT_FAST_INSTANCE), scratch, forward, backward, window_sums, drop};
  return table;
}

}  // namespace HUBERT_FAST_INSTANCE
}  // namespace hubert_fast
