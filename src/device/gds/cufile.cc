#include "device/gds/cufile.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "base/check.h"
#include "base/errors.h"
#include "io/io_thread.h"

namespace tokendepot {
namespace {

// The part of cuFile's binary interface that is used here, as NVIDIA's cufile.h 1.20 defines it.
struct CuError {
  int code = 0;  // 0 or above 5000
  int cuda = 0;  // with kCudaError
};
struct CuDescriptor {
  int type = 1;  // a file descriptor
  union {
    int fd;
    void* other;
  } file{};
  const void* operations = nullptr;
};
struct CuProperties {
  unsigned driver_major = 0;
  unsigned driver_minor = 0;
  size_t poll_threshold = 0;
  size_t most_direct_bytes = 0;
  unsigned file_systems = 0;
  unsigned control = 0;
  unsigned features = 0;
  unsigned device_cache_kib = 0;
  unsigned buffer_cache_kib = 0;
  unsigned pinned_kib = 0;
  unsigned batch = 0;
  unsigned batch_timeout_ms = 0;
  unsigned room_for_later_versions[64] = {};
};

constexpr int kCodeBase = 5000;
constexpr int kNoDriver = 5001;
constexpr int kCudaError = 5011;
constexpr int kAlreadyOpen = 5026;
// Bits of CuProperties::control: each of them lets I/O go through host memory.
constexpr unsigned kAllowCompat = 1u << 1;
constexpr unsigned kPosixOnly = 1u << 2;
constexpr unsigned kFallback = 1u << 4;
// Numbers of boolean parameters.
constexpr int kParamAllowCompat = 1;
constexpr int kParamForceCompat = 2;
constexpr int kParamFallback = 13;

std::string words_of(const CuError& error) {
  switch (error.code) {
    case kNoDriver:
      return "the nvidia-fs driver is not loaded";
    case 5004:
    case 5005:
      return "the version of the nvidia-fs driver does not fit";
    case 5007:
      return "this platform cannot do it";
    case 5008:
      return "not on this file system";
    case 5009:
      return "this GPU cannot do it";
    case kCudaError:
      return fmt::format("CUDA error {}", error.cuda);
    case 5020:
      return "the file is not open with O_DIRECT";
    case 5025:
      return "no permission";
    case 5034:
      return "switched off for this file in cufile.json";
    case 5036:
      return "GPU memory cannot be pinned";
    default:
      return fmt::format("cuFile error {}", error.code);
  }
}

}  // namespace

struct CuFileCalls {
  CuError (*driver_open)() = nullptr;
  CuError (*properties)(CuProperties*) = nullptr;
  CuError (*handle_register)(void**, CuDescriptor*) = nullptr;
  void (*handle_deregister)(void*) = nullptr;
  CuError (*buffer_register)(const void*, size_t, int) = nullptr;
  CuError (*buffer_deregister)(const void*) = nullptr;
  ssize_t (*read)(void*, void*, size_t, off_t, off_t) = nullptr;
  ssize_t (*write)(void*, const void*, size_t, off_t, off_t) = nullptr;
  // Not in every release.
  CuError (*set_flag)(int, bool) = nullptr;
  CuError (*get_flag)(int, bool*) = nullptr;
  CuError (*version)(int*) = nullptr;
};

namespace {

std::mutex& library_mutex() {
  static std::mutex mutex;
  return mutex;
}

/// Loaded once a process and name, never unloaded. Under library_mutex().
Result<const CuFileCalls*> load(const std::string& name) {
  static std::map<std::string, CuFileCalls> loaded;
  if (const auto found = loaded.find(name); found != loaded.end()) return &found->second;
  void* const library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* const why = dlerror();
    return fail(ErrorKind::unsupported, "cuFile cannot be loaded ({})", why != nullptr ? why : name);
  }
  CuFileCalls calls;
  const char* missing = nullptr;
  const auto take = [&](auto& into, const char* symbol, bool required = true) {
    into = reinterpret_cast<std::remove_reference_t<decltype(into)>>(dlsym(library, symbol));
    if (into == nullptr && required) missing = symbol;
  };
  take(calls.driver_open, "cuFileDriverOpen");
  take(calls.properties, "cuFileDriverGetProperties");
  take(calls.handle_register, "cuFileHandleRegister");
  take(calls.handle_deregister, "cuFileHandleDeregister");
  take(calls.buffer_register, "cuFileBufRegister");
  take(calls.buffer_deregister, "cuFileBufDeregister");
  take(calls.read, "cuFileRead");
  take(calls.write, "cuFileWrite");
  take(calls.set_flag, "cuFileSetParameterBool", false);
  take(calls.get_flag, "cuFileGetParameterBool", false);
  take(calls.version, "cuFileGetVersion", false);
  if (missing != nullptr) {
    dlclose(library);
    return fail(ErrorKind::unsupported, "{} has no {}: expected NVIDIA's cuFile", name, missing);
  }
  return &loaded.emplace(name, calls).first->second;
}

/// Runs `body` where the device is current and waits for it: the caller's thread keeps the device that it
/// has. False: the system refused the thread, and nothing was done.
template <typename Body>
bool on_own_thread(Device& device, Body& body) {
  auto errand = [&] {
    device.enter_thread();
    body();
  };
  return run_on_io_thread(errand, "td-cufile");
}

}  // namespace

CuFileHandle::CuFileHandle(CuFileHandle&& other) noexcept
    : calls_(other.calls_),
      handle_(std::exchange(other.handle_, nullptr)),
      fd_(std::exchange(other.fd_, -1)) {}

CuFileHandle& CuFileHandle::operator=(CuFileHandle&& other) noexcept {
  std::swap(calls_, other.calls_);
  std::swap(handle_, other.handle_);
  std::swap(fd_, other.fd_);
  return *this;
}

CuFileHandle::~CuFileHandle() {
  if (handle_ != nullptr) calls_->handle_deregister(handle_);
  if (fd_ >= 0) ::close(fd_);
}

bool CuFile::host_has_driver() {
  return access("/proc/driver/nvidia-fs", F_OK) == 0;
}

Result<std::unique_ptr<CuFile>> CuFile::open(Device& device, Compat compat, const std::string& library) {
  const std::lock_guard lock(library_mutex());
  const auto calls = load(library);
  if (!calls) return std::unexpected(calls.error());
  std::unique_ptr<CuFile> opened(new CuFile(device, **calls));
  Status started;
  auto start = [&] { started = opened->start(compat); };
  if (!on_own_thread(device, start)) return thread_refused("cuFile's first thread");
  if (!started) return std::unexpected(started.error());
  return opened;
}

Status CuFile::start(Compat compat) {
  if (auto driver = open_driver(compat); !driver) return driver;
  slab_ = device_.make_file_slab();
  if (slab_ == nullptr) return fail(ErrorKind::unsupported, "the paged cache is not in GPU memory");
  register_slab();
  return {};
}

Status CuFile::open_driver(Compat compat) {
  const auto open = [this](bool allow_compat) {
    if (calls_.set_flag != nullptr) {
      // Refused when the driver is open already; its properties tell what is in effect.
      calls_.set_flag(kParamAllowCompat, allow_compat);
      if (!allow_compat) calls_.set_flag(kParamFallback, false);
    }
    CuError error = calls_.driver_open();
    if (error.code == kAlreadyOpen) error = {};
    return error;
  };
  CuError error = open(false);
  std::string why_compat;
  if (error.code != 0) {
    why_compat = words_of(error);
    if (compat == Compat::forbidden) return fail(ErrorKind::unsupported, "{}", why_compat);
    if (calls_.set_flag != nullptr) error = open(true);
    if (error.code != 0) return fail(ErrorKind::unsupported, "{}", words_of(error));
  }
  CuProperties properties;
  error = calls_.properties(&properties);
  if (error.code != 0) return fail(ErrorKind::unsupported, "{}", words_of(error));
  bool forced = false;
  if (calls_.get_flag != nullptr) calls_.get_flag(kParamForceCompat, &forced);
  p2p_ = !forced && (properties.control & (kAllowCompat | kPosixOnly | kFallback)) == 0;
  if (!p2p_ && why_compat.empty())
    why_compat = fmt::format("its settings {} compatibility mode", forced ? "force" : "allow");
  if (!p2p_ && compat == Compat::forbidden) return fail(ErrorKind::unsupported, "{}", why_compat);
  int version = 0;
  if (calls_.version != nullptr) calls_.version(&version);
  summary_ = fmt::format("cuFile {}.{} {}{}", version / 1000, version % 1000 / 10,
                         p2p_ ? "point to point" : "in compatibility mode: ", why_compat);
  return {};
}

void CuFile::register_slab() {
  const CuError error = calls_.buffer_register(slab_->base(), slab_->size(), 0);
  registered_ = error.code == 0;
  if (registered_) return;
  // The library then stages in GPU memory of its own: one copy more, and nothing else changes.
  summary_ += fmt::format(", slab not registered ({})", words_of(error));
}

CuFile::~CuFile() {
  if (slab_ == nullptr) return;
  auto deregister = [this] { calls_.buffer_deregister(slab_->base()); };
  // Without a thread it happens here: memory that is registered must not be freed.
  if (registered_ && !on_own_thread(device_, deregister)) deregister();
  device_.drop_file_slab();
}

Result<CuFileHandle> CuFile::add(const File& file) const {
  // cuFile refuses files with flags that it does not know, O_NOFOLLOW or O_NONBLOCK among them (error 5019):
  // it gets a descriptor of the same file without them.
  const int mode = ::fcntl(file.fd(), F_GETFL) & O_ACCMODE;
  const int fd = ::open(fmt::format("/proc/self/fd/{}", file.fd()).c_str(), mode | O_DIRECT | O_CLOEXEC);
  if (fd < 0) return fail_errno(errno, "cannot open {} once more for cuFile", file.path());
  CuFileHandle taken(&calls_, nullptr, fd);
  CuDescriptor descriptor;
  descriptor.file.fd = fd;
  const CuError error = calls_.handle_register(&taken.handle_, &descriptor);
  if (error.code != 0 || !taken)
    return fail(ErrorKind::unsupported, "cuFile does not take {}: {}", file.path(), words_of(error));
  return taken;
}

IoMover CuFile::mover() {
  return {.enter = [](void* self) { static_cast<CuFile*>(self)->device_.enter_thread(); },
          .move = [](void* self, const IoOperation& operation,
                     uint32_t moved) { return static_cast<const CuFile*>(self)->move(operation, moved); },
          .context = this};
}

int64_t CuFile::move(const IoOperation& operation, uint32_t moved) const {
  TD_CHECK(operation.handle != nullptr && operation.buffer >= slab_->base() &&
           operation.buffer + operation.bytes <= slab_->base() + slab_->size());
  const auto at = static_cast<off_t>(operation.offset + moved);
  const off_t place = operation.buffer - slab_->base() + moved;
  const size_t wanted = operation.bytes - moved;
  errno = 0;
  const ssize_t result = operation.write ? calls_.write(operation.handle, slab_->base(), wanted, at, place)
                                         : calls_.read(operation.handle, slab_->base(), wanted, at, place);
  if (result >= 0) return result <= static_cast<ssize_t>(wanted) ? result : -EIO;
  // -1 comes with errno; other values are cuFile's own codes, all of them larger than any errno.
  if (result != -1) return result;
  return errno != 0 ? -errno : -EIO;
}

std::string CuFile::words(int error) {
  return error > kCodeBase ? words_of({error, 0}) : std::strerror(error);
}

}  // namespace tokendepot
