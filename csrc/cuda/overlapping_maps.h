// Whether the tensor maps of the copy engine may describe rows that overlap: a row stride shorter than a row.
//
// The CUDA driver's documentation builds the strides of cuTensorMapEncodeTiled from the extents and padding, so it promises
// nothing about shorter ones. Where they are refused, gemm.cpp splits what overlaps.
#pragma once

namespace hubert_fast::cuda {

// On the current device, which must have tensor maps. Decided once for each device: by HUBERT_FAST_OVERLAPPING_MAPS (0: no,
// 1: yes) where it is set, which is for measuring both ways and for a driver that takes such maps and copies wrongly; else
// by whether the driver takes a small one. Throws std::invalid_argument for another value of the variable and
// std::runtime_error where the driver cannot be asked.
bool overlapping_maps_allowed();

}  // namespace hubert_fast::cuda
