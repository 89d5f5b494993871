// The products of gemm.h as CUTLASS 3.x kernels for sm_90a: operands through the bulk copy engine, wgmma, warp
// specialisation, persistent blocks. One .cu file instantiates one kernel, so that they compile beside each other.
//
// The tensor map of an input with overlapping rows has extents (depth, rows) and a row stride smaller than depth. The copy
// engine bounds-checks coordinates against extents only, and strides need only be multiples of 16 bytes; but the driver, which
// encodes the map, does not promise to take it. Where it refuses, gemm.cpp splits the product (overlapping_maps.h).
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cutlass/cuda_host_adapter.hpp"

namespace hubert_fast::cuda {

// CUTLASS prints a tensor map that the driver refuses and goes on; here it ends the call.
template <class... Arguments>
CUresult checked_cuTensorMapEncodeTiled(Arguments... arguments) {
  const CUresult result = cutlass::call_cuTensorMapEncodeTiled(arguments...);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with CUresult " + std::to_string(static_cast<int>(result)));
  }
  return result;
}

template <class... Arguments>
CUresult checked_cuTensorMapEncodeIm2col(Arguments... arguments) {
  return cutlass::call_cuTensorMapEncodeIm2col(arguments...);
}

}  // namespace hubert_fast::cuda

#undef CUTLASS_CUDA_DRIVER_WRAPPER_CALL
#define CUTLASS_CUDA_DRIVER_WRAPPER_CALL(function) hubert_fast::cuda::checked_##function

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "gemm.h"
#include "gemm_cutlass.h"

namespace hubert_fast::cuda::sm90 {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

// Ping-pong: two warpgroups take turns, so the epilogue of one tile (by its instructions, GELU takes a third of the cycles
// that the products take at depth 1,024) hides behind the products of the other. With 128 x 128 each has registers for it.
using RowSchedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using RowEpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized;
using RowTile = Shape<_128, _128, _64>;
// Two blocks along the rows share each tile of the weight.
using RowCluster = Shape<_2, _1, _1>;

template <class Element, class Source>
using RowEpilogueShape =
    cutlass::epilogue::collective::detail::EpilogueDescriptor<RowTile, cutlass::epilogue::collective::EpilogueTileAuto,
                                                              Source, Element, RowEpilogueSchedule>;

template <class Element>
using Bias = fusion::Sm90RowBroadcast<0, RowTile, float, float>;

template <class Element>
using Biased =
    fusion::Sm90EVT<fusion::Sm90Compute<cutlass::plus, float, float, kRound>, fusion::Sm90AccFetch, Bias<Element>>;

// out = accumulator + bias
template <class Element>
struct PlainEpilogue {
  using Source = void;
  using Callbacks =
      fusion::Sm90EVT<fusion::Sm90Compute<cutlass::plus, Element, float, kRound>, fusion::Sm90AccFetch, Bias<Element>>;
};

template <class Element, class Source>
struct AuxiliaryStore {
  using Epilogue = RowEpilogueShape<Element, Source>;
  using Descriptor =
      cutlass::epilogue::collective::detail::AuxStoreDescriptor<Epilogue, cutlass::layout::RowMajor, Element>;
  using Node = fusion::Sm90AuxStore<Descriptor::Stages, typename Epilogue::EpilogueTile, Element, kRound,
                                    typename Descriptor::Stride, typename Descriptor::SmemLayoutAtom,
                                    typename Descriptor::CopyOpR2S>;
};

// auxiliary = accumulator + bias, out = GELU(auxiliary)
template <class Element>
struct GeluEpilogue {
  using Source = void;
  using Callbacks = fusion::Sm90EVT<fusion::Sm90Compute<GeluValue, Element, float, kRound>,
                                    fusion::Sm90EVT<typename AuxiliaryStore<Element, Source>::Node, Biased<Element>>>;
};

// auxiliary = GELU(source), out = accumulator * GELU'(source)
template <class Element>
struct GeluGradientEpilogue {
  using Source = Element;
  using Callbacks =
      fusion::Sm90TopologicalVisitor<float,
                                     cute::tuple<cute::seq<>, cute::seq<>, cute::seq<1>, cute::seq<2>, cute::seq<0, 1>>,
                                     fusion::Sm90AccFetch,                                      // 0
                                     fusion::Sm90SrcFetch<Element>,                             // 1: z
                                     fusion::Sm90Compute<GeluValue, float, float, kRound>,      // 2: GELU(z)
                                     typename AuxiliaryStore<Element, Source>::Node,            // 3
                                     fusion::Sm90Compute<GeluGradient, Element, float, kRound>  // 4
                                     >;
};

// Weight: its layout as [depth, columns]; column-major is [columns, depth] in memory.
template <class Element, class Epilogue, class Weight>
struct RowProduct {
  using EpilogueOp = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, RowTile, RowCluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, typename Epilogue::Source,
      cutlass::layout::RowMajor, kAlignment, Element, cutlass::layout::RowMajor, kAlignment, RowEpilogueSchedule,
      typename Epilogue::Callbacks>::CollectiveOp;
  using MainloopOp = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, kAlignment, Element,
      Weight, kAlignment, float, RowTile, RowCluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename EpilogueOp::SharedStorage))>,
      RowSchedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, MainloopOp, EpilogueOp>;
};

// float, as a type that depends on Element: nvcc's front end writes out aliases of builders that do not depend on a template
// parameter without the `typename` that the host compiler wants.
template <class Element>
struct Float {
  using type = float;
};

// D[l, m, n] = sum_k A[l, k, m] B[l, k, n] in float, the operands running along m and n: the weight gradient.
// Two warpgroups on one tile of 128 x 256: there is no epilogue to hide, and each value of B serves twice as often.
template <class Element>
struct WeightProduct {
  using Tile = Shape<_128, _256, _64>;
  using Cluster = Shape<_2, _1, _1>;
  using Sum = typename Float<Element>::type;
  using EpilogueOp = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, Sum, Sum, void, cutlass::layout::RowMajor, 4, Sum,
      cutlass::layout::RowMajor, 4, cutlass::epilogue::TmaWarpSpecializedCooperative>::CollectiveOp;
  using MainloopOp = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::ColumnMajor, kAlignment, Element,
      cutlass::layout::RowMajor, kAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename EpilogueOp::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, MainloopOp, EpilogueOp>;
};

inline cutlass::KernelHardwareInfo hardware() {
  cutlass::KernelHardwareInfo info;
  cudaError_t error = cudaGetDevice(&info.device_id);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&info.sm_count, cudaDevAttrMultiProcessorCount, info.device_id);
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string("no CUDA device: ") + cudaGetErrorString(error));
  return info;
}

using RowStride = Stride<std::int64_t, _1, std::int64_t>;
using ColumnStride = Stride<_1, std::int64_t, std::int64_t>;

inline RowStride weight_stride(cutlass::layout::ColumnMajor, const Product& operands) { return {operands.depth, _1{}, 0}; }
inline ColumnStride weight_stride(cutlass::layout::RowMajor, const Product& operands) {
  return {_1{}, operands.columns, 0};
}

template <class Element, class Epilogue, class Weight = cutlass::layout::ColumnMajor, class CallbackArguments>
void run_rows(const Product& operands, const CallbackArguments& callbacks, const void* source, void* out,
              std::int64_t out_stride, const char* name, cudaStream_t stream) {
  using Kernel = typename RowProduct<Element, Epilogue, Weight>::Kernel;
  const RowStride out_layout{out_stride, _1{}, 0};
  const typename Kernel::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {static_cast<int>(operands.rows), static_cast<int>(operands.columns), static_cast<int>(operands.depth), 1},
      {static_cast<const Element*>(operands.input), RowStride{operands.input_stride, _1{}, 0},
       static_cast<const Element*>(operands.weight), weight_stride(Weight{}, operands)},
      {callbacks, static_cast<const Element*>(source), out_layout, static_cast<Element*>(out), out_layout},
      hardware()};
  run<Kernel>(arguments, name, stream);
}

template <class Element>
void product(const Product& operands, const float* bias, void* out, std::int64_t out_stride, cudaStream_t stream) {
  using Epilogue = PlainEpilogue<Element>;
  const typename Epilogue::Callbacks::Arguments callbacks{{}, {bias}, {}};
  run_rows<Element, Epilogue>(operands, callbacks, nullptr, out, out_stride, "product", stream);
}

template <class Element>
void product_gelu(const Product& operands, const float* bias, void* z, void* activation, std::int64_t out_stride,
                  cudaStream_t stream) {
  using Epilogue = GeluEpilogue<Element>;
  const typename Epilogue::Callbacks::Arguments callbacks{
      {{{}, {bias}, {}}, {static_cast<Element*>(z), RowStride{out_stride, _1{}, 0}}}, {}};
  run_rows<Element, Epilogue>(operands, callbacks, nullptr, activation, out_stride, "product_gelu", stream);
}

template <class Element>
void product_gelu_gradient(const Product& operands, const void* z, void* out, void* activation, std::int64_t out_stride,
                           cudaStream_t stream) {
  using Epilogue = GeluGradientEpilogue<Element>;
  const typename Epilogue::Callbacks::Arguments callbacks{
      {}, {}, {}, {static_cast<Element*>(activation), RowStride{out_stride, _1{}, 0}}, {}};
  run_rows<Element, Epilogue, cutlass::layout::RowMajor>(operands, callbacks, z, out, out_stride,
                                                         "product_gelu_gradient", stream);
}

template <class Element>
void weight_gradient_parts(const void* gradient, const void* input, std::int64_t input_stride, float* partial,
                           std::int64_t partial_stride, std::int64_t parts, std::int64_t part_rows,
                           std::int64_t channels, std::int64_t depth, cudaStream_t stream) {
  using Kernel = typename WeightProduct<Element>::Kernel;
  const RowStride out_layout{partial_stride, _1{}, channels * partial_stride};
  const typename Kernel::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {static_cast<int>(channels), static_cast<int>(depth), static_cast<int>(part_rows), static_cast<int>(parts)},
      {static_cast<const Element*>(gradient), ColumnStride{_1{}, channels, part_rows * channels},
       static_cast<const Element*>(input), ColumnStride{_1{}, input_stride, part_rows * input_stride}},
      {{1.0f, 0.0f}, nullptr, out_layout, partial, out_layout},
      hardware()};
  run<Kernel>(arguments, "weight_gradient", stream);
}

}  // namespace hubert_fast::cuda::sm90
