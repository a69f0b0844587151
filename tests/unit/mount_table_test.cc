#include "io/mount_table.h"

#include <gtest/gtest.h>

#include <string>

namespace tokendepot {
namespace {

constexpr std::string_view kTable =
    "22 27 0:21 / /proc rw,relatime - proc proc rw\n"
    "123 27 0:44 / /mnt/weka\\040- rw,noatime shared:7 master:2 - wekafs 10.0.0.1/default rw,writecache\n"
    "12 27 0:45 / /mnt/other rw - ext4 /dev/sda1 rw\n"
    "x 27 0:46 / /mnt/x rw - nfs4 server:/ rw\n"
    "14 27 0:47 / /mnt/cut rw\n"
    "15 27 0:48 / /mnt/last rw - lustre o2ib:/fs";

TEST(MountTable, NamesTheTypeOfTheMountWithThatVeryId) {
  EXPECT_EQ(mounted_type(kTable, 123), "wekafs");
  EXPECT_EQ(mounted_type(kTable, 12), "ext4");
  EXPECT_EQ(mounted_type(kTable, 22), "proc");
  EXPECT_EQ(mounted_type(kTable, 15), "lustre");
}

TEST(MountTable, WithoutThatIdOrWithAGarbledLineNamesNone) {
  EXPECT_EQ(mounted_type(kTable, 1), "");
  EXPECT_EQ(mounted_type(kTable, 0), "");
  EXPECT_EQ(mounted_type(kTable, 14), "");
  EXPECT_EQ(mounted_type("", 12), "");
}

TEST(MountTable, TellsWhatSeveralHostsMountFromWhatOneHostHas) {
  for (const char* type : {"wekafs", "lustre", "gpfs", "beegfs", "ceph", "nfs", "nfs4", "cifs", "smb3",
                           "glusterfs", "fuse.glusterfs", "fuse"}) {
    EXPECT_TRUE(is_shared_type(type)) << type;
  }
  for (const char* type : {"ext4", "xfs", "proc", "bcachefs", "wekafs2", "weka", ""})
    EXPECT_FALSE(is_shared_type(type)) << type;
}

}  // namespace
}  // namespace tokendepot
