#include "io/memory_node.h"

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <climits>
#include <string>

#include "base/errors.h"
#include "io/kernel_file.h"

namespace tokendepot {
namespace {

constexpr int kMostNodes = 1024;  // of any kernel (CONFIG_NODES_SHIFT is at most 10)
constexpr int kBits = sizeof(unsigned long) * CHAR_BIT;

}  // namespace

int node_of_pci_device(std::string_view address, std::string_view devices) {
  std::string path(devices);
  path += '/';
  std::ranges::transform(address, std::back_inserter(path), [](unsigned char c) { return std::tolower(c); });
  const auto node = number_in(kernel_text(path + "/numa_node"));
  return node && *node >= 0 && *node < kMostNodes ? static_cast<int>(*node) : -1;
}

Status prefer_memory_of_node(int node) {
  if (node < 0) return {};
  if (node >= kMostNodes) return fail(ErrorKind::invalid_argument, "there is no NUMA node {}", node);
  std::array<unsigned long, kMostNodes / kBits> nodes{};
  nodes[static_cast<size_t>(node / kBits)] = 1ul << (node % kBits);
  // The kernel takes one bit less than it is told of.
  if (::syscall(SYS_set_mempolicy, MPOL_PREFERRED, nodes.data(), kMostNodes + 1) == 0) return {};
  if (errno == EINVAL) return fail(ErrorKind::invalid_argument, "there is no NUMA node {}", node);
  return fail_errno(errno, "memory of NUMA node {}", node);
}

}  // namespace tokendepot
