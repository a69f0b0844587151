#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <set>
#include <shared_mutex>

#include "convert.h"
#include "unlocked.h"

namespace tokendepot::py {
namespace {

Error closed_error() {
  return {ErrorKind::closed, 0, "the depot is closed"};
}

/// A Depot as Python holds it: calls run without the GIL; close() waits for the calls in progress and refuses
/// later ones; a copy that came over by fork() refuses everything and is never destroyed, because its threads
/// are not there.
class Handle {
 public:
  explicit Handle(std::unique_ptr<Depot> depot) : depot_(std::move(depot)) {
    std::lock_guard lock(open_mutex());
    open_handles().insert(this);
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() {
    close();
    if (getpid() != owner_) return;
    std::lock_guard lock(open_mutex());
    open_handles().erase(this);
  }

  template <typename Body>
  auto use(Body body) {
    if (getpid() != owner_) {
      throw DepotException(
          {ErrorKind::closed, 0,
           fmt::format("the depot was opened by process {} and cannot be used after fork()", owner_)});
    }
    const Unlocked unlocked;
    // Asked before the lock: readers may otherwise keep close() waiting for ever.
    if (closing_) throw DepotException(closed_error());
    std::shared_lock lock(mutex_);
    if (depot_ == nullptr) throw DepotException(closed_error());
    return body(*depot_);
  }

  void close() {
    if (getpid() != owner_) {
      static_cast<void>(depot_.release());
      return;
    }
    closing_ = true;
    const Unlocked unlocked;
    std::unique_lock lock(mutex_);
    depot_.reset();
  }

  /// At interpreter exit: engine threads must not outlive the libraries that they use.
  static void close_all() {
    std::vector<Handle*> handles;
    {
      std::lock_guard lock(open_mutex());
      handles.assign(open_handles().begin(), open_handles().end());
    }
    for (Handle* handle : handles) handle->close();
  }

 private:
  // Never destroyed: handles may be collected after static destructors have begun.
  static std::mutex& open_mutex() {
    static auto& mutex = *new std::mutex;
    return mutex;
  }
  static std::set<Handle*>& open_handles() {
    static auto& handles = *new std::set<Handle*>;
    return handles;
  }

  std::unique_ptr<Depot> depot_;
  std::shared_mutex mutex_;
  std::atomic<bool> closing_ = false;
  pid_t owner_ = getpid();
};

std::unique_ptr<Handle> open(const std::string& config_json, bool catalog, bool writer) {
  const Unlocked unlocked;
  Options options = unwrap(parse_options(config_json));
  options.catalog = catalog;
  options.writer = writer;
  return std::make_unique<Handle>(unwrap(Depot::open(options)));
}

nb::bytes register_namespace(Handle& self, const std::string& manifest_json) {
  return digest_to_bytes(
      unwrap(self.use([&](Depot& depot) { return depot.register_namespace(manifest_json); })));
}

std::vector<GroupWant> wants_from(nb::sequence wants) {
  std::vector<GroupWant> out;
  for (nb::handle want : wants) out.push_back(typed<GroupWant>(want, "a GroupWant"));
  return out;
}

size_t longest_prefix(Handle& self, const nb::bytes& keys, nb::sequence wants) {
  const auto key_list = keys_from(keys);
  const auto want_list = wants_from(wants);
  return self.use([&](Depot& depot) { return depot.longest_prefix(key_list, want_list); });
}

nb::bytes stored(Handle& self, const nb::bytes& keys, const GroupWant& want) {
  const auto key_list = keys_from(keys);
  std::vector<uint8_t> out(key_list.size());
  self.use([&](Depot& depot) { depot.stored(key_list, want, out); });
  return nb::bytes(out.data(), out.size());
}

using GroupTuple = std::tuple<GroupWant, uint32_t, uint32_t, nb::object>;

nb::bytes plan_load(Handle& self, const nb::bytes& ns, const nb::bytes& keys, nb::sequence groups,
                    double deadline_s) {
  const auto digest = digest_from<NamespaceDigest>(ns, "namespace");
  const auto key_list = keys_from(keys);
  std::vector<std::vector<int32_t>>
      blocks;  // what the spans below point into: moving the outer vector keeps it valid
  std::vector<Depot::LoadGroup> wanted;
  for (nb::handle item : groups) {
    const auto [want, first_chunk, blocks_per_chunk, ids] =
        typed<GroupTuple>(item, "groups of (GroupWant, first chunk, blocks per chunk, block ids)");
    blocks.push_back(integers_from<int32_t>(ids, "blocks"));
    wanted.push_back({want, first_chunk, blocks_per_chunk, blocks.back()});
  }
  const auto plan = self.use([&](Depot& depot) -> Result<std::vector<std::byte>> {
    const auto planned = depot.plan_load(digest, key_list, wanted, duration_from(deadline_s));
    if (!planned) return std::unexpected(planned.error());
    return encode(*planned);
  });
  return to_bytes(unwrap(plan));
}

void forget(Handle& self, const nb::bytes& key, uint16_t group) {
  const auto digest = digest_from<Key>(key, "key");
  self.use([&](Depot& depot) { depot.forget(digest, group); });
}

using PlaneTuple = std::tuple<uint64_t, int64_t, int64_t, int64_t, uint32_t>;

void attach(Handle& self, uint16_t group, std::string_view kind, const PartTuple& part, uint32_t tokens,
            uint32_t block_tokens, uint32_t block_count, uint32_t row_bytes, uint32_t page_bytes,
            nb::sequence layers) {
  PagedCache cache;
  cache.shape.group = group;
  cache.shape.kind = kind_from(kind);
  cache.shape.part = part_from(part);
  cache.shape.tokens = tokens;
  cache.shape.block_tokens = block_tokens;
  cache.shape.row_bytes = row_bytes;
  cache.shape.page_bytes = page_bytes;
  cache.block_count = block_count;
  for (nb::handle layer : layers) {
    auto& planes = cache.layers.emplace_back();
    for (nb::handle plane : typed<nb::sequence>(layer, "layers as sequences of planes")) {
      const auto [address, block_stride, head_stride, token_stride, piece_bytes] =
          typed<PlaneTuple>(plane, "planes of (address, block, head and token stride, piece bytes)");
      planes.push_back({reinterpret_cast<std::byte*>(static_cast<uintptr_t>(address)), block_stride,
                        head_stride, token_stride, piece_bytes});
    }
  }
  const bool canonical = cache.shape.kind == LayoutKind::canonical;
  cache.shape.planes = canonical && !cache.layers.empty() ? static_cast<uint16_t>(cache.layers[0].size()) : 0;
  unwrap(self.use([&](Depot& depot) { return depot.attach(cache); }));
}

void submit_load(Handle& self, uint64_t job, const nb::bytes& plan) {
  unwrap(self.use([&](Depot& depot) -> Status {
    auto decoded = decode_load_plan(as_span(plan));
    if (!decoded) return std::unexpected(decoded.error());
    return depot.submit_load(job, std::move(*decoded));
  }));
}

void submit_hold(Handle& self, uint64_t job, const nb::bytes& plan) {
  unwrap(self.use([&](Depot& depot) -> Status {
    auto decoded = decode_load_plan(as_span(plan));
    if (!decoded) return std::unexpected(decoded.error());
    return depot.submit_hold(job, std::move(*decoded));
  }));
}

void place(Handle& self, uint64_t job, uint64_t held_job, nb::sequence blocks) {
  using Entry = std::tuple<uint32_t, uint16_t, std::vector<int32_t>>;
  std::vector<Depot::HeldBlocks> held;
  for (nb::handle entry : blocks) {
    auto [chunk, group, ids] = typed<Entry>(entry, "blocks as (chunk, group, block ids)");
    held.push_back({chunk, group, std::move(ids)});
  }
  unwrap(self.use([&](Depot& depot) { return depot.place(job, held_job, held); }));
}

void submit_store(Handle& self, uint64_t job, const nb::bytes& plan) {
  unwrap(self.use([&](Depot& depot) -> Status {
    auto decoded = decode_store_plan(as_span(plan));
    if (!decoded) return std::unexpected(decoded.error());
    return depot.submit_store(job, std::move(*decoded));
  }));
}

nb::list poll(Handle& self) {
  const auto completions = self.use([](Depot& depot) { return depot.poll(); });
  nb::list out;
  for (const Completion& c : completions) {
    nb::list failures;
    for (const ItemFailure& f : c.failures)
      failures.append(nb::make_tuple(f.item, f.chunk, f.group, name(f.reason)));
    nb::dict done;
    done["job"] = c.job;
    done["kind"] = c.kind == JobKind::load ? "load" : "store";
    done["items_ok"] = c.items_ok;
    done["bytes"] = c.bytes;
    done["seconds"] = static_cast<double>(c.nanoseconds) * 1e-9;
    done["failures"] = failures;
    out.append(done);
  }
  return out;
}

nb::object stats(Handle& self) {
  const std::string json = self.use([](Depot& depot) { return to_json(depot.stats()); });
  return from_json(json);
}

nb::bytes plan_store(const nb::bytes& ns, nb::sequence items) {
  StorePlan plan{digest_from<NamespaceDigest>(ns, "namespace"), {}};
  using Item = std::tuple<nb::bytes, uint32_t, uint16_t, nb::object>;
  for (nb::handle value : items) {
    const auto [key, chunk, group, blocks] = typed<Item>(value, "items of (key, chunk, group, block ids)");
    plan.items.push_back(
        {digest_from<Key>(key, "key"), chunk, group, integers_from<int32_t>(blocks, "blocks")});
  }
  std::vector<std::byte> bytes;
  {
    const Unlocked unlocked;
    bytes = encode(plan);
  }
  return to_bytes(bytes);
}

template <typename Item>
nb::dict describe_item(const Item& item) {
  nb::dict out;
  out["key"] = digest_to_bytes(item.key);
  out["chunk"] = item.chunk;
  out["group"] = item.group;
  out["blocks"] = nb::cast(item.blocks);
  return out;
}

nb::dict describe_plan(const nb::bytes& bytes) {
  nb::dict out;
  nb::list items;
  const auto load = decode_load_plan(as_span(bytes));
  if (load) {
    for (const LoadItem& item : load->items) {
      nb::dict described = describe_item(item);
      described["kind"] = kind_to(item.kind);
      described["part"] = part_to(item.part);
      described["tokens"] = item.tokens;
      described["segment"] = segment_to(item.where.segment);
      described["offset"] = item.where.offset;
      described["bytes"] = item.where.bytes;
      items.append(described);
    }
    out["kind"] = "load";
    out["namespace"] = digest_to_bytes(load->ns);
    out["deadline_s"] = static_cast<double>(load->deadline_ns) * 1e-9;
    out["items"] = items;
    return out;
  }
  const auto store = decode_store_plan(as_span(bytes));
  if (!store) {
    throw DepotException(store.error().kind == ErrorKind::unsupported ? store.error() : load.error());
  }
  for (const StoreItem& item : store->items) items.append(describe_item(item));
  out["kind"] = "store";
  out["namespace"] = digest_to_bytes(store->ns);
  out["items"] = items;
  return out;
}

void construct_want(GroupWant* self, uint16_t group, std::string_view kind, const PartTuple& part,
                    uint32_t tokens, uint32_t window_chunks) {
  new (self) GroupWant{group, kind_from(kind), part_from(part), tokens, window_chunks};
}

}  // namespace

void bind_depot(nb::module_& module) {
  nb::class_<GroupWant>(module, "GroupWant", "What a lookup asks of one KV-cache group.")
      .def("__init__", &construct_want, nb::arg("group"), nb::arg("kind"), nb::arg("part"), nb::arg("tokens"),
           nb::arg("window_chunks") = 0)
      .def_rw("group", &GroupWant::group)
      .def_prop_rw(
          "kind", [](const GroupWant& w) { return kind_to(w.kind); },
          [](GroupWant& w, std::string_view kind) { w.kind = kind_from(kind); })
      .def_prop_rw(
          "part", [](const GroupWant& w) { return part_to(w.part); },
          [](GroupWant& w, const PartTuple& part) { w.part = part_from(part); })
      .def_rw("tokens", &GroupWant::tokens)
      .def_rw("window_chunks", &GroupWant::window_chunks);

  nb::class_<Handle>(module, "Depot",
                     "A set of directories that keep KV-cache chunks. See include/tokendepot/depot.h.")
      .def_static("open", &open, nb::arg("config_json"), nb::kw_only(), nb::arg("catalog") = true,
                  nb::arg("writer") = true)
      .def("close", &Handle::close)
      .def("register_namespace", &register_namespace, nb::arg("manifest_json"))
      .def("longest_prefix", &longest_prefix, nb::arg("keys"), nb::arg("wants"))
      .def("stored", &stored, nb::arg("keys"), nb::arg("want"))
      .def("plan_load", &plan_load, nb::arg("namespace"), nb::arg("keys"), nb::arg("groups"),
           nb::arg("deadline_s"))
      .def("forget", &forget, nb::arg("key"), nb::arg("group"))
      .def("attach", &attach, nb::kw_only(), nb::arg("group"), nb::arg("kind"), nb::arg("part"),
           nb::arg("tokens"), nb::arg("block_tokens"), nb::arg("block_count"), nb::arg("row_bytes") = 0,
           nb::arg("page_bytes") = 0, nb::arg("layers"))
      .def(
          "mark_stream",
          [](Handle& self, uint64_t stream) {
            unwrap(self.use([&](Depot& depot) {
              return depot.mark_stream(reinterpret_cast<void*>(static_cast<uintptr_t>(stream)));
            }));
          },
          nb::arg("stream"))
      .def(
          "engine_step",
          [](Handle& self, bool begins) { self.use([&](Depot& depot) { depot.engine_step(begins); }); },
          nb::arg("begins"))
      .def("submit_load", &submit_load, nb::arg("job"), nb::arg("plan"))
      .def("submit_hold", &submit_hold, nb::arg("job"), nb::arg("plan"))
      .def("place", &place, nb::arg("job"), nb::arg("held_job"), nb::arg("blocks"))
      .def(
          "drop_held",
          [](Handle& self, uint64_t held_job) { self.use([&](Depot& depot) { depot.drop_held(held_job); }); },
          nb::arg("held_job"))
      .def("submit_store", &submit_store, nb::arg("job"), nb::arg("plan"))
      .def(
          "wait_gathered",
          [](Handle& self, double timeout_s) {
            return self.use([&](Depot& depot) { return depot.wait_gathered(duration_from(timeout_s)); });
          },
          nb::arg("timeout_s"))
      .def(
          "cancel", [](Handle& self, uint64_t job) { self.use([&](Depot& depot) { depot.cancel(job); }); },
          nb::arg("job"))
      .def("poll", &poll)
      .def(
          "flush",
          [](Handle& self, double timeout_s) {
            return self.use([&](Depot& depot) { return depot.flush(duration_from(timeout_s)); });
          },
          nb::arg("timeout_s"))
      .def("refresh", [](Handle& self) { self.use([](Depot& depot) { depot.refresh(); }); })
      .def(
          "history",
          [](Handle& self, const nb::bytes& key) {
            const auto wanted = digest_from<Key>(key, "key");
            constexpr const char* kNames[] = {"never", "stored", "gone"};
            return kNames[static_cast<size_t>(self.use([&](Depot& depot) { return depot.history(wanted); }))];
          },
          nb::arg("key"))
      .def("stats", &stats);

  module.def("plan_store", &plan_store, nb::arg("namespace"), nb::arg("items"));
  module.def("describe_plan", &describe_plan, nb::arg("plan"));
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(&Handle::close_all));
}

}  // namespace tokendepot::py
