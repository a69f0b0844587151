#include "root_files.h"

#include <cerrno>

#include "base/errors.h"

namespace tokendepot {

Result<Marker> read_marker(const std::string& path) {
  const auto bytes = read_file(path + "/DEPOT", kPageBytes);
  if (!bytes) {
    if (bytes.error().kind == ErrorKind::not_found || bytes.error().os_errno == ENOTDIR) {
      return fail(ErrorKind::not_found, "{} is not the root of a depot: it has no file DEPOT", path);
    }
    return std::unexpected(bytes.error());
  }
  auto marker = decode_marker(*bytes);
  if (!marker) return fail(marker.error().kind, "{}/DEPOT: {}", path, marker.error().message);
  return marker;
}

Result<std::vector<DirectoryEntry>> entries_of(const std::string& path) {
  auto entries = list_directory(path);
  if (!entries && entries.error().kind == ErrorKind::not_found) return std::vector<DirectoryEntry>();
  return entries;
}

bool is_temporary(const std::string& name) {
  return name.starts_with(".tmp-");
}

bool has_live_writer(const std::string& path) {
  const auto file = File::open(path, {});
  if (!file) return false;
  return file->is_locked_by_another().value_or(false);
}

std::optional<NamespaceDigest> digest_of_manifest(const std::string& name) {
  constexpr std::string_view kEnding = ".json";
  NamespaceDigest digest;
  if (name.size() != 2 * digest.bytes.size() + kEnding.size() || !name.ends_with(kEnding))
    return std::nullopt;
  const auto nibble = [](char c) {
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
  };
  for (size_t i = 0; i < digest.bytes.size(); ++i) {
    const int high = nibble(name[2 * i]);
    const int low = nibble(name[2 * i + 1]);
    if (high < 0 || low < 0) return std::nullopt;
    digest.bytes[i] = static_cast<uint8_t>(high * 16 + low);
  }
  return digest;
}

Result<KeeperLock> lock_keeper(const std::string& path) {
  constexpr uint32_t kPatienceMs = 2000;
  const auto system = file_system_of(path);
  if (!system) return std::unexpected(system.error());
  KeeperElection election(path + "/keeper.lock", KeeperElection::kStuckMs, system->network);
  auto keeper = election.acquire(kPatienceMs);
  if (!keeper) return std::unexpected(keeper.error());
  if (*keeper) return std::move(**keeper);
  return fail(ErrorKind::busy,
              "{}/keeper.lock is held by an engine that is making space; expected it free within {} s", path,
              kPatienceMs / 1000);
}

}  // namespace tokendepot
