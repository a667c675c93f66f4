// Zero-filled memory for boards and arenas, aligned as shared memory is.
#pragma once

#include <cstddef>
#include <vector>

namespace feplb_test {

class Memory {
 public:
  explicit Memory(std::size_t bytes) : lines_(bytes / sizeof(Line) + 1) {}
  std::byte* data() { return lines_.data()->bytes; }

 private:
  struct alignas(64) Line {
    std::byte bytes[64] = {};
  };
  std::vector<Line> lines_;
};

}  // namespace feplb_test
