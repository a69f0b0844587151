// What the reasons of failures are called in logs, statistics and the C interface.
#include "tokendepot/depot.h"

namespace tokendepot {

const char* name(ItemFailure::Reason reason) {
  switch (reason) {
    case ItemFailure::Reason::absent:
      return "absent";
    case ItemFailure::Reason::mismatch:
      return "mismatch";
    case ItemFailure::Reason::corrupt:
      return "corrupt";
    case ItemFailure::Reason::io_error:
      return "io_error";
    case ItemFailure::Reason::timed_out:
      return "timed_out";
    case ItemFailure::Reason::cancelled:
      return "cancelled";
    case ItemFailure::Reason::dropped:
      return "dropped";
    case ItemFailure::Reason::pinned:
      return "pinned";
  }
  return "unknown";
}

}  // namespace tokendepot
