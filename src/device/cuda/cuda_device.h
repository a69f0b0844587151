// The CUDA implementation of the device seam.
#pragma once

#include <memory>

#include "device/device.h"

namespace tokendepot {

/// `device_slab_bytes` of device memory for extents in flight, `slab_bytes` of page-locked staging memory,
/// `threads` that copy what lies in mappings which are not registered. Errors: unsupported (no CUDA, no such
/// GPU), no_space (naming what is free), io (the driver's words).
Result<std::unique_ptr<Device>> make_cuda_device(uint32_t ordinal, uint64_t device_slab_bytes,
                                                 uint64_t slab_bytes, uint32_t threads);

}  // namespace tokendepot
