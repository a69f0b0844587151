#include "io/memory_node.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include "tokendepot/layout.h"

namespace tokendepot {
namespace {

TEST(MemoryNode, OfADeviceIsWhatTheSystemLists) {
  std::string folder = ::testing::TempDir() + "tokendepot-pci-XXXXXX";
  ASSERT_NE(::mkdtemp(folder.data()), nullptr);
  const auto list = [&](const char* address, const char* node) {
    std::filesystem::create_directory(folder + "/" + address);
    std::ofstream(folder + "/" + address + "/numa_node") << node;
  };
  list("0000:1b:00.0", "1\n");
  list("0000:1c:00.0", "-1\n");
  list("0000:1d:00.0", "many\n");
  list("0000:1e:00.0", "4096\n");
  EXPECT_EQ(node_of_pci_device("0000:1B:00.0", folder), 1)
      << "the CUDA driver writes addresses in upper case";
  EXPECT_EQ(node_of_pci_device("0000:1c:00.0", folder), -1);
  EXPECT_EQ(node_of_pci_device("0000:1d:00.0", folder), -1);
  EXPECT_EQ(node_of_pci_device("0000:1e:00.0", folder), -1);
  EXPECT_EQ(node_of_pci_device("0000:1f:00.0", folder), -1) << "not listed";
  std::filesystem::remove_all(folder);
}

/// A policy stays with its thread, so that of these tests is one of its own.
template <typename Body>
void on_a_thread(const Body& body) {
  std::thread(body).join();
}

TEST(MemoryNode, NewPagesLieOnIt) {
  on_a_thread([] {
    const Status preferred = prefer_memory_of_node(0);
    if (!preferred && preferred.error().kind != ErrorKind::invalid_argument)
      GTEST_SKIP() << preferred.error().message;  // a sandbox
    ASSERT_TRUE(preferred) << preferred.error().message;
    void* page = ::mmap(nullptr, kPageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(page, MAP_FAILED);
    std::memset(page, 1, kPageBytes);
    int node = -1;
    const bool told = ::syscall(SYS_move_pages, 0, 1ul, &page, nullptr, &node, 0) == 0;
    EXPECT_TRUE(!told || node == 0) << node;
    ::munmap(page, kPageBytes);
  });
}

TEST(MemoryNode, NoneIsNoError) {
  on_a_thread([] { EXPECT_TRUE(prefer_memory_of_node(-1)); });
}

TEST(MemoryNode, OneThatIsNotThereIsRefusedByNumber) {
  on_a_thread([] {
    for (const int node : {1023, 1024, 1 << 20}) {
      const Status refused = prefer_memory_of_node(node);
      ASSERT_FALSE(refused) << node;
      if (refused.error().kind != ErrorKind::invalid_argument) GTEST_SKIP() << refused.error().message;
      EXPECT_NE(refused.error().message.find(std::to_string(node)), std::string::npos)
          << refused.error().message;
    }
  });
}

}  // namespace
}  // namespace tokendepot
