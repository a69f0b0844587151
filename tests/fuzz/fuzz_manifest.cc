// Any text as a manifest: what is accepted is canonical, and stays so.
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "format/manifest.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto manifest = tokendepot::make_manifest(text);
  if (!manifest) {
    TD_CHECK(!manifest.error().message.empty());
    TD_CHECK(!tokendepot::check_manifest(text, {}).has_value());
    return 0;
  }
  const auto again = tokendepot::check_manifest(manifest->canonical, manifest->digest);
  TD_CHECK(again && again->canonical == manifest->canonical && again->digest == manifest->digest);
  return 0;
}
