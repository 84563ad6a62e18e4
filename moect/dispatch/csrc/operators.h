// The operators around the kernels of kernels.h: checks, allocation, choice of the vector width. Written once: `Device`
// is how the CUDA build (cuda.cpp) and the CPU build (cpu_kernels.cpp) run a kernel.
//
// T tokens, K experts per token, E experts, D width, F expert width, N = T K assignments in the order of their experts
#pragma once

#include <initializer_list>
#include <optional>
#include <tuple>
#include <type_traits>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "kernels.h"
#include "tensors.h"

namespace moect::operators {

using at::Tensor;
using kernels::Rows;
using kernels::Vector;

inline void same_device(const Tensor& like, std::initializer_list<Tensor> others) {
  for (const Tensor& other : others) {
    TORCH_CHECK_VALUE(other.device() == like.device(), "moect: tensors on ", like.device(), " and ", other.device());
  }
}

inline bool is_order(const Tensor& order_N) { return order_N.dim() == 1 && order_N.scalar_type() == at::kInt; }

// Whether rows of so many numbers can be moved 16 bytes at a time in all of these.
inline bool in_vectors(int64_t width, std::initializer_list<Tensor> tensors) {
  for (const Tensor& t : tensors) {
    if (width * t.element_size() % 16 || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16) return false;
  }
  return true;
}

template <class T, class Run>
void with_vectors(bool vectors, const Run& run) {
  if (vectors) {
    run(std::integral_constant<int, 16 / sizeof(T)>());
  } else {
    run(std::integral_constant<int, 1>());
  }
}

inline Rows rows_of(int64_t rows, int64_t width) {
  TORCH_CHECK_VALUE(width <= INT32_MAX / 4, "moect: rows of ", width, " numbers");
  return Rows(rows, static_cast<int>(width));
}

template <class V>
const V* read(const Tensor& t) {
  return static_cast<const V*>(t.const_data_ptr());
}

template <class V>
V* write(Tensor& t) {
  return static_cast<V*>(t.mutable_data_ptr());
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> sort_by_expert(const Tensor& indices_TK, int64_t experts) {
  TORCH_CHECK_VALUE(indices_TK.scalar_type() == at::kLong, "sort_by_expert: indices must be int64");
  TORCH_CHECK_VALUE(0 <= experts && experts < (1 << 24), "sort_by_expert: ", experts, " experts");
  TORCH_CHECK_VALUE(indices_TK.numel() < INT32_MAX, "sort_by_expert: 2^31 assignments or more in one call");
  const Device device(indices_TK);
  const Tensor indices = indices_TK.contiguous();
  const int64_t assignments = indices.numel(), chunks = (assignments + kernels::chunk - 1) / kernels::chunk;
  const int32_t E = static_cast<int32_t>(experts);
  const auto options = indices.options().dtype(at::kInt);
  Tensor source_N = at::empty({assignments}, options), position_N = at::empty({assignments}, options);
  Tensor ends_E = at::empty({experts}, options), counts = at::empty({chunks, experts + 1}, options);
  int shift = 0;
  while ((1 << shift) < experts && (1 << shift) < kernels::Scan::threads) shift++;
  const auto* key = read<int64_t>(indices);
  device.run(kernels::Count{key, write<int32_t>(counts), assignments, E}, chunks);
  device.run(kernels::Scan{write<int32_t>(counts), write<int32_t>(ends_E), chunks, E, shift}, 1);
  device.run(
      kernels::Place{key, read<int32_t>(counts), read<int32_t>(ends_E), write<int32_t>(source_N),
                     write<int32_t>(position_N), assignments, E},
      chunks);
  return {source_N, position_N, ends_E};
}

template <class Device>
Tensor permute(const Tensor& x_TD, const Tensor& position_N, int64_t top_k) {
  const bool fits = x_TD.dim() == 2 && is_order(position_N) && position_N.numel() == x_TD.size(0) * top_k;
  TORCH_CHECK_VALUE(fits, "permute: expected x (T, D) and int32 positions (T K)");
  same_device(x_TD, {position_N});
  const Device device(x_TD);
  const Tensor x = x_TD.contiguous(), position = position_N.contiguous();
  Tensor x_ND = at::empty({position.numel(), x.size(1)}, x.options());
  auto run = [&](auto word, int64_t width) {
    using Word = decltype(word);
    const Rows tokens = rows_of(x.size(0), width);
    device.run(
        kernels::Permute<Word>{
            read<Word>(x), read<int32_t>(position), write<Word>(x_ND), static_cast<int>(top_k), tokens},
        tokens.blocks());
  };
  const int64_t width = x.size(1), bytes = x.element_size();
  if (in_vectors(width, {x, x_ND})) {
    run(Vector<uint32_t, 4>{}, width * bytes / 16);
  } else if (bytes == 8) {
    run(uint64_t(), width);
  } else if (bytes == 4) {
    run(uint32_t(), width);
  } else {
    TORCH_CHECK_VALUE(bytes == 2, "permute: a number of ", bytes, " bytes");
    run(uint16_t(), width);
  }
  return x_ND;
}

template <class Device>
Tensor combine(
    const Tensor& y_ND, const Tensor& position_N, const std::optional<Tensor>& weights_TK, int64_t top_k) {
  const int64_t assignments = position_N.numel();
  const bool fits = y_ND.dim() == 2 && is_order(position_N) && y_ND.size(0) == assignments && top_k > 0 &&
                    assignments % top_k == 0 && (!weights_TK || weights_TK->numel() == assignments);
  TORCH_CHECK_VALUE(fits, "combine: expected y (N, D), int32 positions (N) and N weights");
  same_device(y_ND, {position_N, weights_TK.value_or(y_ND)});
  const Device device(y_ND);
  const Tensor y = y_ND.contiguous(), position = position_N.contiguous();
  const Tensor weights = weights_TK ? in_sum_type(*weights_TK, y.scalar_type()) : Tensor();
  Tensor y_TD = at::empty({assignments / top_k, y.size(1)}, y.options());
  MOECT_DISPATCH(y.scalar_type(), [&] {
    with_vectors<scalar_t>(in_vectors(y.size(1), {y, y_TD}), [&](auto v) {
      constexpr int V = decltype(v)::value;
      using Row = Vector<scalar_t, V>;
      const Rows tokens = rows_of(y_TD.size(0), y.size(1) / V);
      device.run(
          kernels::Combine<scalar_t, V>{
              read<Row>(y), read<int32_t>(position), weights_TK ? read<sum_t<scalar_t>>(weights) : nullptr,
              write<Row>(y_TD), static_cast<int>(top_k), tokens},
          tokens.blocks());
    });
  });
  return y_TD;
}

template <class Device>
std::tuple<Tensor, Tensor> combine_backward(
    const Tensor& dy_TD, const Tensor& y_ND, const Tensor& position_N, const Tensor& weights_TK) {
  const int64_t assignments = position_N.numel();
  const bool fits = dy_TD.dim() == 2 && weights_TK.dim() == 2 && is_order(position_N) &&
                    dy_TD.size(0) == weights_TK.size(0) && weights_TK.numel() == assignments &&
                    y_ND.sizes() == at::IntArrayRef({assignments, dy_TD.size(1)}) &&
                    y_ND.scalar_type() == dy_TD.scalar_type();
  TORCH_CHECK_VALUE(
      fits, "combine_backward: expected dy (T, D), y (N, D) of its dtype, int32 positions (N) and weights (T, K)");
  same_device(dy_TD, {y_ND, position_N, weights_TK});
  const Device device(dy_TD);
  const Tensor dy = dy_TD.contiguous(), y = y_ND.contiguous(), position = position_N.contiguous();
  const Tensor weights = in_sum_type(weights_TK, dy.scalar_type());
  Tensor dy_ND = at::empty_like(y), dweights = at::empty_like(weights);
  MOECT_DISPATCH(dy.scalar_type(), [&] {
    with_vectors<scalar_t>(in_vectors(dy.size(1), {dy, y, dy_ND}), [&](auto v) {
      constexpr int V = decltype(v)::value;
      using Row = Vector<scalar_t, V>;
      using S = sum_t<scalar_t>;
      const Rows rows = rows_of(assignments, dy.size(1) / V);
      device.run(
          kernels::CombineBackward<scalar_t, V>{
              read<Row>(dy), read<Row>(y), read<int32_t>(position), read<S>(weights), write<Row>(dy_ND),
              write<S>(dweights), static_cast<int>(weights.size(1)), rows},
          rows.blocks());
    });
  });
  return {dy_ND, dweights.to(weights_TK.scalar_type())};
}

template <class Device>
Tensor swiglu(const Tensor& h_N2F) {
  TORCH_CHECK_VALUE(h_N2F.dim() == 2 && h_N2F.size(1) % 2 == 0, "swiglu: expected gate and up, (N, 2F)");
  const Device device(h_N2F);
  const Tensor h = h_N2F.contiguous();
  const int64_t N = h.size(0), F = h.size(1) / 2;
  Tensor a_NF = at::empty({N, F}, h.options());
  MOECT_DISPATCH(h.scalar_type(), [&] {
    with_vectors<scalar_t>(in_vectors(F, {h, a_NF}), [&](auto v) {
      constexpr int V = decltype(v)::value;
      using Row = Vector<scalar_t, V>;
      const Rows rows = rows_of(N, F / V);
      device.run(kernels::Swiglu<scalar_t, V>{read<Row>(h), write<Row>(a_NF), rows}, rows.blocks());
    });
  });
  return a_NF;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> swiglu_backward(
    const Tensor& da_NF, const Tensor& h_N2F, const std::optional<Tensor>& weights_TK,
    const std::optional<Tensor>& source_N) {
  const bool fits = da_NF.dim() == 2 && h_N2F.sizes() == at::IntArrayRef({da_NF.size(0), 2 * da_NF.size(1)}) &&
                    h_N2F.scalar_type() == da_NF.scalar_type();
  TORCH_CHECK_VALUE(fits, "swiglu_backward: expected da (N, F) and h (N, 2F) of its dtype");
  const bool weights_fit = weights_TK && source_N ? is_order(*source_N) && source_N->numel() == da_NF.size(0) &&
                                                        weights_TK->numel() == da_NF.size(0)
                                                  : !weights_TK && !source_N;
  TORCH_CHECK_VALUE(weights_fit, "swiglu_backward: expected N weights and int32 sources (N), or neither");
  same_device(da_NF, {h_N2F, weights_TK.value_or(h_N2F), source_N.value_or(h_N2F)});
  const Device device(da_NF);
  const Tensor da = da_NF.contiguous(), h = h_N2F.contiguous();
  const Tensor source = weights_TK ? source_N->contiguous() : Tensor();
  const Tensor weights = weights_TK ? in_sum_type(*weights_TK, da.scalar_type()) : at::empty({0}, da.options());
  Tensor dh_N2F = at::empty_like(h), weighted_NF = at::empty_like(da), dweights = at::empty_like(weights);
  MOECT_DISPATCH(da.scalar_type(), [&] {
    with_vectors<scalar_t>(in_vectors(da.size(1), {da, h, dh_N2F, weighted_NF}), [&](auto v) {
      constexpr int V = decltype(v)::value;
      using Row = Vector<scalar_t, V>;
      using S = sum_t<scalar_t>;
      const Rows rows = rows_of(da.size(0), da.size(1) / V);
      device.run(
          kernels::SwigluBackward<scalar_t, V>{
              read<Row>(da), read<Row>(h), weights_TK ? read<int32_t>(source) : nullptr,
              weights_TK ? read<S>(weights) : nullptr, write<Row>(dh_N2F), write<Row>(weighted_NF),
              weights_TK ? write<S>(dweights) : nullptr, rows},
          rows.blocks());
    });
  });
  return {dh_N2F, weighted_NF, weights_TK ? dweights.to(weights_TK->scalar_type()) : dweights};
}

template <class Device>
void define(torch::Library& library) {
  library.impl("sort_by_expert", sort_by_expert<Device>);
  library.impl("permute", permute<Device>);
  library.impl("combine", combine<Device>);
  library.impl("combine_backward", combine_backward<Device>);
  library.impl("swiglu", swiglu<Device>);
  library.impl("swiglu_backward", swiglu_backward<Device>);
}

}  // namespace moect::operators
