#include "device/gds/gds_lane.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/clock.h"
#include "base/errors.h"
#include "base/log.h"
#include "io/aligned_memory.h"
#include "io/scratch_file.h"

namespace tokendepot {
namespace {

constexpr uint64_t kStepBytes = 1ull << 20;

/// A file with a name, which cuFile may look at; gone at the end, and after a crash the keeper removes it.
class ProbeFile {
 public:
  static Result<ProbeFile> create(const std::string& directory) {
    auto file = File::open(temporary_path(directory),
                           {.write = true, .create = true, .exclusive = true, .direct = true});
    if (!file) return std::unexpected(file.error());
    static_cast<void>(
        file->try_lock_exclusive());  // else another process's keeper may take it for a leftover
    return ProbeFile(std::move(*file));
  }
  ProbeFile(ProbeFile&& other) noexcept = default;
  ProbeFile& operator=(ProbeFile&&) = delete;
  ~ProbeFile() {
    if (file_.is_open()) static_cast<void>(remove_file(file_.path()));
  }
  const File& file() const { return file_; }

 private:
  explicit ProbeFile(File file) : file_(std::move(file)) {}
  File file_;
};

struct SlabRange {
  SlabRange(Slab& from, uint64_t bytes) : slab(from), memory(from.allocate(bytes)) {}
  SlabRange(const SlabRange&) = delete;
  SlabRange& operator=(const SlabRange&) = delete;
  ~SlabRange() {
    if (memory != nullptr) slab.release(memory);
  }
  Slab& slab;
  std::byte* const memory;
};

}  // namespace

Result<std::unique_ptr<GdsLane>> GdsLane::make(CuFile& cufile, uint32_t io_depth, std::string root_path) {
  auto engine = make_thread_engine(io_depth, cufile.mover());
  if (!engine) return std::unexpected(engine.error());
  return std::unique_ptr<GdsLane>(new GdsLane(cufile, std::move(*engine), std::move(root_path)));
}

Result<GdsLane::Rates> GdsLane::probe(const std::string& directory, IoEngine& ordinary, uint64_t bytes) {
  const auto probe = ProbeFile::create(directory);
  if (!probe) return std::unexpected(probe.error());
  const File& file = probe->file();
  const auto host_memory = aligned_memory(kPageBytes, kStepBytes + bytes, "a probe of cuFile");
  if (!host_memory) return std::unexpected(host_memory.error());
  std::byte* const sent = host_memory->get();
  std::byte* const received = sent + kStepBytes;
  // Not zeros: a file system that compresses or skips them would be measured at something else.
  uint64_t state = 1;
  for (uint64_t at = 0; at < kStepBytes; at += sizeof state) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    std::memcpy(sent + at, &state, sizeof state);
  }
  for (uint64_t at = 0; at < bytes; at += kStepBytes) {
    if (auto written = file.write_at({sent, kStepBytes}, at); !written)
      return std::unexpected(written.error());
  }
  const auto handle = cufile_.add(file);
  if (!handle) return std::unexpected(handle.error());
  const SlabRange range(cufile_.slab(), bytes);
  if (range.memory == nullptr)
    return fail(ErrorKind::no_space,
                "device_slab is too small for cuFile: half of it holds {} bytes, expected {}",
                cufile_.slab().size(), bytes);

  IoOperation pattern{.fd = file.fd(), .handle = handle->get()};
  int error = move_and_wait(*engine_, pattern, range.memory, 0, kStepBytes);
  pattern.write = true;
  if (error == 0) error = move_and_wait(*engine_, pattern, range.memory, bytes, kStepBytes);
  if (error != 0) return fail_errno(error, "cuFile failed a transfer in {}", directory);
  if (auto read = file.read_at({received, kStepBytes}, bytes); !read) return std::unexpected(read.error());
  if (std::memcmp(sent, received, kStepBytes) != 0)
    return fail(ErrorKind::io, "cuFile brought back other bytes than were written in {}", directory);

  pattern.write = false;
  const auto rate = [&](IoEngine& engine, std::byte* memory) -> double {
    const uint64_t before = system_clock().steady_ns();
    if (move_and_wait(engine, pattern, memory, 0, bytes) != 0) return 0;
    const uint64_t took = std::max<uint64_t>(system_clock().steady_ns() - before, 1);
    return static_cast<double>(bytes) / static_cast<double>(took);
  };
  Rates rates;
  rates.ordinary = rate(ordinary, received);
  rates.cufile = rate(*engine_, range.memory);
  return rates;
}

Status GdsLane::check_files(const std::string& directory) const {
  const auto entries = list_directory(directory);
  if (!entries) return std::unexpected(entries.error());
  const auto found = std::ranges::find_if(*entries, [](const auto& entry) { return entry.regular; });
  if (found == entries->end()) return {};
  const auto file = File::open(directory + "/" + found->name, {.direct = true});
  if (!file) return std::unexpected(file.error());
  const auto handle = cufile_.add(*file);
  if (!handle) return std::unexpected(handle.error());
  return {};
}

CuFileHandle GdsLane::add(const File& file) {
  if (!in_use()) return {};
  auto handle = cufile_.add(file);
  if (handle) return std::move(*handle);
  note_error(handle.error().message);
  return {};
}

void GdsLane::note_error(const std::string& what) {
  const uint64_t errors = errors_.fetch_add(1, std::memory_order_relaxed) + 1;
  if (errors == 1)
    log(LogLevel::warning, "root \"{}\": cuFile failed, counted as gds_errors: {}", root_path_, what);
  if (errors != kMostErrors) return;
  log(LogLevel::warning, "root \"{}\": {} errors of cuFile, the last one: {}; going on without it",
      root_path_, errors, what);
}

}  // namespace tokendepot
