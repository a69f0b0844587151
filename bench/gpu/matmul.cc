#include "gpu/matmul.h"

#include <dlfcn.h>
#include <library_types.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace tokendepot::bench {

// Found when the program runs: the card's machine may have it in a Python environment only. The signatures
// and numbers are those of NVIDIA's cublas_v2.h and cublas_api.h.
struct Matmul::Library {
  static constexpr int kNoTranspose = 0;
  static constexpr int kCompute32F = 68;
  static constexpr int kDefaultAlgorithm = -1;

  void* handle = nullptr;
  void* context = nullptr;
  int (*create)(void**) = nullptr;
  int (*destroy)(void*) = nullptr;
  int (*set_stream)(void*, cudaStream_t) = nullptr;
  int (*gemm)(void*, int, int, int, int, int, const void*, const void*, cudaDataType_t, int, const void*,
              cudaDataType_t, int, const void*, void*, cudaDataType_t, int, int, int) = nullptr;

  template <typename Function>
  bool find(const char* name, Function*& into) {
    into = reinterpret_cast<Function*>(dlsym(handle, name));
    return into != nullptr;
  }
};

std::unique_ptr<Matmul> Matmul::make(int n, std::string& why_not) {
  auto library = std::make_unique<Library>();
  constexpr std::array kNames{"libcublas.so.13", "libcublas.so.12", "libcublas.so"};
  for (const char* name : kNames) {
    if (library->handle == nullptr) library->handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  }
  if (library->handle == nullptr) {
    why_not = "no libcublas.so.13 or .12 was found on the library path";
    return nullptr;
  }
  if (!library->find("cublasCreate_v2", library->create) ||
      !library->find("cublasDestroy_v2", library->destroy) ||
      !library->find("cublasSetStream_v2", library->set_stream) ||
      !library->find("cublasGemmEx", library->gemm) || library->create(&library->context) != 0) {
    why_not = "the libcublas that was found cannot be used";
    return nullptr;
  }
  std::unique_ptr<Matmul> made(new Matmul);
  if (library->set_stream(library->context, made->stream_) != 0) stop("cublasSetStream failed");
  made->library_ = std::move(library);
  made->n_ = n;
  const auto values = static_cast<size_t>(n) * static_cast<size_t>(n);
  must(cudaMalloc(&made->memory_, 3 * values * 2), "device memory for the products");
  // Random values of magnitude 1 to 2: zeros would let the card run faster than it does at work.
  std::vector<uint16_t> random(2 * values);
  fill_random(std::as_writable_bytes(std::span(random)));
  for (uint16_t& value : random) value = static_cast<uint16_t>((value & 0x807F) | 0x3F80);
  must(cudaMemcpy(made->memory_, random.data(), random.size() * 2, cudaMemcpyHostToDevice),
       "the products' input");
  made->timed(3);
  made->first_ms_ = made->timed(10);
  return made;
}

Matmul::~Matmul() {
  cudaFree(memory_);
  if (library_ != nullptr) library_->destroy(library_->context);
}

void Matmul::enqueue(int count) {
  const float one = 1, zero = 0;
  auto* const a = static_cast<uint16_t*>(memory_);
  const auto values = static_cast<size_t>(n_) * static_cast<size_t>(n_);
  for (int i = 0; i < count; ++i) {
    const int status =
        library_->gemm(library_->context, Library::kNoTranspose, Library::kNoTranspose, n_, n_, n_, &one, a,
                       CUDA_R_16BF, n_, a + values, CUDA_R_16BF, n_, &zero, a + 2 * values, CUDA_R_16BF, n_,
                       Library::kCompute32F, Library::kDefaultAlgorithm);
    if (status != 0) stop("cublasGemmEx failed with status " + std::to_string(status));
  }
}

void Matmul::wait() {
  must(cudaStreamSynchronize(stream_), "the products");
}

double Matmul::timed(int count) {
  const Event begin(cudaEventDefault), end(cudaEventBlockingSync);
  must(cudaEventRecord(begin, stream_), "an event");
  enqueue(count);
  must(cudaEventRecord(end, stream_), "an event");
  must(cudaEventSynchronize(end), "the products");
  float ms = 0;
  must(cudaEventElapsedTime(&ms, begin, end), "the products' time");
  return static_cast<double>(ms) / count;
}

double Matmul::milliseconds(double seconds) {
  return timed(std::max(3, static_cast<int>(std::ceil(seconds * 1000 / first_ms_))));
}

double Matmul::tflops(double ms) const {
  return 2 * std::pow(static_cast<double>(n_), 3) / (ms * 1e9);
}

}  // namespace tokendepot::bench
