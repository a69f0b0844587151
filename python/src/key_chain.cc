#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <mutex>

#include "convert.h"
#include "unlocked.h"

namespace tokendepot::py {
namespace {

/// KeyChain for several threads: hashing runs without the GIL, so the GIL no longer orders its callers.
class SharedChain {
 public:
  SharedChain(const NamespaceDigest& ns, uint32_t chunk_tokens, std::string_view salt, std::string_view lora)
      : chain_(ns, chunk_tokens, salt, lora) {}

  size_t append(std::span<const uint32_t> tokens, std::span<const MediaSpan> media) {
    const Unlocked unlocked;
    std::lock_guard lock(mutex_);
    chain_.append(tokens, media);
    return chain_.keys().size();
  }

  nb::bytes keys(int64_t first, int64_t last) const {
    std::vector<Key> copy;
    {
      const Unlocked unlocked;
      std::lock_guard lock(mutex_);
      const auto count = static_cast<int64_t>(chain_.keys().size());
      const int64_t end = last < 0 ? count : std::min(last, count);
      const int64_t begin = std::clamp<int64_t>(first, 0, end);
      copy.assign(chain_.keys().begin() + begin, chain_.keys().begin() + end);
    }
    return to_bytes(std::as_bytes(std::span(copy)));
  }

  uint64_t tokens_seen() const {
    const Unlocked unlocked;
    std::lock_guard lock(mutex_);
    return chain_.tokens_seen();
  }

  size_t size() const {
    const Unlocked unlocked;
    std::lock_guard lock(mutex_);
    return chain_.keys().size();
  }

 private:
  mutable std::mutex mutex_;
  KeyChain chain_;
};

void construct(SharedChain* self, const nb::bytes& ns, uint32_t chunk_tokens, nb::handle salt,
               nb::handle lora) {
  if (chunk_tokens == 0) refuse("chunk_tokens is 0; allowed is a number greater than 0");
  new (self) SharedChain(digest_from<NamespaceDigest>(ns, "namespace"), chunk_tokens,
                         text_or_bytes(salt, "salt"), text_or_bytes(lora, "lora"));
}

using Media = std::tuple<nb::object, uint64_t, uint64_t>;

size_t append(SharedChain& self, nb::handle tokens, nb::sequence media) {
  std::vector<Media> kept;  // owns the objects that the views below point into
  for (nb::handle item : media)
    kept.push_back(typed<Media>(item, "media of (content hash, first token, tokens)"));
  std::vector<MediaSpan> spans;
  for (const auto& [hash, first, count] : kept)
    spans.push_back({text_or_bytes(hash, "content hash"), first, count});
  return self.append(integers_from<uint32_t>(tokens, "tokens"), spans);
}

}  // namespace

void bind_key_chain(nb::module_& module) {
  nb::class_<SharedChain>(module, "KeyChain",
                          "Grows the chunk keys of one prompt. See include/tokendepot/key.h.")
      .def("__init__", &construct, nb::arg("namespace"), nb::arg("chunk_tokens"), nb::arg("salt") = "",
           nb::arg("lora") = "")
      .def("append", &append, nb::arg("tokens"), nb::arg("media") = nb::make_tuple(),
           "Appends the prompt's next tokens and returns the number of keys so far.")
      .def("keys", &SharedChain::keys, nb::arg("first") = 0, nb::arg("last") = -1)
      .def_prop_ro("tokens_seen", &SharedChain::tokens_seen)
      .def("__len__", &SharedChain::size);
}

}  // namespace tokendepot::py
