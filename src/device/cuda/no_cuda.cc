// Stands in for the CUDA device in builds without nvcc.
#include "base/errors.h"
#include "device/cuda/cuda_device.h"

namespace tokendepot {

Result<std::unique_ptr<Device>> make_cuda_device(uint32_t ordinal, uint64_t /*device_slab_bytes*/,
                                                 uint64_t /*pinned_bytes*/) {
  return fail(ErrorKind::unsupported,
              "device=cuda:{}: this build has no CUDA (nvcc was not found when it was built)", ordinal);
}

}  // namespace tokendepot
