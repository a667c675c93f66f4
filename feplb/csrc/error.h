// How feplb's C++ core fails: by throwing, on the thread that noticed, with the values that were
// wrong. Nothing here ends the process, and no exception crosses a thread or a destructor: a thread
// stores what it caught and the caller's thread rethrows it (mover.h).
//
//   UserError   the caller handed in something wrong        -> ValueError in Python
//   Error       the machine, a peer or the protocol failed   -> RuntimeError in Python
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace feplb {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A call of a lane's driver failed.
struct DeviceError : Error {
  using Error::Error;
};

struct UserError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// cat("rank ", 3, ": ...") -> one string.
template <typename... Parts>
std::string cat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// "open(/dev/shm/x): No such file or directory" for the errno of a failed system call.
std::string errno_text(const std::string& what, int error_number);

}  // namespace feplb

// A broken invariant of our own: file, line, condition and the values involved.
#define FEPLB_CHECK(condition, ...)                                                   \
  do {                                                                                \
    if (!(condition))                                                                 \
      throw ::feplb::Error(                                                           \
          ::feplb::cat(__FILE__, ":", __LINE__, " `" #condition "`: ", __VA_ARGS__)); \
  } while (0)
