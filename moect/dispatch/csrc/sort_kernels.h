// Counting sort of the assignments by expert: count each chunk, add up over the chunks, place. How to read: kernels.h.
#pragma once

#include <cstdint>

#include "arithmetic.h"

namespace moect::kernels {

constexpr int chunk = 512;  // assignments that a block sorts

// Keys of one chunk, four to a 16-byte read; -1 where the chunk is longer than what is left.
struct ChunkKeys {
  struct alignas(16) Four {
    int32_t at[4];
  };
  Four four[chunk / 4];

  MOECT_HD void load(const int64_t* key_N, int64_t block, int thread, int64_t assignments, int32_t experts) {
    const int64_t i = block * chunk + thread;
    int32_t key = -1;
    if (i < assignments) key = uint64_t(key_N[i]) < uint64_t(experts) ? int32_t(key_N[i]) : experts;
    four[thread / 4].at[thread % 4] = key;
  }

  // How many of the first `length` keys are `key`.
  MOECT_HD int32_t count(int32_t key, int length) const {
    int32_t equal = 0;
    for (int q = 0; q < length / 4; q++) {
      const Four keys = four[q];
      for (int j = 0; j < 4; j++) equal += keys.at[j] == key;
    }
    for (int j = 0; j < length % 4; j++) equal += four[length / 4].at[j] == key;
    return equal;
  }
};

// counts (chunks, E + 1): how often each expert is in each chunk; the last column counts keys out of range.
struct Count {
  static constexpr int threads = chunk;
  using Shared = ChunkKeys;
  const int64_t* key_N;
  int32_t* counts;
  int64_t assignments;
  int32_t experts;

  MOECT_HD int phases() const { return 2; }
  MOECT_HD void operator()(int phase, int64_t block, int thread, Shared& keys) const {
    if (phase == 0) return keys.load(key_N, block, thread, assignments, experts);
    for (int32_t e = thread; e <= experts; e += threads) counts[block * (experts + 1) + e] = keys.count(e, chunk);
  }
};

// One block. counts: in place, how often each expert is in the chunks before. ends_E: where each expert's segment ends.
// The threads share out the columns of counts, 2^shift at a time, and the rows of a column.
struct Scan {
  static constexpr int threads = 1024;
  struct Shared {
    int32_t part[threads];
    int32_t total[threads];
  };
  int32_t* counts;
  int32_t* ends_E;
  int64_t chunks;
  int32_t experts;
  int shift;

  MOECT_HD int phases() const { return 3 * ((experts + (1 << shift)) >> shift); }
  MOECT_HD void operator()(int phase, int64_t, int thread, Shared& shared) const {
    const int columns = 1 << shift, parts = threads >> shift;
    const int column = thread & (columns - 1), part = thread >> shift;
    const int first_expert = phase / 3 * columns, e = first_expert + column;
    const int64_t rows = (chunks + parts - 1) / parts, stride = experts + 1;
    const int64_t first = e <= experts ? part * rows : chunks;
    const int64_t last = first + rows < chunks ? first + rows : chunks;
    if (phase % 3 == 0) {
      int32_t sum = 0;
      for (int64_t c = first; c < last; c++) sum += counts[c * stride + e];
      shared.part[thread] = sum;
    } else if (phase % 3 == 1) {
      int32_t sum = 0;
      for (int p = 0; p < part; p++) sum += shared.part[p * columns + column];
      constexpr int batch = 8;  // reads under way at a time: a read waits for no write
      for (int64_t c = first; c < last; c += batch) {
        int32_t count[batch];
        for (int j = 0; j < batch; j++) count[j] = c + j < last ? counts[(c + j) * stride + e] : 0;
        for (int j = 0; j < batch; j++) {
          if (c + j < last) counts[(c + j) * stride + e] = sum;
          sum += count[j];
        }
      }
      if (part == parts - 1) shared.total[column] = sum;
    } else if (part == 0 && e < experts) {
      int32_t end = first_expert ? ends_E[first_expert - 1] : 0;
      for (int c = 0; c <= column; c++) end += shared.total[c];
      ends_E[e] = end;
    }
  }
};

// Position and source of every assignment: tokens ascend within an expert.
struct Place {
  static constexpr int threads = chunk;
  using Shared = ChunkKeys;
  const int64_t* key_N;
  const int32_t* counts;  // as Scan leaves them
  const int32_t* ends_E;
  int32_t* source_N;
  int32_t* position_N;
  int64_t assignments;
  int32_t experts;

  MOECT_HD int phases() const { return 2; }
  MOECT_HD void operator()(int phase, int64_t block, int thread, Shared& keys) const {
    if (phase == 0) return keys.load(key_N, block, thread, assignments, experts);
    const int32_t i = int32_t(block * chunk + thread);
    if (i >= assignments) return;
    const int32_t e = keys.four[thread / 4].at[thread % 4];
    const int32_t n = (e ? ends_E[e - 1] : 0) + counts[block * (experts + 1) + e] + keys.count(e, thread);
    position_N[i] = e < experts ? n : ~n;
    source_N[n] = e < experts ? i : ~i;
  }
};

}  // namespace moect::kernels
