// Any text as the options that users write: refused in one sentence, or understood and written out the same.
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "tokendepot/depot.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto length = tokendepot::parse_size(text);
  TD_CHECK(length ? *length > 0 : !length.error().message.empty());
  const auto options = tokendepot::parse_options(text);
  if (!options) {
    TD_CHECK(!options.error().message.empty() && options.error().message.find('\n') == std::string::npos);
    return 0;
  }
  const std::string written = tokendepot::to_json(*options);
  const auto again = tokendepot::parse_options(written);
  TD_CHECK(again && tokendepot::to_json(*again) == written);
  return 0;
}
