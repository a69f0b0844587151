// Assertions that stay on in release builds: a broken invariant of the engine is a bug, not an error to
// handle.
#pragma once

#include <cstdio>
#include <cstdlib>

#define TD_CHECK(condition)                                                                          \
  do {                                                                                               \
    if (!(condition)) [[unlikely]] {                                                                 \
      std::fprintf(stderr, "tokendepot: %s:%d: check failed: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                                  \
    }                                                                                                \
  } while (false)
