// How long a journal is ours. The kernel's locks last as long as the process; those of a network file system
// as long as the connection, and whoever finds a journal unlocked may take it over, with the segment that it
// fills. So its owner asks again and again, writes nothing while nobody answers, and leaves what it has lost.
#include "base/errors.h"
#include "base/log.h"
#include "store/root_writer.h"

namespace tokendepot {
namespace {

// Longer than an owner that is connected again needs to take its lock back.
constexpr uint64_t kAbandonedNs = 15ull * 1000 * 1000 * 1000;

}  // namespace

bool RootWriter::holds_journal_locked() const {
  return !root_.network() || confirmed_ns_ == 0 || clock_.steady_ns() - confirmed_ns_ <= kHoldNs;
}

void RootWriter::confirm_hold() {
  const uint64_t asked_ns = clock_.steady_ns();
  Result<File> journal;
  uint64_t writer = 0;
  {
    std::lock_guard lock(mutex_);
    journal = journal_.handle();
    writer = journal_.writer();
  }
  if (!journal) return;
  // Without the mutex, which stores need: a file system may take long to answer.
  const auto locked = journal->try_lock_exclusive();
  if (!locked) {
    log(LogLevel::debug, "root \"{}\": {}", root_.path(), locked.error().message);
    return;
  }
  const bool removed = *locked && journal->was_removed();
  std::lock_guard lock(mutex_);
  if (journal_.writer() != writer) return;  // compacted meanwhile, under a lock of its own
  if (*locked && !removed && !journal_.another_appended()) {
    confirmed_ns_ = asked_ns;
    return;
  }
  const char* const what = removed ? "was removed" : "was taken over by another process";
  const auto fresh = start_anew_locked();
  // What failed is tried again each second, and stores that find no space say why.
  log(fresh ? LogLevel::warning : LogLevel::debug, "root \"{}\": journal {} {}; {}", root_.path(),
      journal_name(writer), what, fresh ? "going on with a new one" : fresh.error().message);
}

Status RootWriter::start_anew_locked() {
  const uint64_t now = clock_.steady_ns();
  auto fresh = JournalWriter::create(root_.journals_dir());
  if (!fresh) return std::unexpected(fresh.error());
  // Their files belong to who has the journal; stores under way end as failed (Place::hold).
  for (std::optional<Current>* segment : {&current_, &spare_, &copies_}) {
    if (*segment) root_.files().drop((*segment)->id);
    segment->reset();
  }
  use_journal(std::move(*fresh));
  next_sequence_ = 0;
  ++hold_;
  confirmed_ns_ = now;
  replay_.take_over(journal_.writer());
  return {};
}

bool RootWriter::is_abandoned(uint64_t writer) {
  if (!root_.network()) return true;  // whoever can lock it has the proof
  const auto journal = File::open(root_.journals_dir() + "/" + journal_name(writer), {});
  const auto locked = journal ? journal->is_locked_by_another() : Result<bool>(false);
  if (!locked || *locked || (!journal && journal.error().kind != ErrorKind::not_found)) {
    free_since_.erase(writer);
    return false;
  }
  const uint64_t now = clock_.steady_ns();
  return now - free_since_.try_emplace(writer, now).first->second >= kAbandonedNs;
}

}  // namespace tokendepot
