#include "gpu/loop_device.h"

#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace tokendepot::bench {
namespace {

struct Said {
  bool ok = false;
  std::string words;
};

Said shell(const std::string& command) {
  Said said;
  FILE* const pipe = popen((command + " 2>&1").c_str(), "r");
  if (pipe == nullptr) return said;
  char line[512];
  while (std::fgets(line, sizeof line, pipe) != nullptr) said.words += line;
  const int status = pclose(pipe);
  said.ok = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  while (said.words.ends_with('\n')) said.words.pop_back();
  return said;
}

}  // namespace

std::unique_ptr<LoopDevice> LoopDevice::make(const std::string& base, uint64_t bytes, std::string& why_not) {
  std::unique_ptr<LoopDevice> made(new LoopDevice);
  std::string pattern = base + "/tokendepot-bench-loop-XXXXXX";
  if (mkdtemp(pattern.data()) == nullptr) {
    why_not = "cannot make a directory in " + base;
    return nullptr;
  }
  made->directory_ = pattern;
  const std::string file = made->directory_ + "/disk";
  const auto step = [&](const std::string& command) {
    const Said said = shell(command);
    if (!said.ok) why_not = "`" + command + "` failed: " + said.words;
    return said;
  };
  std::filesystem::create_directory(made->mount_point());
  if (!step("truncate -s " + std::to_string(bytes) + " " + file).ok) return nullptr;
  // Direct I/O on the file saves a second copy in the page cache; a kernel may not offer it on tmpfs.
  const std::string set_up = "losetup --find --show ";
  Said device = shell(set_up + "--direct-io=on " + file);
  if (!device.ok) device = step(set_up + file);
  if (!device.ok) return nullptr;
  made->device_ = device.words.substr(device.words.rfind('\n') + 1);  // warnings come before it
  if (!step("mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 " + made->device_).ok) return nullptr;
  // The machine's own mount with its own libraries, even where the rest was brought along.
  if (!step("env -u LD_LIBRARY_PATH mount " + made->device_ + " " + made->mount_point()).ok) return nullptr;
  made->mounted_ = true;
  made->record();
  return made;
}

// cuFile asks udev's database what file system a disk has; a container has no such database.
void LoopDevice::record() {
  struct stat status{};
  if (stat(device_.c_str(), &status) != 0) return;
  const std::string number =
      std::to_string(major(status.st_rdev)) + ":" + std::to_string(minor(status.st_rdev));
  const std::filesystem::path database = "/run/udev/data";
  std::error_code ignored;
  if (std::filesystem::exists(database / ("b" + number), ignored)) return;
  std::filesystem::create_directories(database, ignored);
  if (!std::filesystem::exists("/run/udev/control", ignored)) std::ofstream("/run/udev/control");
  record_ = database / ("b" + number);
  std::ofstream(record_) << "E:ID_FS_USAGE=filesystem\nE:ID_FS_TYPE=ext4\n";
}

LoopDevice::~LoopDevice() {
  if (std::error_code ignored; !record_.empty()) std::filesystem::remove(record_, ignored);
  if (mounted_) shell("env -u LD_LIBRARY_PATH umount " + mount_point());
  if (!device_.empty()) shell("losetup --detach " + device_);
  if (!directory_.empty()) std::filesystem::remove_all(directory_);
}

}  // namespace tokendepot::bench
