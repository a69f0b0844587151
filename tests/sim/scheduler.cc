#undef _FORTIFY_SOURCE  // its longjmp takes another stack for a damaged one
#include "scheduler.h"

#include <pthread.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdlib>
#include <ctime>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"
#include "report.h"

namespace tokendepot::sim {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr uint64_t kNever = UINT64_MAX;
constexpr uint64_t kEpochNs = 1'700'000'000ull * 1'000'000'000;
// Virtual time and turns that no run comes near to while it makes progress.
constexpr uint64_t kLongestNs = 20'000ull * 1'000'000'000;
constexpr uint64_t kMostTurns = 30'000'000;

struct Fiber {
  uint64_t id = 0;
  ProcessId process = 0;
  ucontext_t start{};  // its stack, and how it begins on it
  bool begun = false;
  jmp_buf rest;
  std::function<void()> body;
  const void* waits_for = nullptr;  // null: can run
  uint64_t deadline = kNever;
  bool timed_out = false;
  bool over = false;
  int error = 0;  // errno
  std::vector<pthread_mutex_t*> held;
};

struct Scheduler {
  Random random;
  double switch_chance = 0;
  uint64_t now = 1'000'000'000;
  uint64_t turns = 0;
  uint64_t next_id = 1;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<void*> free_stacks;
  std::map<ProcessId, int64_t> skew;
  Fiber* current = nullptr;
  jmp_buf main;
};
Scheduler* scheduler = nullptr;

void fiber_main() {
  Fiber* const self = scheduler->current;
  self->body();
  self->over = true;
  _longjmp(scheduler->main, 1);
}

// By jumps, because swapcontext() sets the signal mask each time, a system call that was 40 % of a life. All
// fibers have one mask, which pthread_sigmask() leaves as it is.
void to_scheduler() {
  Fiber* const self = scheduler->current;
  self->error = errno;
  if (_setjmp(self->rest) == 0) _longjmp(scheduler->main, 1);
  errno = self->error;
}

/// Returns when it waits, has done enough for this turn, or is over.
void run(Fiber& fiber) {
  scheduler->current = &fiber;
  if (_setjmp(scheduler->main) != 0) return;
  if (std::exchange(fiber.begun, true)) _longjmp(fiber.rest, 1);
  setcontext(&fiber.start);
}

/// Waits until somebody wakes `address` or the deadline. False: the deadline.
bool block_on(const void* address, uint64_t deadline) {
  Fiber* const self = scheduler->current;
  self->waits_for = address;
  self->deadline = deadline;
  self->timed_out = false;
  to_scheduler();
  return !self->timed_out;
}

void release(Fiber& fiber) {
  fiber.waits_for = nullptr;
  fiber.deadline = kNever;
}

void wake_all(const void* address) {
  for (const auto& fiber : scheduler->fibers) {
    if (fiber->waits_for == address) release(*fiber);
  }
}

void wake_one(const void* address) {
  std::vector<Fiber*> waiting;
  for (const auto& fiber : scheduler->fibers) {
    if (fiber->waits_for == address) waiting.push_back(fiber.get());
  }
  if (!waiting.empty()) release(*waiting[scheduler->random.below(waiting.size())]);
}

Fiber* next_fiber() {
  auto& s = *scheduler;
  std::vector<Fiber*> ready;
  uint64_t earliest = kNever;
  for (const auto& fiber : s.fibers) {
    if (fiber->waits_for == nullptr) {
      ready.push_back(fiber.get());
    } else {
      earliest = std::min(earliest, fiber->deadline);
    }
  }
  if (ready.empty()) {
    if (earliest == kNever) violated(Verdict::hang, "every thread waits and nothing will wake one");
    s.now = std::max(s.now, earliest);
  } else {
    s.now += 100;
  }
  for (const auto& fiber : s.fibers) {
    if (fiber->waits_for == nullptr || fiber->deadline > s.now) continue;
    fiber->timed_out = true;
    release(*fiber);
    ready.push_back(fiber.get());
  }
  if (s.now > kLongestNs) violated(Verdict::hang, "not at its end after hours of its own time");
  if (++s.turns > kMostTurns) violated(Verdict::hang, "threads run for ever");
  return ready[s.random.below(ready.size())];
}

uint64_t to_ns(const timespec& time) {
  return static_cast<uint64_t>(time.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(time.tv_nsec);
}

int& word(pthread_mutex_t* mutex) {
  return mutex->__data.__lock;
}

void lock(pthread_mutex_t* mutex) {
  while (word(mutex) != 0) block_on(mutex, kNever);
  word(mutex) = 1;
  scheduler->current->held.push_back(mutex);
}

void unlock(pthread_mutex_t* mutex) {
  word(mutex) = 0;
  std::erase(scheduler->current->held, mutex);
  wake_all(mutex);
}

}  // namespace

void run_simulation(uint64_t seed, std::function<void()> world) {
  scheduler = new Scheduler;
  scheduler->random = Random(seed);
  constexpr double kSwitching[] = {0, 0.02, 0.2, 0.6};
  scheduler->switch_chance = kSwitching[scheduler->random.below(4)];
  bool ended = false;
  start_fiber(kWorld, [&ended, &world] {
    world();
    ended = true;
  });
  while (!ended) {
    Fiber* const next = next_fiber();
    note("turn", next->id);
    run(*next);
    if (next->over) {
      scheduler->free_stacks.push_back(next->start.uc_stack.ss_sp);
      wake_all(next);
      std::erase_if(scheduler->fibers, [next](const auto& fiber) { return fiber.get() == next; });
    }
  }
}

bool simulating() {
  return scheduler != nullptr && scheduler->current != nullptr;
}
Random& chance() {
  return scheduler->random;
}
uint64_t now_ns() {
  return scheduler->now;
}
ProcessId current_process() {
  return scheduler->current->process;
}
void set_skew(ProcessId process, int64_t ns) {
  scheduler->skew[process] = ns;
}
uint64_t wall_ns() {
  const auto skew = scheduler->skew.find(current_process());
  return kEpochNs + now_ns() + static_cast<uint64_t>(skew == scheduler->skew.end() ? 0 : skew->second);
}

void start_fiber(ProcessId process, std::function<void()> body) {
  auto fiber = std::make_unique<Fiber>();
  fiber->id = scheduler->next_id++;
  fiber->process = process;
  fiber->body = std::move(body);
  getcontext(&fiber->start);
  void* stack = nullptr;
  if (!scheduler->free_stacks.empty()) {
    stack = scheduler->free_stacks.back();
    scheduler->free_stacks.pop_back();
  } else {
    stack = ::mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TD_CHECK(stack != MAP_FAILED);
  }
  fiber->start.uc_stack.ss_sp = stack;
  fiber->start.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber->start, fiber_main, 0);
  scheduler->fibers.push_back(std::move(fiber));
}

void sleep_ns(uint64_t ns) {
  const char nobody = 0;
  block_on(&nobody, scheduler->now + ns);
}

void maybe_switch() {
  if (scheduler->random.chance(scheduler->switch_chance)) to_scheduler();
}

void kill_process(ProcessId process) {
  auto& s = *scheduler;
  const bool suicide = s.current->process == process;
  for (auto& fiber : s.fibers) {
    if (fiber->process != process) continue;
    // A mutex of the process is never looked at again; one that lives outside of it (the log's) must go on.
    for (pthread_mutex_t* mutex : fiber->held) {
      word(mutex) = 0;
      wake_all(mutex);
    }
    if (fiber.get() != s.current) fiber->over = true;
  }
  // The memory of a dead fiber's stack may be in use by what it shares with its kin: never used again.
  std::erase_if(s.fibers, [&](auto& fiber) {
    if (!fiber->over || fiber->process != process) return false;
    (void)fiber.release();  // its body owns what a kill does not tidy up
    return true;
  });
  if (!suicide) return;
  std::erase_if(s.fibers, [&](auto& fiber) {
    if (fiber.get() != s.current) return false;
    (void)fiber.release();
    return true;
  });
  _longjmp(s.main, 1);
}

bool has_fibers(ProcessId process) {
  return std::ranges::any_of(scheduler->fibers,
                             [process](const auto& fiber) { return fiber->process == process; });
}

// --- what the linker sends here instead of to the system
// ------------------------------------------------------

extern "C" {

int __real_pthread_mutex_lock(pthread_mutex_t* mutex);
int __real_pthread_mutex_trylock(pthread_mutex_t* mutex);
int __real_pthread_mutex_unlock(pthread_mutex_t* mutex);
int __real_pthread_rwlock_rdlock(pthread_rwlock_t* lock);
int __real_pthread_rwlock_wrlock(pthread_rwlock_t* lock);
int __real_pthread_rwlock_unlock(pthread_rwlock_t* lock);
int __real_nanosleep(const timespec* time, timespec* rest);
int __real_usleep(unsigned microseconds);
int __real_pthread_sigmask(int how, const sigset_t* set, sigset_t* before);

int __wrap_pthread_mutex_lock(pthread_mutex_t* mutex) {
  if (!simulating()) return __real_pthread_mutex_lock(mutex);
  maybe_switch();
  lock(mutex);
  return 0;
}

int __wrap_pthread_mutex_trylock(pthread_mutex_t* mutex) {
  if (!simulating()) return __real_pthread_mutex_trylock(mutex);
  maybe_switch();
  if (word(mutex) != 0) return EBUSY;
  lock(mutex);
  return 0;
}

int __wrap_pthread_mutex_unlock(pthread_mutex_t* mutex) {
  if (!simulating()) return __real_pthread_mutex_unlock(mutex);
  unlock(mutex);
  maybe_switch();
  return 0;
}

int __wrap_pthread_rwlock_rdlock(pthread_rwlock_t* lock) {
  if (!simulating()) return __real_pthread_rwlock_rdlock(lock);
  maybe_switch();
  while (lock->__data.__writers != 0) block_on(lock, kNever);
  ++lock->__data.__readers;
  return 0;
}

int __wrap_pthread_rwlock_wrlock(pthread_rwlock_t* lock) {
  if (!simulating()) return __real_pthread_rwlock_wrlock(lock);
  maybe_switch();
  while (lock->__data.__writers != 0 || lock->__data.__readers != 0) block_on(lock, kNever);
  lock->__data.__writers = 1;
  return 0;
}

int __wrap_pthread_rwlock_unlock(pthread_rwlock_t* lock) {
  if (!simulating()) return __real_pthread_rwlock_unlock(lock);
  if (lock->__data.__writers != 0) {
    lock->__data.__writers = 0;
  } else {
    --lock->__data.__readers;
  }
  wake_all(lock);
  maybe_switch();
  return 0;
}

int __wrap_pthread_cond_clockwait(pthread_cond_t* condition, pthread_mutex_t* mutex, clockid_t clock,
                                  const timespec* until) {
  TD_CHECK(simulating() && clock == CLOCK_MONOTONIC);
  unlock(mutex);
  const bool woken = block_on(condition, to_ns(*until));
  lock(mutex);
  return woken ? 0 : ETIMEDOUT;
}

int __wrap_pthread_setname_np(pthread_t /*thread*/, const char* /*name*/) {
  return 0;
}

int __wrap_nanosleep(const timespec* time, timespec* rest) {
  if (!simulating()) return __real_nanosleep(time, rest);
  sleep_ns(to_ns(*time));
  return 0;
}

int __wrap_usleep(unsigned microseconds) {
  if (!simulating()) return __real_usleep(microseconds);
  sleep_ns(uint64_t{microseconds} * 1000);
  return 0;
}

// No simulated medium sends a signal, and the real ones that end a run must reach every fiber.
int __wrap_pthread_sigmask(int how, const sigset_t* set, sigset_t* before) {
  if (!simulating()) return __real_pthread_sigmask(how, set, before);
  if (before != nullptr) sigemptyset(before);
  return 0;
}

int __wrap_sched_yield() {
  if (simulating()) to_scheduler();
  return 0;
}

// std::chrono::steady_clock::now() and system_clock::now(); a time point is one 64-bit number of nanoseconds.
int64_t __real__ZNSt6chrono3_V212steady_clock3nowEv();
int64_t __real__ZNSt6chrono3_V212system_clock3nowEv();

int64_t __wrap__ZNSt6chrono3_V212steady_clock3nowEv() {
  if (!simulating()) return __real__ZNSt6chrono3_V212steady_clock3nowEv();
  return static_cast<int64_t>(scheduler->now += 50);  // who spins on the clock gets to the end
}

int64_t __wrap__ZNSt6chrono3_V212system_clock3nowEv() {
  if (!simulating()) return __real__ZNSt6chrono3_V212system_clock3nowEv();
  return static_cast<int64_t>(wall_ns());
}

// std::condition_variable::wait, notify_one, notify_all.
void __wrap__ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE(std::condition_variable* condition,
                                                                      std::unique_lock<std::mutex>& held) {
  pthread_mutex_t* const mutex = held.mutex()->native_handle();
  unlock(mutex);
  block_on(condition, kNever);
  lock(mutex);
}

void __wrap__ZNSt18condition_variable10notify_oneEv(std::condition_variable* condition) {
  if (simulating()) wake_one(condition);
}

void __wrap__ZNSt18condition_variable10notify_allEv(std::condition_variable* condition) {
  if (simulating()) wake_all(condition);
}

// std::thread::_M_start_thread and join. A thread's handle is its fiber's number.
void __wrap__ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE(
    std::thread* thread, std::unique_ptr<std::thread::_State>* state, void (* /*depends*/)()) {
  TD_CHECK(simulating());
  *reinterpret_cast<uint64_t*>(thread) = scheduler->next_id;
  start_fiber(current_process(), [body = std::shared_ptr<std::thread::_State>(std::move(*state))]() mutable {
    body->_M_run();
    body.reset();
  });
  maybe_switch();
}

void __wrap__ZNSt6thread4joinEv(std::thread* thread) {
  const uint64_t id = std::exchange(*reinterpret_cast<uint64_t*>(thread), 0);
  while (true) {
    const auto found = std::ranges::find_if(scheduler->fibers, [id](const auto& f) { return f->id == id; });
    if (found == scheduler->fibers.end()) return;
    block_on(found->get(), kNever);
  }
}

}  // extern "C"

}  // namespace tokendepot::sim
