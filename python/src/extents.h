// Extents as dictionaries, the form in which Python passes them on to the tools.
#pragma once

#include <vector>

#include "convert.h"
#include "tokendepot/tools.h"

namespace tokendepot::py {

double seconds_of(uint64_t ns);
/// The first 8 bytes of a namespace's digest as the first 16 hex digits of it.
std::string prefix_to_hex(uint64_t prefix);

nb::dict extent_to(const StoredExtent& extent);
std::vector<StoredExtent> extents_from(nb::sequence extents);

}  // namespace tokendepot::py
