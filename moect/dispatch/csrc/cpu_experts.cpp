// All of it on a CPU: order, gather, two products per expert, SwiGLU, weighted sum, and their backward.
//
// The products are ATen's, one per expert segment, as in `segments`. What is saved around them:
//   - whole experts are shared out among the threads, each product on one thread, wherever that balances: a product of
//     a few rows is memory traffic, which several threads inside it share badly
//   - an expert's tokens are gathered, and its activation made and used, while they are in the cache; gathered rows lie
//     where the rows of the result will
//   - only the pre-activation h is kept for backward; without gradients not even that
// No token is dropped, nothing is added atomically: same routing and number of threads, same bits.
//
// T tokens, K experts per token, E experts, D width, F expert width, N = T K assignments in the order of their experts

#include <algorithm>
#include <array>
#include <atomic>
#include <tuple>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "arithmetic.h"
#include "tensors.h"

namespace {

using at::Tensor;
using moect::in_sum_type;
using moect::sum_t;

// Memory that is written for the first time costs a page fault per page. Where it is large, ask for large pages.
Tensor allocate(at::IntArrayRef shape, const at::TensorOptions& options) {
  Tensor out = at::empty(shape, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const auto begin = reinterpret_cast<uintptr_t>(out.data_ptr());
  const uintptr_t first = (begin + page - 1) & ~(page - 1), last = (begin + out.nbytes()) & ~(page - 1);
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: it may fail
#endif
  return out;
}

// Rows that a thread should have, at least, to be worth waking.
int64_t grain(int64_t numbers_per_row) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, numbers_per_row)); }

// ---- order ----

struct Order {
  Tensor source_N;    // int32: the assignment t K + k at each position
  Tensor position_N;  // int32: the position of each assignment
  Tensor ends_E;      // int32: where each expert's segment ends
};

// Counting sort, stable: tokens ascend within an expert.
Order order_by_expert(const Tensor& indices_TK, int64_t experts) {
  const Tensor indices = indices_TK.contiguous();
  const int64_t assignments = indices.numel();
  TORCH_CHECK_VALUE(assignments < INT32_MAX, "moect: more than 2^31 assignments in one call");
  const auto options = indices.options().dtype(at::kInt);
  Order order{at::empty({assignments}, options), at::empty({assignments}, options), at::zeros({experts}, options)};
  const int64_t* index = indices.const_data_ptr<int64_t>();
  int32_t* source = order.source_N.data_ptr<int32_t>();
  int32_t* position = order.position_N.data_ptr<int32_t>();
  int32_t* next = order.ends_E.data_ptr<int32_t>();
  for (int64_t i = 0; i < assignments; i++) {
    TORCH_CHECK_INDEX(0 <= index[i] && index[i] < experts, "moect: expert ", index[i], " of ", experts);
    next[index[i]]++;
  }
  int32_t start = 0;
  for (int64_t e = 0; e < experts; e++) start += std::exchange(next[e], start);
  for (int64_t i = 0; i < assignments; i++) {
    position[i] = next[index[i]]++;
    source[position[i]] = static_cast<int32_t>(i);
  }
  return order;
}

// ---- which thread does which expert ----

struct Segment {
  int64_t expert, start, count;
};

// Experts that all threads do together, one after another, and those that single threads take from a queue.
struct Schedule {
  std::vector<Segment> together, queue, idle;
  int64_t threads = 1;
  int64_t stride = 0;  // rows of workspace for a thread at the queue
  int64_t rows = 0;    // of workspace in all
};

// Whether threads that each take the next segment when they are done with one end at about the same time.
bool balanced(const std::vector<Segment>& queue, int64_t threads) {
  constexpr double tolerated = 1.1;  // the greatest share over the mean, in rows
  std::vector<int64_t> share(threads);
  int64_t rows = 0;
  for (const Segment& segment : queue) {
    *std::min_element(share.begin(), share.end()) += segment.count;
    rows += segment.count;
  }
  return *std::max_element(share.begin(), share.end()) * threads <= rows * tolerated;
}

// The queue is longest first. What would unbalance it is done together, if it has rows for all threads; so are segments
// with so many rows that a product does well on all threads: then there is one workspace instead of one a thread.
Schedule make_schedule(const Tensor& ends_E) {
  constexpr int64_t many = 1024, few = 16;  // rows; rows a thread
  Schedule schedule;
  const int32_t* end = ends_E.const_data_ptr<int32_t>();
  for (int64_t e = 0, start = 0; e < ends_E.numel(); start = end[e++]) {
    const int64_t count = end[e] - start;
    (count == 0 ? schedule.idle : count < many ? schedule.queue : schedule.together).push_back({e, start, count});
  }
  schedule.threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  std::vector<Segment>&queue = schedule.queue, &together = schedule.together;
  std::stable_sort(queue.begin(), queue.end(), [](auto& a, auto& b) { return a.count > b.count; });
  if (schedule.threads == 1) together.insert(together.end(), queue.begin(), queue.end()), queue.clear();
  while (!queue.empty() && queue.front().count >= few * schedule.threads && !balanced(queue, schedule.threads)) {
    together.push_back(queue.front());
    queue.erase(queue.begin());
  }
  for (const Segment& segment : together) schedule.rows = std::max(schedule.rows, segment.count);
  if (!queue.empty()) {
    // products round otherwise at other alignments: each thread's rows must begin alike, at a multiple of 64 bytes
    schedule.stride = (queue.front().count + 31) / 32 * 32;
    schedule.rows = std::max(schedule.rows, schedule.stride * schedule.threads);
  }
  return schedule;
}

// Call work(segment, first workspace row) for every segment. Which thread takes which changes no result.
template <class Work>
void run(const Schedule& schedule, const Work& work) {
  for (const Segment& segment : schedule.together) work(segment, 0);
  std::atomic<size_t> next{0};
  at::parallel_for(0, schedule.queue.empty() ? 0 : schedule.threads, 1, [&](int64_t first, int64_t last) {
    at::AutoDispatchBelowADInplaceOrView guard;  // as in the thread that called; threads do not inherit it
    for (size_t i; first < last && (i = next++) < schedule.queue.size();) {
      work(schedule.queue[i], first * schedule.stride);
    }
  });
}

// ---- rows ----

template <class T>
void gather(const Tensor& from_TD, const int32_t* source, int64_t top_k, Tensor& to_nD) {
  const int64_t width = to_nD.size(1);
  const T* from = from_TD.const_data_ptr<T>();
  T* to = to_nD.data_ptr<T>();
  at::parallel_for(0, to_nD.size(0), grain(width), [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++) {
      std::memcpy(to + n * width, from + moect::token_of(source[n], top_k) * width, width * sizeof(T));
    }
  });
}

template <class T>
void activate(const Tensor& h_n2F, Tensor& a_nF) {
  using S = sum_t<T>;
  const int64_t width = a_nF.size(1);
  const T* h = h_n2F.const_data_ptr<T>();
  T* a = a_nF.data_ptr<T>();
  at::parallel_for(0, a_nF.size(0), grain(2 * width), [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++) {
      const T *gate = h + 2 * n * width, *up = gate + width;
      for (int64_t j = 0; j < width; j++) a[n * width + j] = T(moect::swiglu(S(gate[j]), S(up[j])));
    }
  });
}

// da becomes the weighted activation, in place; dh and the weights' gradients are written.
template <class T>
void activate_backward(
    Tensor& da_nF, const Tensor& h_n2F, const sum_t<T>* weight, const int32_t* source, Tensor& dh_n2F,
    sum_t<T>* dweight) {
  using S = sum_t<T>;
  constexpr int64_t lanes = 16;  // partial sums, so that the sum over a row is a vector's, in an order of its own
  const int64_t width = da_nF.size(1);
  T* da = da_nF.data_ptr<T>();
  const T* h = h_n2F.const_data_ptr<T>();
  T* dh = dh_n2F.data_ptr<T>();
  at::parallel_for(0, da_nF.size(0), grain(4 * width), [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++) {
      const T *gate = h + 2 * n * width, *up = gate + width;
      T *row = da + n * width, *dgate = dh + 2 * n * width, *dup = dgate + width;
      const S w = weight[source[n]];
      S partial[lanes] = {};
      auto one = [&](int64_t j) {
        const auto d = moect::swiglu_backward(S(row[j]), S(gate[j]), S(up[j]), w);
        row[j] = T(d.weighted);
        dgate[j] = T(d.dgate);
        dup[j] = T(d.dup);
        return d.dweight;
      };
      int64_t j = 0;
      for (; j + lanes <= width; j += lanes) {
#pragma GCC ivdep
        for (int64_t lane = 0; lane < lanes; lane++) partial[lane] += one(j + lane);
      }
      S total = 0;
      for (; j < width; j++) total += one(j);
      for (S sum : partial) total += sum;
      dweight[source[n]] = total;
    }
  });
}

// y_t = sum_k w_tk y_position(t, k), in the order of k; w = 1 where there are none.
template <class T>
void combine(const Tensor& y_ND, const int32_t* position, const sum_t<T>* weight, int64_t top_k, Tensor& y_TD) {
  using S = sum_t<T>;
  const int64_t width = y_TD.size(1);
  const T* rows = y_ND.const_data_ptr<T>();
  T* out = y_TD.data_ptr<T>();
  at::parallel_for(0, y_TD.size(0), grain(top_k * width), [&](int64_t first, int64_t last) {
    std::vector<S> sum(width);
    for (int64_t t = first; t < last; t++) {
      std::fill(sum.begin(), sum.end(), S(0));
      S* total = sum.data();
      for (int64_t i = t * top_k; i < (t + 1) * top_k; i++) {
        const T* row = rows + position[i] * width;
        const S w = weight ? weight[i] : S(1);
#pragma GCC ivdep
        for (int64_t j = 0; j < width; j++) total[j] += w * S(row[j]);
      }
      for (int64_t j = 0; j < width; j++) out[t * width + j] = T(total[j]);
    }
  });
}

// ---- the operators ----

// Whoever calls the operators themselves, and not `dispatch`, must not read past the end of anything.
void check(const Tensor& x_TD, const Tensor& weights_TK, const Tensor& gate_up_E2FD, const Tensor& down_EDF) {
  const bool dims = x_TD.dim() == 2 && weights_TK.dim() == 2 && gate_up_E2FD.dim() == 3 && down_EDF.dim() == 3;
  const bool fits = dims && weights_TK.size(0) == x_TD.size(0) && down_EDF.size(1) == x_TD.size(1) &&
                    gate_up_E2FD.sizes() == at::IntArrayRef({down_EDF.size(0), 2 * down_EDF.size(2), x_TD.size(1)});
  TORCH_CHECK_VALUE(fits, "moect: expected x (T, D), weights (T, K), gate and up (E, 2F, D), down (E, D, F)");
  const auto type = x_TD.scalar_type();
  TORCH_CHECK_VALUE(
      gate_up_E2FD.scalar_type() == type && down_EDF.scalar_type() == type && weights_TK.is_floating_point(),
      "moect: expected one dtype for tokens and experts, floating point for weights");
  TORCH_CHECK_VALUE(
      weights_TK.is_cpu() && gate_up_E2FD.is_cpu() && down_EDF.is_cpu(), "moect: expected all tensors on the CPU");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> experts(
    const Tensor& x_TD_, const Tensor& indices_TK, const Tensor& weights_TK, const Tensor& gate_up_E2FD,
    const Tensor& down_EDF, bool keep) {
  check(x_TD_, weights_TK, gate_up_E2FD, down_EDF);
  TORCH_CHECK_VALUE(
      indices_TK.scalar_type() == at::kLong && indices_TK.sizes() == weights_TK.sizes() && indices_TK.is_cpu(),
      "moect: expected int64 indices (T, K), as many as weights");
  const Tensor x_TD = x_TD_.contiguous();
  const int64_t top_k = indices_TK.size(1), D = x_TD.size(1), F = down_EDF.size(2);
  const auto options = x_TD.options();
  const Tensor weights = in_sum_type(weights_TK, x_TD.scalar_type());
  const Order order = order_by_expert(indices_TK, down_EDF.size(0));
  const int64_t N = indices_TK.numel();
  const Schedule schedule = make_schedule(order.ends_E);

  Tensor y_TD = at::empty_like(x_TD);
  Tensor h = allocate({keep ? N : schedule.rows, 2 * F}, options);
  Tensor x_ND = allocate({N, D}, options), a = allocate({schedule.rows, F}, options);
  Tensor& y_ND = x_ND;  // a segment's x is not needed any more when its y is written
  MOECT_DISPATCH(x_TD.scalar_type(), [&] {
    run(schedule, [&](const Segment& s, int64_t own) {
      Tensor x_nD = x_ND.narrow(0, s.start, s.count), h_n2F = h.narrow(0, keep ? s.start : own, s.count);
      Tensor a_nF = a.narrow(0, own, s.count), y_nD = y_ND.narrow(0, s.start, s.count);
      gather<scalar_t>(x_TD, order.source_N.const_data_ptr<int32_t>() + s.start, top_k, x_nD);
      at::mm_out(h_n2F, x_nD, gate_up_E2FD.select(0, s.expert).t());
      activate<scalar_t>(h_n2F, a_nF);
      at::mm_out(y_nD, a_nF, down_EDF.select(0, s.expert).t());
    });
    combine<scalar_t>(
        y_ND, order.position_N.const_data_ptr<int32_t>(), weights.const_data_ptr<sum_t<scalar_t>>(), top_k, y_TD);
  });
  return {y_TD, keep ? h : at::empty({0, 2 * F}, options), order.source_N, order.position_N, order.ends_E};
}

// needs: which of dx, dweights, dgate_up, ddown to compute; the others come back without elements.
std::tuple<Tensor, Tensor, Tensor, Tensor> experts_backward(
    const Tensor& dy_TD_, const Tensor& x_TD_, const Tensor& weights_TK, const Tensor& gate_up_E2FD,
    const Tensor& down_EDF, const Tensor& h_N2F, const Tensor& source_N, const Tensor& position_N, const Tensor& ends_E,
    std::array<bool, 4> needs) {
  check(x_TD_, weights_TK, gate_up_E2FD, down_EDF);
  const int64_t assignments = weights_TK.numel();
  TORCH_CHECK_VALUE(
      dy_TD_.sizes() == x_TD_.sizes() && dy_TD_.scalar_type() == x_TD_.scalar_type() &&
          h_N2F.sizes() == at::IntArrayRef({assignments, gate_up_E2FD.size(1)}) && source_N.numel() == assignments &&
          position_N.numel() == assignments && ends_E.numel() == down_EDF.size(0),
      "moect: expected dy (T, D), and h and the order as the forward pass left them");
  const auto [needs_x, needs_weights, needs_gate_up, needs_down] = needs;
  const Tensor dy_TD = dy_TD_.contiguous(), x_TD = x_TD_.contiguous();
  const int64_t top_k = weights_TK.size(1), D = x_TD.size(1), F = down_EDF.size(2), N = source_N.numel();
  const auto options = x_TD.options();
  const Tensor weights = in_sum_type(weights_TK, x_TD.scalar_type());
  const Schedule schedule = make_schedule(ends_E);

  Tensor dx_TD = at::empty({needs_x ? x_TD.size(0) : 0, D}, options);
  Tensor dweights = at::empty_like(weights);
  Tensor dgate_up = allocate({needs_gate_up ? gate_up_E2FD.size(0) : 0, 2 * F, D}, options);
  Tensor ddown = allocate({needs_down ? down_EDF.size(0) : 0, D, F}, options);
  Tensor rows_ND = allocate({N, D}, options);  // a segment's dy, then its x, then its dx
  Tensor a = allocate({schedule.rows, F}, options), dh = allocate({schedule.rows, 2 * F}, options);
  for (const Segment& s : schedule.idle) {
    if (needs_gate_up) dgate_up.select(0, s.expert).zero_();
    if (needs_down) ddown.select(0, s.expert).zero_();
  }
  MOECT_DISPATCH(x_TD.scalar_type(), [&] {
    using S = sum_t<scalar_t>;
    run(schedule, [&](const Segment& s, int64_t own) {
      const int32_t* source = source_N.const_data_ptr<int32_t>() + s.start;
      Tensor rows_nD = rows_ND.narrow(0, s.start, s.count);
      Tensor a_nF = a.narrow(0, own, s.count), dh_n2F = dh.narrow(0, own, s.count);
      gather<scalar_t>(dy_TD, source, top_k, rows_nD);
      at::mm_out(a_nF, rows_nD, down_EDF.select(0, s.expert));  // da, before the token's weight
      activate_backward<scalar_t>(
          a_nF, h_N2F.narrow(0, s.start, s.count), weights.const_data_ptr<S>(), source, dh_n2F, dweights.data_ptr<S>());
      if (needs_down) {
        Tensor place = ddown.select(0, s.expert);
        at::mm_out(place, rows_nD.t(), a_nF);
      }
      if (needs_gate_up) {
        gather<scalar_t>(x_TD, source, top_k, rows_nD);
        Tensor place = dgate_up.select(0, s.expert);
        at::mm_out(place, dh_n2F.t(), rows_nD);
      }
      if (needs_x) at::mm_out(rows_nD, dh_n2F, gate_up_E2FD.select(0, s.expert));
    });
    if (needs_x) combine<scalar_t>(rows_ND, position_N.const_data_ptr<int32_t>(), nullptr, top_k, dx_TD);
  });
  return {dx_TD, needs_weights ? dweights.to(weights_TK.scalar_type()) : at::empty({0, top_k}, weights_TK.options()),
          dgate_up, ddown};
}

}  // namespace

TORCH_LIBRARY_IMPL(moect, CPU, m) {
  m.impl("experts", experts);
  m.impl("experts_backward", experts_backward);
}
