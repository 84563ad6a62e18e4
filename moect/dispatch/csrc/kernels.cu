// The kernels of kernels.h on a GPU: one way to run them all, and the list of those there are.

#include "kernels.h"
#include "launch.h"

namespace moect::kernels {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::threads, 1024 / Kernel::threads) run(const Kernel kernel) {
  __shared__ typename Kernel::Shared shared;
  for (int phase = 0; phase < kernel.phases(); phase++) {
    if (phase) __syncthreads();
    kernel(phase, blockIdx.x, threadIdx.x, shared);
  }
}

template <class Kernel>
cudaError_t launch(const Kernel& kernel, int64_t blocks, cudaStream_t stream) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  run<<<static_cast<unsigned>(blocks), Kernel::threads, 0, stream>>>(kernel);
  return cudaGetLastError();
}

#define MOECT_LAUNCH(...) template cudaError_t launch(const __VA_ARGS__&, int64_t, cudaStream_t)
#define MOECT_LAUNCH_ROWS(T, V)       \
  MOECT_LAUNCH(Combine<T, V>);        \
  MOECT_LAUNCH(CombineBackward<T, V>); \
  MOECT_LAUNCH(Swiglu<T, V>);         \
  MOECT_LAUNCH(SwigluBackward<T, V>)
#define MOECT_LAUNCH_TYPE(T) \
  MOECT_LAUNCH_ROWS(T, 1);   \
  MOECT_LAUNCH_ROWS(T, 16 / sizeof(T))

MOECT_LAUNCH(Count);
MOECT_LAUNCH(Scan);
MOECT_LAUNCH(Place);
MOECT_LAUNCH(Permute<uint16_t>);
MOECT_LAUNCH(Permute<uint32_t>);
MOECT_LAUNCH(Permute<uint64_t>);
MOECT_LAUNCH(Permute<Vector<uint32_t, 4>>);
MOECT_LAUNCH_TYPE(float);
MOECT_LAUNCH_TYPE(double);
MOECT_LAUNCH_TYPE(c10::BFloat16);
MOECT_LAUNCH_TYPE(c10::Half);

}  // namespace moect::kernels
