// bulk_copy: every byte, and no other, at every alignment and around the sizes where its ways meet.
#include <cstring>

#include "../../feplb/csrc/bulk_copy.h"
#include "check.h"

namespace feplb_test {
namespace {

constexpr std::size_t kMargin = 256;

std::byte pattern(std::size_t i) { return static_cast<std::byte>((i * 131 + i / 251) & 0xff); }

// First byte that is wrong, in and around what was copied; -1: none.
std::ptrdiff_t first_wrong(std::size_t bytes, std::size_t dst_offset, std::size_t src_offset) {
  const std::size_t whole = bytes + 2 * kMargin;
  std::vector<std::byte> src(whole), dst(whole, std::byte{0x5a});
  for (std::size_t i = 0; i < whole; ++i) src[i] = pattern(i);
  std::vector<std::byte> expected = dst;
  std::memcpy(expected.data() + dst_offset, src.data() + src_offset, bytes);
  feplb::bulk_copy(dst.data() + dst_offset, src.data() + src_offset, bytes);
  for (std::size_t i = 0; i < whole; ++i) {
    if (dst[i] != expected[i]) return static_cast<std::ptrdiff_t>(i);
  }
  return -1;
}

TEST(copies_are_whole_and_touch_nothing_else) {
  constexpr std::size_t kBigFrom = 64 * 1024;
  std::vector<std::size_t> sizes{0, 1, 63, 64, 65, 4096, kBigFrom - 1, kBigFrom, kBigFrom + 1};
  for (std::size_t more : {15, 16, 255, 256, 257, 1000}) sizes.push_back(kBigFrom + more);
  sizes.push_back((1 << 20) + 192);
  for (const std::size_t bytes : sizes) {
    for (const std::size_t dst_offset : {0, 1, 4, 8, 16, 24, 64}) {
      for (const std::size_t src_offset : {0, 1, 4, 16, 40}) {
        const auto wrong = first_wrong(bytes, dst_offset, src_offset);
        CHECK(wrong < 0, feplb::cat(bytes, " bytes from +", src_offset, " to +", dst_offset,
                                    ": byte ", wrong, " is wrong"));
      }
    }
  }
}

}  // namespace
}  // namespace feplb_test
