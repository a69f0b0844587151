// File systems in memory, below the engine's system calls: what a kernel, a disk and a power supply can do to
// a depot, on the command of a seed.
//
// Each root is a volume of its own: a disk, whose unflushed writes a power cut may keep, drop or tear, or
// memory (tmpfs), which a power cut empties. Paths under kMount go here, all others to the system.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "report.h"
#include "scheduler.h"
#include "tokendepot/key.h"

namespace tokendepot::sim {

inline constexpr char kMount[] = "/simulated";

/// Probabilities of one system call. All zero: an honest and healthy disk.
struct Faults {
  double read_error = 0;
  double short_read = 0;
  double rot_in_transit = 0;  // what is read differs from what is stored
  double write_error = 0;
  double short_write = 0;
  double torn_write = 0;  // a part is written, then EIO
  double lost_write = 0;  // told as written, but is not
  double misdirected_write = 0;
  double no_space = 0;
  double other_error = 0;  // open, rename, link, unlink, list, stat, flush, lock
  double interrupted = 0;
  double slow = 0;
  double slow_transfer = 0;  // of segments only: what is read or written stays in use for long
};

class Disk {
 public:
  Disk();

  void add_volume(const std::string& path, bool memory, uint64_t bytes, uint64_t capacity);
  /// Whether unflushed writes are remembered apart.
  void expect_power_cuts() { track_ = true; }
  void set_faults(const Faults& faults) { faults_ = faults; }
  /// Others' files on the same file system.
  void set_foreign_bytes(const std::string& volume, uint64_t bytes);

  /// The process dies in its n-th change of the disk from now on, having done none, a part or all of it.
  void crash_at(ProcessId process, uint64_t n);
  uint64_t changes_of(ProcessId process) const;
  void close_all(ProcessId process);
  /// The kernel has written everything back.
  void settle();
  /// All processes are dead already.
  void cut_power();
  /// Flips a bit of a segment or journal. Keys of whatever the bit belonged to join `damaged`.
  void rot(std::set<Key>& damaged);
  /// Logs every journal record of this chunk and of the segments that it was put into.
  void explain(const Key& key) const;

  // --- system calls: a result or a negative errno ---
  int open(const std::string& path, int flags);
  int close(int fd);
  int64_t read(int fd, std::byte* out, uint64_t bytes, uint64_t offset);
  int64_t write(int fd, const std::byte* bytes, uint64_t count, uint64_t offset);
  int64_t size_of(int fd);
  struct Status {
    uint64_t inode = 0;
    uint64_t bytes = 0;
    bool directory = false;
  };
  int status(const std::string& path, Status& out);
  int status(int fd, Status& out);
  int make_directory(const std::string& path);
  int rename(const std::string& from, const std::string& to);
  int link(const std::string& from, const std::string& to);
  int unlink(const std::string& path);
  int allocate(int fd, uint64_t bytes);
  int truncate(int fd, uint64_t bytes);
  int flush(int fd);
  int flags(int fd) const;
  int set_flags(int fd, int flags);
  int lock(int fd);
  int locked_by_another(int fd, bool& locked);
  int list(int fd, std::vector<std::string>& names, std::string& path);
  struct Space {
    bool memory = false;
    uint64_t total = 0;
    uint64_t available = 0;
  };
  int space(const std::string& path, Space& out);
  std::byte* map(int fd, uint64_t bytes);

 private:
  struct Change {  // not flushed yet
    bool resize = false;
    uint64_t offset = 0;  // or the new size
    std::vector<std::byte> bytes;
  };
  struct Inode {
    uint64_t id = 0;
    bool directory = false;
    std::byte* memory = nullptr;  // kMostBytes of address space, never moved: it may be mapped
    uint64_t size = 0;
    int locked_by = -1;
    std::vector<std::byte> stable;
    std::vector<Change> changes;
  };
  struct Volume {
    std::string path;
    bool memory = false;
    uint64_t bytes = 0;
    uint64_t capacity = 0;
    uint64_t foreign = 0;
    std::map<std::string, Inode*> names;
    std::map<std::string, Inode*> stable_names;
    std::vector<std::map<std::string, Inode*>> unflushed_names;  // after each change of a name
  };
  struct Open {
    Inode* inode = nullptr;
    Volume* volume = nullptr;
    std::string path;
    int flags = 0;
    ProcessId process = 0;
  };

  Volume* volume_of(const std::string& path);
  Inode* find(const std::string& path);
  Open& at(int fd);
  Inode* new_inode(bool directory);
  void resize(Inode& inode, uint64_t bytes);
  void store(Inode& inode, const std::byte* bytes, uint64_t count, uint64_t offset);
  void names_changed(Volume& volume);
  static uint64_t used(const Volume& volume);
  void check_capacity(const Volume& volume) const;
  /// Time passes, others run; then an errno to answer with, or 0.
  void take_time(int fd);
  int enter(double failure, Injected kind, int error);
  /// As above for what changes the disk; `part` (of `whole`) is what is done before the process dies here.
  bool dies(uint64_t whole, uint64_t& part);
  /// A change that is done or not: a process that dies here has done either.
  template <typename Change>
  void change_or_die(Change change) {
    uint64_t part = 0;
    const bool last = dies(1, part);
    if (!last || part == 1) change();
    if (last) die();
  }
  void die();

  Random random_;
  bool track_ = false;
  Faults faults_;
  std::map<std::string, Volume> volumes_;
  std::vector<Inode*> inodes_;
  std::map<int, Open> open_;
  int next_fd_ = 1'000'000;
  std::map<ProcessId, uint64_t> changes_;
  std::map<ProcessId, uint64_t> crash_at_;
};

bool is_inside(const std::string& path, const std::string& directory);

/// The one that the wrapped system calls work on.
Disk& disk();

}  // namespace tokendepot::sim
