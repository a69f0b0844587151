// Depot::open() for who brings the device and the cuFile library, and what it checks first.
#pragma once

#include <memory>
#include <string>

#include "device/device.h"
#include "tokendepot/depot.h"

namespace tokendepot {

/// `device` is used instead of the one that the options name.
Result<std::unique_ptr<Depot>> open_depot_on(std::unique_ptr<Device> device, const Options& options,
                                             const std::string& cufile_library);

/// `invalid_argument` when a number of the options is one that no depot can be opened with.
Status check_ranges(const Options& options);

}  // namespace tokendepot
