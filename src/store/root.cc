#include "store/root.h"

#include <openssl/rand.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <ranges>

#include "base/clock.h"
#include "base/errors.h"
#include "base/log.h"
#include "store/journal_file.h"

namespace tokendepot {
namespace {

constexpr uint64_t kMiB = 1ull << 20;
constexpr uint64_t kLargestSegment = 256 * kMiB;
constexpr uint64_t kSmallestSegment = 1 * kMiB;
// Of what a control group may use, for its files in memory; the rest is for the engine itself.
constexpr uint64_t kMemoryShare = 3;
constexpr uint64_t kMemoryShareOf = 4;
constexpr uint64_t kLeastReadAhead = 4 * kMiB;
constexpr uint64_t kGdsCheckBytes = 1 * kMiB;
constexpr uint64_t kGdsMeasureBytes = 32 * kMiB;
// Transfers past the host spare its memory and one copy: a rate that is nearly the same is a win.
constexpr double kGdsWorthwhile = 0.9;
// An eviction forgets a whole segment: fewer cost hits (docs/benchmarks.md, "Real traces").
constexpr uint64_t kSegmentsPerRoot = 256;

uint64_t default_segment_bytes(uint64_t capacity) {
  return std::clamp(capacity / kSegmentsPerRoot / kMiB * kMiB, kSmallestSegment, kLargestSegment);
}

// The rest of the process's files are the engine's, and those of other roots.
constexpr size_t kShareOfFiles = 8;

size_t files_kept_open() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return 64;
  return std::clamp<size_t>(limit.rlim_cur / kShareOfFiles, 4, 4096);
}

/// Where nothing can be written a segment that is there is asked; without any there is nothing to refuse.
Result<uint32_t> alignment_of_segments(const std::string& directory) {
  const uint32_t assumed = kPageBytes;
  const auto entries =
      list_directory(directory, [](const std::string&) { return std::optional<uint64_t>(0); });
  if (!entries) return assumed;
  for (const DirectoryEntry& entry : *entries) {
    if (!entry.regular || !segment_of_name(entry.name)) continue;
    const auto reads = probe_direct_reads(directory + "/" + entry.name);
    if (!reads && reads.error().kind == ErrorKind::unsupported) return std::unexpected(reads.error());
    if (reads || reads.error().kind != ErrorKind::not_found) return assumed;
  }
  return assumed;
}

bool writable_directory(const std::string& path) {
  return access(path.c_str(), W_OK | X_OK) == 0;
}

}  // namespace

std::string Root::id() const {
  std::string text;
  for (const uint8_t byte : marker_.root_id) text += fmt::format("{:02x}", byte);
  return text;
}

Status Root::open_marker() {
  const std::string file = path() + "/DEPOT";
  auto content = read_file(file, 1 << 16);
  if (!content && content.error().kind == ErrorKind::not_found) {
    const auto entries = list_directory(path());
    if (!entries) return std::unexpected(entries.error());
    // Another process may make the same depot at this moment; its marker comes before all else.
    content = read_file(file, 1 << 16);
    for (const DirectoryEntry& entry : *entries) {
      if (content || entry.name == "lost+found" || entry.name.starts_with(".tmp-")) continue;
      return fail(ErrorKind::invalid_argument,
                  "root \"{}\" holds something else (\"{}\") and no DEPOT marker; expected an empty "
                  "directory or a depot",
                  path(), entry.name);
    }
  }
  if (!content && content.error().kind == ErrorKind::not_found) {
    if (!writable_) {
      return fail(ErrorKind::permission,
                  "root \"{}\" is not a depot yet and cannot be written to make it one", path());
    }
    Marker fresh;
    fresh.created_ns = system_clock().wall_ns();
    if (RAND_bytes(fresh.root_id.data(), static_cast<int>(fresh.root_id.size())) != 1) {
      return fail(ErrorKind::io, "root \"{}\": no random bytes for a root id", path());
    }
    std::array<std::byte, kPageBytes> page;
    encode_marker(fresh, page);
    if (auto written = write_new_file_atomically(file, page); !written)
      return std::unexpected(written.error());
    content = read_file(file, 1 << 16);  // ours, or that of a process which was faster
  }
  if (!content) return std::unexpected(content.error());
  auto marker = decode_marker(*content);
  if (!marker) {
    return std::unexpected(
        Error{marker.error().kind, 0, fmt::format("root \"{}\": {}", path(), marker.error().message)});
  }
  marker_ = *marker;
  if (!writable_) return {};
  for (const std::string& directory : {segments_dir(), journals_dir(), manifests_dir()}) {
    if (auto made = make_directory(directory); !made) return made;
  }
  return {};
}

Status Root::choose_transport(const FileSystemInfo& system, uint32_t io_depth) {
  const bool want_mapped = options_.transport == TransportChoice::mapped ||
                           (options_.transport == TransportChoice::automatic && system.memory);
  if (want_mapped) {
    if (!system.memory) {
      return fail(ErrorKind::invalid_argument,
                  "root \"{}\": transport=mapped needs a memory file system (tmpfs), but this is {}", path(),
                  system.type);
    }
    mapped_ = true;
    transport_ = "mapped";
    reason_ = system.type + " is memory";
    return {};
  }
  if (options_.transport != TransportChoice::buffered) {
    auto alignment =
        writable_ ? probe_direct_alignment(segments_dir()) : alignment_of_segments(segments_dir());
    // Direct I/O was not refused, there is just no room to try it: a full disk still serves what it holds.
    if (!alignment && alignment.error().kind == ErrorKind::no_space)
      alignment = alignment_of_segments(segments_dir());
    const bool untried = !alignment && alignment.error().kind == ErrorKind::busy;
    if (alignment && *alignment <= kPageBytes) {
      direct_ = true;
    } else if (options_.transport == TransportChoice::direct || options_.transport == TransportChoice::gds) {
      return fail(untried ? ErrorKind::busy : ErrorKind::unsupported,
                  "root \"{}\": transport={} is not possible here: {}", path(),
                  options_.transport == TransportChoice::gds ? "gds" : "direct",
                  alignment ? fmt::format("alignment {} is larger than 4096", *alignment)
                            : alignment.error().message);
    } else {
      reason_ = alignment ? fmt::format("O_DIRECT needs alignment {}; ", *alignment)
                          : fmt::format("{} ({}); ", untried ? "O_DIRECT not tried" : "O_DIRECT refused",
                                        alignment.error().message);
      log(LogLevel::warning, "root \"{}\": {}using the page cache", path(), reason_);
    }
  }
  if (options_.io == IoChoice::uring) {
    auto engine = make_uring_engine(io_depth);
    if (!engine) {
      return fail(engine.error().kind, "root \"{}\": io=uring is not possible here: {}", path(),
                  engine.error().message);
    }
    engine_ = std::move(*engine);
    reason_ += "io=uring asked for";
  } else if (options_.io == IoChoice::threads || !writable_) {
    auto engine = make_thread_engine(io_depth);
    if (!engine) return fail(engine.error().kind, "root \"{}\": {}", path(), engine.error().message);
    engine_ = std::move(*engine);
    reason_ += writable_ ? "io=threads asked for" : "read-only";
  } else {
    const bool count_reads = direct_ && !network_ && options_.reads_at_once_bytes == 0;
    auto choice = choose_engine(segments_dir(), direct_, io_depth, count_reads);
    if (!choice) return fail(choice.error().kind, "root \"{}\": {}", path(), choice.error().message);
    engine_ = std::move(choice->engine);
    // And half as many, so that the medium never waits for the next.
    if (const uint64_t enough = choice->enough_bytes; enough > 0)
      most_read_bytes_ = enough + std::max(kLeastReadAhead, enough / 2);
    reason_ += choice->reason;
    read_bytes_per_second_ = choice->read_bytes_per_second;
  }
  if (options_.reads_at_once_bytes > 0) most_read_bytes_ = options_.reads_at_once_bytes;
  transport_ = fmt::format("{}-{}", direct_ ? "direct" : "buffered", engine_->name());
  return {};
}

Status Root::choose_gds(CuFile* cufile, uint32_t io_depth) {
  const bool asked = options_.transport == TransportChoice::gds;
  const bool possible = asked || (options_.transport == TransportChoice::automatic && direct_ && writable_);
  if (cufile == nullptr || !possible || (!asked && !cufile->p2p())) return {};
  if (options_.require_gds && !cufile->p2p()) {
    return fail(ErrorKind::unsupported, "root \"{}\": require_gds=true, but there is only {}", path(),
                cufile->summary());
  }
  auto lane = GdsLane::make(*cufile, io_depth, path());
  GdsLane::Rates rates;
  Status works;
  if (!lane) {
    works = std::unexpected(lane.error());
  } else if (writable_) {
    const auto probed = (*lane)->probe(segments_dir(), *engine_, asked ? kGdsCheckBytes : kGdsMeasureBytes);
    if (probed) {
      rates = *probed;
    } else {
      works = std::unexpected(probed.error());
    }
  } else {
    works = (*lane)->check_files(segments_dir());
  }
  if (!works) {
    if (options_.require_gds) {
      const bool busy = works.error().kind == ErrorKind::busy;
      return fail(busy ? ErrorKind::busy : ErrorKind::unsupported, "root \"{}\": require_gds=true, but {}",
                  path(), works.error().message);
    }
    log(asked ? LogLevel::warning : LogLevel::info, "root \"{}\": going on without cuFile: {}", path(),
        works.error().message);
    reason_ += "; no cuFile: " + works.error().message;
    return {};
  }
  const std::string measured =
      fmt::format("; cuFile {:.1f} GB/s, {} {:.1f} GB/s", rates.cufile, transport_, rates.ordinary);
  if (!asked && rates.cufile < kGdsWorthwhile * rates.ordinary) {
    reason_ += measured;
    return {};
  }
  gds_ = std::move(*lane);
  without_gds_ = std::move(transport_);
  transport_ = cufile->p2p() ? "gds-p2p" : "gds-compat";
  reason_ = fmt::format("{}{}; headers {}", cufile->summary(), asked ? "" : measured, reason_);
  return {};
}

void Root::cap_to(const MemoryLimit& limit, const std::string& file_system) {
  const uint64_t allowed = limit.bytes / kMemoryShareOf * kMemoryShare;
  if (options_.capacity_bytes <= allowed) return;
  log(LogLevel::warning,
      "root \"{}\": capacity={} is more than {}/{} of the {} bytes of memory that {} allows this process, "
      "and "
      "files on {} are memory: using capacity={}; lower the capacity, or raise that limit",
      path(), options_.capacity_bytes, kMemoryShare, kMemoryShareOf, limit.bytes, limit.file, file_system,
      allowed);
  options_.capacity_bytes = allowed;
}

Result<std::unique_ptr<Root>> Root::open(const RootOptions& options, RootIndex index, const Options& depot,
                                         Device* device, CuFile* cufile) {
  std::unique_ptr<Root> root(new Root);
  root->options_ = options;
  root->index_ = index;
  if (options.path.size() > kMaxRootPathBytes) {
    return fail(
        ErrorKind::invalid_argument,
        "root \"{}...\" has a path of {} bytes; expected at most {}, which is PATH_MAX less what the depot "
        "appends",
        options.path.substr(0, 64), options.path.size(), kMaxRootPathBytes);
  }
  const bool make = !options.read_only && access(options.path.c_str(), F_OK) != 0;
  // What is to be made is judged where it will be, so that a refusal leaves no directory behind.
  const auto system = file_system_of(make ? parent_of(options.path) : options.path);
  if (!system) return std::unexpected(system.error());
  root->writable_ = !options.read_only && !system->read_only && (make || writable_directory(options.path));
  root->network_ = system->network;
  root->election_ = std::make_unique<KeeperElection>(options.path + "/keeper.lock", KeeperElection::kStuckMs,
                                                     root->network_);
  if (!options.read_only && !root->writable_) {
    log(LogLevel::warning, "root \"{}\" is not writable ({}): serving what it holds, storing nothing there",
        options.path, system->read_only ? "read-only file system" : "no permission");
  }
  if (options.capacity_bytes > system->total_bytes) {
    return fail(ErrorKind::invalid_argument,
                "root \"{}\": capacity={} is larger than its file system ({} bytes of {})", options.path,
                options.capacity_bytes, system->total_bytes, system->type);
  }
  if (root->writable_ && system->memory_limit) root->cap_to(*system->memory_limit, system->type);
  const uint64_t capacity = root->capacity();
  const uint64_t wanted =
      options.segment_bytes != 0 ? options.segment_bytes : default_segment_bytes(capacity);
  // Compared before anything is added or multiplied: no size may wrap around.
  if (root->writable_ && (wanted > capacity / 3 || align_up(wanted) > capacity / 3)) {
    return fail(
        ErrorKind::invalid_argument,
        "root \"{}\": capacity={}{} holds fewer than 3 segments of {} bytes; give room for 3 at least",
        options.path, capacity,
        capacity < options.capacity_bytes ? ", all that the memory limit allows," : "", wanted);
  }
  root->segment_bytes_ = align_up(wanted);
  root->base_segment_bytes_ = root->segment_bytes_;
  if (make) {
    if (auto made = make_directory(options.path); !made) return std::unexpected(made.error());
  }
  if (auto marked = root->open_marker(); !marked) return std::unexpected(marked.error());
  if (auto chosen = root->choose_transport(*system, depot.io_depth); !chosen)
    return std::unexpected(chosen.error());
  root->device_ = device;
  const bool map_writable = root->writable_ && root->device_registers();
  if (auto chosen = root->choose_gds(cufile, depot.io_depth); !chosen) return std::unexpected(chosen.error());
  root->files_ = std::make_unique<SegmentFiles>(root->segments_dir(), root->mapped_, root->direct_,
                                                files_kept_open(), device, map_writable, root->gds_.get());
  log(LogLevel::info, "root \"{}\": {} ({}), capacity {} MiB{}, segments of {} MiB{}", options.path,
      root->transport_, root->reason_, capacity / kMiB,
      root->mapped_ && root->device_registers() ? ", all of which may be page-locked for the device" : "",
      root->segment_bytes() / kMiB, root->writable_ ? "" : ", read-only");
  return root;
}

Status Root::fit_extent(uint64_t extent_bytes) {
  const uint64_t extent = align_up(extent_bytes);
  uint64_t least = largest_extent_bytes_;
  while (least < extent && !largest_extent_bytes_.compare_exchange_weak(least, extent)) {
  }
  uint64_t before = segment_bytes_;
  uint64_t wanted = std::max(before, extent);
  if (wanted > capacity() / 3) {
    return fail(ErrorKind::invalid_argument,
                "root \"{}\": capacity={} is too small for extents of {} bytes; give at least {} bytes",
                path(), capacity(), extent_bytes, wanted * 3);
  }
  if (options_.segment_bytes == 0) {
    const uint64_t whole = (base_segment_bytes_ + extent - 1) / extent * extent;
    if (whole <= capacity() / 3) wanted = std::max(wanted, whole);
  }
  while (before < wanted && !segment_bytes_.compare_exchange_weak(before, wanted)) {
  }
  return {};
}

bool Root::device_registers() const {
  return device_ != nullptr && device_->registers_mappings();
}

void Root::map_ahead(const SegmentTable& segments, const std::atomic<bool>& stop) {
  if (!mapped_ || !device_registers()) return;
  uint64_t bytes = 0;
  const auto coldest_first = segments.present_segments(index_);
  for (const auto& [slot, segment] : std::views::reverse(coldest_first)) {
    bytes += segment.roots[index_].file_bytes;
    if (stop || bytes > capacity()) return;
    if (!files_->map_ahead(segment.id, segment.last_used_ns)) {
      log(LogLevel::warning,
          "root \"{}\": {} of its {} segments are kept mapped for the device, loads from the others are "
          "slower: of `ulimit -n` a share of 1/{} is for segments; expected {} or more",
          path(), files_->most_open(), coldest_first.size(), kShareOfFiles,
          coldest_first.size() * kShareOfFiles);
      return;
    }
    // Recycled or removed while it was opened: nobody else would let go of the file.
    if (segments.condemned(slot, index_)) files_->drop(segment.id);
  }
}

Status Root::keep_manifest(const Manifest& manifest) {
  const std::string name = to_hex(manifest.digest.bytes) + ".json";
  const std::string file = manifests_dir() + "/" + name;
  const auto stored = read_file(file, kMaxManifestBytes);
  std::string damage;
  if (stored) {
    const std::string_view text(reinterpret_cast<const char*>(stored->data()), stored->size());
    const auto checked = check_manifest(text, manifest.digest);
    if (checked) return {};
    damage = checked.error().message;
  } else if (stored.error().kind != ErrorKind::not_found) {
    damage = stored.error().message;
  }
  const Status written = write_file_atomically(file, std::as_bytes(std::span(manifest.canonical)));
  if (!written || damage.empty()) return written;
  ++mended_manifests_;
  log(LogLevel::warning, "root \"{}\": manifest {} was damaged and is written anew: {}", path(), name,
      damage);
  return {};
}

}  // namespace tokendepot
