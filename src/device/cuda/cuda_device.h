// The CUDA implementation of the device seam.
#pragma once

#include <memory>

#include "device/device.h"

namespace tokendepot {

/// `device_slab_bytes` of device memory for extents in flight, `pinned_bytes` of page-locked host memory for
/// what is not in a registered mapping. Errors: no_space (naming what is free), io (the driver's words).
Result<std::unique_ptr<Device>> make_cuda_device(uint32_t ordinal, uint64_t device_slab_bytes,
                                                 uint64_t pinned_bytes);

}  // namespace tokendepot
