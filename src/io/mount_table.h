// What /proc/self/mountinfo says of a file system that statfs() does not name: a type has a name there, and
// that of a vendor's file system is documented where its number is not.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace tokendepot {

/// The type of the mount with this id in a table such as /proc/self/mountinfo (proc(5)), e.g. "wekafs"; ""
/// when it has none of that id.
std::string mounted_type(std::string_view table, uint64_t mount_id);

/// Of file systems that several hosts mount at once, by their types' names.
bool is_shared_type(std::string_view type);

/// The type of the file system that holds `path`, by this process's table; "" where neither the kernel
/// (before Linux 5.8) nor the table tells.
std::string mounted_type_of(const std::string& path);

}  // namespace tokendepot
