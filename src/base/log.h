// One log sink for the process. Default: stderr, one line each, "tokendepot: LEVEL message".
#pragma once

#include <fmt/format.h>

#include <functional>
#include <string>
#include <string_view>
#include <utility>

namespace tokendepot {

enum class LogLevel : uint8_t { debug, info, warning, error };

using LogSink = std::function<void(LogLevel, std::string_view)>;

/// Replaces the sink (nullptr = stderr). Thread-safe; the sink may be called from any thread.
void set_log_sink(LogSink sink);
void log_line(LogLevel level, std::string_view text);

template <typename... Args>
void log(LogLevel level, fmt::format_string<Args...> text, Args&&... args) {
  log_line(level, fmt::format(text, std::forward<Args>(args)...));
}

}  // namespace tokendepot
