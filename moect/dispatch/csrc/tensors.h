// What both the fused and the single operators do with tensors.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>

// Run a lambda with `scalar_t` as the type of the tensors' numbers.
#define MOECT_DISPATCH(type, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, type, "moect::dispatch", __VA_ARGS__)

namespace moect {

// The weights in the type that sums of such tensors are taken in.
inline at::Tensor in_sum_type(const at::Tensor& weights, at::ScalarType type) {
  return weights.to(type == at::kDouble ? at::kDouble : at::kFloat).contiguous();
}

}  // namespace moect
