// Dropout of rows, compiled once for each instruction set. The mask follows from a seed and each value's row and column
// alone, not from the instructions, the threads or the order of the rows.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace hubert_fast {
namespace HUBERT_FAST_INSTANCE {
namespace {

constexpr int kHashes = 16;              // of a block
constexpr int kColumns = 2 * kHashes;    // each hash has 16 bits for two of them

// SplitMix64's mixing function (Steele et al. 2014).
inline std::uint64_t mixed(std::uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
  return bits ^ (bits >> 31);
}

// What values whose 16 bits reach the threshold are multiplied by, and 0 for the others.
inline Floats multipliers(Bits bits, std::uint32_t threshold, float scale) {
  return bit_cast<Floats>(bit_cast<Bits>(bits >= threshold) & bit_cast<Bits>(broadcast(scale)));
}

inline void drop_block(const float* values, float* out, std::uint32_t block, std::uint64_t key, const Drop& work) {
  Bits lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = std::uint32_t(i);
  for (int i = 0; i < kHashes; i += kLanes) {
    // Two rounds of multiplying and shifting, each after half of the key.
    Bits bits = (lane + (block * kHashes + i)) * 0x9E3779B1u + std::uint32_t(key);
    bits = (bits ^ (bits >> 16)) * 0x21F0AAADu ^ std::uint32_t(key >> 32);
    bits = (bits ^ (bits >> 15)) * 0x735A2D97u;
    bits ^= bits >> 15;
    store(out + i, load(values + i) * multipliers(bits & 0xFFFFu, work.threshold, work.scale));
    store(out + kHashes + i, load(values + kHashes + i) * multipliers(bits >> 16, work.threshold, work.scale));
  }
}

void drop(const Drop& work, std::int64_t start, std::int64_t stop) {
  const std::int64_t whole = work.columns / kColumns, rest = work.columns % kColumns;
  for (std::int64_t place = start; place < stop; ++place) {
    const std::int64_t row = place % work.rows;
    const std::int64_t number = work.first + place / work.rows * work.stride + (work.index ? work.index[row] : row);
    const std::uint64_t key = mixed(work.seed + std::uint64_t(number) * 0x9E3779B97F4A7C15u);
    const float* values = work.values + place * work.columns;
    float* out = work.out + place * work.columns;
    for (std::int64_t block = 0; block < whole; ++block)
      drop_block(values + block * kColumns, out + block * kColumns, std::uint32_t(block), key, work);
    if (rest == 0) continue;
    float block[kColumns] = {};
    std::memcpy(block, values + whole * kColumns, std::size_t(rest) * sizeof(float));
    drop_block(block, block, std::uint32_t(whole), key, work);
    std::memcpy(out + whole * kColumns, block, std::size_t(rest) * sizeof(float));
  }
}

}  // namespace
}  // namespace HUBERT_FAST_INSTANCE
}  // namespace hubert_fast
