#include "base/log.h"

#include <cstdio>
#include <mutex>

namespace tokendepot {
namespace {

struct SinkSlot {
  std::mutex mutex;
  LogSink sink;
};

// Never destroyed: threads that outlive main() may still log.
SinkSlot& sink_slot() {
  static SinkSlot* const slot = new SinkSlot;
  return *slot;
}

const char* level_name(LogLevel level) {
  switch (level) {
    case LogLevel::debug:
      return "DEBUG";
    case LogLevel::info:
      return "INFO";
    case LogLevel::warning:
      return "WARNING";
    case LogLevel::error:
      return "ERROR";
  }
  return "ERROR";
}

// Messages quote file names and bytes of others: control characters must not start a second line.
void write_stderr(LogLevel level, std::string_view text) {
  std::string line = fmt::format("tokendepot: {} {}", level_name(level), text);
  for (char& c : line) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = ' ';
  }
  line += '\n';
  std::fwrite(line.data(), 1, line.size(), stderr);
}

}  // namespace

void set_log_sink(LogSink sink) {
  SinkSlot& slot = sink_slot();
  {
    std::lock_guard lock(slot.mutex);
    slot.sink.swap(sink);
  }
  // The old sink is destroyed here, outside the lock: its destructor may log or take other locks.
}

void log_line(LogLevel level, std::string_view text) {
  LogSink sink;
  {
    SinkSlot& slot = sink_slot();
    std::lock_guard lock(slot.mutex);
    sink = slot.sink;
  }
  // Called outside the lock: a sink that waits for an interpreter lock would deadlock with set_log_sink().
  if (sink) {
    try {
      sink(level, text);
      return;
    } catch (...) {
      write_stderr(LogLevel::error, "the log sink threw an exception; its line follows");
    }
  }
  write_stderr(level, text);
}

}  // namespace tokendepot
