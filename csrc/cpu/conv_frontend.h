// The CPU kernels of the convolutional front end over a whole call, on several threads.
//
// Frames are cut into fixed ranges whose partial sums are added up in order, so results do not depend on the number of threads.
#pragma once

#include "kernels.h"

namespace hubert_fast {

void forward(const Forward& work, int threads);

void backward(const Backward& work, int threads);

// Mean m and covariance C = mean (X - m)(X - m)^T of the windows X[t] = signal[stride t .. stride t + taps) over the first `frames`
// frames of each row, in float64. A row without frames has mean and covariance 0.
struct FirstLayerStatistics {
  const float* signals;        // [batch, samples], rows row_stride apart
  std::int64_t row_stride;
  int batch, taps, stride;
  const std::int64_t* frames;  // [batch]
  double* means;               // [batch, taps]
  double* covariances;         // [batch, taps, taps]
};

void first_layer_statistics(const FirstLayerStatistics& work, int threads);

}  // namespace hubert_fast
