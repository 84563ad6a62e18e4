// The operators of the extension: their signatures, and the one that is the same on every device.
//
// T tokens, K experts per token, E experts, D width, F expert width, N = T K assignments in the order of their experts

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

namespace {

using at::Tensor;

// One matrix product per expert segment, each written into its place.
//   a (N, I), b (E, I, O): rows of expert e times b[e] -> (N, O)
//   a (I, N), b (N, O): columns of expert e of a times rows of expert e of b -> (E, I, O), 0 for one without tokens
// ends (E), int32, on the CPU: where each expert's segment ends.
Tensor segment_mm(const Tensor& a, const Tensor& b, const Tensor& ends) {
  TORCH_CHECK_VALUE(
      ends.device().is_cpu() && ends.scalar_type() == at::kInt, "segment_mm: ends must be int32 on the CPU");
  const bool by_rows = b.dim() == 3;
  const int64_t experts = ends.numel();
  const int32_t* end = ends.const_data_ptr<int32_t>();
  const int64_t assignments = a.size(by_rows ? 0 : 1);
  TORCH_CHECK_VALUE(
      experts == 0 ? assignments == 0 : end[experts - 1] <= assignments, "segment_mm: ends beyond the rows");
  Tensor out = by_rows ? at::empty({assignments, b.size(2)}, a.options())
                       : at::empty({experts, a.size(0), b.size(1)}, a.options());
  for (int64_t e = 0, start = 0; e < experts; start = end[e++]) {
    const int64_t count = end[e] - start;
    Tensor place = by_rows ? out.narrow(0, start, count) : out.select(0, e);
    if (count == 0) {
      place.zero_();
    } else if (by_rows) {
      at::mm_out(place, a.narrow(0, start, count), b.select(0, e));
    } else {
      at::mm_out(place, a.narrow(1, start, count), b.narrow(0, start, count));
    }
  }
  return out;
}

}  // namespace

TORCH_LIBRARY(moect, m) {
  // the whole of it, fused, on the CPU
  m.def(
      "experts(Tensor x_TD, Tensor indices_TK, Tensor weights_TK, Tensor gate_up_E2FD, Tensor down_EDF, bool keep)"
      " -> (Tensor y_TD, Tensor h_N2F, Tensor source_N, Tensor position_N, Tensor ends_E)");
  m.def(
      "experts_backward(Tensor dy_TD, Tensor x_TD, Tensor weights_TK, Tensor gate_up_E2FD, Tensor down_EDF,"
      " Tensor h_N2F, Tensor source_N, Tensor position_N, Tensor ends_E, bool[4] needs)"
      " -> (Tensor dx_TD, Tensor dweights_TK, Tensor dgate_up_E2FD, Tensor ddown_EDF)");
  // its parts
  m.def("sort_by_expert(Tensor indices_TK, int experts) -> (Tensor source_N, Tensor position_N, Tensor ends_E)");
  m.def("permute(Tensor x_TD, Tensor position_N, int top_k) -> Tensor");
  m.def("combine(Tensor y_ND, Tensor position_N, Tensor? weights_TK, int top_k) -> Tensor");
  m.def(
      "combine_backward(Tensor dy_TD, Tensor y_ND, Tensor position_N, Tensor weights_TK)"
      " -> (Tensor dy_ND, Tensor dweights_TK)");
  m.def("swiglu(Tensor h_N2F) -> Tensor");
  m.def(
      "swiglu_backward(Tensor da_NF, Tensor h_N2F, Tensor? weights_TK, Tensor? source_N)"
      " -> (Tensor dh_N2F, Tensor weighted_NF, Tensor dweights_TK)");
  m.def("segment_mm(Tensor a, Tensor b, Tensor ends_E) -> Tensor");
}

TORCH_LIBRARY_IMPL(moect, CompositeExplicitAutograd, m) { m.impl("segment_mm", segment_mm); }
