// A depot with a CUDA device next to the limits of the same card and the same minute: loads and stores
// through each kind of root, what they cost a matrix product on the same card and other threads of the
// process, and how soon a large depot is ready.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/statvfs.h>

#include <atomic>
#include <fstream>
#include <optional>
#include <thread>

#include "gpu/cuda.h"
#include "gpu/kernels.h"
#include "gpu/loop_device.h"
#include "gpu/matmul.h"
#include "gpu/options.h"
#include "gpu/other_threads.h"
#include "gpu/report.h"
#include "rig.h"
#include "workload/link.h"
#include "workload/raw_control.h"

namespace tokendepot::bench {
namespace {

constexpr double kGiB = 1024.0 * 1024 * 1024;
constexpr size_t kFlight = 4;  // jobs
constexpr size_t kRawThreads = 16;

enum class Place : uint8_t { memory, disk, loop };

struct RootKind {
  const char* name;       // in the figures' names
  const char* transport;  // the value of the root's key
  Place place;
};

// Another way of moving bytes is one more line here.
constexpr RootKind kRootKinds[] = {
    {"mapped", "mapped", Place::memory}, {"direct", "direct", Place::disk}, {"loop", "direct", Place::loop},
    {"gds", "gds", Place::disk},         {"gdsloop", "gds", Place::loop},
};

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4g", value);
  return text;
}

double available_bytes(const std::string& directory) {
  struct statvfs system{};
  if (statvfs(directory.c_str(), &system) != 0) stop("there is no directory " + directory);
  return static_cast<double>(system.f_bavail) * static_cast<double>(system.f_frsize);
}

double available_memory() {
  std::ifstream file("/proc/meminfo");
  std::string word;
  double kib = 0;
  while (file >> word) {
    if (word == "MemAvailable:") file >> kib;
  }
  return kib * 1024;
}

/// Seconds that the driver takes to register one GiB of a mapped file.
double registration_s_per_gib(const std::string& directory, uint64_t bytes) {
  std::string file = directory + "/tokendepot-bench-XXXXXX";
  const int fd = mkstemp(file.data());
  if (fd < 0 || posix_fallocate(fd, 0, static_cast<off_t>(bytes)) != 0) stop("no space in " + directory);
  void* const mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
  unlink(file.c_str());
  close(fd);
  if (mapped == MAP_FAILED) stop("cannot map a file in " + directory);
  const double begin = now_s();
  must(cudaHostRegister(mapped, bytes, cudaHostRegisterPortable), "registering a mapped file");
  const double took = now_s() - begin;
  must(cudaHostUnregister(mapped), "a mapped file");
  munmap(mapped, bytes);
  return took / (static_cast<double>(bytes) / kGiB);
}

class GpuPath {
 public:
  explicit GpuPath(const GpuOptions& options)
      : options_(options),
        rounds_(options.toy ? 1 : 5),
        link_(unwrap(Link::make(0, options.toy ? 64ull << 20 : 1ull << 30))) {
    cudaDeviceProp card{};
    must(cudaGetDeviceProperties(&card, 0), "the card's properties");
    int driver = 0, runtime = 0;
    must(cudaDriverGetVersion(&driver), "the driver's version");
    must(cudaRuntimeGetVersion(&runtime), "the runtime's version");
    sms_ = card.multiProcessorCount;
    report_.about("card", card.name);
    report_.about("multiprocessors", std::to_string(sms_));
    report_.about("CUDA", "driver " + std::to_string(driver) + ", runtime " + std::to_string(runtime));
  }

  void measure_paths() {
    for (const RootKind& kind : kRootKinds) {
      const auto& roots = options_.roots;
      if (!roots.empty() && std::ranges::find(roots, kind.name) == roots.end()) continue;
      for (const double mib : options_.sizes) {
        if (!measure_cell(kind, mib)) break;
      }
    }
  }

  /// The multiprocessors that a link's worth of traffic takes on average: those that a launch takes, for the
  /// part of the time in which its kernels run.
  void measure_kernels() {
    for (const bool store : {false, true}) {
      const auto way = store ? Link::Way::to_host : Link::Way::to_device;
      const double link = unwrap(link_->copy_large(way, options_.seconds / rounds_)).gb_per_s;
      for (const double mib : options_.sizes) {
        const KernelRate rate = bench::measure_kernels(mib, store, options_.seconds);
        const std::string tail = std::string(store ? "store_" : "load_") + size_name(mib);
        report_.add("gpu_kernels_" + tail, rate.gb_per_s, "GB/s", link);
        const double taken = std::min<double>(rate.blocks, sms_);
        report_.add("gpu_multiprocessors_" + tail, taken * link / rate.gb_per_s, "SMs", sms_);
      }
    }
  }

  void measure_matmul() {
    std::string why_not;
    const auto matmul = Matmul::make(options_.toy ? 512 : 8192, why_not);
    if (matmul == nullptr) return report_.note("matmul: skipped: " + why_not);
    const auto plan = plan_for(kRootKinds[0], options_.memory, options_.toy ? 1 : 32);
    if (!plan) return report_.note("matmul: skipped: " + plan.error().message);
    Rig rig(*plan);
    warm(rig);
    settle(rig);
    const double seconds = options_.seconds / rounds_;
    for (const bool store : {false, true}) {
      const std::string way = store ? "store" : "load";
      const auto depot = [&] { return store ? rig.store(kFlight, seconds) : rig.load(kFlight, seconds); };
      const auto copies = [&] {
        const auto to = store ? Link::Way::to_host : Link::Way::to_device;
        const auto rate = unwrap(link_->copy_large(to, seconds));
        return Rig::Run{rate.gb_per_s, rate.cpu_s_per_gb, 0};
      };
      measure_beside(*matmul, "copies_" + way, copies);
      measure_beside(*matmul, way, depot);
    }
  }

  /// What an eager step consists of, beside stores into segments that nobody has written yet, which are not
  /// registered: their pages are made, and threads copy. Then behind them, while those are being registered.
  void measure_threads() {
    std::string why_not;
    const auto matmul = Matmul::make(64, why_not);
    if (matmul == nullptr) return report_.note("threads: skipped: " + why_not);
    auto plan = plan_for(kRootKinds[0], options_.memory, options_.toy ? 1 : 32);
    if (!plan) return report_.note("threads: skipped: " + plan.error().message);
    plan->segment_bytes = options_.toy ? 0 : 256ull << 20;  // as in a root of tens of GiB
    const double link = unwrap(link_->copy_large(Link::Way::to_host, options_.seconds / rounds_)).gb_per_s;
    for (const OtherWork& work : other_work(*matmul)) {
      std::vector<Fresh> rounds;
      for (int round = 0; round < rounds_; ++round) rounds.push_back(measure_fresh(*plan, work));
      const auto middle = [&](double Fresh::* which) {
        std::vector<double> values;
        for (const Fresh& round : rounds) values.push_back(round.*which);
        return median(values);
      };
      const std::string name = work.name;
      const double before = middle(&Fresh::before);
      report_.add("gpu_fresh_store_beside_" + name, middle(&Fresh::stored), "GB/s", link);
      report_.add("gpu_" + name + "_beside_fresh_store", middle(&Fresh::beside), "us", before);
      report_.note("behind it " + number(middle(&Fresh::registered)) + " GB/s were registered");
      report_.add("gpu_" + name + "_behind_fresh_store", middle(&Fresh::behind), "us", before);
    }
  }

  void measure_open() {
    const double room = std::min(available_bytes(options_.memory), available_memory() * 0.9);
    const double gib = std::min(options_.open_gib, std::floor(room / 1.3 / kGiB * 8) / 8);
    const double mib = options_.open_mib;
    if (const double least = std::max(0.125, 8 * mib / 1024); gib < least)
      return report_.note("open: skipped: " + number(gib) + " GiB are too few for extents of " +
                          size_name(mib) + " in " + options_.memory + ", expected at least " + number(least));
    auto plan = plan_for(kRootKinds[0], options_.memory, mib);
    if (!plan) return report_.note("open: skipped: " + plan.error().message);
    plan->extents = static_cast<size_t>(gib * 1024 / mib);
    plan->capacity = static_cast<uint64_t>(gib * 1.25 * kGiB);  // whole extents leave room in their segments
    Rig rig(*plan);
    const Rig::Run filled = rig.store(kFlight);
    const DepotStats stats = rig.stats();
    const double used_gib = static_cast<double>(stats.roots[0].used_bytes) / kGiB;
    report_.note("open: " + number(used_gib) + " GiB of segments in " + options_.memory + ", filled at " +
                 number(filled.gb_per_s) + " GB/s");
    std::vector<double> opened, registered, mapped_gib;
    for (int round = 0; round < (options_.toy ? 1 : 3); ++round) {
      const double begin = now_s();
      opened.push_back(rig.open());
      registered.push_back(settle(rig) - begin);
      mapped_gib.push_back(static_cast<double>(rig.stats().device.registered_bytes) / kGiB);
    }
    const std::string tail = number(gib) + "GiB";
    report_.note("open: " + number(median(mapped_gib)) + " GiB are registered in the end");
    report_.add("gpu_open_" + tail, median(opened), "s", 1);
    const double per_gib = registration_s_per_gib(options_.memory, options_.toy ? 32ull << 20 : 1ull << 30);
    report_.add("gpu_registered_" + tail, median(registered), "s", median(mapped_gib) * per_gib);
    std::vector<double> limits, loaded;
    for (int round = 0; round < rounds_; ++round)  // before anything is being registered
      limits.push_back(unwrap(link_->copy_large(Link::Way::to_device, options_.seconds / rounds_)).gb_per_s);
    for (int round = 0; round < rounds_; ++round) {
      rig.open();
      loaded.push_back(rig.load(kFlight).gb_per_s);
    }
    report_.add("gpu_load_while_registering", median(loaded), "GB/s", median(limits));
  }

  bool write(const std::string& path) const { return report_.write(path); }

 private:
  /// The matrix product beside traffic, which `move` makes for a round's time and tells the rate of.
  void measure_beside(Matmul& matmul, const std::string& what, const std::function<Rig::Run()>& move) {
    const double seconds = options_.seconds / rounds_;
    std::vector<double> slowdown, beside, alone_rate;
    double alone_ms = 0;
    for (int round = 0; round < rounds_; ++round) {
      alone_ms = matmul.milliseconds(seconds);
      alone_rate.push_back(move().gb_per_s);
      std::atomic<bool> over = false;
      Rig::Run run;
      std::thread traffic([&] {
        while (!over) {
          const Rig::Run latest = move();
          // The last one may have gone on alone after the product's end.
          if (!over || run.gb_per_s == 0) run = latest;
        }
      });
      usleep(options_.toy ? 0 : 100'000);
      const double ms = matmul.milliseconds(seconds);
      over = true;
      traffic.join();
      slowdown.push_back((ms / alone_ms - 1) * 100);
      beside.push_back(run.gb_per_s);
    }
    report_.note("matmul alone: " + number(matmul.tflops(alone_ms)) + " TFLOP/s of bf16");
    report_.add("gpu_matmul_slowdown_" + what + "_percent", median(slowdown), "%", 5);
    report_.add("gpu_" + what + "_beside_matmul", median(beside), "GB/s", median(alone_rate));
  }

  /// Of one pass of stores into a new root: microseconds of a part of some work on average before it,
  /// meanwhile and behind it, and GB/s.
  struct Fresh {
    double before, beside, behind, stored, registered;
  };

  Fresh measure_fresh(const RigPlan& plan, const OtherWork& work) const {
    Rig rig(plan);
    usleep(options_.toy ? 0 : 500'000);  // the first segment is registered as soon as it is there
    const auto until = [&](const std::function<bool()>& over) {
      const double begin = now_s();
      double steps = 0;
      do {
        rig.engine_step(true);
        work.step([&] { rig.engine_step(false); });
        ++steps;
      } while (!over());
      return (now_s() - begin) / (steps * work.parts) * 1e6;
    };
    const auto for_a_while = [&] {
      const double ends = now_s() + options_.seconds / rounds_;
      return until([=] { return now_s() >= ends; });
    };
    const double before = for_a_while();
    std::atomic<bool> over = false;
    Rig::Run run;
    std::thread stores([&] {
      run = rig.store(kFlight);
      over = true;
    });
    const double beside = until([&] { return over.load(); });
    stores.join();
    const uint64_t registered = rig.stats().device.registered_bytes;
    const double begin = now_s();
    const double behind = for_a_while();
    const auto more = static_cast<double>(rig.stats().device.registered_bytes - registered);
    return {before, beside, behind, run.gb_per_s, more / (now_s() - begin) * 1e-9};
  }

  /// Where roots of this kind lie, or why there is no such place.
  Result<std::string> place_of(const RootKind& kind) {
    if (kind.place == Place::memory) return options_.memory;
    if (kind.place == Place::disk) return options_.disk;
    if (!loop_asked_for_) {
      loop_asked_for_ = true;
      const double largest = std::ranges::max(options_.sizes) * 1048576;
      const double bytes = std::max(options_.volume_gib * kGiB / 4, 8 * largest) * 5 + (256 << 20);
      if (bytes > available_bytes(options_.memory)) {
        loop_refusal_ = "no space for a disk of " + number(bytes / kGiB) + " GiB in " + options_.memory;
      } else {
        loop_ = LoopDevice::make(options_.memory, static_cast<uint64_t>(bytes), loop_refusal_);
      }
    }
    if (loop_ == nullptr) return std::unexpected(Error{ErrorKind::unsupported, 0, loop_refusal_});
    return loop_->mount_point();
  }

  /// A rig on the card, or why this build or this place does not offer it.
  Result<RigPlan> plan_for(const RootKind& kind, const std::string& base, double mib) const {
    using Json = nlohmann::json;
    const auto payload = static_cast<uint64_t>(mib * 1048576);
    double volume = options_.volume_gib * kGiB / (kind.place == Place::memory ? 1 : 4);
    volume = std::min(volume, available_bytes(base) / 5);
    RigPlan plan;
    plan.base = base;
    plan.mib = mib;
    plan.extents = std::max<size_t>(8, static_cast<uint64_t>(volume) / payload);
    plan.capacity = 3 * plan.extents * payload;
    plan.cache_bytes = plan.extents * payload;
    plan.job_extents = std::clamp<size_t>((256ull << 20) / payload, 1, plan.extents / 8);
    plan.heads_first = false;
    plan.drops_allowed = true;
    plan.memory = device_cache;
    Json config{{"roots", {{{"path", base + "/depot"}, {"capacity", 1}, {"transport", kind.transport}}}},
                {"device", "cuda:0"},
                {"slab", "1GiB"}};
    if (options_.toy) config.update({{"slab", "64MiB"}, {"device_slab", "64MiB"}});
    const Json keys = Json::parse(options_.engine, nullptr, false);
    if (!keys.is_object()) stop("--engine has the value \"" + options_.engine + "\", expected a JSON object");
    config.update(keys);
    auto parsed = parse_options(config.dump());
    if (!parsed) return std::unexpected(parsed.error());
    plan.options = *parsed;
    const double needed = static_cast<double>(plan.capacity) * 1.4;
    if (needed > available_bytes(base)) {
      return std::unexpected(
          Error{ErrorKind::no_space, 0, base + " has less than " + number(needed / kGiB) + " GiB free"});
    }
    // Opened once for its refusal: the rig takes none for an answer.
    std::string scratch = base + "/tokendepot-bench-XXXXXX";
    if (mkdtemp(scratch.data()) == nullptr) stop("cannot make a directory in " + base);
    Options trial = plan.options;
    trial.roots[0].path = scratch + "/root";
    trial.roots[0].capacity_bytes = plan.capacity;
    auto opened = Depot::open(trial);
    std::optional<Error> refused;
    if (!opened) {
      refused = opened.error();
    } else if (const RootStats root = (*opened)->stats().roots[0];
               kind.transport == std::string("gds") && !root.transport.starts_with("gds")) {
      refused = Error{ErrorKind::unsupported, 0, "the root is " + root.transport + " (" + root.reason + ")"};
    }
    if (opened) opened->reset();
    std::filesystem::remove_all(scratch);
    if (refused) return std::unexpected(*refused);
    return plan;
  }

  /// Until every segment has been written once: fresh memory and fresh file extents are slow for everybody.
  static void warm(Rig& rig) {
    for (int generation = 0; generation < 4; ++generation) rig.store(kFlight);
  }

  /// Waits until the device has registered all segments, which a depot does in the background, or registers
  /// no more. The moment of the last change.
  double settle(const Rig& rig) {
    constexpr double kPatience = 3;
    double changed = now_s();
    uint64_t registered = rig.stats().device.registered_bytes;
    while (true) {
      const DepotStats stats = rig.stats();
      if (stats.device.registered_bytes != registered) changed = now_s();
      registered = stats.device.registered_bytes;
      const uint64_t wanted = stats.roots[0].used_bytes;
      if (registered >= wanted) return changed;
      if (now_s() - changed > kPatience) {
        report_.note("registration: it ended at " + number(static_cast<double>(registered) / kGiB) + " of " +
                     number(static_cast<double>(wanted) / kGiB) + " GiB");
        return changed;
      }
      usleep(1000);
    }
  }

  /// False when no size of this kind can be measured here.
  bool measure_cell(const RootKind& kind, double mib) {
    const auto base = place_of(kind);
    if (!base) return skip(kind, base.error());
    const auto plan = plan_for(kind, *base, mib);
    if (!plan) return skip(kind, plan.error());
    Rig rig(*plan);
    const uint64_t payload = rig.extent_payload();
    std::unique_ptr<RawControl> raw;
    if (kind.place != Place::memory) raw = unwrap(RawControl::make(*base, payload, plan->extents));
    report_.note(std::string(kind.name) + " on " + *base + ": " + rig.transport() + ", " +
                 std::to_string(plan->extents) + " extents of " + size_name(mib) + ", " +
                 std::to_string(kFlight) + " jobs of " + std::to_string(plan->job_extents) + " in flight");
    warm(rig);
    if (kind.place == Place::memory) settle(rig);
    const double seconds = options_.seconds / rounds_;
    Pairs load, store, to_device, to_host;
    uint64_t dropped = 0;
    for (int round = 0; round < rounds_; ++round) {
      for (const bool in : {true, false}) {
        const auto way = in ? Link::Way::to_device : Link::Way::to_host;
        const auto large = unwrap(link_->copy_large(way, seconds));
        const auto same_size = unwrap(link_->copy(way, payload, seconds));
        (in ? to_device : to_host)
            .add(same_size.gb_per_s, same_size.cpu_s_per_gb, large.gb_per_s, large.cpu_s_per_gb);
        double limit = large.gb_per_s;
        double limit_cpu = large.cpu_s_per_gb;
        if (raw) {
          const double cpu = cpu_s();
          const double begin = now_s();
          const double rate =
              unwrap(raw->run(kRawThreads, in ? Traffic::read : Traffic::write, Pages::plain, seconds));
          limit_cpu = (cpu_s() - cpu) / (rate * (now_s() - begin));
          limit = std::min(limit, rate);
        }
        const Rig::Run run = in ? rig.load(kFlight, seconds) : rig.store(kFlight, seconds);
        (in ? load : store).add(run.gb_per_s, run.cpu_s_per_gb, limit, limit_cpu);
        dropped += run.dropped;
      }
    }
    if (dropped > 0) report_.note("the depot dropped " + std::to_string(dropped) + " stores of these rounds");
    if (kind.place == Place::memory) {
      to_device.print(report_, "gpu_link_h2d_" + size_name(mib));
      to_host.print(report_, "gpu_link_d2h_" + size_name(mib));
    }
    load.print(report_, "gpu_" + std::string(kind.name) + "_load_" + size_name(mib));
    store.print(report_, "gpu_" + std::string(kind.name) + "_store_" + size_name(mib));
    return true;
  }

  bool skip(const RootKind& kind, const Error& error) {
    report_.note(std::string(kind.name) + ": skipped: " + error.message);
    return false;
  }

  const GpuOptions& options_;
  int rounds_;
  int sms_ = 0;
  Report report_;
  std::unique_ptr<Link> link_;
  bool loop_asked_for_ = false;
  std::string loop_refusal_;
  std::unique_ptr<LoopDevice> loop_;
};

}  // namespace

const std::vector<std::string>& root_kinds() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> made;
    for (const RootKind& kind : kRootKinds) made.emplace_back(kind.name);
    return made;
  }();
  return names;
}

}  // namespace tokendepot::bench

int main(int argc, char** argv) {
  namespace bench = tokendepot::bench;
  const bench::GpuOptions options = bench::parse_arguments(argc, argv);
  int cards = 0;
  const cudaError_t counted = cudaGetDeviceCount(&cards);
  if (counted != cudaSuccess || cards == 0) {
    const char* const words = counted == cudaSuccess ? "the driver lists none" : cudaGetErrorString(counted);
    std::printf("SKIPPED gpu_path: no GPU can be used here (%s)\n", words);
    return options.toy ? 0 : 2;
  }
  bench::GpuPath path(options);
  if (options.wants("paths")) path.measure_paths();
  if (options.wants("kernels")) path.measure_kernels();
  if (options.wants("matmul")) path.measure_matmul();
  if (options.wants("threads")) path.measure_threads();
  if (options.wants("open")) path.measure_open();
  if (!options.json.empty() && !path.write(options.json)) bench::stop("cannot write " + options.json);
}
