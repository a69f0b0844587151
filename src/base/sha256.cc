#include "base/sha256.h"

#include <openssl/evp.h>

#include <memory>

#include "base/bytes.h"
#include "base/check.h"

namespace tokendepot {
namespace {

struct ContextDeleter {
  void operator()(EVP_MD_CTX* context) const { EVP_MD_CTX_free(context); }
};

// Fetched once: a lookup by name in every call would cost more than hashing a chunk.
const EVP_MD* algorithm() {
  static const EVP_MD* const fetched = EVP_MD_fetch(nullptr, "SHA256", nullptr);
  TD_CHECK(fetched != nullptr);
  return fetched;
}

EVP_MD_CTX* context() {
  thread_local const std::unique_ptr<EVP_MD_CTX, ContextDeleter> owned(EVP_MD_CTX_new());
  TD_CHECK(owned != nullptr);
  return owned.get();
}

}  // namespace

Sha256::Sha256() {
  TD_CHECK(EVP_DigestInit_ex(context(), algorithm(), nullptr) == 1);
}

Sha256& Sha256::update(std::span<const std::byte> bytes) {
  TD_CHECK(EVP_DigestUpdate(context(), bytes.data(), bytes.size()) == 1);
  return *this;
}

Sha256& Sha256::update_le(uint64_t value, size_t bytes) {
  TD_CHECK(bytes >= 1 && bytes <= sizeof(value));
  std::array<std::byte, sizeof(value)> encoded;
  put_le(std::span<std::byte>(encoded), 0, value);
  return update(std::span<const std::byte>(encoded).first(bytes));
}

std::array<uint8_t, 32> Sha256::finish() {
  std::array<uint8_t, 32> digest;
  unsigned size = 0;
  TD_CHECK(EVP_DigestFinal_ex(context(), digest.data(), &size) == 1 && size == digest.size());
  return digest;
}

std::array<uint8_t, 32> sha256(std::string_view text) {
  return Sha256().update(text).finish();
}

}  // namespace tokendepot
