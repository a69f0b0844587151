// Any text as a manifest, and as a value in one: what is accepted is canonical, and stays so.
#include <cstdint>
#include <string>
#include <string_view>

#include "base/check.h"
#include "format/manifest.h"

namespace {

void check(std::string_view text) {
  const auto manifest = tokendepot::make_manifest(text);
  if (!manifest) {
    TD_CHECK(!manifest.error().message.empty());
    TD_CHECK(!tokendepot::check_manifest(text, {}).has_value());
    return;
  }
  const auto again = tokendepot::check_manifest(manifest->canonical, manifest->digest);
  TD_CHECK(again && again->canonical == manifest->canonical && again->digest == manifest->digest);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  check(text);
  check("{\"key\":" + text + "}");
  return 0;
}
