// What the CPU kernels take, and the table of them that each instruction set has one of.
//
// Pointers, sizes and strides only: Python owns every buffer and has checked every shape. Rows are frames, `channels` values each.
#pragma once

#include <cstdint>

namespace hubert_fast {

enum class Dtype { kFloat32, kBFloat16 };

// Taps of layer 0 that the kernels hold in fixed-size arrays.
constexpr int kMaxTaps = 32;

// Layer 0: z[t, c] = shift[c] + sum_k filters[k, c] (signal[stride t + k] - centre[k]).
struct FirstLayer {
  const float* signal;   // of one sequence, from its first sample
  const float* filters;  // [taps, channels]
  const float* centre;   // [taps]
  const float* shift;    // [channels]
  int taps, stride;
};

// LayerNorm over channels before GELU; weight is null where there is none.
struct LayerNorm {
  const float* weight;  // [channels]
  const float* bias;    // [channels]
  float eps;
};

// Where activations go: as the windows that the next layer's GEMM reads, row t holding input rows
// stride t .. stride t + kernel - 1 counted from the call's first row. kernel = stride = 1 is the plain layout. Null: nowhere.
struct Windows {
  void* data;  // [rows, kernel * channels]
  int kernel, stride;
  std::int64_t rows;
};

// Gradient of the activations, as the GEMMs onto blocks of `stride` rows leave it: row i of the call is phase i % stride of block
// i / stride; the first `split` phases lie in `head`, the others in `tail` (_DataGradient in cpu_backend/conv_frontend.py).
struct BlockGradient {
  const void* head;  // [blocks, split * channels]
  const void* tail;  // [blocks, (stride - split) * channels]
  int split, stride;
};

struct Forward {
  Dtype dtype;  // of preactivations and windows
  int channels;
  const FirstLayer* first_layer;  // the source of rows: layer 0 recomputed from the signal, or, where null,
  const void* preactivations;     // [frames, channels] of one sequence
  LayerNorm norm;
  std::int64_t start, stop;  // frames
  Windows windows;
};

struct Backward {
  Forward source;             // its frames start .. stop have a gradient
  std::int64_t windows_stop;  // windows read activations up to here, at or past stop
  BlockGradient gradient;
  void* preactivation_gradient;  // of the same frames as the gradient, [stop - start, channels]; null for layer 0
  // Added to, in float64: [sum of dz], then for layer 0 [sum of dz (signal[stride t + k] - centre[k])] for each k, then with a norm
  // [its weight's gradient] [its bias's gradient]; each [channels], where dz is the gradient of the convolution's output. May be null
  // where there is neither.
  double* sums;
};

// Dropout of values [groups * rows, columns] into out, which may be values itself. Row i of group g has number
// first + g stride + i in the mask, or first + g stride + index[i] where there is an index.
struct Drop {
  const float* values;
  float* out;
  const std::int64_t* index;  // [rows], or null
  std::int64_t groups, rows, columns, first, stride;
  std::uint64_t seed;
  std::uint32_t threshold;  // draws of 16 bits below it are dropped
  float scale;              // of the others
};

struct Kernels {
  const char* name;
  std::int64_t (*scratch)(const Forward&);  // floats of memory that a thread needs
  void (*forward)(const Forward&, std::int64_t start, std::int64_t stop, float* scratch);
  void (*backward)(const Backward&, std::int64_t start, std::int64_t stop, float* scratch, float* partial_sums);
  // Sums over frames start <= t < stop of X[t] = signal[stride t ..] (means == null: sums[taps]) or of the products
  // (X[t] - means)(X[t] - means)^T (sums[taps, taps]).
  void (*window_sums)(
      const float* signal, int taps, int stride, std::int64_t start, std::int64_t stop, const double* means, double* sums);
  void (*drop)(const Drop&, std::int64_t start, std::int64_t stop);  // rows of all groups, counted through
};

// Rows of `sums` above.
inline int sum_rows(const Backward& work) {
  return 1 + (work.source.first_layer ? work.source.first_layer->taps : 0) + (work.source.norm.weight ? 2 : 0);
}

namespace baseline {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
namespace avx512_bf16 {
const Kernels& kernels();
}

}  // namespace hubert_fast
