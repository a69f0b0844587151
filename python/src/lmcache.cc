// LMCache's storage connector contract over a depot: batches of (key text, buffer) that end as completions
// behind one event descriptor. python/tokendepot/_core.pyi has the contract of each call.
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <set>
#include <shared_mutex>
#include <string>
#include <thread>
#include <unordered_map>

#include "base/log.h"
#include "base/sha256.h"
#include "convert.h"
#include "io/io_thread.h"
#include "unlocked.h"

namespace tokendepot::py {
namespace {

using Json = nlohmann::json;

/// The event descriptor of a connector: readable while completions wait.
class EventDescriptor {
 public:
  EventDescriptor() : fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {}
  EventDescriptor(const EventDescriptor&) = delete;
  EventDescriptor& operator=(const EventDescriptor&) = delete;
  ~EventDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int fd() const { return fd_; }
  void raise() const {
    const uint64_t one = 1;
    // It can only fail when the counter is full, and then it is readable anyway.
    static_cast<void>(::write(fd_, &one, sizeof one));
  }
  void clear() const {
    uint64_t count = 0;
    static_cast<void>(::read(fd_, &count, sizeof count));
  }

 private:
  int fd_;
};

/// LMCache's key text: model@rank@group@chunk hash[@salt], rank and group in hex.
struct KeyText {
  std::string_view slice;  // model@rank@group: what makes bytes exchangeable
  std::string_view model;
  std::string_view rank;
  std::string_view group;
  std::string_view hash;
  std::string_view salt;
};

std::optional<KeyText> parse_key(std::string_view text) {
  std::array<size_t, 4> at{};
  size_t found = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '@') continue;
    if (found == at.size()) return std::nullopt;
    at[found++] = i;
  }
  if (found < 3) return std::nullopt;
  const size_t hash_end = found == 4 ? at[3] : text.size();
  KeyText key;
  key.slice = text.substr(0, at[2]);
  key.model = text.substr(0, at[0]);
  key.rank = text.substr(at[0] + 1, at[1] - at[0] - 1);
  key.group = text.substr(at[1] + 1, at[2] - at[1] - 1);
  key.hash = text.substr(at[2] + 1, hash_end - at[2] - 1);
  if (found == 4) key.salt = text.substr(hash_end + 1);
  if (key.model.empty() || key.rank.empty() || key.group.empty() || key.hash.empty()) return std::nullopt;
  return key;
}

/// The salt is a secret of a user: it is in the key as a hash only, and not in the manifest, of which there
/// would be one a user.
Key depot_key(const NamespaceDigest& ns, const KeyText& text) {
  Sha256 hash;
  hash.update(std::as_bytes(std::span(ns.bytes)));
  hash.update_le(text.salt.size());
  hash.update(text.salt);
  hash.update(text.hash);
  Key key;
  key.bytes = hash.finish();
  return key;
}

class LMCacheConnector {
 public:
  LMCacheConnector(std::unique_ptr<Depot> depot, Json identity, double deadline_s)
      : depot_(std::move(depot)), identity_(std::move(identity)), deadline_(duration_from(deadline_s)) {
    if (event_.fd() < 0) throw DepotException(fail_errno(errno, "no event descriptor").error());
    reaper_ =
        start_io_thread([](void* self) { static_cast<LMCacheConnector*>(self)->reap(); }, this, "td-lmcache");
    if (!reaper_.joinable())
      throw DepotException(thread_refused("the thread that reports to LMCache").error());
  }
  LMCacheConnector(const LMCacheConnector&) = delete;
  LMCacheConnector& operator=(const LMCacheConnector&) = delete;
  ~LMCacheConnector() {
    if (getpid() != owner_) {
      // After fork() its thread is not here to be joined.
      new std::thread(std::move(reaper_));
      static_cast<void>(depot_.release());
      return;
    }
    close();
    for (Ended& job : ended_) release(job.buffers);
  }

  int event_fd() const { return event_.fd(); }

  uint64_t submit_set(nb::sequence keys, nb::sequence buffers) {
    return submit_transfer(JobKind::store, keys, buffers);
  }
  uint64_t submit_get(nb::sequence keys, nb::sequence buffers) {
    return submit_transfer(JobKind::load, keys, buffers);
  }

  uint64_t submit_exists(nb::sequence keys) {
    return answer(keys, [](Depot& depot, std::span<const Key> names, std::span<uint8_t> out) {
      depot.stored(names, Depot::object_want(), out);
    });
  }

  uint64_t submit_delete(nb::sequence keys) {
    return answer(keys, [](Depot& depot, std::span<const Key> names, std::span<uint8_t> out) {
      depot.condemn(names, Depot::object_want(), out);
    });
  }

  nb::list drain() {
    std::vector<Ended> ended;
    {
      const Unlocked unlocked;
      event_.clear();
      std::lock_guard lock(mutex_);
      ended.swap(ended_);
    }
    nb::list out;
    for (Ended& job : ended) {
      nb::list each;
      for (const uint8_t ok : job.ok) each.append(ok != 0);
      out.append(nb::make_tuple(job.id, job.problem.empty(), job.problem, each));
      release(job.buffers);
    }
    return out;
  }

  std::string stats_json() {
    const Unlocked unlocked;
    std::shared_lock lock(closing_);
    return depot_ ? to_json(depot_->stats()) : "{}";
  }

  /// What is under way is cancelled and reported as failed.
  void close() {
    if (getpid() != owner_) return;
    const Unlocked unlocked;
    std::lock_guard lock(closing_);
    if (stop_.exchange(true)) return;
    reaper_.join();
    depot_.reset();
    std::lock_guard ending(mutex_);
    for (auto& [id, pending] : pending_) {
      ended_.push_back(
          {id, std::vector<uint8_t>(pending.keys.size()), "the depot is closed", std::move(pending.buffers)});
    }
    pending_.clear();
    event_.raise();
  }

 private:
  struct Pending {
    JobKind kind = JobKind::load;
    std::vector<Key> keys;
    std::vector<Py_buffer> buffers;  // held until the completion is drained
  };
  struct Ended {
    uint64_t id = 0;
    std::vector<uint8_t> ok;
    std::string problem;
    std::vector<Py_buffer> buffers;
  };

  static void release(std::vector<Py_buffer>& buffers) {
    for (Py_buffer& buffer : buffers) PyBuffer_Release(&buffer);
    buffers.clear();
  }

  /// The texts belong to the sequence's elements.
  static std::vector<std::string_view> texts_of(nb::sequence keys) {
    std::vector<std::string_view> texts;
    texts.reserve(nb::len(keys));
    for (nb::handle key : keys) {
      Py_ssize_t bytes = 0;
      const char* text = PyUnicode_AsUTF8AndSize(key.ptr(), &bytes);
      if (text == nullptr) throw nb::python_error();
      texts.emplace_back(text, static_cast<size_t>(bytes));
    }
    return texts;
  }

  /// Nothing is known of a key in a namespace that the roots did not take, or that is none of LMCache's.
  std::optional<std::pair<NamespaceDigest, Key>> identify(std::string_view text) {
    const auto key = parse_key(text);
    if (!key) {
      if (!odd_key_told_.exchange(true))
        log(LogLevel::warning, "a key is not LMCache's model@rank@group@hash, it is answered as a miss");
      return std::nullopt;
    }
    const auto ns = namespace_of(*key);
    if (!ns) return std::nullopt;
    return std::pair(*ns, depot_key(*ns, *key));
  }

  std::optional<NamespaceDigest> namespace_of(const KeyText& key) {
    std::lock_guard lock(names_mutex_);
    if (const auto known = namespaces_.find(key.slice); known != namespaces_.end()) return known->second;
    Json manifest = identity_;
    manifest["engine"] = "lmcache";
    manifest["model"] = key.model;
    manifest["kv_rank"] = key.rank;
    manifest["object_group"] = key.group;
    const auto ns = depot_->register_namespace(manifest.dump(-1, ' ', false, Json::error_handler_t::replace));
    if (!ns) {
      if (refused_.emplace(key.slice).second)
        log(LogLevel::warning, "\"{}\" of LMCache is not kept: {}", key.slice, ns.error().message);
      return std::nullopt;
    }
    return namespaces_.emplace(key.slice, *ns).first->second;
  }

  uint64_t submit_transfer(JobKind kind, nb::sequence keys, nb::sequence buffers) {
    const auto texts = texts_of(keys);
    if (nb::len(buffers) != texts.size())
      refuse("{} keys but {} buffers; expected one for each", texts.size(), nb::len(buffers));
    Pending pending{kind, std::vector<Key>(texts.size()), {}};
    std::vector<Depot::Object> objects(texts.size());
    const int access = kind == JobKind::load ? PyBUF_WRITABLE : PyBUF_SIMPLE;
    for (nb::handle buffer : buffers) {
      Py_buffer held;
      if (PyObject_GetBuffer(buffer.ptr(), &held, access) != 0) {
        release(pending.buffers);
        throw nb::python_error();
      }
      objects[pending.buffers.size()].memory = {static_cast<std::byte*>(held.buf),
                                                static_cast<size_t>(held.len)};
      pending.buffers.push_back(held);
    }
    const Unlocked unlocked;
    const uint64_t id = next_++;
    std::shared_lock lock(closing_);
    if (depot_) {
      for (size_t i = 0; i < texts.size(); ++i) {
        const auto named = identify(texts[i]);
        if (named) {
          std::tie(objects[i].ns, objects[i].key) = *named;
          pending.keys[i] = objects[i].key;
        } else {
          objects[i].memory = {};  // fails alone
        }
      }
    }
    {
      std::lock_guard under_way(mutex_);
      pending_.emplace(id, std::move(pending));
    }
    Status submitted = fail(ErrorKind::closed, "the depot is closed");
    if (depot_ && kind == JobKind::load) submitted = depot_->submit_load_objects(id, objects, deadline_);
    if (depot_ && kind == JobKind::store) submitted = depot_->submit_store_objects(id, objects);
    if (submitted) return id;
    std::lock_guard under_way(mutex_);
    auto refused = pending_.extract(id);
    ended_.push_back({id, std::vector<uint8_t>(texts.size()), submitted.error().message,
                      std::move(refused.mapped().buffers)});
    event_.raise();
    return id;
  }

  template <typename Body>
  uint64_t answer(nb::sequence keys, Body body) {
    const auto texts = texts_of(keys);
    const Unlocked unlocked;
    const uint64_t id = next_++;
    Ended ended{id, std::vector<uint8_t>(texts.size()), {}, {}};
    std::shared_lock lock(closing_);
    if (depot_) {
      std::vector<Key> names;
      std::vector<size_t> index;
      names.reserve(texts.size());
      index.reserve(texts.size());
      for (size_t i = 0; i < texts.size(); ++i) {
        if (const auto named = identify(texts[i])) {
          names.push_back(named->second);
          index.push_back(i);
        }
      }
      std::vector<uint8_t> found(names.size());
      body(*depot_, names, found);
      for (size_t i = 0; i < index.size(); ++i) ended.ok[index[i]] = found[i];
    }
    std::lock_guard ending(mutex_);
    ended_.push_back(std::move(ended));
    event_.raise();
    return id;
  }

  void reap() {
    while (!stop_) {
      if (depot_->wait_ended(std::chrono::milliseconds(100))) end(depot_->poll());
    }
  }

  void end(const std::vector<Completion>& completions) {
    for (const Completion& completion : completions) {
      std::unique_lock lock(mutex_);
      auto done = pending_.extract(completion.job);
      lock.unlock();
      if (done.empty()) continue;
      Pending& pending = done.mapped();
      Ended ended{
          completion.job, std::vector<uint8_t>(pending.keys.size(), 1), {}, std::move(pending.buffers)};
      for (const ItemFailure& failure : completion.failures) {
        ended.ok[failure.item] = 0;
        // Nothing can be proved where the kernel failed: do not promise it again.
        if (completion.kind == JobKind::load) depot_->forget(pending.keys[failure.item], 0);
      }
      if (!completion.failures.empty()) {
        ended.problem =
            fmt::format("{} of {} chunks not {}: {}", completion.failures.size(), pending.keys.size(),
                        completion.kind == JobKind::load ? "loaded" : "stored",
                        tokendepot::name(completion.failures.front().reason));
      }
      lock.lock();
      ended_.push_back(std::move(ended));
      event_.raise();
    }
  }

  struct TextHash {
    using is_transparent = void;
    size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
  };

  const pid_t owner_ = getpid();
  std::unique_ptr<Depot> depot_;
  const Json identity_;
  const std::chrono::nanoseconds deadline_;
  EventDescriptor event_;
  std::atomic<uint64_t> next_ = 1;
  std::atomic<bool> stop_ = false;
  std::atomic<bool> odd_key_told_ = false;
  std::shared_mutex closing_;  // exclusive: depot_ goes away
  std::mutex names_mutex_;
  std::unordered_map<std::string, NamespaceDigest, TextHash, std::equal_to<>> namespaces_;
  std::set<std::string, std::less<>> refused_;
  std::mutex mutex_;
  std::unordered_map<uint64_t, Pending> pending_;
  std::vector<Ended> ended_;
  std::thread reaper_;
};

std::unique_ptr<LMCacheConnector> open_connector(const std::string& config_json,
                                                 const std::string& identity_json, double load_timeout_s) {
  const Unlocked unlocked;
  Json identity = Json::parse(identity_json, nullptr, false);
  if (!identity.is_object()) refuse("the namespace is {}; expected a JSON object", identity_json);
  auto depot = unwrap(Depot::open(unwrap(parse_options(config_json))));
  return std::make_unique<LMCacheConnector>(std::move(depot), std::move(identity), load_timeout_s);
}

}  // namespace

void bind_lmcache(nb::module_& module) {
  nb::class_<LMCacheConnector>(module, "LMCacheConnector", nb::is_weak_referenceable(),
                               "LMCache's storage connector contract over a depot.")
      .def_static("open", &open_connector, nb::arg("config_json"), nb::kw_only(), nb::arg("namespace_json"),
                  nb::arg("load_timeout_s"))
      .def("event_fd", &LMCacheConnector::event_fd)
      .def("submit_batch_set", &LMCacheConnector::submit_set, nb::arg("keys"), nb::arg("buffers"))
      .def("submit_batch_get", &LMCacheConnector::submit_get, nb::arg("keys"), nb::arg("buffers"))
      .def("submit_batch_exists", &LMCacheConnector::submit_exists, nb::arg("keys"))
      .def("submit_batch_delete", &LMCacheConnector::submit_delete, nb::arg("keys"))
      .def("drain_completions", &LMCacheConnector::drain)
      .def("stats_json", &LMCacheConnector::stats_json)
      .def("close", &LMCacheConnector::close);
}

}  // namespace tokendepot::py
