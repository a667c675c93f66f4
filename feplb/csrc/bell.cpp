#include "bell.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

namespace feplb {

void futex_wait(std::atomic<uint32_t>* word, uint32_t seen, TimePoint deadline) {
  const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(deadline - Clock::now());
  if (left.count() <= 0) return;
  timespec timeout;
  timeout.tv_sec = static_cast<time_t>(left.count() / 1000000000);
  timeout.tv_nsec = static_cast<long>(left.count() % 1000000000);
  // Not FUTEX_PRIVATE: the word may lie in memory shared with other processes.
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT, seen, &timeout, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace feplb
