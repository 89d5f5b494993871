// Layer 0 under layer norm.
#include "first_layer_passes.h"

namespace hubert_fast::cuda {
namespace {

// A tap of every channel's filter, or, as tap number `kernel`, the bias.
struct Tap {
  const float* first;  // null: zeros
  int stride;
  __device__ Tap(const FirstLayer& layer, const float* weight, const float* bias, int k)
      : first(k < layer.kernel ? weight + k : bias), stride(k < layer.kernel ? layer.kernel : 1) {}
  __device__ double operator()(int channel) const { return first == nullptr ? 0.0 : first[channel * stride]; }
};

// Block j: the covariances of tap j with every tap, and row j of the filters. A block makes the means of all taps for itself,
// in the same order as every other, so that none waits.
__global__ void __launch_bounds__(kThreads)
    layer_norm_kernel(FirstLayer layer, const float* weight, const float* bias, const float* norm_weight,
                      double* statistics, float* filters) {
  constexpr int kWarps = kThreads / 32;
  __shared__ double mean[kMaxTaps + 1];
  const int kernel = layer.kernel, channels = layer.channels;
  const int j = static_cast<int>(block_index()), warp = thread_index() / 32, lane = thread_index() % 32;
  const LayerNormStatistics at{kernel};
  auto mean_of = [&](auto value) {  // over channels, by a warp
    double sum = 0.0;
    for (int c = lane; c < channels; c += 32) sum += value(c);
    return warp_sum(sum) / channels;
  };
  for (int k = warp; k <= kernel; k += kWarps) {
    const double result = mean_of(Tap(layer, weight, bias, k));
    if (lane == 0) mean[k] = result;
  }
  __syncthreads();
  const Tap own(layer, weight, bias, j);
  if (thread_index() == 0) statistics[j < kernel ? at.mean() + j : at.mean_bias()] = mean[j];
  for (int k = warp; k <= kernel; k += kWarps) {
    const Tap other(layer, weight, bias, k);
    const double result = mean_of([&](int c) { return (own(c) - mean[j]) * (other(c) - mean[k]); });
    if (lane > 0) continue;
    if (j < kernel && k < kernel) statistics[j * kernel + k] = result;
    if (j < kernel && k == kernel) statistics[at.cross() + j] = result;
    if (j == kernel && k == kernel) statistics[at.constant()] = result;
  }
  for (int c = thread_index(); c < channels; c += kThreads) {
    filters[j * channels + c] = static_cast<float>((own(c) - mean[j]) * norm_weight[c]);
  }
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
    Ahead<T, kWidth, 2> ahead(at, layer.channels, share.active ? end - begin : 0);
    for (int t = begin; t < end; ++t, at += layer.channels) {
      window.advance(staged, t, layer);
      float first = 0.0f, second = 0.0f;
      if (share.active) {
        float values[kWidth];
        ahead.next(at, end - 1 - t).to_floats(values);
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

}  // namespace

void first_layer_layer_norm(const FirstLayer& layer, const float* weight, const float* bias, const float* norm_weight,
                            double* statistics, float* filters, cudaStream_t stream) {
  const char* name = "first_layer_layer_norm";
  check(layer, name);
  launch(name, layer_norm_kernel, layer.kernel + 1, kThreads, stream, layer, weight, bias, norm_weight, statistics,
         filters);
}

void first_layer_layer_norm_forward(const FirstLayer& layer, const double* statistics, const float* filters,
                                    const float* norm_bias, double epsilon, void* activations, std::int64_t rows,
                                    Dtype dtype, cudaStream_t stream) {
  first_layer_forward<true>(layer, statistics, filters, norm_bias, epsilon, activations, rows, dtype, stream);
}

void first_layer_layer_norm_backward(const FirstLayer& layer, const double* statistics, const float* filters,
                                     const float* norm_weight, const float* norm_bias, double epsilon, void* gradients,
                                     std::int64_t rows, float* partial, float* frame_partial, Dtype dtype,
                                     cudaStream_t stream) {
  const char* name = "first_layer_layer_norm_backward";
  check(layer, name);
  require(rows >= layer.frames, name, "rows must be at least frames");
  const int parts = part_count(layer, layer.frames, kLayerNormBackwardFrames, name);
  with_instance(layer, dtype, name, [&](auto type, auto shape) {
    using T = decltype(type);
    launch(name, layer_norm_backward_kernel<T, decltype(shape)>, layer.batch * parts, kThreads, stream, layer,
           statistics, filters, norm_weight, norm_bias, epsilon, static_cast<T*>(gradients), rows, partial,
           frame_partial, parts);
  });
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
