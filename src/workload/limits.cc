#include "workload/limits.h"

#include <algorithm>
#include <thread>

#include "base/errors.h"

namespace tokendepot {
namespace {

constexpr uint64_t kCopyBytes = 256ull << 20;
constexpr size_t kMostThreads = 128;
constexpr uint64_t kMostBuffers = 1ull << 30;  // more in flight makes no medium faster

const char* name_of(Traffic traffic) {
  switch (traffic) {
    case Traffic::read:
      return "reads";
    case Traffic::write:
      return "writes";
    case Traffic::mixed:
      return "reads and writes";
  }
  return "";
}

}  // namespace

Result<std::unique_ptr<Limits>> Limits::make(const LimitsPlan& plan) {
  std::unique_ptr<Limits> made(new Limits(plan));
  if (plan.gpu) {
    auto link = Link::make(*plan.gpu, std::max<uint64_t>(kCopyBytes, 4 * plan.piece));
    if (!link) return std::unexpected(link.error());
    made->link_ = std::move(*link);
  }
  if (!plan.in_memory) {
    auto raw = RawControl::make(plan.directory, plan.piece, plan.pieces);
    if (!raw) return std::unexpected(raw.error());
    made->raw_ = std::move(*raw);
  } else if (!plan.gpu) {
    // On a GPU, segments in memory go over the link as they are.
    const size_t pieces = std::clamp<size_t>(kCopyBytes / plan.piece, 1, plan.pieces);
    auto memory = ControlBuffer::make(pieces * plan.piece, Pages::huge);
    if (!memory) return std::unexpected(memory.error());
    auto copies = CopyControl::make(plan.directory, pieces * plan.piece);
    if (!copies) return std::unexpected(copies.error());
    made->memory_ = std::move(*memory);
    made->copies_ = std::move(*copies);
  }
  return made;
}

Result<std::vector<WorkloadLimit>> Limits::measure(double seconds) {
  std::vector<WorkloadLimit> limits;
  const double part = raw_ && link_ ? seconds / 2 : seconds;
  if (auto s = measure_medium(part, limits); !s) return std::unexpected(s.error());
  if (auto s = measure_link(part, limits); !s) return std::unexpected(s.error());
  return limits;
}

Status Limits::measure_medium(double seconds, std::vector<WorkloadLimit>& into) {
  if (copies_) {
    const size_t threads = std::clamp<size_t>(std::thread::hardware_concurrency(), 1, plan_.depth);
    const uint64_t bytes = std::clamp<uint64_t>(kCopyBytes / plan_.piece, 1, plan_.pieces) * plan_.piece;
    const auto rate = copies_->run(memory_->data(), bytes, plan_.piece, threads, plan_.traffic, seconds);
    if (!rate) return std::unexpected(rate.error());
    into.push_back(
        {fmt::format("{} by memcpy on a mapped file, {} threads", name_of(plan_.traffic), threads), *rate});
  }
  if (!raw_) return {};
  const size_t most = std::clamp<size_t>(kMostBuffers / plan_.piece, 4, kMostThreads);
  const size_t depth = std::min(plan_.burst_pieces > 0 ? plan_.burst_pieces : plan_.depth, most);
  const std::string what =
      fmt::format("{} {} of a plain file, {} threads, buffers in huge pages",
                  raw_->direct() ? "O_DIRECT" : "buffered", name_of(plan_.traffic), depth);
  if (plan_.burst_pieces > 0) {
    const auto took = raw_->seconds_of(depth, plan_.burst_pieces);
    if (!took) return std::unexpected(took.error());
    into.push_back({what, static_cast<double>(plan_.burst_pieces * plan_.piece) * 1e-9 / *took});
    return {};
  }
  const auto rate = raw_->run(depth, plan_.traffic, Pages::huge, seconds);
  if (!rate) return std::unexpected(rate.error());
  into.push_back({what, *rate});
  return {};
}

Status Limits::measure_link(double seconds, std::vector<WorkloadLimit>& into) {
  if (!link_) return {};
  const Link::Way way = plan_.traffic == Traffic::read    ? Link::Way::to_device
                        : plan_.traffic == Traffic::write ? Link::Way::to_host
                                                          : Link::Way::both;
  const auto rate = link_->copy_large(way, seconds);
  if (!rate) return std::unexpected(rate.error());
  constexpr const char* kWays[] = {"to", "from", "to and from"};
  into.push_back({fmt::format("copies between pinned memory and cuda:{}, large pieces, {} the device",
                              *plan_.gpu, kWays[static_cast<size_t>(way)]),
                  rate->gb_per_s});
  return {};
}

}  // namespace tokendepot
