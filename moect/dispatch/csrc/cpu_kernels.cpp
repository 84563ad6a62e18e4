// The CUDA kernels on a CPU, block by block and thread by thread: what tests hold for here holds for the GPU's index
// arithmetic. For speed on a CPU there is cpu_experts.cpp.

#include <ATen/Parallel.h>

#include "operators.h"

namespace {

struct Cpu {
  explicit Cpu(const at::Tensor&) {}

  template <class Kernel>
  void run(const Kernel& kernel, int64_t blocks) const {
    at::parallel_for(0, blocks, 16, [&](int64_t first, int64_t last) {
      typename Kernel::Shared shared;
      for (int64_t block = first; block < last; block++) {
        for (int phase = 0; phase < kernel.phases(); phase++) {
          for (int thread = 0; thread < Kernel::threads; thread++) kernel(phase, block, thread, shared);
        }
      }
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(moect, CPU, m) { moect::operators::define<Cpu>(m); }
