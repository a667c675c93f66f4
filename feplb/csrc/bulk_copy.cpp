#include "bulk_copy.h"

#include <cstdint>
#include <cstring>

// The sanitizers do not see streaming stores; they check the same calls on memcpy.
#if defined(__SSE2__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define FEPLB_STREAMS_PAST_CACHES
#include <emmintrin.h>
#endif

namespace feplb {

#ifdef FEPLB_STREAMS_PAST_CACHES
namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kStreams = 4;
constexpr std::size_t kWorthIt = 64 * 1024;  // below it a copy mostly stays in the caches

// `dst` is a multiple of 16.
void stream_line(std::byte* dst, const std::byte* src) {
  for (std::size_t at = 0; at < kLine; at += sizeof(__m128i)) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(dst + at),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + at)));
  }
}

}  // namespace

void bulk_copy(std::byte* dst, const std::byte* src, std::size_t bytes) {
  const std::size_t part = bytes / kStreams / kLine * kLine;
  if (bytes < kWorthIt || reinterpret_cast<std::uintptr_t>(dst) % sizeof(__m128i) != 0) {
    std::memcpy(dst, src, bytes);
    return;
  }
  for (std::size_t at = 0; at < part; at += kLine) {
    for (std::size_t stream = 0; stream < kStreams; ++stream) {
      stream_line(dst + stream * part + at, src + stream * part + at);
    }
  }
  std::memcpy(dst + kStreams * part, src + kStreams * part, bytes - kStreams * part);
  _mm_sfence();
}
#else
void bulk_copy(std::byte* dst, const std::byte* src, std::size_t bytes) {
  std::memcpy(dst, src, bytes);
}
#endif

}  // namespace feplb
