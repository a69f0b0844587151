// What a root shared by many writers costs one process that tails it: real journals of N writers in one
// directory of a memory file system, one real replay with its catalog, one real keeper at the configured
// poll. Limits of the same run: for a poll the bare listing of that directory (open, getdents, one fstatat a
// file); for the time to see a chunk the second that is promised.
#include <dirent.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <thread>

#include "result.h"
#include "rig.h"
#include "store/catalog.h"
#include "store/journal_file.h"
#include "store/keeper.h"
#include "store/replay.h"

namespace tokendepot::bench {
namespace {

constexpr uint32_t kPollMs = 100;
constexpr double kPromisedS = 1.0;
const PartShape kShape{0, LayoutKind::canonical, {0, 32, 0, 8}, 256};

Key key_of(uint64_t writer, uint64_t n) {
  Key key;
  uint64_t state = writer ^ (n + 1) * 0x9e3779b97f4a7c15ull;
  for (size_t i = 0; i < 4; ++i) {
    state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9ull;
    state ^= state >> 27;
    std::memcpy(key.bytes.data() + 8 * i, &state, 8);
  }
  return key;
}

constexpr uint64_t kExtentBytes = 8192;  // the smallest there is: header and one page

/// One writer on some host: its journal, and puts into one segment.
struct Writer {
  JournalWriter journal;
  uint64_t puts = 0;

  Key append(size_t count) {
    std::vector<Record> records(count);
    for (Record& record : records) {
      record.key = key_of(journal.writer(), puts);
      record.where = {{journal.writer(), 0}, puts++ * kExtentBytes, kExtentBytes};
      record.part = kShape.part;
      record.tokens = kShape.tokens;
      record.time_ns = 1;
    }
    if (auto written = journal.append(records); !written) stop(written.error().message);
    return records.back().key;
  }
};

double list_once(const std::string& directory) {
  const double begin = now_s();
  const int fd = open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR* const listing = fd < 0 ? nullptr : fdopendir(fd);
  if (listing == nullptr) stop("cannot list " + directory);
  while (const dirent* entry = readdir(listing)) {
    struct stat info;
    if (fstatat(fd, entry->d_name, &info, AT_SYMLINK_NOFOLLOW) != 0) stop("cannot stat " + directory);
  }
  closedir(listing);
  return now_s() - begin;
}

size_t open_descriptors() {
  return static_cast<size_t>(std::distance(std::filesystem::directory_iterator("/proc/self/fd"), {}));
}

void run(const std::string& base, size_t hosts, size_t records, size_t polls) {
  std::string pattern = base + "/tokendepot-bench-XXXXXX";
  if (mkdtemp(pattern.data()) == nullptr) stop("cannot make a directory in " + base);
  const Options options;
  // A replay takes no more extents than a file and a root can hold.
  const uint64_t capacity = std::max<uint64_t>(16 << 20, records * kExtentBytes);
  auto root = unwrap(Root::open(
      {.path = pattern + "/root", .capacity_bytes = capacity, .segment_bytes = 1 << 20}, 0, options));
  const std::string name = "hosts_" + std::to_string(hosts);
  std::vector<Writer> writers;
  const size_t own_descriptors = open_descriptors();
  for (size_t i = 0; i < hosts; ++i) {
    Writer& writer = writers.emplace_back(unwrap(JournalWriter::create(root->journals_dir())));
    const File segment =
        unwrap(File::open(root->segments_dir() + "/" + segment_name({writer.journal.writer(), 0}),
                          {.write = true, .create = true}));
    if (auto sized = segment.truncate(capacity); !sized) stop(sized.error().message);
    for (size_t left = records / hosts; left > 0; left -= std::min<size_t>(left, 1000))
      writer.append(std::min<size_t>(left, 1000));
  }
  const size_t written = records / hosts * hosts;

  SegmentTable segments;
  Catalog catalog(segments);
  Replay replay(*root, segments, &catalog);
  const size_t before = open_descriptors();
  double begin = now_s();
  if (auto read = replay.first(); !read) stop(read.error().message);
  print_result(name + "_first_replay", static_cast<double>(written) / (now_s() - begin), "1/s", 0);
  if (catalog.entries() != written) stop("the replay lost records");
  print_result(name + "_descriptors", static_cast<double>(open_descriptors() - before), "", 64);
  print_result(name + "_journal_bytes",
               static_cast<double>(written) * kRecordBytes / static_cast<double>(hosts), "B", 0);
  print_result(name + "_catalog_bytes_per_entry",
               static_cast<double>(catalog.memory_bytes()) / static_cast<double>(written), "B", 64);

  // Nobody writes: what a poll costs for being asked.
  std::vector<double> listing;
  for (size_t i = 0; i < polls; ++i) listing.push_back(list_once(root->journals_dir()) * 1e6);
  std::vector<double> quiet;
  for (size_t i = 0; i < polls; ++i) {
    begin = now_s();
    replay.poll();
    quiet.push_back((now_s() - begin) * 1e6);
  }
  print_result(name + "_quiet_poll", median(quiet), "us", median(listing));

  // A tenth of the writers writes between two polls, ten records each.
  std::vector<double> busy;
  const size_t active = std::max<size_t>(1, hosts / 10);
  for (size_t i = 0; i < polls; ++i) {
    for (size_t w = 0; w < active; ++w) writers[(i * active + w) % hosts].append(10);
    begin = now_s();
    replay.poll();
    busy.push_back((now_s() - begin) * 1e6);
  }
  print_result(name + "_busy_poll", median(busy), "us", median(listing));
  print_result(name + "_record",
               std::max(0.0, median(busy) - median(quiet)) / static_cast<double>(active * 10), "us", 0);

  // The keeper as it is in an engine: its share of a core, and when a look-up finds what somebody has stored.
  const std::vector<Keeper::Tier> tiers{{root.get(), &replay, nullptr}};
  Promotion promotion(tiers, segments, system_clock());
  Rewriting rewriting(0, promotion.use(), segments, system_clock());
  Keeper keeper(tiers, segments, &catalog, promotion, rewriting, kPollMs, nullptr);
  if (!keeper.running()) stop("no threads");
  const double idle_begin = now_s();
  const double cpu_begin = cpu_s();
  std::this_thread::sleep_for(std::chrono::seconds(polls > 50 ? 5 : 1));
  print_result(name + "_keeper_cpu", (cpu_s() - cpu_begin) / (now_s() - idle_begin) * 100, "%", 100.0 / 20);
  const PartId part = *catalog.part_id(kShape);
  std::mt19937 random(1);
  double slowest = 0;
  for (size_t i = 0; i < polls / 4; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(random() % 50));
    const Key key = writers[random() % hosts].append(1);
    begin = now_s();
    while (!catalog.find(key, part)) std::this_thread::sleep_for(std::chrono::microseconds(200));
    slowest = std::max(slowest, now_s() - begin);
  }
  print_result(name + "_seen_after", slowest, "s", kPromisedS);
  if (open_descriptors() > own_descriptors + hosts + 256) stop("descriptors are leaked");
  std::filesystem::remove_all(pattern);
}

}  // namespace
}  // namespace tokendepot::bench

int main(int argc, char** argv) {
  const bool toy = argc > 1 && std::string(argv[1]) == "--toy";
  const std::string base = argc > (toy ? 2 : 1) ? argv[argc - 1] : "/dev/shm";
  // All writers of the simulation are open in this one process.
  rlimit files{};
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  for (const size_t hosts : toy ? std::vector<size_t>{10, 50} : std::vector<size_t>{10, 100, 1000, 8000}) {
    if (hosts + 256 > files.rlim_cur) {
      std::printf("SKIPPED %zu writers: RLIMIT_NOFILE is %zu\n", hosts, static_cast<size_t>(files.rlim_cur));
      continue;
    }
    tokendepot::bench::run(base, hosts, toy ? 5'000 : 1'000'000, toy ? 8 : 100);
  }
}
