// Elementwise passes of the later layers over channels-last rows: GELU, and LayerNorm with GELU.
//
// Inputs lie in padded buffers [batch, rows, channels] whose rows t >= frames of each sequence are dead. channels is a
// multiple of 64, at most 1024; pointers are device memory aligned to 16 bytes. Every function throws std::invalid_argument
// for sizes that it cannot take and std::runtime_error, with the kernel's name, for a failed launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace hubert_fast::cuda {

struct Rows {
  std::int64_t batch;
  std::int64_t rows;    // of each sequence in the padded buffer
  std::int64_t frames;  // of them that are not dead
  int channels;
};

// Norm of a row over its channels; the pointers are null where the layer has none. [channels] float each.
struct Norm {
  const float* weight;
  const float* bias;
  double epsilon;
};

// out[b, t] = GELU(norm(z[b, t])) for t < frames, zero for frames <= t < out_rows. out: [batch, out_rows, channels].
void activation_forward(const Rows& rows, const Norm& norm, const void* z, void* out, std::int64_t out_rows,
                        Dtype dtype, cudaStream_t stream);

// out[b, t] = grad[b, t] * GELU'(z[b, t]) for t < frames, else zero; likewise activation (null: not wanted) = GELU(z).
// grad: [batch, grad_rows, channels] with grad_rows >= frames; out and activation: like z. out may be grad itself where
// grad_rows == rows.
void gelu_backward(const Rows& rows, const void* grad, std::int64_t grad_rows, const void* z, void* out,
                   void* activation, Dtype dtype, cudaStream_t stream);

// The same through GELU(norm(z)). partial: [ceil(batch * rows / part_rows), 3, channels] float: sums over the rows of a part
// of the gradients of the norm's weight, of its bias, and of z (which is the gradient of the convolution's bias).
void layer_norm_backward(const Rows& rows, const Norm& norm, const void* grad, std::int64_t grad_rows, const void* z,
                         void* out, void* activation, float* partial, std::int64_t part_rows, Dtype dtype,
                         cudaStream_t stream);

// Zeroes the dead rows of z and of activation (either may be null).
void clear_dead_rows(const Rows& rows, void* z, void* activation, Dtype dtype, cudaStream_t stream);

// partial[p, c] = sum over the part_rows rows of part p of x[row, c], float; x: [total_rows, channels].
void column_sums(const void* x, std::int64_t total_rows, int channels, float* partial, std::int64_t part_rows,
                 Dtype dtype, cudaStream_t stream);

// out[o, c] = sum_p partial[o, p, c] in a fixed order and in double; out is float, or double where out_is_double. Columns c
// are [.., taps, channels] in partial and [.., channels, taps] in out: the same where taps is 1.
void sum_parts(const float* partial, std::int64_t outer, std::int64_t parts, std::int64_t columns, std::int64_t taps,
               std::int64_t channels, void* out, bool out_is_double, cudaStream_t stream);

}  // namespace hubert_fast::cuda
