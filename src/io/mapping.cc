#include "io/mapping.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <mutex>
#include <thread>
#include <utility>

#include "base/check.h"
#include "base/errors.h"
#include "tokendepot/layout.h"

namespace tokendepot {

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  if (this != &other) {
    if (data_ != nullptr) ::munmap(data_, size_);
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
  }
  return *this;
}

Mapping::~Mapping() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

Result<Mapping> Mapping::map(const File& file, uint64_t bytes, bool writable) {
  const Result<uint64_t> size = file.size();
  if (!size) return std::unexpected(size.error());
  if (bytes == 0 || *size < bytes) {
    return fail(ErrorKind::invalid_argument, "cannot map {} bytes of {}, expected 1 to its size of {}", bytes,
                file.path(), *size);
  }
  void* const address =
      ::mmap(nullptr, bytes, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED, file.fd(), 0);
  if (address == MAP_FAILED) return fail_errno(errno, "cannot map {} bytes of {}", bytes, file.path());
  // Only tmpfs takes the advice, and only where the machine allows it: fewer faults and less to register.
  (void)::madvise(address, bytes, MADV_HUGEPAGE);
  Mapping mapping;
  mapping.data_ = static_cast<std::byte*>(address);
  mapping.size_ = bytes;
  return mapping;
}

// The kernel locks the process's memory map for as long as each call takes, which for the 256 MiB of a fresh
// segment was 75 ms, and a thread of the engine that maps or unmaps memory waited as long, up to 370 ms
// beside stores. It gets its turn between two slices only if this thread sleeps there.
void Mapping::populate() const {
#ifdef MADV_POPULATE_WRITE
  constexpr uint64_t kSlice = 1 << 20;
  constexpr auto kTurn = std::chrono::microseconds(1);
  for (uint64_t at = 0; at < size_; at += kSlice) {
    if (::madvise(data_ + at, std::min(kSlice, size_ - at), MADV_POPULATE_WRITE) != 0) return;
    std::this_thread::sleep_for(kTurn);
  }
#endif
}

namespace {

struct GuardFrame {
  uintptr_t begin;  // whole pages: bad memory is reported by page
  uintptr_t end;
  GuardFrame* outer;
  sigjmp_buf back;
};

// What the handler needs to know of a thread. Not thread_local: the handler would allocate on the first touch
// in a thread, and the initial-exec model, which would not, binds all thread-local memory of a loaded library
// to the little that a process has left for libraries (the static CUDA runtime alone is over it). A thread
// takes a slot at its first guarded call and gives it back when it ends.
struct ThreadSlot {
  std::atomic<pthread_t> owner{0};  // 0 = free; no thread of glibc is number 0
  GuardFrame* innermost = nullptr;
  bool unblocked = false;
};
constexpr size_t kMostThreads = 4096;
ThreadSlot slots[kMostThreads];
// Per process, because a thread without a slot has nowhere else: the first handler that came after ours runs
// once.
std::atomic<pthread_t> chaining{0};

ThreadSlot* find_slot(pthread_t thread) {
  for (ThreadSlot& slot : slots) {
    if (slot.owner.load(std::memory_order_relaxed) == thread) return &slot;
  }
  return nullptr;
}

class SlotHolder {
 public:
  SlotHolder() {
    const pthread_t self = pthread_self();
    for (ThreadSlot& slot : slots) {
      pthread_t none = 0;
      if (!slot.owner.compare_exchange_strong(none, self)) continue;
      slot.innermost = nullptr;
      slot.unblocked = false;
      slot_ = &slot;
      return;
    }
    TD_CHECK(slot_ != nullptr);
  }
  ~SlotHolder() { slot_->owner.store(0); }
  SlotHolder(const SlotHolder&) = delete;
  SlotHolder& operator=(const SlotHolder&) = delete;
  ThreadSlot& slot() { return *slot_; }

 private:
  ThreadSlot* slot_ = nullptr;
};

ThreadSlot& my_slot() {
  thread_local SlotHolder holder;
  return holder.slot();
}

// Handlers found in our place, oldest first. Slots are written once, then published: the handler reads
// without locks.
constexpr int kMostPrevious = 8;
struct sigaction previous[kMostPrevious];
int previous_count = 0;  // under install_mutex
std::atomic<const struct sigaction*> next_in_chain{nullptr};
std::mutex install_mutex;

void die_of_sigbus() {
  struct sigaction standard{};
  standard.sa_handler = SIG_DFL;
  ::sigaction(SIGBUS, &standard, nullptr);
  ::raise(SIGBUS);
}

void on_sigbus(int signal, siginfo_t* info, void* context) {
  const bool sent = info->si_code <= 0;  // by kill() or raise(): no fault, so the address means nothing
  if (!sent) {
    const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
    ThreadSlot* const slot = find_slot(pthread_self());
    for (GuardFrame* frame = slot != nullptr ? slot->innermost : nullptr; frame != nullptr;
         frame = frame->outer) {
      if (address >= frame->begin && address < frame->end) {
        slot->innermost = frame->outer;
        siglongjmp(frame->back, 1);
      }
    }
  }
  // A handler that came after ours may have us as its own previous one: let it run once, then end as it wants
  // to.
  const struct sigaction* const next = next_in_chain.load(std::memory_order_acquire);
  if (chaining.load() == pthread_self() || next == nullptr) return die_of_sigbus();
  chaining.store(pthread_self());
  if ((next->sa_flags & SA_SIGINFO) != 0) {
    next->sa_sigaction(signal, info, context);
  } else if (next->sa_handler == SIG_IGN) {
    if (!sent) die_of_sigbus();  // returning would fault for ever
  } else if (next->sa_handler == SIG_DFL) {
    die_of_sigbus();
  } else {
    next->sa_handler(signal);
  }
  chaining.store(0);
}

bool same_handler(const struct sigaction& a, const struct sigaction& b) {
  if ((a.sa_flags & SA_SIGINFO) != (b.sa_flags & SA_SIGINFO)) return false;
  return (a.sa_flags & SA_SIGINFO) != 0 ? a.sa_sigaction == b.sa_sigaction : a.sa_handler == b.sa_handler;
}

bool is_ours(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) != 0 && action.sa_sigaction == on_sigbus;
}

// Puts our handler on top of whoever is there now (a crash reporter may have come after us). Costs one system
// call when nothing has changed.
void ensure_handler() {
  struct sigaction current;
  ::sigaction(SIGBUS, nullptr, &current);
  if (is_ours(current)) return;

  const std::lock_guard lock(install_mutex);
  ::sigaction(SIGBUS, nullptr, &current);
  if (is_ours(current)) return;
  int slot = 0;
  while (slot < previous_count && !same_handler(previous[slot], current)) ++slot;
  if (slot == previous_count) {
    if (previous_count == kMostPrevious) return;  // somebody installs new ones all the time: let them
    previous[previous_count++] = current;
  }
  next_in_chain.store(&previous[slot], std::memory_order_release);

  struct sigaction ours{};
  ours.sa_sigaction = on_sigbus;
  // NODEFER: the handler is left by a jump that restores no mask, so the mask must not change on entry.
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&ours.sa_mask);
  ::sigaction(SIGBUS, &ours, nullptr);
}

// A blocked SIGBUS kills the process without asking any handler.
void unblock_once(ThreadSlot& slot) {
  if (slot.unblocked) return;
  sigset_t only;
  sigemptyset(&only);
  sigaddset(&only, SIGBUS);
  pthread_sigmask(SIG_UNBLOCK, &only, nullptr);
  slot.unblocked = true;
}

}  // namespace

bool run_guarded(std::span<const std::byte> guarded, GuardedBody body, void* context) {
  ThreadSlot& slot = my_slot();
  unblock_once(slot);
  ensure_handler();
  GuardFrame frame;
  const auto begin = reinterpret_cast<uintptr_t>(guarded.data());
  frame.begin = begin / kPageBytes * kPageBytes;
  frame.end = align_up(begin + guarded.size());
  frame.outer = slot.innermost;
  if (frame.outer == nullptr) {  // a handler that jumped away may have left it set
    pthread_t self = pthread_self();
    chaining.compare_exchange_strong(self, 0);
  }
  if (sigsetjmp(frame.back, 0) != 0) return false;
  slot.innermost = &frame;
  std::atomic_signal_fence(std::memory_order_seq_cst);
  body(context);
  std::atomic_signal_fence(std::memory_order_seq_cst);
  slot.innermost = frame.outer;
  return true;
}

}  // namespace tokendepot
