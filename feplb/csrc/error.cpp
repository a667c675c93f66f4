#include "error.h"

#include <system_error>

namespace feplb {

std::string errno_text(const std::string& what, int error_number) {
  // Not strerror: its buffer is shared between threads.
  return cat(what, ": ", std::generic_category().message(error_number));
}

}  // namespace feplb
