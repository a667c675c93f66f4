// What a test program needs and no more: named tests, checks that say what they saw, a main().
//
//   TEST(counts_are_read_back) { CHECK_EQ(board.published_seq(0, 1), 1u); }
//
// A test passes unless it throws. The program runs the tests named on its command line, all without
// arguments, and lists them with --list; it fails if nothing ran.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>

#include "../../feplb/csrc/error.h"

namespace feplb_test {

struct CheckFailed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Registration {
  Registration(const std::string& name, std::function<void()> run);
};

// A line for the test's report, such as how many interleavings it ran.
void note(const std::string& text);

// Expects `action` to throw an error of type E whose text contains `part`.
template <typename E>
void check_throws(const std::function<void()>& action, const std::string& part) {
  try {
    action();
  } catch (const E& error) {
    if (std::string(error.what()).find(part) != std::string::npos) return;
    throw CheckFailed(feplb::cat("expected an error with \"", part, "\", got: ", error.what()));
  }
  throw CheckFailed(feplb::cat("expected an error with \"", part, "\", got none"));
}

}  // namespace feplb_test

#define TEST(name)                                                                    \
  static void test_##name();                                                          \
  static const ::feplb_test::Registration registration_of_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition, ...)                                                         \
  do {                                                                                \
    if (!(condition))                                                                 \
      throw ::feplb_test::CheckFailed(                                                \
          ::feplb::cat(__FILE__, ":", __LINE__, " `" #condition "`: ", __VA_ARGS__)); \
  } while (0)

#define CHECK_EQ(left, right) CHECK((left) == (right), "got ", (left), ", expected ", (right))
