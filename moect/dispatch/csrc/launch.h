// What the C++ compiler sees of kernels.cu: no torch, and nothing that only nvcc understands.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

namespace moect::kernels {

// Queue a kernel of kernels.h on so many blocks, at least one. Returns what cudaGetLastError says then.
template <class Kernel>
cudaError_t launch(const Kernel& kernel, int64_t blocks, cudaStream_t stream);

}  // namespace moect::kernels
