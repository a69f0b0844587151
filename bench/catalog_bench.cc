// The catalog alone: lookups one at a time and batched, a long prefix, bytes an entry, and recovery from a
// journal. Limits of the same run: random reads of one cache line from a table of the same size, dependent
// and independent ones; all in CPU time; for recovery the digest check of the records alone.
#include <unistd.h>

#include <filesystem>

#include "format/digest.h"
#include "format/journal.h"
#include "result.h"
#include "rig.h"
#include "store/catalog.h"
#include "store/journal_file.h"
#include "store/replay.h"

namespace tokendepot::bench {
namespace {

/// CPU time, in which other work on the machine does not count: nothing here waits.
double busy_s() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

Key key_of(uint64_t n) {
  Key key;
  uint64_t state = n * 0x9e3779b97f4a7c15ull + 1;
  for (size_t i = 0; i < 4; ++i) {
    state ^= state >> 31;
    state *= 0xbf58476d1ce4e5b9ull;
    state ^= state >> 29;
    std::memcpy(key.bytes.data() + 8 * i, &state, 8);
  }
  return key;
}

// Header and one page: the smallest there is. A replay takes no more extents than a file and a root can hold.
constexpr uint64_t kExtentBytes = 8192;

uint64_t room_for(size_t entries) {
  return std::max<uint64_t>(16 << 20, entries * kExtentBytes);
}

/// Random reads a second from `bytes` of memory; dependent: the next address needs the last value.
double random_reads(uint64_t bytes, bool dependent) {
  std::vector<uint64_t> lines(bytes / 8);
  std::mt19937_64 random(3);
  for (size_t i = 0; i < lines.size(); i += 8) lines[i] = random();
  constexpr size_t kReads = 4'000'000;
  uint64_t carry = 1;
  const uint64_t count = lines.size() / 8;
  const double begin = busy_s();
  for (size_t i = 0; i < kReads; ++i) {
    const uint64_t seed = (i + 1) * 0x9e3779b97f4a7c15ull ^ (dependent ? carry : 0);
    carry += lines[((seed >> 32) * count >> 32) * 8];
  }
  const double rate = kReads / (busy_s() - begin);
  if (carry == 42) std::puts("");
  return rate;
}

void run(const std::string& base, size_t entries) {
  SegmentTable segments;
  const uint32_t slot = segments.slot_of({1, 0});
  segments.set_present(slot, 0, 1ull << 40);
  Catalog catalog(segments);
  const PartShape shape{0, LayoutKind::canonical, {0, 32, 0, 8}, 256};
  const PartId part = *catalog.part_id(shape);
  std::vector<Key> keys(entries);
  for (size_t i = 0; i < entries; ++i) {
    keys[i] = key_of(i);
    catalog.put(keys[i], part, slot, {{1, 0}, i * 4096, 4096});
  }
  const uint64_t table_bytes = catalog.memory_bytes();
  std::vector<uint32_t> order(entries);
  for (size_t i = 0; i < entries; ++i) order[i] = static_cast<uint32_t>(i);
  std::shuffle(order.begin(), order.end(), std::mt19937(1));

  // Medians of five: on a shared machine a round may be interrupted.
  std::vector<double> single;
  std::vector<double> batch;
  std::vector<Key> shuffled(entries);
  for (size_t i = 0; i < entries; ++i) shuffled[i] = keys[order[i]];
  std::vector<uint8_t> present(entries);
  double begin = 0;
  for (int round = 0; round < 5; ++round) {
    size_t found = 0;
    begin = busy_s();
    for (const Key& key : shuffled) found += catalog.find(key, part).has_value();
    single.push_back(static_cast<double>(entries) / (busy_s() - begin));
    if (found != entries) stop("the catalog lost entries");
    std::ranges::fill(present, uint8_t{0});
    begin = busy_s();
    catalog.count_present(shuffled, part, present, false);
    batch.push_back(static_cast<double>(entries) / (busy_s() - begin));
    for (const uint8_t one : present) found -= one;
    if (found != 0) stop("the batch lost entries");
  }
  print_result("catalog_lookup_single", median(single), "1/s", random_reads(table_bytes, true));
  print_result("catalog_lookup_batch", median(batch), "1/s", random_reads(table_bytes, false));

  const GroupWant want{0, shape.kind, shape.part, shape.tokens, 0};
  std::vector<double> times;
  for (size_t n = 0; n + 500 <= entries && n < 200; ++n) {
    const auto prompt = std::span(shuffled).subspan((n * 7919) % (entries - 500), 500);
    begin = busy_s();
    if (catalog.longest_prefix(prompt, std::span(&want, 1)) != 500) stop("a prefix was lost");
    times.push_back((busy_s() - begin) * 1e6);
  }
  print_result("catalog_prefix_500", median(times), "us", 500e6 / random_reads(table_bytes, false));
  print_result("catalog_bytes_per_entry", static_cast<double>(table_bytes) / static_cast<double>(entries),
               "B", sizeof(uint64_t) * 4);

  // Recovery: the real journal file through the real replay into a fresh catalog.
  std::string pattern = base + "/tokendepot-bench-XXXXXX";
  if (mkdtemp(pattern.data()) == nullptr) stop("cannot make a directory in " + base);
  Options options;
  const RootOptions root_options{
      .path = pattern + "/root", .capacity_bytes = room_for(entries), .segment_bytes = 1 << 20};
  auto root = Root::open(root_options, 0, options);
  if (!root) stop(root.error().message);
  {
    auto journal = JournalWriter::create((*root)->journals_dir());
    if (!journal) stop(journal.error().message);
    auto segment = File::open((*root)->segments_dir() + "/" + segment_name({journal->writer(), 0}),
                              {.write = true, .create = true});
    if (!segment) stop(segment.error().message);
    if (auto sized = segment->truncate(room_for(entries)); !sized) stop(sized.error().message);
    std::vector<Record> records(1000);
    for (size_t at = 0; at < entries; at += records.size()) {
      for (size_t i = 0; i < records.size(); ++i) {
        Record& record = records[i];
        record.key = keys[std::min(at + i, entries - 1)];
        record.where = {{journal->writer(), 0}, (at + i) * kExtentBytes, kExtentBytes};
        record.part = shape.part;
        record.tokens = shape.tokens;
        record.time_ns = 1;
      }
      if (auto written = journal->append(records); !written) stop(written.error().message);
    }
  }
  std::vector<double> rates;
  std::vector<double> cpu_rates;
  for (int round = 0; round < 3; ++round) {
    SegmentTable fresh_segments;
    Catalog fresh(fresh_segments);
    Replay replay(**root, fresh_segments, &fresh);
    const double cpu_begin = busy_s();
    begin = now_s();
    if (auto read = replay.first(); !read) stop(read.error().message);
    rates.push_back(static_cast<double>(replay.records()) / (now_s() - begin));
    cpu_rates.push_back(static_cast<double>(replay.records()) / (busy_s() - cpu_begin));
    if (fresh.entries() != entries) stop("recovery lost entries");
  }
  std::array<std::byte, kRecordBytes> record{};
  begin = busy_s();
  uint64_t sum = 0;
  for (size_t i = 0; i < entries; ++i) {
    record[0] = static_cast<std::byte>(i);
    sum += xxh3(std::span(record).first(kRecordBytes - 8));
  }
  const double digests = static_cast<double>(entries) / (busy_s() - begin);
  if (sum == 42) std::puts("");
  print_result("recovery_records", median(rates), "1/s", digests);
  print_result("recovery_records_cpu", median(cpu_rates), "1/CPU-s", digests);
  std::filesystem::remove_all(pattern);
}

}  // namespace
}  // namespace tokendepot::bench

// usage: catalog_bench [--toy | --entries N] [DIR]
int main(int argc, char** argv) {
  size_t entries = 1'000'000;
  std::string base = "/dev/shm";
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--toy") {
      entries = 20'000;
    } else if (argument == "--entries" && i + 1 < argc) {
      entries = std::strtoull(argv[++i], nullptr, 10);
    } else {
      base = argument;
    }
  }
  if (entries < 1000 || entries > 1'000'000'000) {
    std::fprintf(stderr, "bench: --entries %zu is out of range; expected 1000 to 1000000000\n", entries);
    return 2;
  }
  tokendepot::bench::run(base, entries);
}
