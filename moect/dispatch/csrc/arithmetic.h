// What a kernel computes for one number, shared by the CPU and the CUDA build, so that tests on a CPU hold for both.
//
// SwiGLU: a = silu(gate) * up, silu(x) = x s, s = 1 / (1 + e^-x). Sums and activations are taken in fp32, or in fp64
// where the tensors are fp64.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#if defined(__CUDACC__)
#define MOECT_HD __host__ __device__ __forceinline__
#else
#define MOECT_HD inline
#endif

namespace moect {

// The type that sums of T are taken in.
template <class T>
struct Sum {
  using type = float;
};
template <>
struct Sum<double> {
  using type = double;
};
template <class T>
using sum_t = typename Sum<T>::type;

// Position n of assignment i = t K + k; its token.
MOECT_HD int64_t token_of(int64_t assignment, int64_t top_k) { return assignment / top_k; }

// e^x, by a polynomial on the CPU, because compilers vectorise that and not a call; within 1e-7 of it, relative.
// The scheme is that of Cephes' expf: x = n ln 2 + r with |r| <= (ln 2) / 2, e^x = 2^n e^r.
MOECT_HD float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  x = x < -87.0f ? -87.0f : x;  // below, 2^n is no normal number; a NaN passes
  x = x > 89.0f ? 89.0f : x;    // from 88.4 on, 2^n is infinity
  const float n = __builtin_rintf(x * 1.44269504f);
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
#endif
}

MOECT_HD double exponential(double x) { return exp(x); }

template <class S>
MOECT_HD S sigmoid(S x) {
  return S(1) / (S(1) + exponential(-x));
}

template <class S>
MOECT_HD S swiglu(S gate, S up) {
  return gate * sigmoid(gate) * up;
}

// One number of SwiGLU's backward, where the activation is then weighted: y = w down(a), da = down^T dy unweighted.
template <class S>
struct SwigluBackward {
  S dgate;      // w da up silu'(gate)
  S dup;        // w da silu(gate)
  S weighted;   // w a, which the gradient of `down` needs
  S dweight;    // da a, to be summed over the row: the weight's own gradient
};

template <class S>
MOECT_HD SwigluBackward<S> swiglu_backward(S da, S gate, S up, S weight) {
  const S s = sigmoid(gate);
  const S silu = gate * s;
  const S a = silu * up;
  const S weighted_da = da * weight;
  return {weighted_da * up * (s + silu * (S(1) - s)), weighted_da * silu, a * weight, da * a};
}

}  // namespace moect
