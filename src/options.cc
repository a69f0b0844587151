// From the JSON that users write to Options, and back. Every refusal is one sentence: key, value, what is
// allowed.
#include <fmt/format.h>
#include <limits.h>

#include <algorithm>
#include <array>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/errors.h"
#include "device/open_device.h"
#include "open_depot.h"
#include "store/root.h"
#include "store/segment_table.h"
#include "tokendepot/depot.h"

namespace tokendepot {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxConfigBytes = 1 << 20;
// Until segments are registered, and where they cannot be, these are what keeps a link busy: 8 reach 30 GB/s
// and 14 reach 41 (one H200, 16 cores); copies alone 29, 39 with 12 and 40 with 16.
constexpr uint32_t kCudaDeviceThreads = 12;
constexpr uint32_t kMostRewritePercent = 10;
constexpr uint32_t kMostGraceMs = 60'000;
constexpr uint32_t kMostOpenWaitMs = 600'000;
constexpr uint64_t kLeastReadsAtOnceBytes = 1ull << 20;
constexpr uint64_t kMostReadsAtOnceBytes = 64ull << 30;
constexpr uint64_t kLeastSegmentBytes = 1 << 20;
constexpr uint64_t kMaxSize = std::numeric_limits<int64_t>::max();

constexpr std::string_view kSizeAllowed =
    "a size greater than 0 in bytes or with one of the units KiB MiB GiB TiB (by 1024) or KB MB GB TB (by "
    "1000)";

constexpr std::array<std::string_view, 13> kTopKeys{
    "roots",          "device",          "device_slab", "slab",
    "device_threads", "io_depth",        "store_queue", "free_space_reserve",
    "poll_ms",        "rewrite_percent", "scrub_rate",  "eviction_grace_ms",
    "open_wait_ms"};
constexpr std::array<std::string_view, 10> kRootKeys{
    "path",      "capacity",    "segment",       "transport",    "io",
    "read_only", "require_gds", "write_through", "demotion_lag", "reads_at_once"};

constexpr std::array<std::pair<std::string_view, TransportChoice>, 5> kTransports{
    {{"auto", TransportChoice::automatic},
     {"mapped", TransportChoice::mapped},
     {"direct", TransportChoice::direct},
     {"buffered", TransportChoice::buffered},
     {"gds", TransportChoice::gds}}};
constexpr std::array<std::pair<std::string_view, IoChoice>, 3> kIoChoices{
    {{"auto", IoChoice::automatic}, {"threads", IoChoice::threads}, {"uring", IoChoice::uring}}};

std::string shown(const Json& value) {
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  constexpr size_t kLongest = 120;
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "...";
  return text;
}

std::unexpected<Error> refuse(std::string_view key, const Json& value, std::string_view allowed) {
  return fail(ErrorKind::invalid_argument, "config key {} has the value {}; allowed is {}", key, shown(value),
              allowed);
}

size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, replaced});
    }
  }
  return row[b.size()];
}

Status check_keys(const Json& object, std::span<const std::string_view> known, std::string_view prefix) {
  for (const auto& item : object.items()) {
    const std::string& key = item.key();
    if (std::ranges::find(known, key) != known.end()) continue;
    constexpr size_t kLongestCompared = 64;  // keeps a megabyte of key from costing a megabyte of comparison
    const std::string_view head = std::string_view(key).substr(0, kLongestCompared);
    const std::string_view nearest =
        *std::ranges::min_element(known, {}, [&](std::string_view k) { return edit_distance(head, k); });
    return fail(ErrorKind::invalid_argument,
                "config key {}{} is unknown; the nearest known key is {} and allowed are {}", prefix,
                shown(key), nearest, fmt::join(known, ", "));
  }
  return {};
}

std::optional<uint64_t> unit_bytes(std::string_view unit) {
  constexpr uint64_t k = 1000;
  constexpr std::array<std::pair<std::string_view, uint64_t>, 10> kUnits{{{"", 1},
                                                                          {"B", 1},
                                                                          {"KiB", 1ull << 10},
                                                                          {"MiB", 1ull << 20},
                                                                          {"GiB", 1ull << 30},
                                                                          {"TiB", 1ull << 40},
                                                                          {"KB", k},
                                                                          {"MB", k * k},
                                                                          {"GB", k * k * k},
                                                                          {"TB", k * k * k * k}}};
  for (const auto& [name, bytes] : kUnits) {
    if (name == unit) return bytes;
  }
  return std::nullopt;
}

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

std::optional<uint64_t> size_from_text(std::string_view text) {
  constexpr size_t kMostDigits = 19;   // 10^19 fits 64 bits
  constexpr size_t kMostDecimals = 6;  // 10^6 times the largest unit does, too
  size_t at = 0;
  uint64_t number = 0;
  while (at < text.size() && is_digit(text[at])) {
    if (at == kMostDigits) return std::nullopt;
    number = number * 10 + static_cast<uint64_t>(text[at++] - '0');
  }
  if (at == 0) return std::nullopt;
  uint64_t decimals = 0;
  uint64_t scale = 1;
  if (at < text.size() && text[at] == '.') {
    const size_t first = ++at;
    while (at < text.size() && is_digit(text[at])) {
      if (at - first == kMostDecimals) return std::nullopt;
      decimals = decimals * 10 + static_cast<uint64_t>(text[at++] - '0');
      scale *= 10;
    }
    if (at == first) return std::nullopt;
  }
  if (at < text.size() && text[at] == ' ') ++at;
  const auto unit = unit_bytes(text.substr(at));
  if (!unit || (scale > 1 && *unit == 1) || number > kMaxSize / *unit) return std::nullopt;
  const uint64_t whole = number * *unit;
  const uint64_t part = decimals * *unit / scale;
  if (part > kMaxSize - whole || whole + part == 0) return std::nullopt;
  return whole + part;
}

Result<uint64_t> size_of(std::string_view key, const Json& value) {
  if (value.is_number_unsigned()) {
    const auto bytes = value.get<uint64_t>();
    if (bytes > 0 && bytes <= kMaxSize) return bytes;
  } else if (value.is_string()) {
    if (const auto bytes = size_from_text(value.get_ref<const std::string&>())) return *bytes;
  }
  return refuse(key, value, kSizeAllowed);
}

Result<uint32_t> count_of(std::string_view key, const Json& value, uint32_t least, uint32_t most) {
  if (value.is_number_unsigned()) {
    const auto count = value.get<uint64_t>();
    if (count >= least && count <= most) return static_cast<uint32_t>(count);
  }
  return refuse(key, value, fmt::format("a whole number from {} to {}", least, most));
}

Result<bool> flag_of(std::string_view key, const Json& value) {
  if (value.is_boolean()) return value.get<bool>();
  if (value == "true") return true;
  if (value == "false") return false;
  return refuse(key, value, "true or false");
}

template <typename E, size_t N>
Result<E> choice_of(std::string_view key, const Json& value,
                    const std::array<std::pair<std::string_view, E>, N>& names) {
  std::string allowed;
  for (const auto& [text, choice] : names) {
    if (value.is_string() && value.get_ref<const std::string&>() == text) return choice;
    allowed += fmt::format("{}\"{}\"", allowed.empty() ? "" : ", ", text);
  }
  return refuse(key, value, "one of " + allowed);
}

template <typename E, size_t N>
std::string_view name_of(E choice, const std::array<std::pair<std::string_view, E>, N>& names) {
  for (const auto& [text, value] : names) {
    if (value == choice) return text;
  }
  return "auto";
}

Result<std::string> path_of(std::string_view key, const Json& value) {
  constexpr std::string_view kAllowed =
      "an absolute path of a directory such as \"/var/lib/depot\" (no \"~\", no URL, no \"..\", no control "
      "characters)";
  if (!value.is_string()) return refuse(key, value, kAllowed);
  const auto& text = value.get_ref<const std::string&>();
  if (text.empty() || text[0] != '/') return refuse(key, value, kAllowed);
  if (std::ranges::any_of(text, [](unsigned char c) { return c < 0x20 || c == 0x7f; })) {
    return refuse(key, value, kAllowed);
  }
  std::string path;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('/', at), text.size());
    const std::string_view part = std::string_view(text).substr(at, end - at);
    at = end + 1;
    if (part.empty() || part == ".") continue;
    if (part == "..") return refuse(key, value, kAllowed);
    if (part.size() > NAME_MAX) {
      return refuse(key, value,
                    fmt::format("a path whose every part has at most {} bytes (NAME_MAX)", NAME_MAX));
    }
    path += '/';
    path += part;
  }
  if (path.empty()) return refuse(key, value, kAllowed);
  if (path.size() > kMaxRootPathBytes) {
    return refuse(
        key, value,
        fmt::format(
            "a path of at most {} bytes, which is PATH_MAX less what the depot appends (this one has {})",
            kMaxRootPathBytes, path.size()));
  }
  return path;
}

// "/path?key=value&key=value" as the object that says the same. Nothing is percent-decoded: a path that has a
// question mark in it is written as an object.
Result<Json> root_object(std::string_view key, const Json& value) {
  const auto& text = value.get_ref<const std::string&>();
  Json object = Json::object();
  const size_t mark = text.find('?');
  object["path"] = text.substr(0, mark);
  if (mark == std::string::npos) return object;
  std::string_view rest = std::string_view(text).substr(mark + 1);
  while (true) {
    const size_t end = std::min(rest.find('&'), rest.size());
    const std::string_view pair = rest.substr(0, end);
    const size_t equals = pair.find('=');
    if (equals == 0 || equals == std::string_view::npos) {
      return refuse(key, value,
                    "\"/path?key=value&key=value\" with the keys capacity, segment, transport, io, "
                    "read_only, require_gds, write_through, demotion_lag, reads_at_once");
    }
    const std::string name(pair.substr(0, equals));
    if (object.contains(name))
      return refuse(key, value, fmt::format("each key once, and {} comes twice", name));
    object[name] = std::string(pair.substr(equals + 1));
    if (end == rest.size()) return object;
    rest.remove_prefix(end + 1);
  }
}

Result<RootOptions> root_of(const std::string& key, const Json& value) {
  Json object = value;
  if (value.is_string()) {
    auto parsed = root_object(key, value);
    if (!parsed) return std::unexpected(parsed.error());
    object = std::move(*parsed);
  }
  if (!object.is_object()) {
    return refuse(key, value,
                  "a string such as \"/var/lib/depot?capacity=100GiB\" or an object with the same keys");
  }
  if (auto known = check_keys(object, kRootKeys, key + "."); !known) return std::unexpected(known.error());
  for (const char* required : {"path", "capacity"}) {
    if (object.contains(required)) continue;
    return refuse(key, value, fmt::format("a root with the key {}, which is missing", required));
  }

  RootOptions root;
  auto path = path_of(key + ".path", object["path"]);
  if (!path) return std::unexpected(path.error());
  root.path = std::move(*path);
  auto capacity = size_of(key + ".capacity", object["capacity"]);
  if (!capacity) return std::unexpected(capacity.error());
  root.capacity_bytes = *capacity;
  if (object.contains("segment") && object["segment"] != "auto") {
    const std::string name = key + ".segment";
    auto segment = size_of(name, object["segment"]);
    if (!segment) return std::unexpected(segment.error());
    if (*segment % kPageBytes != 0 || *segment > root.capacity_bytes) {
      return refuse(name, object["segment"],
                    fmt::format("\"auto\" or a multiple of 4KiB that is at most the capacity ({} bytes)",
                                root.capacity_bytes));
    }
    root.segment_bytes = *segment;
  }
  if (object.contains("transport")) {
    auto transport = choice_of(key + ".transport", object["transport"], kTransports);
    if (!transport) return std::unexpected(transport.error());
    root.transport = *transport;
  }
  if (object.contains("io")) {
    auto io = choice_of(key + ".io", object["io"], kIoChoices);
    if (!io) return std::unexpected(io.error());
    root.io = *io;
  }
  if (object.contains("read_only")) {
    auto read_only = flag_of(key + ".read_only", object["read_only"]);
    if (!read_only) return std::unexpected(read_only.error());
    root.read_only = *read_only;
  }
  if (object.contains("require_gds")) {
    const std::string name = key + ".require_gds";
    auto require_gds = flag_of(name, object["require_gds"]);
    if (!require_gds) return std::unexpected(require_gds.error());
    if (*require_gds && root.transport != TransportChoice::gds)
      return refuse(name, object["require_gds"], "true only together with \"transport\": \"gds\"");
    root.require_gds = *require_gds;
  }
  if (object.contains("write_through")) {
    auto write_through = flag_of(key + ".write_through", object["write_through"]);
    if (!write_through) return std::unexpected(write_through.error());
    root.write_through = *write_through;
  }
  if (object.contains("demotion_lag") && object["demotion_lag"] != "auto") {
    const std::string name = key + ".demotion_lag";
    auto lag = size_of(name, object["demotion_lag"]);
    if (!lag) return std::unexpected(lag.error());
    // Two segments are never copied yet: the one that is filled, and the one that is ready.
    const uint64_t least = 3 * std::max<uint64_t>(root.segment_bytes, kLeastSegmentBytes);
    if (*lag < least || *lag > root.capacity_bytes) {
      return refuse(
          name, object["demotion_lag"],
          fmt::format("\"auto\" or a size from three segments (at least {} bytes) to the capacity ({} "
                      "bytes)",
                      least, root.capacity_bytes));
    }
    root.demotion_lag_bytes = *lag;
  }
  if (object.contains("reads_at_once") && object["reads_at_once"] != "auto") {
    const std::string name = key + ".reads_at_once";
    auto bytes = size_of(name, object["reads_at_once"]);
    if (!bytes) return std::unexpected(bytes.error());
    if (*bytes < kLeastReadsAtOnceBytes || *bytes > kMostReadsAtOnceBytes)
      return refuse(name, object["reads_at_once"], "\"auto\" or a size from 1MiB to 64GiB");
    root.reads_at_once_bytes = *bytes;
  }
  return root;
}

/// What a root says about the next one needs a next one.
Status check_demotion(const std::vector<RootOptions>& roots, const Json& values) {
  const auto writable = [](const RootOptions& root) { return !root.read_only; };
  const auto first = std::ranges::find_if(roots, writable);
  const bool has_next = first != roots.end() && std::find_if(first + 1, roots.end(), writable) != roots.end();
  for (size_t i = 0; i < roots.size(); ++i) {
    const bool may = has_next && &roots[i] == &*first;
    if (may || (!roots[i].write_through && roots[i].demotion_lag_bytes == 0)) continue;
    const char* const what = roots[i].write_through ? "write_through" : "demotion_lag";
    const Json shown_value = values[i].is_object() ? values[i].value(what, Json()) : values[i];
    return refuse(fmt::format("roots[{}].{}", i, what), shown_value,
                  "that key only on the first root that is not read_only, with another such root after it");
  }
  return {};
}

Result<std::vector<RootOptions>> roots_of(const Json& value) {
  if (!value.is_array() || value.empty() || value.size() > kMaxRoots) {
    return refuse("roots", value, fmt::format("a list of 1 to {} roots", kMaxRoots));
  }
  std::vector<RootOptions> roots;
  for (size_t i = 0; i < value.size(); ++i) {
    const std::string key = fmt::format("roots[{}]", i);
    auto root = root_of(key, value[i]);
    if (!root) return std::unexpected(root.error());
    for (size_t j = 0; j < roots.size(); ++j) {
      const std::string& other = roots[j].path;
      if (root->path == other) {
        return refuse(key + ".path", root->path, fmt::format("a directory that is not also roots[{}]", j));
      }
      if (root->path.starts_with(other + "/") || other.starts_with(root->path + "/")) {
        return refuse(
            key + ".path", root->path,
            fmt::format("a directory that neither lies in roots[{}] ({}) nor holds it", j, shown(other)));
      }
    }
    roots.push_back(std::move(*root));
  }
  if (auto possible = check_demotion(roots, value); !possible) return std::unexpected(possible.error());
  return roots;
}

// nlohmann keeps the last of two equal keys without a word; a config that says two things is refused instead.
Result<Json> parse_json(std::string_view text) {
  std::vector<std::set<std::string>> open_objects;
  std::string twice;
  const auto watch = [&](int, Json::parse_event_t event, Json& parsed) {
    if (event == Json::parse_event_t::object_start) open_objects.emplace_back();
    if (event == Json::parse_event_t::object_end) open_objects.pop_back();
    if (event == Json::parse_event_t::key && !open_objects.back().insert(parsed.get<std::string>()).second) {
      twice = parsed.get<std::string>();
    }
    return true;
  };
  try {
    Json value = Json::parse(text, watch);
    if (!twice.empty()) {
      return fail(ErrorKind::invalid_argument, "config key {} comes twice in one object; allowed is once",
                  shown(twice));
    }
    return value;
  } catch (const Json::parse_error& error) {
    return fail(ErrorKind::invalid_argument,
                "config is not valid JSON at byte {}; allowed is one JSON object", error.byte);
  } catch (const Json::exception&) {  // a number that no double can hold
    return fail(ErrorKind::invalid_argument, "config has a number out of range; allowed is one JSON object");
  }
}

}  // namespace

Status check_ranges(const Options& options) {
  if (options.roots.empty() || options.roots.size() > kMaxRoots) {
    return fail(ErrorKind::invalid_argument, "roots has {} entries; expected 1 to {}", options.roots.size(),
                kMaxRoots);
  }
  if (options.device_threads < 1 || options.device_threads > 64) {
    return fail(ErrorKind::invalid_argument, "device_threads={} is out of range; expected 1 to 64",
                options.device_threads);
  }
  if (options.io_depth < 1 || options.io_depth > 128) {
    return fail(ErrorKind::invalid_argument, "io_depth={} is out of range; expected 1 to 128",
                options.io_depth);
  }
  if (options.poll_ms < 1)
    return fail(ErrorKind::invalid_argument, "poll_ms={} is out of range; expected 1 or more",
                options.poll_ms);
  return {};
}

Result<uint64_t> parse_size(std::string_view text) {
  if (const auto bytes = size_from_text(text)) return *bytes;
  return fail(ErrorKind::invalid_argument, "the size {} is not understood; allowed is {}", shown(Json(text)),
              kSizeAllowed);
}

Result<Options> parse_options(std::string_view json) {
  if (json.size() > kMaxConfigBytes) {
    return fail(ErrorKind::invalid_argument, "config has {} bytes; allowed are at most {}", json.size(),
                kMaxConfigBytes);
  }
  const auto parsed = parse_json(json);
  if (!parsed) return std::unexpected(parsed.error());
  const Json& config = *parsed;
  if (!config.is_object()) {
    return fail(
        ErrorKind::invalid_argument,
        "config is {}; allowed is a JSON object such as {{\"roots\":[\"/dev/shm/depot?capacity=8GiB\"]}}",
        shown(config));
  }
  if (auto known = check_keys(config, kTopKeys, ""); !known) return std::unexpected(known.error());
  if (!config.contains("roots")) {
    return fail(ErrorKind::invalid_argument,
                "config key roots is missing; required is a list such as [\"/dev/shm/depot?capacity=8GiB\"]");
  }

  Options options;
  auto roots = roots_of(config["roots"]);
  if (!roots) return std::unexpected(roots.error());
  options.roots = std::move(*roots);

  if (config.contains("device")) {
    const Json& device = config["device"];
    if (!device.is_string() || !parse_device(device.get_ref<const std::string&>()))
      return refuse("device", device, kDeviceAllowed);
    options.device = device.get<std::string>();
    if (options.device != "host") options.device_threads = kCudaDeviceThreads;
  }
  const std::array<std::pair<const char*, uint64_t*>, 5> sizes{
      {{"slab", &options.slab_bytes},
       {"device_slab", &options.device_slab_bytes},
       {"store_queue", &options.store_queue_bytes},
       {"free_space_reserve", &options.free_space_reserve},
       {"scrub_rate", &options.scrub_bytes_per_second}}};
  for (const auto& [key, into] : sizes) {
    if (!config.contains(key)) continue;
    const bool may_be_none = into == &options.free_space_reserve || into == &options.scrub_bytes_per_second;
    if (may_be_none && config[key] == 0) {
      *into = 0;
      continue;
    }
    const auto bytes = size_of(key, config[key]);
    if (!bytes) return std::unexpected(bytes.error());
    *into = *bytes;
  }
  struct Count {
    const char* key;
    uint32_t most;
    uint32_t* into;
    uint32_t least = 1;
  };
  for (const Count& count :
       {Count{"device_threads", 64, &options.device_threads}, Count{"io_depth", 128, &options.io_depth},
        Count{"poll_ms", 60'000, &options.poll_ms},
        Count{"rewrite_percent", kMostRewritePercent, &options.rewrite_percent, 0},
        Count{"eviction_grace_ms", kMostGraceMs, &options.eviction_grace_ms, 0},
        Count{"open_wait_ms", kMostOpenWaitMs, &options.open_wait_ms, 0}}) {
    if (!config.contains(count.key)) continue;
    const auto number = count_of(count.key, config[count.key], count.least, count.most);
    if (!number) return std::unexpected(number.error());
    *count.into = *number;
  }
  return options;
}

std::string to_json(const Options& options) {
  Json roots = Json::array();
  for (const RootOptions& root : options.roots) {
    roots.push_back(
        {{"path", root.path},
         {"capacity", root.capacity_bytes},
         {"segment", root.segment_bytes == 0 ? Json("auto") : Json(root.segment_bytes)},
         {"transport", name_of(root.transport, kTransports)},
         {"io", name_of(root.io, kIoChoices)},
         {"read_only", root.read_only},
         {"require_gds", root.require_gds},
         {"write_through", root.write_through},
         {"demotion_lag", root.demotion_lag_bytes == 0 ? Json("auto") : Json(root.demotion_lag_bytes)},
         {"reads_at_once", root.reads_at_once_bytes == 0 ? Json("auto") : Json(root.reads_at_once_bytes)}});
  }
  const Json config{{"roots", roots},
                    {"device", options.device},
                    {"device_slab", options.device_slab_bytes},
                    {"slab", options.slab_bytes},
                    {"device_threads", options.device_threads},
                    {"io_depth", options.io_depth},
                    {"store_queue", options.store_queue_bytes},
                    {"free_space_reserve", options.free_space_reserve},
                    {"poll_ms", options.poll_ms},
                    {"rewrite_percent", options.rewrite_percent},
                    {"scrub_rate", options.scrub_bytes_per_second},

                    {"eviction_grace_ms", options.eviction_grace_ms},
                    {"open_wait_ms", options.open_wait_ms}};
  return config.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace tokendepot
