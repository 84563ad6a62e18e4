// Rows to the experts and back, and the activation between. All of them only move memory: what counts is that each byte
// is moved once, 16 at a time. How to read: kernels.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "arithmetic.h"

namespace moect::kernels {

struct Nothing {};

constexpr int row_threads = 256;

// V numbers that are read and written at once: 16 bytes where rows and pointers allow it, else one number.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T at[V];
};

// Which row, and which vectors of it, a thread does: a team of 2^shift threads has a row, a block has several teams.
struct Rows {
  int64_t rows;
  int width;  // vectors in a row
  int shift;

  // Two vectors or more for each thread, where the row is that wide.
  Rows(int64_t rows, int width) : rows(rows), width(width), shift(0) {
    while ((row_threads >> shift) > 2 && (4 << shift) <= width) shift++;
  }
  int64_t blocks() const { return (rows + (row_threads >> shift) - 1) / (row_threads >> shift); }
  MOECT_HD int team() const { return 1 << shift; }
  MOECT_HD int lane(int thread) const { return thread & (team() - 1); }
  MOECT_HD int64_t row(int64_t block, int thread) const { return block * (row_threads >> shift) + (thread >> shift); }
};

// Sum of one number from each thread of a team, in two steps, in a fixed order; the team's first thread gets it.
template <class S>
struct TeamSum {
  S part[row_threads];

  MOECT_HD void first_step(const Rows& rows, int thread) {
    const int parts = rows.team() > 8 ? rows.team() / 8 : 1, lane = rows.lane(thread);
    if (lane >= parts) return;
    S sum = part[thread];
    for (int from = lane + parts; from < rows.team(); from += parts) sum += part[thread - lane + from];
    part[thread] = sum;
  }
  MOECT_HD S second_step(const Rows& rows, int thread) const {
    const int parts = rows.team() > 8 ? rows.team() / 8 : 1;
    S sum = part[thread];
    for (int from = 1; from < parts; from++) sum += part[thread + from];
    return sum;
  }
};

// x_ND: row t of x_TD at each of its K positions. Each row of x_TD is read once.
template <class Word>
struct Permute {
  static constexpr int threads = row_threads;
  using Shared = Nothing;
  const Word* x_TD;
  const int32_t* position_N;
  Word* x_ND;
  int top_k;
  Rows tokens;

  MOECT_HD int phases() const { return 1; }
  MOECT_HD void operator()(int, int64_t block, int thread, Shared&) const {
    const int64_t t = tokens.row(block, thread);
    if (t >= tokens.rows) return;
    const Word* from = x_TD + t * tokens.width;
    const int32_t* position = position_N + t * top_k;
    for (int j = tokens.lane(thread); j < tokens.width; j += tokens.team()) {
      const Word word = from[j];
      for (int k = 0; k < top_k; k++) {
        const int32_t n = position[k];
        x_ND[int64_t(n < 0 ? ~n : n) * tokens.width + j] = n < 0 ? Word{} : word;
      }
    }
  }
};

// y_t = sum_k w_tk y_ND[position(t, k)], in the order of k; w = 1 where there are none.
template <class T, int V>
struct Combine {
  static constexpr int threads = row_threads;
  using Shared = Nothing;
  using S = sum_t<T>;
  const Vector<T, V>* y_ND;
  const int32_t* position_N;
  const S* weight_N;
  Vector<T, V>* y_TD;
  int top_k;
  Rows tokens;

  MOECT_HD int phases() const { return 1; }
  MOECT_HD void operator()(int, int64_t block, int thread, Shared&) const {
    const int64_t t = tokens.row(block, thread);
    if (t >= tokens.rows) return;
    for (int j = tokens.lane(thread); j < tokens.width; j += tokens.team()) {
      S sum[V] = {};
      int k = 0;
      for (; k + 4 <= top_k; k += 4) add<4>(t * top_k + k, j, sum);
      for (; k < top_k; k++) add<1>(t * top_k + k, j, sum);
      Vector<T, V> out;
      for (int v = 0; v < V; v++) out.at[v] = T(sum[v]);
      y_TD[t * tokens.width + j] = out;
    }
  }

  // The vectors j of so many assignments from i on: all of them are read before the first is used.
  template <int count>
  MOECT_HD void add(int64_t i, int j, S (&sum)[V]) const {
    Vector<T, V> y[count];
    S weight[count];
    for (int c = 0; c < count; c++) {
      const int32_t n = position_N[i + c];
      weight[c] = n < 0 ? S(NAN) : weight_N ? weight_N[i + c] : S(1);
      y[c] = y_ND[int64_t(n < 0 ? 0 : n) * tokens.width + j];
    }
    for (int c = 0; c < count; c++) {
      for (int v = 0; v < V; v++) sum[v] += weight[c] * S(y[c].at[v]);
    }
  }
};

// dy_ND = w dy_t, dw_tk = <dy_t, y_ND>. In the order of the assignments: a token's K rows share a read of dy_TD.
template <class T, int V>
struct CombineBackward {
  static constexpr int threads = row_threads;
  using S = sum_t<T>;
  using Shared = TeamSum<S>;
  const Vector<T, V>* dy_TD;
  const Vector<T, V>* y_ND;
  const int32_t* position_N;
  const S* weight_N;
  Vector<T, V>* dy_ND;
  S* dweight_N;
  int top_k;
  Rows assignments;

  MOECT_HD int phases() const { return 3; }
  MOECT_HD void operator()(int phase, int64_t block, int thread, Shared& dweight) const {
    const int64_t i = assignments.row(block, thread);
    const int width = assignments.width;
    if (i >= assignments.rows) return;  // a whole team leaves, or none of it
    if (phase == 0) {
      const int32_t n = position_N[i];
      const int64_t from = token_of(i, top_k) * width, to = int64_t(n < 0 ? ~n : n) * width;
      const S weight = weight_N[i];
      S sum = n < 0 ? S(NAN) : S(0);
      for (int j = assignments.lane(thread); j < width; j += assignments.team()) {
        const Vector<T, V> dy = dy_TD[from + j];
        Vector<T, V> out{};
        if (n >= 0) {
          const Vector<T, V> y = y_ND[to + j];
          for (int v = 0; v < V; v++) {
            sum += S(dy.at[v]) * S(y.at[v]);
            out.at[v] = T(weight * S(dy.at[v]));
          }
        }
        dy_ND[to + j] = out;
      }
      dweight.part[thread] = sum;
    } else if (phase == 1) {
      dweight.first_step(assignments, thread);
    } else if (assignments.lane(thread) == 0) {
      dweight_N[i] = dweight.second_step(assignments, thread);
    }
  }
};

// a = silu(gate) up, where a row of h is the gate, then up.
template <class T, int V>
struct Swiglu {
  static constexpr int threads = row_threads;
  using Shared = Nothing;
  using S = sum_t<T>;
  const Vector<T, V>* h_N2F;
  Vector<T, V>* a_NF;
  Rows rows;

  MOECT_HD int phases() const { return 1; }
  MOECT_HD void operator()(int, int64_t block, int thread, Shared&) const {
    const int64_t n = rows.row(block, thread);
    if (n >= rows.rows) return;
    for (int j = rows.lane(thread); j < rows.width; j += rows.team()) {
      const Vector<T, V> gate = h_N2F[2 * n * rows.width + j], up = h_N2F[(2 * n + 1) * rows.width + j];
      Vector<T, V> a;
      for (int v = 0; v < V; v++) a.at[v] = T(swiglu(S(gate.at[v]), S(up.at[v])));
      a_NF[n * rows.width + j] = a;
    }
  }
};

// dh and w a from da = down^T dy; dw = <da, a>, at the assignment of the row. Without weights w = 1 and no dw.
template <class T, int V>
struct SwigluBackward {
  static constexpr int threads = row_threads;
  using S = sum_t<T>;
  using Shared = TeamSum<S>;
  const Vector<T, V>* da_NF;
  const Vector<T, V>* h_N2F;
  const int32_t* source_N;
  const S* weight_N;
  Vector<T, V>* dh_N2F;
  Vector<T, V>* weighted_NF;
  S* dweight_N;
  Rows rows;

  MOECT_HD int phases() const { return weight_N ? 3 : 1; }
  MOECT_HD void operator()(int phase, int64_t block, int thread, Shared& dweight) const {
    const int64_t n = rows.row(block, thread);
    const int width = rows.width;
    if (n >= rows.rows) return;  // a whole team leaves, or none of it
    const int32_t i = weight_N ? source_N[n] : 0;
    if (phase == 0) {
      const S weight = !weight_N ? S(1) : i < 0 ? S(0) : weight_N[i];
      S sum = i < 0 ? S(NAN) : S(0);
      for (int j = rows.lane(thread); j < width; j += rows.team()) {
        Vector<T, V> dgate{}, dup{}, weighted{};
        if (i >= 0) {  // behind all experts da and h were never written
          const Vector<T, V> da = da_NF[n * width + j];
          const Vector<T, V> gate = h_N2F[2 * n * width + j], up = h_N2F[(2 * n + 1) * width + j];
          for (int v = 0; v < V; v++) {
            const auto d = swiglu_backward(S(da.at[v]), S(gate.at[v]), S(up.at[v]), weight);
            dgate.at[v] = T(d.dgate);
            dup.at[v] = T(d.dup);
            weighted.at[v] = T(d.weighted);
            sum += d.dweight;
          }
        }
        dh_N2F[2 * n * width + j] = dgate;
        dh_N2F[(2 * n + 1) * width + j] = dup;
        weighted_NF[n * width + j] = weighted;
      }
      dweight.part[thread] = sum;
    } else if (phase == 1) {
      dweight.first_step(rows, thread);
    } else if (rows.lane(thread) == 0) {
      dweight_N[i < 0 ? ~i : i] = dweight.second_step(rows, thread);
    }
  }
};

}  // namespace moect::kernels
