// Stands between one process and the C library, for files below a directory and for the wall clock. What it
// does is read from a page of memory that the test shares (faulty_system.py), so that it changes at once.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <time.h>
#include <unistd.h>

struct control {  // faulty_system.py knows the order
  volatile int64_t hold_opens;    // of segments: they return when this is 0 again
  volatile int64_t hold_reads;    // of segments
  volatile int64_t hold_writes;   // of anything
  volatile int64_t write_delay_ms;
  volatile int64_t open_error;    // of segments
  volatile int64_t read_error;    // of segments
  volatile int64_t rename_error;
  volatile int64_t hide_newer_s;  // listings leave out what was made in the last seconds
  volatile int64_t network;       // the file system says that it is NFS
  volatile int64_t wall_offset_s;
  volatile int64_t opens;         // counted: of segments
  volatile int64_t hold_journals; // reads of them
};

enum { most_files = 4096 };

static struct control none;
static struct control* control = &none;
static const char* below = "//";
static char is_ours[most_files];
static char is_segment[most_files];
static char is_journal[most_files];

__attribute__((constructor)) static void begin(void) {
  const char* const path = getenv("FAULTY_SYSTEM_CONTROL");
  const char* const root = getenv("FAULTY_SYSTEM_BELOW");
  const int fd = path == NULL || root == NULL ? -1 : open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return;
  void* const page = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (page == MAP_FAILED) return;
  control = page;
  below = root;
}

static int ours(const char* path) {
  const size_t length = strlen(below);
  return strncmp(path, below, length) == 0 && (path[length] == '/' || path[length] == 0);
}
static int in(const char* files, int fd) { return fd >= 0 && fd < most_files && files[fd]; }

static void hold_while(volatile int64_t* flag) {
  const struct timespec pause = {0, 1000 * 1000};
  while (*flag != 0) nanosleep(&pause, NULL);
}

static int fails_with(int64_t error) {
  if (error != 0) errno = (int)error;
  return error != 0;
}

#define REAL(name)                                           \
  static __typeof__(&name) real;                             \
  if (real == NULL) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

int open(const char* path, int flags, ...) {
  REAL(open);
  va_list rest;
  va_start(rest, flags);
  const mode_t mode = (flags & (O_CREAT | __O_TMPFILE)) != 0 ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  const int mine = ours(path);
  const int segment = mine && strstr(path, "/segments/") != NULL && (flags & O_CREAT) == 0;
  if (segment) {
    __atomic_add_fetch(&control->opens, 1, __ATOMIC_RELAXED);
    hold_while(&control->hold_opens);
    if (fails_with(control->open_error)) return -1;
  }
  const int fd = real(path, flags, mode);
  if (fd >= 0 && fd < most_files) {
    is_ours[fd] = (char)mine;
    is_segment[fd] = (char)segment;
    is_journal[fd] = (char)(mine && strstr(path, "/journals/") != NULL);
  }
  return fd;
}

ssize_t pread(int fd, void* out, size_t bytes, off_t offset) {
  REAL(pread);
  if (in(is_journal, fd)) hold_while(&control->hold_journals);
  if (in(is_segment, fd)) {
    hold_while(&control->hold_reads);
    if (fails_with(control->read_error)) return -1;
  }
  return real(fd, out, bytes, offset);
}

ssize_t pwrite(int fd, const void* from, size_t bytes, off_t offset) {
  REAL(pwrite);
  if (in(is_ours, fd)) {
    hold_while(&control->hold_writes);
    const int64_t delay = control->write_delay_ms;
    const struct timespec pause = {delay / 1000, delay % 1000 * 1000 * 1000};
    if (delay != 0) nanosleep(&pause, NULL);
  }
  return real(fd, from, bytes, offset);
}

int rename(const char* from, const char* to) {
  REAL(rename);
  return ours(from) && fails_with(control->rename_error) ? -1 : real(from, to);
}

struct dirent* readdir(DIR* directory) {
  REAL(readdir);
  while (1) {
    struct dirent* const entry = real(directory);
    struct statx found;
    if (entry == NULL || control->hide_newer_s == 0 || !in(is_ours, dirfd(directory)) ||
        statx(dirfd(directory), entry->d_name, AT_SYMLINK_NOFOLLOW, STATX_BTIME, &found) != 0 ||
        (found.stx_mask & STATX_BTIME) == 0 || found.stx_btime.tv_sec + control->hide_newer_s < time(NULL)) {
      return entry;
    }
  }
}

int statfs(const char* path, struct statfs* out) {
  REAL(statfs);
  const int result = real(path, out);
  if (result == 0 && control->network != 0 && ours(path)) out->f_type = NFS_SUPER_MAGIC;
  return result;
}

int clock_gettime(clockid_t clock, struct timespec* out) {
  REAL(clock_gettime);
  const int result = real(clock, out);
  if (result == 0 && clock == CLOCK_REALTIME) out->tv_sec += control->wall_offset_s;
  return result;
}
