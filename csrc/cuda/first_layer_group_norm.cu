// Layer 0 under group norm.
#include "first_layer_passes.h"

namespace hubert_fast::cuda {
namespace {

HUBERT_FAST_HOST_DEVICE std::int64_t valid_frames(const FirstLayer& layer, const std::int64_t* valid_samples,
                                                  std::int64_t row) {
  if (valid_samples == nullptr) return layer.frames;
  const std::int64_t samples = valid_samples[row];
  if (samples < layer.kernel) return 0;
  const std::int64_t frames = (samples - layer.kernel) / layer.stride + 1;
  return frames < layer.frames ? frames : layer.frames;
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

template <class T, class Shape, int kWidth>
__global__ void __launch_bounds__(kThreads)
    group_norm_backward_kernel(FirstLayer layer, const double* statistics, const float* filters, T* gradients,
                               std::int64_t rows, float* partial, int parts) {
  constexpr int kFrames = kGroupNormBackwardFrames;
  constexpr int kAhead = sizeof(T) == 4 ? 1 : 2;  // two of float would spill
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
    if (begin < end) window.begin(staged, begin);
    Ahead<T, kWidth, kAhead> ahead(at, layer.channels, end - begin);
    for (int t = begin; t < end; ++t, at += layer.channels) {
      float values[kWidth];
      ahead.next(at, end - 1 - t).to_floats(values);
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

void first_layer_group_norm_forward(const FirstLayer& layer, const double* statistics, const float* filters,
                                    void* activations, std::int64_t rows, Dtype dtype, cudaStream_t stream) {
  first_layer_forward<false>(layer, statistics, filters, nullptr, 0.0, activations, rows, dtype, stream);
}

void first_layer_group_norm_backward(const FirstLayer& layer, const double* statistics, const float* filters,
                                     void* gradients, std::int64_t rows, float* partial, Dtype dtype,
                                     cudaStream_t stream) {
  const char* name = "first_layer_group_norm_backward";
  check(layer, name);
  require(rows >= layer.frames, name, "rows must be at least frames");
  const int parts = part_count(layer, layer.frames, kGroupNormBackwardFrames, name);
  with_instance(layer, dtype, name, [&](auto type, auto shape) {
    using T = decltype(type);
    using Shape = decltype(shape);
    launch(name, group_norm_backward_kernel<T, Shape, Shape::kStride == 0 ? 4 : 8>, layer.batch * parts, kThreads,
           stream, layer, statistics, filters, static_cast<T*>(gradients), rows, partial, parts);
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

}  // namespace hubert_fast::cuda
