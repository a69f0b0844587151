// Bits that flip where they lie, and whom that may hurt.
#include <algorithm>
#include <array>

#include "disk.h"
#include "format/extent.h"
#include "format/journal.h"
#include "report.h"
#include "store/journal_file.h"

namespace tokendepot::sim {

void Disk::rot(std::set<Key>& damaged) {
  std::vector<std::pair<std::string, Inode*>> files;
  const char* const folder = random_.chance(0.5) ? "/segments/" : "/journals/";
  for (const auto& [root, volume] : volumes_) {
    for (const auto& [name, inode] : volume.names) {
      if (name.find(folder) != std::string::npos && inode->size > 0) files.emplace_back(name, inode);
    }
  }
  if (files.empty()) return;
  const auto& [name, inode] = files[random_.below(files.size())];
  const std::string file = name.substr(name.rfind('/') + 1);
  const std::span<const std::byte> content(inode->memory, inode->size);
  uint64_t at = random_.below(inode->size);
  uint64_t bit = random_.below(8);
  if (const auto writer = writer_of_journal(file)) {
    if (random_.chance(0.5)) {  // what the record means
      at = std::min(at / kRecordBytes * kRecordBytes + 6, inode->size - 1);
      bit = random_.below(3);
    }
    const uint64_t index = at / kRecordBytes;
    if ((index + 1) * kRecordBytes <= inode->size) {
      const auto record = decode_record(
          std::span<const std::byte, kRecordBytes>(content.data() + index * kRecordBytes, kRecordBytes),
          *writer, index);
      if (record && record->type == RecordType::put) damaged.insert(record->key);
    }
  } else {
    for (uint64_t header_at = 0; header_at <= at; header_at += kPageBytes) {
      const auto header = decode_extent_header(content.subspan(header_at));
      if (!header || header->offset != header_at) continue;
      if (at < header_at + extent_bytes(header->shape())) damaged.insert(header->key);
    }
  }
  inode->memory[at] ^= static_cast<std::byte>(1u << bit);
  if (track_ && at < inode->stable.size()) inode->stable[at] = inode->memory[at];
  count(Injected::rot);
  note("rot", at);
}

void Disk::explain(const Key& key) const {
  tell("what the journals say of chunk {}:", to_hex(key.bytes).substr(0, 8));
  std::set<SegmentId> segments;
  for (const bool again : {false, true}) {
    for (const auto& [root, volume] : volumes_) {
      for (const auto& [name, inode] : volume.names) {
        const std::string file = name.substr(name.rfind('/') + 1);
        if (again) {
          const auto id = segment_of_name(file);
          if (id && segments.contains(*id)) tell("{}: {} bytes", name, inode->size);
        }
        const auto writer = writer_of_journal(file);
        if (!writer) continue;
        for (uint64_t index = 0; (index + 1) * kRecordBytes <= inode->size; ++index) {
          const std::span<const std::byte, kRecordBytes> slot(inode->memory + index * kRecordBytes,
                                                              kRecordBytes);
          const auto record = decode_record(slot, *writer, index);
          if (!record) {
            if (again) tell("{} record {}: {}", file, index, record.error().message);
            continue;
          }
          const bool of_chunk = record->key == key;
          if (of_chunk) segments.insert(record->where.segment);
          const bool told = of_chunk || (record->key == Key{} && segments.contains(record->where.segment));
          if (!again || !told) continue;
          tell("{} record {}: type {} of {} at {}{}", file, index, static_cast<int>(record->type),
               segment_name(record->where.segment), record->where.offset, of_chunk ? ", the chunk" : "");
        }
      }
    }
  }
}

}  // namespace tokendepot::sim
