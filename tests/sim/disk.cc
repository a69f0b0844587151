#include "disk.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "format/digest.h"

namespace tokendepot::sim {
namespace {

constexpr uint64_t kMostBytes = 4 << 20;
constexpr uint64_t kSector = 512;
constexpr int kFaultless = 0;

std::string parent_of(const std::string& path) {
  return path.substr(0, path.rfind('/'));
}

}  // namespace

bool is_inside(const std::string& path, const std::string& directory) {
  return path.size() > directory.size() && path.starts_with(directory) && path[directory.size()] == '/';
}

Disk& disk() {
  static Disk* const instance = new Disk;
  return *instance;
}

Disk::Disk() : random_(chance().next()) {}

void Disk::add_volume(const std::string& path, bool memory, uint64_t bytes, uint64_t capacity) {
  Volume& volume = volumes_[path];
  volume.path = path;
  volume.memory = memory;
  volume.bytes = bytes;
  volume.capacity = capacity;
  volume.names[path] = new_inode(true);
  volume.stable_names = volume.names;
}

void Disk::set_foreign_bytes(const std::string& volume, uint64_t bytes) {
  volumes_.at(volume).foreign = bytes;
}

void Disk::crash_at(ProcessId process, uint64_t n) {
  crash_at_[process] = changes_[process] + n;
}

uint64_t Disk::changes_of(ProcessId process) const {
  const auto found = changes_.find(process);
  return found == changes_.end() ? 0 : found->second;
}

Disk::Inode* Disk::new_inode(bool directory) {
  auto* const inode = new Inode;
  inode->id = inodes_.size() + 1;
  inode->directory = directory;
  if (!directory) {
    void* const memory = ::mmap(nullptr, kMostBytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TD_CHECK(memory != MAP_FAILED);
    inode->memory = static_cast<std::byte*>(memory);
  }
  inodes_.push_back(inode);
  return inode;
}

Disk::Volume* Disk::volume_of(const std::string& path) {
  for (auto& [root, volume] : volumes_) {
    if (path == root || is_inside(path, root)) return &volume;
  }
  return nullptr;
}

Disk::Inode* Disk::find(const std::string& path) {
  Volume* const volume = volume_of(path);
  if (volume == nullptr) return nullptr;
  const auto found = volume->names.find(path);
  return found == volume->names.end() ? nullptr : found->second;
}

Disk::Open& Disk::at(int fd) {
  const auto found = open_.find(fd);
  if (found == open_.end()) violated(Verdict::broken, "a system call on a descriptor that is not open");
  if (found->second.process != current_process())
    violated(Verdict::broken, "a system call on another process's descriptor");
  return found->second;
}

void Disk::resize(Inode& inode, uint64_t bytes) {
  TD_CHECK(bytes <= kMostBytes);
  if (bytes == inode.size) return;
  if (bytes < inode.size) std::memset(inode.memory + bytes, 0, inode.size - bytes);
  inode.size = bytes;
  if (track_) inode.changes.push_back({true, bytes, {}});
}

void Disk::store(Inode& inode, const std::byte* bytes, uint64_t count, uint64_t offset) {
  if (count == 0) return;
  TD_CHECK(offset + count <= kMostBytes);
  std::memcpy(inode.memory + offset, bytes, count);
  inode.size = std::max(inode.size, offset + count);
  if (track_) inode.changes.push_back({false, offset, {bytes, bytes + count}});
}

void Disk::names_changed(Volume& volume) {
  if (track_) volume.unflushed_names.push_back(volume.names);
  check_capacity(volume);
}

uint64_t Disk::used(const Volume& volume) {
  uint64_t total = volume.foreign;
  for (const auto& [name, inode] : volume.names) total += inode->size;
  return total;
}

void Disk::check_capacity(const Volume& volume) const {
  uint64_t total = 0;
  for (const auto& [name, inode] : volume.names) {
    if (name.ends_with(".seg")) total += inode->size;  // copies under way, too
  }
  if (total > volume.capacity) {
    violated(Verdict::capacity, volume.path + " holds " + std::to_string(total) +
                                    " bytes of segments, more than its capacity of " +
                                    std::to_string(volume.capacity));
  }
}

int Disk::enter(double failure, Injected kind, int error) {
  if (random_.chance(faults_.slow)) {
    count(Injected::slow);
    sleep_ns(random_.between(1'000'000, 3'000'000'000));
  } else if (random_.chance(0.5)) {
    sleep_ns(random_.between(5'000, 200'000));
  } else {
    maybe_switch();
  }
  note("call", static_cast<uint64_t>(kind));
  if (!random_.chance(failure)) return kFaultless;
  count(kind);
  return -error;
}

void Disk::take_time(int fd) {
  if (faults_.slow_transfer == 0 || !at(fd).path.ends_with(".seg")) return;
  if (!random_.chance(faults_.slow_transfer)) return;
  count(Injected::slow);
  sleep_ns(random_.between(1'000'000, 1'500'000'000));
}

bool Disk::dies(uint64_t whole, uint64_t& part) {
  const ProcessId process = current_process();
  const uint64_t n = ++changes_[process];
  note("change", n);
  const auto planned = crash_at_.find(process);
  if (planned == crash_at_.end() || planned->second != n) return false;
  part = random_.chance(0.3) ? 0 : random_.chance(0.4) ? whole : random_.below(whole + 1);
  return true;
}

void Disk::die() {
  count(Injected::kill);
  ++report().crashes;
  const ProcessId process = current_process();
  close_all(process);
  kill_process(process);
}

void Disk::close_all(ProcessId process) {
  for (auto at = open_.begin(); at != open_.end();) {
    if (at->second.process != process) {
      ++at;
      continue;
    }
    if (at->second.inode->locked_by == at->first) at->second.inode->locked_by = -1;
    at = open_.erase(at);
  }
  crash_at_.erase(process);
}

// --- power
// -----------------------------------------------------------------------------------------------------

void Disk::settle() {
  for (Inode* inode : inodes_) {
    inode->stable.assign(inode->memory, inode->memory + inode->size);
    inode->changes.clear();
  }
  for (auto& [path, volume] : volumes_) {
    volume.stable_names = volume.names;
    volume.unflushed_names.clear();
  }
}

void Disk::cut_power() {
  count(Injected::power_cut);
  TD_CHECK(track_ && open_.empty());
  // Some cuts take nearly everything, some nearly nothing.
  const double dropped = random_.chance(0.3) ? 1.0 : random_.chance(0.5) ? 0.1 : 0.5;
  for (Inode* inode : inodes_) {
    if (inode->directory) continue;
    const std::vector<Change> changes = std::exchange(inode->changes, {});
    std::vector<std::byte> content = inode->stable;
    for (const Change& change : changes) {
      if (random_.chance(dropped)) continue;
      if (change.resize) {
        content.resize(change.offset);
        continue;
      }
      if (content.size() < change.offset + change.bytes.size())
        content.resize(change.offset + change.bytes.size());
      const bool torn = random_.chance(0.3);
      for (uint64_t i = 0; i < change.bytes.size(); i += kSector) {
        if (torn && random_.chance(0.5)) continue;
        std::memcpy(content.data() + change.offset + i, change.bytes.data() + i,
                    std::min(kSector, change.bytes.size() - i));
      }
    }
    std::memset(inode->memory, 0, std::max<uint64_t>(inode->size, content.size()));
    if (!content.empty()) std::memcpy(inode->memory, content.data(), content.size());
    inode->size = content.size();
    inode->locked_by = -1;
  }
  for (auto& [path, volume] : volumes_) {
    if (volume.memory) {
      Inode* const top = volume.names.at(path);
      volume.names = {{path, top}};
    } else if (volume.unflushed_names.empty() || random_.chance(dropped)) {
      volume.names = volume.stable_names;
    } else {  // names reach the disk in order
      volume.names = volume.unflushed_names[random_.below(volume.unflushed_names.size())];
    }
  }
  settle();
}

// --- system calls
// -----------------------------------------------------------------------------------------------------

int Disk::open(const std::string& path, int flags) {
  if (const int error = enter(faults_.other_error, Injected::other_error, EIO)) return error;
  Volume* const volume = volume_of(path);
  if (volume == nullptr) return -ENOENT;
  if ((flags & O_TMPFILE) == O_TMPFILE) return -EOPNOTSUPP;
  Inode* inode = find(path);
  if (inode != nullptr && (flags & O_CREAT) != 0 && (flags & O_EXCL) != 0) return -EEXIST;
  if (inode == nullptr) {
    if ((flags & O_CREAT) == 0) return -ENOENT;
    if (find(parent_of(path)) == nullptr) return -ENOENT;
    change_or_die([&] {
      inode = new_inode(false);
      volume->names[path] = inode;
      names_changed(*volume);
    });
  }
  const bool for_directory = (flags & O_DIRECTORY) != 0;
  if (inode->directory != for_directory) return inode->directory ? -EISDIR : -ENOTDIR;
  const int fd = next_fd_++;
  open_[fd] = {inode, volume, path, flags & ~(O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC), current_process()};
  return fd;
}

int Disk::close(int fd) {
  Open& file = at(fd);
  if (file.inode->locked_by == fd) file.inode->locked_by = -1;
  open_.erase(fd);
  return 0;
}

int64_t Disk::read(int fd, std::byte* out, uint64_t bytes, uint64_t offset) {
  if (const int error = enter(faults_.read_error, Injected::read_error, EIO)) return error;
  if (random_.chance(faults_.interrupted)) {
    count(Injected::interrupted);
    return -EINTR;
  }
  take_time(fd);
  Open& file = at(fd);
  const Inode& inode = *file.inode;
  const bool direct = (file.flags & O_DIRECT) != 0;
  if (direct &&
      (offset % kSector != 0 || bytes % kSector != 0 || reinterpret_cast<uintptr_t>(out) % kSector != 0))
    return -EINVAL;
  if (offset >= inode.size) return 0;
  uint64_t moved = std::min(bytes, inode.size - offset);
  if (moved > kSector && random_.chance(faults_.short_read)) {
    count(Injected::short_read);
    moved = random_.between(1, (moved - 1) / kSector) * kSector;
  }
  std::memcpy(out, inode.memory + offset, moved);
  if (random_.chance(faults_.rot_in_transit)) {
    count(Injected::rot_in_transit);
    out[random_.below(moved)] ^= static_cast<std::byte>(1u << random_.below(8));
  }
  return static_cast<int64_t>(moved);
}

int64_t Disk::write(int fd, const std::byte* bytes, uint64_t count_of_bytes, uint64_t offset) {
  if (const int error = enter(faults_.write_error, Injected::write_error, EIO)) return error;
  if (random_.chance(faults_.interrupted)) {
    count(Injected::interrupted);
    return -EINTR;
  }
  take_time(fd);
  Open& file = at(fd);
  Inode& inode = *file.inode;
  TD_CHECK((file.flags & O_ACCMODE) != O_RDONLY);
  const bool direct = (file.flags & O_DIRECT) != 0;
  if (direct && (offset % kSector != 0 || count_of_bytes % kSector != 0 ||
                 reinterpret_cast<uintptr_t>(bytes) % kSector != 0))
    return -EINVAL;
  const uint64_t end = offset + count_of_bytes;
  const bool grows = end > inode.size;
  if (grows && used(*file.volume) + (end - inode.size) > file.volume->bytes) return -ENOSPC;
  if (random_.chance(faults_.no_space)) {
    count(Injected::no_space);
    return -ENOSPC;
  }
  uint64_t part = 0;
  if (dies(count_of_bytes, part)) {
    store(inode, bytes, part, offset);
    die();
  }
  uint64_t moved = count_of_bytes;
  if (moved > kSector && random_.chance(faults_.short_write)) {
    count(Injected::short_write);
    moved = random_.between(1, (moved - 1) / kSector) * kSector;
  } else if (random_.chance(faults_.torn_write)) {
    count(Injected::torn_write);
    store(inode, bytes, random_.below(count_of_bytes), offset);
    return -EIO;
  } else if (random_.chance(faults_.lost_write)) {
    count(Injected::lost_write);
    if (grows) resize(inode, end);
    return static_cast<int64_t>(moved);
  } else if (inode.size > count_of_bytes && random_.chance(faults_.misdirected_write)) {
    count(Injected::misdirected_write);
    // Mostly to where a write like this one might have gone.
    const uint64_t step = random_.chance(0.7) ? count_of_bytes : kSector;
    store(inode, bytes, count_of_bytes, random_.below((inode.size - count_of_bytes) / step + 1) * step);
    if (grows) resize(inode, end);
    return static_cast<int64_t>(moved);
  }
  store(inode, bytes, moved, offset);
  if (grows) check_capacity(*file.volume);
  return static_cast<int64_t>(moved);
}

int Disk::status(const std::string& path, Status& out) {
  if (const int error = enter(faults_.other_error, Injected::other_error, EIO)) return error;
  const Inode* const inode = find(path);
  if (inode == nullptr) return -ENOENT;
  out = {inode->id, inode->size, inode->directory};
  return 0;
}

int Disk::status(int fd, Status& out) {
  if (const int error = enter(faults_.other_error, Injected::other_error, EIO)) return error;
  const Inode& inode = *at(fd).inode;
  out = {inode.id, inode.size, inode.directory};
  return 0;
}

int Disk::make_directory(const std::string& path) {
  if (const int error = enter(faults_.other_error, Injected::other_error, EIO)) return error;
  Volume* const volume = volume_of(path);
  if (volume == nullptr || find(parent_of(path)) == nullptr) return -ENOENT;
  if (find(path) != nullptr) return -EEXIST;
  change_or_die([&] {
    volume->names[path] = new_inode(true);
    names_changed(*volume);
  });
  return 0;
}

int Disk::rename(const std::string& from, const std::string& to) {
  if (const int error = enter(faults_.other_error, Injected::other_error, EIO)) return error;
  Volume* const volume = volume_of(from);
  Inode* const inode = find(from);
  if (inode == nullptr) return -ENOENT;
  if (volume_of(to) != volume) return -EXDEV;
  change_or_die([&] {
    volume->names.erase(from);
    volume->names[to] = inode;
    names_changed(*volume);
  });
  return 0;
}

int Disk::link(const std::string& from, const std::string& to) {
  if (const int error = enter(faults_.other_error, Injected::other_error, EIO)) return error;
  Volume* const volume = volume_of(from);
  Inode* const inode = find(from);
  if (inode == nullptr) return -ENOENT;
  if (find(to) != nullptr) return -EEXIST;
  change_or_die([&] {
    volume->names[to] = inode;
    names_changed(*volume);
  });
  return 0;
}

int Disk::unlink(const std::string& path) {
  if (const int error = enter(faults_.other_error, Injected::other_error, EIO)) return error;
  Volume* const volume = volume_of(path);
  if (find(path) == nullptr) return -ENOENT;
  change_or_die([&] {
    volume->names.erase(path);
    names_changed(*volume);
  });
  return 0;
}

int Disk::allocate(int fd, uint64_t bytes) {
  if (const int error = enter(faults_.no_space, Injected::no_space, ENOSPC)) return error;
  Open& file = at(fd);
  if (bytes <= file.inode->size) return 0;
  if (used(*file.volume) + (bytes - file.inode->size) > file.volume->bytes) return -ENOSPC;
  change_or_die([&] {
    resize(*file.inode, bytes);
    check_capacity(*file.volume);
  });
  return 0;
}

int Disk::truncate(int fd, uint64_t bytes) {
  if (const int error = enter(faults_.other_error, Injected::other_error, EIO)) return error;
  Open& file = at(fd);
  change_or_die([&] {
    resize(*file.inode, bytes);
    check_capacity(*file.volume);
  });
  return 0;
}

int Disk::flush(int fd) {
  if (const int error = enter(faults_.other_error, Injected::other_error, EIO)) return error;
  Open& file = at(fd);
  change_or_die([&] {
    file.inode->stable.assign(file.inode->memory, file.inode->memory + file.inode->size);
    file.inode->changes.clear();
    file.volume->stable_names = file.volume->names;
    file.volume->unflushed_names.clear();
  });
  return 0;
}

int Disk::flags(int fd) const {
  return open_.at(fd).flags;
}

int Disk::set_flags(int fd, int flags) {
  at(fd).flags = flags;
  return 0;
}

int Disk::lock(int fd) {
  if (const int error = enter(faults_.other_error, Injected::other_error, ENOLCK)) return error;
  Inode& inode = *at(fd).inode;
  if (inode.locked_by != -1 && inode.locked_by != fd) return -EAGAIN;
  inode.locked_by = fd;
  return 0;
}

int Disk::locked_by_another(int fd, bool& locked) {
  if (const int error = enter(faults_.other_error, Injected::other_error, ENOLCK)) return error;
  const Inode& inode = *at(fd).inode;
  locked = inode.locked_by != -1 && inode.locked_by != fd;
  return 0;
}

int Disk::list(int fd, std::vector<std::string>& names, std::string& path) {
  if (const int error = enter(faults_.other_error, Injected::other_error, EIO)) return error;
  const Open& directory = at(fd);
  path = directory.path;
  for (const auto& [name, inode] : directory.volume->names) {
    if (is_inside(name, path) && parent_of(name) == path) names.push_back(name.substr(path.size() + 1));
  }
  // In no order that anybody could rely on.
  for (size_t i = names.size(); i > 1; --i) std::swap(names[i - 1], names[random_.below(i)]);
  return 0;
}

int Disk::space(const std::string& path, Space& out) {
  if (const int error = enter(faults_.other_error, Injected::other_error, EIO)) return error;
  Volume* const volume = volume_of(path);
  if (volume == nullptr || find(path) == nullptr) return -ENOENT;
  const uint64_t taken = used(*volume);
  out = {volume->memory, volume->bytes, volume->bytes > taken ? volume->bytes - taken : 0};
  return 0;
}

std::byte* Disk::map(int fd, uint64_t bytes) {
  const Inode& inode = *at(fd).inode;
  TD_CHECK(bytes <= inode.size);
  return inode.memory;
}

}  // namespace tokendepot::sim
