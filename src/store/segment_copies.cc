// Copies of other roots' segments: made whole by demotion, or extent by extent as stores pass through.
#include <set>

#include "base/errors.h"
#include "base/log.h"
#include "store/copy_run.h"
#include "store/root_writer.h"
#include "store/scan.h"

namespace tokendepot {

Result<File> RootWriter::open_copy(const SegmentId& id, uint64_t bytes,
                                   const BeforeEviction& before_eviction) {
  const SegmentFileName name{id, true};
  const std::string path = inventory_.path_of(name);
  auto keeper = lock_keeper();
  if (!keeper) return std::unexpected(keeper.error());
  if (auto wanted = is_not_there(id); !wanted) return std::unexpected(wanted.error());
  if (const auto other = File::open(path, {.write = true})) {
    const auto idle = other->try_lock_exclusive();
    if (!idle) return std::unexpected(idle.error());
    if (!*idle) return fail(ErrorKind::busy, "{}: being copied by another process", path);
    if (auto removed = remove_file(path); !removed) return std::unexpected(removed.error());
    inventory_.has_gone(*keeper, name);
  }
  auto file = make_file(*keeper, name, bytes, before_eviction);
  if (!file) return file;
  // While the keeper's lock is held: nobody may take an unlocked copy for a leftover.
  const auto locked = file->try_lock_exclusive();
  if (!locked) return std::unexpected(locked.error());
  if (!*locked) return fail(ErrorKind::busy, "{}: in use by another process", path);
  return file;
}

Status RootWriter::publish_copy(const SegmentId& id, const File& copy, uint64_t used_bytes) {
  const auto size = copy.size();
  if (!size) return std::unexpected(size.error());
  std::vector<Record> records(1);
  records[0].type = RecordType::adopt_segment;
  records[0].where = {id, 0, *size};
  const auto end = scan_extents(copy, id, 0, false, [&](const ExtentHeader& header, uint64_t bytes) {
    records.push_back(put_of(header, bytes));
  });
  if (!end) return std::unexpected(end.error());
  Record& seal = records.emplace_back();
  seal.type = RecordType::seal;
  seal.where = {id, used_bytes, 0};
  if (auto named = name_copy(id, copy, records); !named) return named;
  written_bytes_ += used_bytes;
  return {};
}

Status RootWriter::is_not_there(const SegmentId& id) {
  replay_.poll();
  const auto slot = segments_.find(id);
  if (!slot || (segments_.present_in(*slot) >> root_.index() & 1u) == 0) return {};
  const std::string path = root_.files().path_of(id);
  if (!File::open(path, {})) return {};
  return fail(ErrorKind::busy, "{}: another process has copied it", path);
}

Status RootWriter::name_copy(const SegmentId& id, const File& copy, std::span<Record> records) {
  for (Record& record : records) {
    if (record.time_ns == 0) record.time_ns = clock_.wall_ns();
  }
  // Between the name and the record the file looks like an orphan.
  auto keeper = lock_keeper();
  if (!keeper) return std::unexpected(keeper.error());
  const std::string path = root_.files().path_of(id);
  // Whoever was passed over as keeper may find that its copy was taken for a leftover and begun anew.
  if (!copy.is_at_its_path())
    return fail(ErrorKind::busy, "{}: another process copies this segment now", copy.path());
  if (auto wanted = is_not_there(id); !wanted) return wanted;
  const auto bytes = copy.size();
  if (!bytes) return std::unexpected(bytes.error());
  if (auto told = inventory_.will_be(*keeper, {id}, *bytes); !told) return told;
  if (auto renamed = rename_file(copy.path(), path); !renamed) {
    inventory_.may_have_gone({id});
    return renamed;
  }
  inventory_.has_gone(*keeper, {id, true});
  const auto written = [&] {
    std::lock_guard lock(mutex_);
    return append_locked(records);
  }();
  if (!written) {
    if (remove_file(path)) inventory_.has_gone(*keeper, {id});
    return written;
  }
  for (const Record& record : records) replay_.apply(record);
  return {};
}

void RootWriter::drop_copy(const SegmentId& id, const File& copy) {
  if (auto removed = remove_file(copy.path()); !removed) log(LogLevel::debug, "{}", removed.error().message);
  inventory_.may_have_gone({id, true});
}

Status RootWriter::begin_copy(const SegmentId& id, const File& copy) {
  const auto size = copy.size();
  if (!size) return std::unexpected(size.error());
  Record adopt;
  adopt.type = RecordType::adopt_segment;
  adopt.where = {id, 0, *size};
  return name_copy(id, copy, std::span(&adopt, 1));
}

Status RootWriter::extend_copy(Record put) {
  if (auto written = append(put); !written) return written;
  written_bytes_ += put.where.bytes;
  return {};
}

Status RootWriter::complete_copy(const SegmentId& id, const File* source, uint64_t used_bytes) {
  // Nobody evicts it meanwhile: it may be sealed already.
  const auto keeper = lock_keeper();
  if (!keeper) return std::unexpected(keeper.error());
  const auto slot = segments_.find(id);
  auto copy = File::open(root_.files().path_of(id), {.write = true, .direct = root_.direct()});
  if (!copy) return std::unexpected(copy.error());
  const auto locked = copy->try_lock_exclusive();
  if (!locked) return std::unexpected(locked.error());
  if (!*locked || !slot || segments_.condemned(*slot, root_.index()))
    return fail(ErrorKind::busy, "{}: another process extends this copy", copy->path());
  std::vector<Record> records;
  if (source != nullptr) {
    if (auto added = add_missing(*copy, *source, id, records); !added) return added;
  }
  if (auto still = still_keeper(*keeper); !still) return still;
  Record& seal = records.emplace_back();
  seal.type = RecordType::seal;
  seal.where = {id, used_bytes, 0};
  seal.time_ns = clock_.wall_ns();
  {
    std::lock_guard lock(mutex_);
    if (auto written = append_locked(records); !written) return written;
  }
  for (const Record& record : records) replay_.apply(record);
  return {};
}

Status RootWriter::add_missing(const File& copy, const File& source, const SegmentId& id,
                               std::vector<Record>& puts) {
  std::set<uint64_t> there;
  const auto note = [&there](const ExtentHeader& header, uint64_t) { there.insert(header.offset); };
  if (auto end = scan_extents(copy, id, 0, true, note); !end) return std::unexpected(end.error());
  // All of them: the record of what is there may be missing.
  const auto end = scan_extents(source, id, 0, false, [&](const ExtentHeader& header, uint64_t bytes) {
    puts.push_back(put_of(header, bytes));
  });
  if (!end) return std::unexpected(end.error());
  for (const Record& put : puts) {
    if (there.contains(put.where.offset)) continue;
    if (auto copied = copy_run(source, copy, put.where.offset, put.where.bytes); !copied) return copied;
    written_bytes_ += put.where.bytes;
  }
  return {};
}

}  // namespace tokendepot
