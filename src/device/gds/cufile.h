// GPUDirect Storage: NVIDIA's cuFile, loaded when it is wanted, so that nothing here needs it to build or
// start.
//
// cuFile has two ways. Point to point, the storage reads and writes the GPU's memory itself. In compatibility
// mode, which is all that most virtual machines have, the library copies through host memory of its own.
// Which of them carried an I/O cannot be asked afterwards, so it is settled before: the driver is opened with
// compatibility mode forbidden, and only if that fails, and the caller may, with it allowed.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "device/device.h"
#include "io/engine.h"
#include "io/file.h"
#include "tokendepot/error.h"

namespace tokendepot {

struct CuFileCalls;

/// A file registered with cuFile. Move-only; must end before its descriptor is closed.
class CuFileHandle {
 public:
  CuFileHandle() = default;
  CuFileHandle(CuFileHandle&& other) noexcept;
  CuFileHandle& operator=(CuFileHandle&& other) noexcept;
  ~CuFileHandle();
  void* get() const { return handle_; }
  explicit operator bool() const { return handle_ != nullptr; }

 private:
  friend class CuFile;
  CuFileHandle(const CuFileCalls* calls, void* handle, int fd) : calls_(calls), handle_(handle), fd_(fd) {}
  const CuFileCalls* calls_ = nullptr;
  void* handle_ = nullptr;
  int fd_ = -1;
};

/// The library and one registered slab of a device. Thread-safe but for opening and closing.
class CuFile {
 public:
  enum class Compat : uint8_t { forbidden, allowed };

  /// `device` is a GPU, else the driver's opening may never return. Errors: `unsupported` with the cause (no
  /// library, a symbol is missing, the driver's refusal, or only compatibility mode is to be had and that is
  /// forbidden). Library and driver stay open until the process ends: others in it may use them.
  static Result<std::unique_ptr<CuFile>> open(Device& device, Compat compat,
                                              const std::string& library = kLibrary);
  /// All handles have ended, and so has what uses slab().
  ~CuFile();
  CuFile(const CuFile&) = delete;
  CuFile& operator=(const CuFile&) = delete;

  /// Whether every transfer is point to point. False: every transfer may go through host memory.
  bool p2p() const { return p2p_; }
  /// For people: version, way, and why.
  const std::string& summary() const { return summary_; }
  /// Where payloads must lie.
  Slab& slab() const { return *slab_; }

  /// The file is open with O_DIRECT. `unsupported` when cuFile does not take it. On any thread.
  Result<CuFileHandle> add(const File& file) const;
  /// Moves operations whose `handle` is a CuFileHandle's and whose buffer is in slab(). Lives as long as
  /// this.
  IoMover mover();
  /// For people: an error of such an operation, which is an errno or a code of cuFile's own.
  static std::string words(int error);

  static constexpr const char* kLibrary = "libcufile.so.0";
  /// Cheap, and touches no library: whether this host could do without compatibility mode.
  static bool host_has_driver();

 private:
  CuFile(Device& device, const CuFileCalls& calls) : device_(device), calls_(calls) {}
  Status start(Compat compat);
  Status open_driver(Compat compat);
  void register_slab();
  int64_t move(const IoOperation& operation, uint32_t moved) const;

  Device& device_;
  const CuFileCalls& calls_;
  Slab* slab_ = nullptr;
  bool p2p_ = false;
  bool registered_ = false;
  std::string summary_;
};

}  // namespace tokendepot
