#include "device.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <cstring>

namespace feplb {
namespace {
constexpr uint32_t kAnyReason = ~0u;
// Longest sleep before a waiter looks at the poison mark again, whoever forgot to ring.
constexpr std::chrono::milliseconds kLongestNap{200};
// About what it costs to sleep on a futex and to be woken by another core.
constexpr std::chrono::microseconds kPollBriefly{50};
}  // namespace

void Device::write_flags(StreamKind stream, const std::vector<Flag*>& flags, Epoch epoch) {
  for (Flag* flag : flags) write_flag(stream, flag, epoch);
}

void Device::put(std::byte* dst, const std::byte* src, std::size_t bytes) {
  std::memcpy(dst, src, bytes);
}

void Device::get(std::byte* dst, const std::byte* src, std::size_t bytes) {
  std::memcpy(dst, src, bytes);
}

Clock::duration Device::longest_nap() const { return kLongestNap; }

WaitResult Device::wait_host(Bell& bell, const std::function<bool()>& done,
                             const WaitLimits& limits) {
  while (true) {
    const uint32_t seen = bell.rings();
    if (done()) return WaitResult::kReached;
    if (limits.poisoned->load(std::memory_order_acquire)) return WaitResult::kPoisoned;
    const TimePoint now = Clock::now();
    if (now >= limits.deadline) return WaitResult::kTimedOut;
    bell.sleep(seen, kAnyReason, std::min(limits.deadline, now + longest_nap()));
  }
}

bool poll_briefly(const std::function<bool()>& done) {
  const TimePoint end = Clock::now() + kPollBriefly;
  while (!done()) {
    if (Clock::now() >= end) return false;
    sched_yield();
  }
  return true;
}

void name_this_thread(const std::string& name) {
  pthread_setname_np(pthread_self(), name.substr(0, 15).c_str());
}

}  // namespace feplb
