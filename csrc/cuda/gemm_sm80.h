// The products of gemm.h as CUTLASS 2.x kernels for sm_80 and every newer architecture: cp.async into a ring of tiles in
// shared memory, ldmatrix, mma.m16n8k16. One .cu file instantiates one kernel, so that they compile beside each other.
//
// Offsets. An operand is (pointer, row stride), and CUTLASS's iterators put the address of (row, k) at
// pointer + row * stride + k, in 64 bits, without asking that stride >= depth: rows that overlap are ordinary rows. They
// compare (row, k) with (rows, depth) alone, 32-bit coordinates that reach at most one tile past an extent: gemm.cpp keeps
// extents a tile away from 2^31. What is out of bounds is not read: what stands for it in shared memory is zero along the
// sum, and elsewhere whatever was there, which goes into rows and columns of the result that are not stored. The visitors
// of an epilogue address (row, column) as row * stride + column, in 64 bits, and compare in the same way; the strides
// between the parts of a weight gradient are 64-bit too.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cutlass/epilogue/thread/linear_combination.h"
#include "cutlass/gemm/kernel/default_gemm_universal.h"
#include "cutlass/gemm/kernel/default_gemm_universal_with_visitor.h"
#include "cutlass/gemm/threadblock/threadblock_swizzle.h"

// After the above, which it does not include itself.
#include "cutlass/epilogue/threadblock/fusion/visitors.hpp"
#include "gemm.h"
#include "gemm_cutlass.h"

namespace hubert_fast::cuda::sm80 {

namespace visitors = cutlass::epilogue::threadblock;

// 128 threads on 128 x 128: a warp's quarter of 64 x 64 is what its registers hold, so that shared memory keeps up with the
// tensor cores. 3 stages are 48 KB: two blocks share a multiprocessor even where it has 100 KB (8.6, 8.9, 12.0), and the
// epilogue of one hides behind the products of the other.
using Tile = cutlass::gemm::GemmShape<128, 128, 32>;
using Warp = cutlass::gemm::GemmShape<64, 64, 32>;
using Instruction = cutlass::gemm::GemmShape<16, 8, 16>;
constexpr int kStages = 3;
// Blocks that follow each other take the tiles of up to 8 columns of tiles, so that rows of the input come from L2.
using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>;

using RowStride = cute::Stride<std::int64_t, cute::_1, std::int64_t>;

template <class Element>
using ThreadMap = visitors::OutputTileThreadLayout<Tile, Warp, Element, kAlignment>;

template <template <class> class Function>
using Compute = visitors::VisitorCompute<Function, float, float, kRound>;

template <class Element>
using Load = visitors::VisitorAuxLoad<ThreadMap<Element>, Element, RowStride>;

template <class Element>
using Store = visitors::VisitorAuxStore<ThreadMap<Element>, Element, kRound, RowStride>;

// Null is not stored to: CUTLASS's node writes to it.
template <class Element>
struct OptionalStore : Store<Element> {
  using Store<Element>::Store;

  template <class ProblemShape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
    // The shape bounds what is written and is no part of an address: without rows nothing is.
    if (this->params_ptr->ptr_aux == nullptr) cute::get<0>(shape) = 0;
    return Store<Element>::get_callbacks(tile, thread, shape);
  }
};

// Accumulator + bias; a null bias is 0.
template <class Element>
using Biased = visitors::Sm80EVT<
    Compute<cutlass::plus>, visitors::VisitorAccFetch,
    visitors::VisitorRowBroadcast<ThreadMap<Element>, float, cute::Stride<cute::_0, cute::_1, cute::_0>>>;

// out = accumulator + bias
template <class Element>
using PlainEpilogue = visitors::Sm80EVT<Store<Element>, Biased<Element>>;

// z = accumulator + bias, out = GELU(z before it is rounded)
template <class Element>
using GeluEpilogue = visitors::Sm80EVT<
    Store<Element>, visitors::Sm80EVT<Compute<GeluValue>, visitors::Sm80EVT<OptionalStore<Element>, Biased<Element>>>>;

// Passes z on and stores GELU(z). A node of its own because CUTLASS's topological visitor, which could use a value twice,
// relies on the order in which a compiler evaluates arguments.
template <class Element>
struct OptionalGeluStore : OptionalStore<Element> {
  using OptionalStore<Element>::OptionalStore;

  template <class Base>
  struct Callbacks : Base {
    template <class Accumulator, int N>
    CUTLASS_DEVICE auto visit(int iteration, int row, int column, int fragment,
                              const cutlass::Array<Accumulator, N>& accumulator, const cutlass::Array<Element, N>& z) {
      const cutlass::NumericArrayConverter<float, Element, N> widen;
      Base::visit(iteration, row, column, fragment, accumulator, GeluValue<cutlass::Array<float, N>>{}(widen(z)));
      return z;
    }
  };

  template <class ProblemShape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
    auto base = OptionalStore<Element>::get_callbacks(tile, thread, shape);
    return Callbacks<decltype(base)>{base};
  }
};

// activation = GELU(z), out = accumulator * GELU'(z)
template <class Element>
using GeluGradientEpilogue =
    visitors::Sm80EVT<Store<Element>, visitors::Sm80EVT<Compute<GeluGradient>, visitors::VisitorAccFetch,
                                                        visitors::Sm80EVT<OptionalGeluStore<Element>, Load<Element>>>>;

// Weight: its layout as [depth, columns]; column-major is [columns, depth] in memory.
template <class Element, class Callbacks, class Weight>
using RowKernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
    Element, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, kAlignment, Element, Weight,
    cutlass::ComplexTransform::kNone, kAlignment, Element, cutlass::layout::RowMajor, kAlignment, float, float,
    cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Tile, Warp, Instruction, Callbacks, Swizzle, kStages,
    cutlass::arch::OpMultiplyAdd>::GemmKernel;

// D[l, m, n] = sum_k A[l, k, m] B[l, k, n] in float, the operands running along m and n: the weight gradient.
template <class Element>
using WeightKernel = typename cutlass::gemm::kernel::DefaultGemmUniversal<
    Element, cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, kAlignment, Element,
    cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, kAlignment, float, cutlass::layout::RowMajor, float,
    cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Tile, Warp, Instruction,
    cutlass::epilogue::thread::LinearCombination<float, 4, float, float, cutlass::epilogue::thread::ScaleType::Nothing>,
    Swizzle, kStages, cutlass::arch::OpMultiplyAdd>::GemmKernel;

template <class Element, class Callbacks, class Weight = cutlass::layout::ColumnMajor>
void run_rows(const Product& operands, const typename Callbacks::Arguments& callbacks, const char* name,
              cudaStream_t stream) {
  using Kernel = RowKernel<Element, Callbacks, Weight>;
  const bool by_columns = std::is_same_v<Weight, cutlass::layout::ColumnMajor>;
  // The callbacks hold the outputs, so C and D are null.
  const typename Kernel::Arguments arguments(
      cutlass::gemm::GemmUniversalMode::kGemm,
      {static_cast<int>(operands.rows), static_cast<int>(operands.columns), static_cast<int>(operands.depth)}, 1,
      callbacks, operands.input, operands.weight, nullptr, nullptr, 0, 0, 0, 0, operands.input_stride,
      by_columns ? operands.depth : operands.columns, std::int64_t{0}, std::int64_t{0});
  run<Kernel>(arguments, name, stream);
}

template <class Element>
typename Store<Element>::Arguments stored(void* out, std::int64_t stride) {
  return {static_cast<Element*>(out), RowStride{stride, cute::_1{}, 0}};
}

template <class Element>
void product(const Product& operands, const float* bias, void* out, std::int64_t out_stride, cudaStream_t stream) {
  run_rows<Element, PlainEpilogue<Element>>(operands, {{{}, {bias}, {}}, stored<Element>(out, out_stride)}, "product",
                                            stream);
}

template <class Element>
void product_gelu(const Product& operands, const float* bias, void* z, void* activation, std::int64_t out_stride,
                  cudaStream_t stream) {
  run_rows<Element, GeluEpilogue<Element>>(
      operands,
      {{{{{}, {bias}, {}}, stored<Element>(z, out_stride)}, {}}, stored<Element>(activation, out_stride)},
      "product_gelu", stream);
}

template <class Element>
void product_gelu_gradient(const Product& operands, const void* z, void* out, void* activation, std::int64_t out_stride,
                           cudaStream_t stream) {
  const typename Load<Element>::Arguments loaded{const_cast<Element*>(static_cast<const Element*>(z)), Element(0),
                                                 RowStride{out_stride, cute::_1{}, 0}};
  run_rows<Element, GeluGradientEpilogue<Element>, cutlass::layout::RowMajor>(
      operands, {{{}, {loaded, stored<Element>(activation, out_stride)}, {}}, stored<Element>(out, out_stride)},
      "product_gelu_gradient", stream);
}

template <class Element>
void weight_gradient_parts(const void* gradient, const void* input, std::int64_t input_stride, float* partial,
                           std::int64_t partial_stride, std::int64_t parts, std::int64_t part_rows,
                           std::int64_t channels, std::int64_t depth, cudaStream_t stream) {
  using Kernel = WeightKernel<Element>;
  const typename Kernel::Arguments arguments(
      cutlass::gemm::GemmUniversalMode::kBatched,
      {static_cast<int>(channels), static_cast<int>(depth), static_cast<int>(part_rows)}, static_cast<int>(parts), {},
      gradient, input, nullptr, partial, part_rows * channels, part_rows * input_stride, 0, channels * partial_stride,
      channels, input_stride, std::int64_t{0}, partial_stride);
  run<Kernel>(arguments, "weight_gradient", stream);
}

}  // namespace hubert_fast::cuda::sm80
