// Limits of threads and of memory, for a child that is not given back (forked_child.h).
#pragma once

#include <malloc.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>

#include "forked_child.h"
#include "io/io_thread.h"

namespace tokendepot {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kShadowMemory = true;
#elif defined(__has_feature)
inline constexpr bool kShadowMemory = __has_feature(address_sanitizer) || __has_feature(thread_sanitizer);
#else
inline constexpr bool kShadowMemory = false;
#endif

/// What a child answers that could not be limited: its test is skipped.
inline constexpr int kNotLimited = 99;

inline size_t threads_now() {
  const std::filesystem::directory_iterator all("/proc/self/task");
  return static_cast<size_t>(std::distance(begin(all), end(all)));
}

/// Whether there are `expected` of them; a thread that was joined is listed for an instant more.
inline bool threads_become(size_t expected) {
  for (int tries = 0; tries < 2000; ++tries) {
    if (threads_now() == expected) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  std::fprintf(stderr, "%zu threads are left, expected %zu\n", threads_now(), expected);
  return false;
}

/// From now on the calling process may have `more` threads than it has. It becomes a user that nobody else
/// is: the limit counts a user's processes together, and does not bind root. False where that is not
/// possible.
inline bool limit_threads(rlim_t more) {
  const auto user = static_cast<uid_t>(40'000 + ::getpid() % 20'000);
  const rlim_t now = threads_now();
  if (::setgroups(0, nullptr) != 0 || ::setresgid(user, user, user) != 0 ||
      ::setresuid(user, user, user) != 0) {
    return false;
  }
  ::prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);  // else /proc/self is root's
  rlimit limit{now, now + more};
  if (::setrlimit(RLIMIT_NPROC, &limit) != 0) return false;
  std::thread thread = start_io_thread([](void*) {}, nullptr, "td-test");
  if (thread.joinable()) {
    thread.join();
    return false;  // this kernel does not count
  }
  limit.rlim_cur = limit.rlim_max;
  return ::setrlimit(RLIMIT_NPROC, &limit) == 0;
}

/// From now on the calling process may map `more` bytes than it has mapped, and its threads take 256 KiB
/// each. What it allocates in large pieces is mapped, whatever was freed before.
inline bool limit_memory(rlim_t more) {
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, 256 << 10);
  if (pthread_setattr_default_np(&attributes) != 0) return false;
  ::mallopt(M_ARENA_MAX, 1);
  rlim_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  const rlim_t bytes = pages * static_cast<rlim_t>(::sysconf(_SC_PAGESIZE));
  rlimit limit{bytes, bytes + more};
  if (::setrlimit(RLIMIT_AS, &limit) != 0) return false;
  while (std::malloc(128 << 10) != nullptr) {
  }
  limit.rlim_cur = limit.rlim_max;
  return ::setrlimit(RLIMIT_AS, &limit) == 0;
}

}  // namespace tokendepot
