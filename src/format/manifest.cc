#include "format/manifest.h"

#include <nlohmann/json.hpp>

#include <vector>

#include "base/errors.h"
#include "base/sha256.h"

namespace tokendepot {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxDepth = 64;

// Builds the document while it is read, and stops at what would make two texts mean one manifest: a key
// twice, or an integer that only fits a floating-point number.
class Builder {
 public:
  bool null() { return add(nullptr); }
  bool boolean(bool value) { return add(value); }
  bool number_integer(Json::number_integer_t value) { return add(value); }
  bool number_unsigned(Json::number_unsigned_t value) { return add(value); }
  bool number_float(Json::number_float_t value, const std::string& text) {
    if (text.find_first_of(".eE") == std::string::npos) {
      return stop(
          fmt::format("manifest has the integer {}, at most 64 bits are allowed", text.substr(0, 64)));
    }
    return add(value);
  }
  bool string(std::string& value) { return add(std::move(value)); }
  bool binary(Json::binary_t&) { return stop("manifest has binary data, JSON is needed"); }

  bool start_object(size_t) { return open(Json::object()); }
  bool start_array(size_t) { return open(Json::array()); }
  bool end_object() { return close(); }
  bool end_array() { return close(); }
  bool key(std::string& name) {
    if (open_.back()->contains(name)) {
      // As ASCII, so that a cut through it leaves no half character in the message.
      const std::string shown = Json(name).dump(-1, ' ', true).substr(0, 64);
      return stop(fmt::format("manifest has the key {} twice, each may occur once", shown));
    }
    name_ = std::move(name);
    return true;
  }

  bool parse_error(size_t position, const std::string&, const Json::exception&) {
    return stop(fmt::format("manifest is not JSON from byte {} on, a JSON object is needed", position));
  }

  Json& root() { return root_; }
  const std::string& problem() const { return problem_; }

 private:
  Json* place(Json value) {
    if (open_.empty()) return &(root_ = std::move(value));
    Json& parent = *open_.back();
    if (parent.is_object()) return &(parent[name_] = std::move(value));
    parent.push_back(std::move(value));
    return &parent.back();
  }
  bool add(Json value) {
    place(std::move(value));
    return true;
  }
  bool open(Json container) {
    if (open_.size() == kMaxDepth)
      return stop(fmt::format("manifest nests deeper than {}, the limit", kMaxDepth));
    // The address stays: a parent gets no further element before its open child is closed.
    open_.push_back(place(std::move(container)));
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }
  bool stop(std::string problem) {
    problem_ = std::move(problem);
    return false;
  }

  Json root_;
  std::vector<Json*> open_;
  std::string name_;
  std::string problem_;
};

}  // namespace

Result<Manifest> make_manifest(std::string_view json) {
  if (json.size() > kMaxManifestBytes) {
    return fail(ErrorKind::invalid_argument, "manifest has {} bytes, at most {} are allowed", json.size(),
                kMaxManifestBytes);
  }
  try {
    Builder builder;
    if (!Json::sax_parse(json, &builder)) return fail(ErrorKind::invalid_argument, "{}", builder.problem());
    if (!builder.root().is_object()) {
      return fail(ErrorKind::invalid_argument, "manifest is a JSON {}, an object is needed",
                  builder.root().type_name());
    }
    Manifest manifest;
    manifest.canonical = builder.root().dump();
    manifest.digest.bytes = sha256(manifest.canonical);
    return manifest;
  } catch (const Json::exception& problem) {
    return fail(ErrorKind::invalid_argument, "manifest is not a JSON object: {}", problem.what());
  }
}

Result<Manifest> check_manifest(std::string_view stored, const NamespaceDigest& expected) {
  Result<Manifest> manifest = make_manifest(stored);
  if (!manifest) {
    return fail(ErrorKind::corrupt, "stored manifest {} is damaged: {}", to_hex(expected.bytes),
                manifest.error().message);
  }
  if (manifest->digest != expected || manifest->canonical != stored) {
    return fail(ErrorKind::corrupt, "stored manifest has digest {}, its file name says {}",
                to_hex(manifest->digest.bytes), to_hex(expected.bytes));
  }
  return manifest;
}

}  // namespace tokendepot
