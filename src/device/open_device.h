// Which device an option names, and that device opened.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>

#include "device/device.h"
#include "tokendepot/error.h"

namespace tokendepot {

struct DeviceName {
  std::optional<uint32_t> cuda_ordinal;  // none: the host
};

inline constexpr std::string_view kDeviceAllowed = "\"host\" or \"cuda:N\" with N from 0 to 255";

/// None when the text is neither "host" nor "cuda:N".
std::optional<DeviceName> parse_device(std::string_view text);

struct DeviceOptions {
  std::string_view name = "host";
  uint32_t threads = 2;
  uint64_t slab_bytes = 0;         // host staging memory; page-locked for a CUDA device
  uint64_t device_slab_bytes = 0;  // CUDA only
};

/// Says in one log line what it took. Errors: `invalid_argument` (no device of that name), `unsupported` (no
/// CUDA in this build, no driver, no GPU of that number), `no_space` (too little free device memory), `io`
/// (the driver's words).
Result<std::unique_ptr<Device>> open_device(const DeviceOptions& options);

}  // namespace tokendepot
