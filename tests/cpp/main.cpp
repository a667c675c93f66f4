#include <chrono>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#include "check.h"

namespace feplb_test {
namespace {

struct TestCase {
  std::string name;
  std::function<void()> run;
};

std::vector<TestCase>& all_tests() {
  static std::vector<TestCase> tests;
  return tests;
}

std::string notes;

bool is_wanted(const TestCase& test, int argc, char** argv) {
  if (argc == 1) return true;
  for (int i = 1; i < argc; ++i) {
    if (test.name == argv[i]) return true;
  }
  return false;
}

bool passes(const TestCase& test) {
  notes.clear();
  const auto start = std::chrono::steady_clock::now();
  std::string error;
  try {
    test.run();
  } catch (const std::exception& caught) {
    error = caught.what();
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  std::printf("%s %s (%.2f s)%s\n", error.empty() ? "ok" : "FAILED", test.name.c_str(),
              took.count(), notes.c_str());
  if (!error.empty()) std::printf("  %s\n", error.c_str());
  std::fflush(stdout);
  return error.empty();
}

}  // namespace

Registration::Registration(const std::string& name, std::function<void()> run) {
  all_tests().push_back(TestCase{name, std::move(run)});
}

void note(const std::string& text) { notes += "; " + text; }

int run_tests(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--list") == 0) {
    for (const TestCase& test : all_tests()) std::printf("%s\n", test.name.c_str());
    return 0;
  }
  int num_run = 0;
  int num_failed = 0;
  for (const TestCase& test : all_tests()) {
    if (!is_wanted(test, argc, argv)) continue;
    ++num_run;
    if (!passes(test)) ++num_failed;
  }
  const bool all_found = argc == 1 || num_run == argc - 1;
  if (!all_found) std::printf("FAILED: %d of %d named tests exist\n", num_run, argc - 1);
  return num_run > 0 && num_failed == 0 && all_found ? 0 : 1;
}

}  // namespace feplb_test

int main(int argc, char** argv) { return feplb_test::run_tests(argc, argv); }
