#include "store/segment_files.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "store/journal_file.h"

namespace tokendepot {

SegmentLease::SegmentLease(SegmentLease&& other) noexcept
    : owner_(std::exchange(other.owner_, nullptr)), file_(std::exchange(other.file_, nullptr)) {}

SegmentLease& SegmentLease::operator=(SegmentLease&& other) noexcept {
  std::swap(owner_, other.owner_);
  std::swap(file_, other.file_);
  return *this;
}

SegmentLease::~SegmentLease() {
  if (owner_ != nullptr) owner_->release(file_);
}

SegmentFiles::SegmentFiles(std::string directory, bool mapped, bool direct, size_t max_open, Device* device,
                           bool map_writable, GdsLane* gds)
    : directory_(std::move(directory)),
      mapped_(mapped),
      direct_(direct),
      max_open_(max_open),
      device_(device),
      map_writable_(mapped && map_writable),
      gds_(gds) {}

std::string SegmentFiles::path_of(const SegmentId& id) const {
  return directory_ + "/" + segment_name(id);
}

Result<SegmentLease> SegmentFiles::open(const SegmentId& id, uint64_t heat) {
  {
    std::lock_guard lock(mutex_);
    if (const auto found = files_.find(id); found != files_.end()) {
      ++found->second->leases;
      found->second->last_lease = ++lease_clock_;
      return SegmentLease(this, found->second.get());
    }
  }
  auto opened = File::open(path_of(id), {.write = map_writable_, .direct = direct_});
  const bool writable = map_writable_ && opened;
  if (!opened && map_writable_ && opened.error().kind == ErrorKind::permission)
    opened = File::open(path_of(id), {});
  // Where nothing was there to be tried when the root was opened.
  if (!opened && direct_ && opened.error().kind == ErrorKind::unsupported) {
    if (!told_fall_back_.exchange(true))
      log(LogLevel::warning, "{}: O_DIRECT refused ({}); using the page cache", directory_,
          opened.error().message);
    opened = File::open(path_of(id), {});
  }
  if (!opened) return std::unexpected(opened.error());
  auto segment = std::make_unique<SegmentFile>();
  segment->id = id;
  segment->file = std::move(*opened);
  return insert(std::move(segment), writable, heat);
}

bool SegmentFiles::map_ahead(const SegmentId& id, uint64_t heat) {
  {
    std::lock_guard lock(mutex_);
    if (files_.contains(id)) return true;
    if (files_.size() >= max_open_) return false;
  }
  auto opened = open(id, heat);
  if (!opened) return true;  // gone meanwhile, or not readable: a load that wants it will say so
  std::lock_guard lock(mutex_);
  opened->file_->last_lease = 0;  // the first to be closed again
  return true;
}

SegmentMapping SegmentFiles::take_mapping(const SegmentId& id) {
  std::lock_guard lock(mutex_);
  const auto found = files_.find(id);
  if (found == files_.end() || found->second->leases > 0 || !found->second->mapping.writable()) return {};
  SegmentMapping mapping = std::move(found->second->mapping);
  files_.erase(found);
  return mapping;
}

Result<SegmentLease> SegmentFiles::adopt(const SegmentId& id, File file, SegmentMapping mapping) {
  auto segment = std::make_unique<SegmentFile>();
  segment->id = id;
  segment->file = std::move(file);
  segment->writable = true;
  segment->mapping = std::move(mapping);
  return insert(std::move(segment), true, SegmentMapping::kHottest);
}

Result<SegmentLease> SegmentFiles::insert(std::unique_ptr<SegmentFile> segment, bool map_writable,
                                          uint64_t heat) {
  const auto size = segment->file.size();
  if (!size) return std::unexpected(size.error());
  segment->bytes = *size;
  segment->direct = segment->file.is_direct();
  if (mapped_ && *size > 0 && segment->mapping.size() != *size) {
    auto mapping = Mapping::map(segment->file, *size, map_writable);
    if (!mapping) return std::unexpected(mapping.error());
    segment->mapping = SegmentMapping(std::move(*mapping), map_writable, device_, heat);
  }
  if (gds_ != nullptr) segment->gds = gds_->add(segment->file);
  std::lock_guard lock(mutex_);
  if (segment->writable) drop_locked(segment->id);
  close_idle(max_open_ > 0 ? max_open_ - 1 : 0);
  const auto [place, fresh] = files_.try_emplace(segment->id);
  if (fresh) place->second = std::move(segment);  // else another thread was faster; its copy serves both
  ++place->second->leases;
  place->second->last_lease = ++lease_clock_;
  return SegmentLease(this, place->second.get());
}

void SegmentFiles::close_idle(size_t keep) {
  while (files_.size() > keep) {
    auto victim = files_.end();
    for (auto at = files_.begin(); at != files_.end(); ++at) {
      if (at->second->leases == 0 &&
          (victim == files_.end() || at->second->last_lease < victim->second->last_lease)) {
        victim = at;
      }
    }
    if (victim == files_.end()) return;  // all in use: the bound gives way rather than the load
    files_.erase(victim);
  }
}

SegmentLease SegmentFiles::share(const SegmentLease& lease) {
  std::lock_guard lock(mutex_);
  ++lease.file_->leases;
  return SegmentLease(this, lease.file_);
}

void SegmentFiles::drop(const SegmentId& id) {
  std::lock_guard lock(mutex_);
  drop_locked(id);
}

void SegmentFiles::drop_locked(const SegmentId& id) {
  const auto found = files_.find(id);
  if (found == files_.end()) return;
  if (found->second->leases > 0) {
    found->second->doomed = true;
    doomed_.push_back(std::move(found->second));
  }
  files_.erase(found);
}

uint64_t SegmentFiles::mapped_bytes() const {
  std::lock_guard lock(mutex_);
  uint64_t bytes = 0;
  for (const auto& [id, file] : files_) bytes += file->mapping.size();
  for (const auto& file : doomed_) bytes += file->mapping.size();
  return bytes;
}

void SegmentFiles::release(SegmentFile* file) {
  std::lock_guard lock(mutex_);
  TD_CHECK(file->leases > 0);
  if (--file->leases == 0 && file->doomed) {
    std::erase_if(doomed_, [file](const auto& entry) { return entry.get() == file; });
  }
}

}  // namespace tokendepot
