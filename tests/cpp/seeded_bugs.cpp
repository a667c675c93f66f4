// Bugs on purpose, one per sanitizer: a run under a sanitizer means nothing unless it fails here.
//   seeded_bugs race | overflow | overrun
#include <cstdio>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

namespace {

int race() {
  int shared = 0;
  std::thread other([&shared] { ++shared; });
  ++shared;
  other.join();
  return shared == 3;
}

int overflow() {
  volatile int largest = std::numeric_limits<int>::max();
  return largest + 1 == 0;
}

int overrun() {
  const std::vector<int> three(3);
  volatile std::size_t idx = 3;
  return three.data()[idx] == 42;
}

}  // namespace

int main(int argc, char** argv) {
  const char* bug = argc == 2 ? argv[1] : "";
  if (std::strcmp(bug, "race") == 0) return race();
  if (std::strcmp(bug, "overflow") == 0) return overflow();
  if (std::strcmp(bug, "overrun") == 0) return overrun();
  std::fprintf(stderr, "which bug?\n");
  return 2;
}
