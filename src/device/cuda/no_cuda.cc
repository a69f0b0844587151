// Stands in for the CUDA device in builds without nvcc.
#include "base/errors.h"
#include "device/cuda/cuda_device.h"

namespace tokendepot {

Result<std::unique_ptr<Device>> make_cuda_device(uint32_t ordinal, uint64_t /*device_slab_bytes*/,
                                                 uint64_t /*slab_bytes*/, uint32_t /*threads*/) {
  return fail(ErrorKind::unsupported, "device=cuda:{} is not possible: this build of Tokendepot has no CUDA",
              ordinal);
}

}  // namespace tokendepot
