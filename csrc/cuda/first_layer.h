// Layer 0: one channel of audio to `channels` channels, its norm and GELU, forward and backward.
//
// Sizes: signal [batch, signal_stride] float, frames t of a row read signal[stride t : stride t + kernel]; kernel and stride
// at most 16; channels a multiple of 64, at most 1024. Activations are [batch, rows, channels] with rows >= frames; the rows
// past the last frame are dead: zero in the forward, ignored in the backward.
// All pointers are device memory; activations, filters and gradients aligned to 16 bytes. Every function throws
// std::invalid_argument for sizes that it cannot take and std::runtime_error, with the kernel's name, for a failed launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace hubert_fast::cuda {

struct FirstLayer {
  const float* signal;
  std::int64_t signal_stride;
  std::int64_t batch;
  std::int64_t frames;
  int kernel;
  int stride;
  int channels;
};

// Frames summed by one block of each reduction: partial sums have ceil(frames / this) parts a row.
constexpr int kMomentFrames = 512;
constexpr int kGroupNormBackwardFrames = 512;
constexpr int kLayerNormBackwardFrames = 256;

// Sums over the windows of a row: of `kernel` taps and of their kernel (kernel + 1) / 2 products.
inline int moment_count(int kernel) { return kernel + kernel * (kernel + 1) / 2; }

// Group norm, first stage. partial: [batch, ceil(frames / kMomentFrames), moment_count(kernel)] double, sums over the valid
// frames of the signal minus the row's first sample. valid_samples: [batch] or null (all frames are valid).
void first_layer_moments(const FirstLayer& layer, const std::int64_t* valid_samples, double* partial,
                         cudaStream_t stream);

// Group norm, second stage.
// statistics: [batch, kernel + kernel^2 + 1] double: means of the taps, their covariance (row-major), and an offset: the
//   mean sample, a float, which the passes below subtract from the signal.
// filters: [batch, kernel + 1, channels] float, so that z[t, c] = sum_k filters[k, c] (x[stride t + k] - offset)
//   + filters[kernel, c] is the normalised convolution.
// weight [channels, kernel], norm_weight and norm_bias [channels], all float.
void first_layer_group_norm(const FirstLayer& layer, const std::int64_t* valid_samples, const double* partial,
                            const float* weight, const float* norm_weight, const float* norm_bias, double epsilon,
                            double* statistics, float* filters, cudaStream_t stream);

// Layer norm: what its mean and variance over channels are made of.
// statistics: [kernel^2 + 2 kernel + 2] double: covariance over channels of the taps of the filters, their covariance with
//   the bias, the variance of the bias; the mean filter and the mean bias.
// filters: [kernel + 1, channels] float: (w - mean filter) * norm_weight, then (bias - mean bias) * norm_weight.
// bias: [channels] float, or null: zero.
void first_layer_layer_norm(const FirstLayer& layer, const float* weight, const float* bias, const float* norm_weight,
                            double* statistics, float* filters, cudaStream_t stream);

// activations [batch, rows, channels] of `dtype`. Group norm's bias is in the filters.
void first_layer_group_norm_forward(const FirstLayer& layer, const double* statistics, const float* filters,
                                    void* activations, std::int64_t rows, Dtype dtype, cudaStream_t stream);
void first_layer_layer_norm_forward(const FirstLayer& layer, const double* statistics, const float* filters,
                                    const float* norm_bias, double epsilon, void* activations, std::int64_t rows,
                                    Dtype dtype, cudaStream_t stream);

// From the gradient of the activations to sums over frames, and the activations once more.
// gradients [batch, rows, channels] of `dtype`; overwritten by the activations (dead rows stay as they are).
// Group norm: partial [batch, ceil(frames / kGroupNormBackwardFrames), kernel + 1, channels] float, sums of dz times
//   (signal - offset), and of dz.
// Layer norm: partial [batch, ceil(frames / kLayerNormBackwardFrames), kernel + 2, channels] float, sums over frames of
//   dy r x, dy r and dy, with y the norm's output and r the reciprocal of its standard deviation; and frame_partial
//   [batch, ceil(...), layer_norm_sum_count(kernel)] float, the sums that do not depend on the channel.
void first_layer_group_norm_backward(const FirstLayer& layer, const double* statistics, const float* filters,
                                     void* gradients, std::int64_t rows, float* partial, Dtype dtype,
                                     cudaStream_t stream);
inline int layer_norm_sum_count(int kernel) { return 2 * kernel + 2 + kernel * (kernel + 1) / 2; }
void first_layer_layer_norm_backward(const FirstLayer& layer, const double* statistics, const float* filters,
                                     const float* norm_weight, const float* norm_bias, double epsilon, void* gradients,
                                     std::int64_t rows, float* partial, float* frame_partial, Dtype dtype,
                                     cudaStream_t stream);

// Parameter gradients, float, from the sums over all parts of each row: sums [batch, kernel + 1, channels] double.
void first_layer_group_norm_finish(const FirstLayer& layer, const double* statistics, const double* sums,
                                   const float* weight, const float* norm_weight, double epsilon, float* weight_grad,
                                   float* norm_weight_grad, float* norm_bias_grad, cudaStream_t stream);
// sums [kernel + 2, channels] and frame_sums [layer_norm_sum_count(kernel)] double, over the whole batch.
void first_layer_layer_norm_finish(const FirstLayer& layer, const double* statistics, const double* sums,
                                   const double* frame_sums, const float* weight, const float* bias,
                                   const float* norm_weight, float* weight_grad, float* bias_grad,
                                   float* norm_weight_grad, float* norm_bias_grad, cudaStream_t stream);

}  // namespace hubert_fast::cuda
