// Somebody else's work on the same card: bf16 matrix products of cuBLAS, one after the other.
#pragma once

#include <memory>
#include <string>

#include "gpu/cuda.h"

namespace tokendepot::bench {

class Matmul {
 public:
  /// Square products of order `n`. nullptr without a cuBLAS; `why_not` then says in one sentence what was
  /// looked for.
  static std::unique_ptr<Matmul> make(int n, std::string& why_not);
  ~Matmul();
  Matmul(const Matmul&) = delete;
  Matmul& operator=(const Matmul&) = delete;

  /// Milliseconds of one product, over at least `seconds` of them.
  double milliseconds(double seconds);
  double tflops(double ms) const;

  /// Products one behind the other, which wait() waits for.
  void enqueue(int count);
  void wait();

 private:
  Matmul() = default;
  double timed(int count);

  struct Library;
  std::unique_ptr<Library> library_;
  int n_ = 0;
  void* memory_ = nullptr;
  double first_ms_ = 0;
  Stream stream_;
};

}  // namespace tokendepot::bench
