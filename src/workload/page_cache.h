// Makes sure that what is read next comes from the medium.
#pragma once

#include <string>

#include "tokendepot/error.h"

namespace tokendepot {

/// Writes back and drops the cached pages of every regular file in `directory`. A request: the kernel keeps
/// pages that somebody maps. Whether it worked shows in device_read_bytes().
Status drop_cached_pages(const std::string& directory);

}  // namespace tokendepot
