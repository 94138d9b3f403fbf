// Philox4x32-10 and the draws that are made from it, for host and device. sg_kernels/rng.py defines
// the counters and what each word means.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace sg_kernels {

enum Stream : std::uint32_t { kSampling, kKeepProb, kPairing, kGridSize, kCall };

struct Words {
  std::uint32_t word[4];
};

SG_HOST_DEVICE inline Words philox(
    std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3, std::uint64_t seed) {
  std::uint32_t k0 = static_cast<std::uint32_t>(seed);
  std::uint32_t k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0;
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(p1);
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

SG_HOST_DEVICE inline std::uint64_t call_seed(
    std::uint64_t seed, std::uint64_t step, std::uint32_t rank) {
  const Words words = philox(
      static_cast<std::uint32_t>(step), static_cast<std::uint32_t>(step >> 32), rank, kCall, seed);
  return words.word[0] | std::uint64_t{words.word[1]} << 32;
}

// Word `i` of a stream is word i % 4 of block i / 4.
SG_HOST_DEVICE inline std::uint32_t stream_word(
    std::uint32_t i, std::uint32_t row, std::uint32_t draw, Stream stream, std::uint64_t seed) {
  const Words words = philox(i / 4, row, draw, stream, seed);
  // Chosen, not indexed: a GPU cannot index registers.
  const std::uint32_t even = i & 2 ? words.word[2] : words.word[0];
  const std::uint32_t odd = i & 2 ? words.word[3] : words.word[1];
  return i & 1 ? odd : even;
}

// Orders the samples of a draw: by the random word, then by the sample's number.
SG_HOST_DEVICE inline std::uint64_t ticket(std::uint32_t word, std::int64_t sample) {
  return std::uint64_t{word} << 32 | static_cast<std::uint64_t>(sample);
}

// A probability as an integer threshold: a word below it is a success.
SG_HOST_DEVICE inline std::int64_t threshold_of(double probability) {
  return static_cast<std::int64_t>(probability * 4294967296.0);
}

constexpr int kQuantileShift = 22;
constexpr std::int64_t kQuantileBins = std::int64_t{1} << (32 - kQuantileShift);

// The inverse CDF at `word`, interpolated linearly between kQuantileBins + 1 nodes.
SG_HOST_DEVICE inline std::int64_t keep_threshold(
    std::uint32_t word, const std::int64_t* quantiles) {
  const std::uint32_t bin = word >> kQuantileShift;
  const std::int64_t low = quantiles[bin], high = quantiles[bin + 1];
  const std::int64_t fraction = word & ((1u << kQuantileShift) - 1);
  return low + ((high - low) * fraction >> kQuantileShift);
}

}  // namespace sg_kernels
