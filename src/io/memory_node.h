// On which NUMA node a thread's new memory lies.
#pragma once

#include <string_view>

#include "tokendepot/error.h"

namespace tokendepot {

/// The node that a PCI device hangs on, by its address ("0000:1B:00.0", in either case). -1 where the system
/// does not say, as in most virtual machines. `devices` is where the system lists them; another folder in
/// tests.
int node_of_pci_device(std::string_view address, std::string_view devices = "/sys/bus/pci/devices");

/// Pages that the calling thread touches first come from `node` from now on, and from others when that one
/// has none. Nothing changes for -1. Errors: invalid_argument for a node that is not there, io with the
/// system's words (a kernel without NUMA, a sandbox that forbids it).
Status prefer_memory_of_node(int node);

}  // namespace tokendepot
