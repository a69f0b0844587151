// The cuFile wrapper against a fake library: what it makes of every refusal, and that bytes arrive.
#include "device/gds/cufile.h"

#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "gds_fixture.h"
#include "io/scratch_file.h"
#include "temporary_directory.h"

namespace tokendepot {
namespace {

using testing::fresh_fake;
using testing::GpuLikeDevice;

constexpr uint64_t kMiB = 1 << 20;

class CuFileTest : public ::testing::Test {
 protected:
  Result<std::unique_ptr<CuFile>> open(CuFile::Compat compat, const char* library = FAKE_CUFILE_WHOLE) {
    return CuFile::open(device_, compat, library);
  }
  std::string refusal(CuFile::Compat compat, const char* library = FAKE_CUFILE_WHOLE) {
    const auto opened = open(compat, library);
    EXPECT_FALSE(opened);
    if (opened) return "";
    EXPECT_EQ(opened.error().kind, ErrorKind::unsupported);
    return opened.error().message;
  }
  File file_of(const std::vector<std::byte>& content) {
    auto file = File::open(directory_ / "file", {.write = true, .create = true});
    EXPECT_TRUE(file);
    EXPECT_TRUE(file->write_at(content, 0));
    return std::move(*file);
  }

  testing::FakeCuFileControl& fake_ = fresh_fake();
  GpuLikeDevice device_{8 * kMiB};
  const TemporaryDirectory directory_;
};

TEST_F(CuFileTest, PointToPointIsWhatADriverThatForbidsCompatibilityModeDoes) {
  const auto opened = open(CuFile::Compat::allowed);
  ASSERT_TRUE(opened) << opened.error().message;
  EXPECT_TRUE((*opened)->p2p());
  EXPECT_EQ((*opened)->summary(), "cuFile 1.20 point to point");
  EXPECT_EQ(fake_.registered_buffers, 1);
}

TEST_F(CuFileTest, CompatibilityModeIsTakenOnlyWhereItIsAllowedAndSaysWhy) {
  fake_.point_to_point = false;
  EXPECT_NE(refusal(CuFile::Compat::forbidden).find("nvidia-fs"), std::string::npos);
  const auto opened = open(CuFile::Compat::allowed);
  ASSERT_TRUE(opened) << opened.error().message;
  EXPECT_FALSE((*opened)->p2p());
  EXPECT_NE((*opened)->summary().find("compatibility mode: the nvidia-fs driver is not loaded"),
            std::string::npos)
      << (*opened)->summary();
}

TEST_F(CuFileTest, SettingsThatAllowCompatibilityModeAreNotCountedAsPointToPoint) {
  fake_.keeps_compat = true;
  EXPECT_NE(refusal(CuFile::Compat::forbidden).find("settings"), std::string::npos);
  const auto opened = open(CuFile::Compat::allowed);
  ASSERT_TRUE(opened) << opened.error().message;
  EXPECT_FALSE((*opened)->p2p());
}

TEST_F(CuFileTest, SettingsThatForceCompatibilityModeAreFoundOut) {
  fake_.forces_compat = true;
  EXPECT_NE(refusal(CuFile::Compat::forbidden).find("settings force"), std::string::npos);
  const auto opened = open(CuFile::Compat::allowed);
  ASSERT_TRUE(opened) << opened.error().message;
  EXPECT_FALSE((*opened)->p2p());
}

TEST_F(CuFileTest, AReleaseThatCannotForbidCompatibilityModeIsNotTrusted) {
  fresh_fake(FAKE_CUFILE_OLD);
  EXPECT_NE(refusal(CuFile::Compat::forbidden, FAKE_CUFILE_OLD), "");
  const auto opened = open(CuFile::Compat::allowed, FAKE_CUFILE_OLD);
  ASSERT_TRUE(opened) << opened.error().message;
  EXPECT_FALSE((*opened)->p2p());
}

TEST_F(CuFileTest, ADriverThatSomebodyElseOpenedIsUsedAsItIs) {
  const auto first = open(CuFile::Compat::forbidden);
  ASSERT_TRUE(first);
  GpuLikeDevice other(8 * kMiB);
  const auto second = CuFile::open(other, CuFile::Compat::allowed, FAKE_CUFILE_WHOLE);
  ASSERT_TRUE(second) << second.error().message;
  EXPECT_TRUE((*second)->p2p());
}

TEST_F(CuFileTest, WhatIsMissingIsNamed) {
  EXPECT_NE(refusal(CuFile::Compat::allowed, "/nowhere/libcufile.so.0").find("/nowhere/libcufile.so.0"),
            std::string::npos);
  EXPECT_NE(refusal(CuFile::Compat::allowed, FAKE_CUFILE_BROKEN).find("cuFileWrite"), std::string::npos);
  fake_.refuse_driver = 5007;
  EXPECT_NE(refusal(CuFile::Compat::allowed).find("platform"), std::string::npos);
  fake_.refuse_driver = 5999;
  EXPECT_NE(refusal(CuFile::Compat::allowed).find("5999"), std::string::npos);
}

TEST_F(CuFileTest, ASlabThatCannotBeRegisteredIsUsedUnregistered) {
  fake_.refuse_buffers = 5036;
  const auto opened = open(CuFile::Compat::allowed);
  ASSERT_TRUE(opened) << opened.error().message;
  EXPECT_TRUE((*opened)->p2p());
  EXPECT_NE((*opened)->summary().find("slab not registered (GPU memory cannot be pinned)"),
            std::string::npos);
}

TEST_F(CuFileTest, AFileIsRegisteredAsLongAsItsHandleLives) {
  const auto opened = open(CuFile::Compat::allowed);
  const File file = file_of(std::vector<std::byte>(kPageBytes));
  {
    auto handle = (*opened)->add(file);
    ASSERT_TRUE(handle) << handle.error().message;
    const CuFileHandle moved = std::move(*handle);
    EXPECT_TRUE(moved);
    EXPECT_EQ(fake_.open_files, 1);
  }
  EXPECT_EQ(fake_.open_files, 0);
  fake_.refuse_files = 5008;
  const auto refused = (*opened)->add(file);
  ASSERT_FALSE(refused);
  EXPECT_NE(refused.error().message.find(file.path()), std::string::npos);
  EXPECT_NE(refused.error().message.find("file system"), std::string::npos);
}

class CuFileTransfer : public CuFileTest {
 protected:
  CuFileTransfer() {
    for (size_t i = 0; i < content_.size(); ++i) content_[i] = static_cast<std::byte>(i * 7 / 3);
    opened_ = std::move(*open(CuFile::Compat::allowed));
    file_ = file_of(content_);
    handle_ = std::move(*opened_->add(file_));
    GpuLikeDevice::entered = 0;
    engine_ = make_thread_engine(3, opened_->mover()).value();
    memory_ = opened_->slab().allocate(content_.size());
  }
  int read() { return move_and_wait(*engine_, {.handle = handle_.get()}, memory_, 0, content_.size()); }

  std::vector<std::byte> content_ = std::vector<std::byte>(4 * kMiB);
  std::unique_ptr<CuFile> opened_;
  File file_;
  CuFileHandle handle_;
  std::unique_ptr<IoEngine> engine_;
  std::byte* memory_ = nullptr;
};

TEST_F(CuFileTransfer, ShortTransfersAreContinuedUntilAllBytesMoved) {
  fake_.most_bytes = 3 * kPageBytes;
  ASSERT_EQ(read(), 0);
  EXPECT_EQ(std::memcmp(memory_, content_.data(), content_.size()), 0);
  std::fill_n(memory_, kMiB, std::byte{9});
  ASSERT_EQ(move_and_wait(*engine_, {.handle = handle_.get(), .write = true}, memory_, kMiB, kMiB), 0);
  std::vector<std::byte> now(content_.size());
  ASSERT_TRUE(file_.read_at(now, 0));
  std::fill_n(content_.begin() + kMiB, kMiB, std::byte{9});
  EXPECT_EQ(now, content_);
  EXPECT_EQ(fake_.wrong_calls, 0);
}

TEST_F(CuFileTransfer, ErrorsAreErrnosOrTheLibrarysOwnAndHaveWords) {
  fake_.fail_reads = 1;
  fake_.fail_with = ENOTCONN;
  EXPECT_EQ(read(), ENOTCONN);
  fake_.fail_reads = 1;
  fake_.fail_with = 5016;
  EXPECT_EQ(read(), 5016);
  EXPECT_EQ(CuFile::words(5016), "cuFile error 5016");
  EXPECT_EQ(CuFile::words(ENOTCONN), std::strerror(ENOTCONN));
  fake_.fail_reads = 1;
  fake_.fail_with = EINTR;
  EXPECT_EQ(read(), 0) << "an interrupted transfer is repeated";
  ASSERT_TRUE(file_.truncate(kPageBytes));
  EXPECT_EQ(read(), ENODATA);
}

TEST_F(CuFileTransfer, EveryThreadMakesTheDeviceCurrentBeforeItMovesBytes) {
  for (int i = 0; i < 1000 && GpuLikeDevice::entered < 3; ++i) usleep(1000);
  EXPECT_EQ(GpuLikeDevice::entered, 3);
}

}  // namespace
}  // namespace tokendepot
