// The operators on a GPU. No wait for the device anywhere: everything is queued on the current stream.

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "launch.h"
#include "operators.h"

namespace {

class Gpu {
 public:
  explicit Gpu(const at::Tensor& tensor) : guard_(tensor.device()) {}

  template <class Kernel>
  void run(const Kernel& kernel, int64_t blocks) const {
    if (blocks) C10_CUDA_CHECK(moect::kernels::launch(kernel, blocks, c10::cuda::getCurrentCUDAStream()));
  }

 private:
  c10::cuda::CUDAGuard guard_;
};

}  // namespace

TORCH_LIBRARY_IMPL(moect, CUDA, m) { moect::operators::define<Gpu>(m); }
