#include "device/open_device.h"

#include <charconv>

#include "base/errors.h"
#include "base/log.h"
#include "device/cuda/cuda_device.h"

namespace tokendepot {

std::optional<DeviceName> parse_device(std::string_view text) {
  if (text == "host") return DeviceName{};
  constexpr std::string_view kCuda = "cuda:";
  if (!text.starts_with(kCuda)) return std::nullopt;
  const std::string_view digits = text.substr(kCuda.size());
  uint8_t ordinal = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), ordinal);
  const bool leading_zero = digits.size() > 1 && digits[0] == '0';
  if (error != std::errc() || end != digits.data() + digits.size() || leading_zero) return std::nullopt;
  return DeviceName{ordinal};
}

Result<std::unique_ptr<Device>> open_device(const DeviceOptions& options) {
  const auto name = parse_device(options.name);
  if (!name) {
    return fail(ErrorKind::invalid_argument, "device=\"{}\" is not known; expected {}", options.name,
                kDeviceAllowed);
  }
  Result<std::unique_ptr<Device>> device =
      name->cuda_ordinal ? make_cuda_device(*name->cuda_ordinal, options.device_slab_bytes,
                                            options.slab_bytes, options.threads)
                         : make_host_device(options.threads, options.slab_bytes);
  if (!device) return device;
  const DeviceUse stats = (*device)->stats();
  constexpr uint64_t kMiB = 1ull << 20;
  if (name->cuda_ordinal) {
    log(LogLevel::info, "device {}: slab of {} MiB there, {} MiB of host memory pinned, {} threads",
        stats.name, stats.slab_bytes / kMiB, stats.pinned_bytes / kMiB, stats.threads);
  } else {
    log(LogLevel::info, "device host: slab of {} MiB, {} threads", (*device)->slab().size() / kMiB,
        stats.threads);
  }
  return device;
}

}  // namespace tokendepot
