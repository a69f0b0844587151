// Stands in for GPU memory and its link in builds without nvcc.
#include "base/errors.h"
#include "workload/cache_memory.h"
#include "workload/link.h"

namespace tokendepot {
namespace {

auto no_cuda(uint32_t ordinal) {
  return fail(ErrorKind::unsupported, "device=cuda:{} is not possible: this build of Tokendepot has no CUDA",
              ordinal);
}

}  // namespace

Result<std::unique_ptr<CacheMemory>> make_cuda_memory(uint32_t ordinal, uint64_t /*bytes*/) {
  return no_cuda(ordinal);
}

Result<std::unique_ptr<Link>> Link::make(uint32_t ordinal, uint64_t /*bytes*/) {
  return no_cuda(ordinal);
}

}  // namespace tokendepot
