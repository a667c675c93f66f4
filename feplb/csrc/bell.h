// A word to sleep on: how a thread that shares its core waits without spinning (measured: a
// spinning mover doubles the GEMM's time on a shared core, a futex costs nothing). Lives in shared
// memory or in one process; every wait has a deadline.
//
//   field   written by   memory order
//   rings   ringers      seq_cst add; the sleeper compares it with what it saw before its last poll
//   wanted  the sleeper  seq_cst; the reasons it wants to be woken for, 0 while it is awake (or
//                        more than it asked for, see expect())
// seq_cst because ringer and sleeper each write one word and read the other: with less, both could
// miss (the ringer sees nobody asleep, the sleeper sees no ring).
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace feplb {

using Clock = std::chrono::steady_clock;
using TimePoint = Clock::time_point;

inline Clock::duration duration_of(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

// Sleeps until *word differs from `seen`, a wake, a signal or the deadline, whichever is first.
void futex_wait(std::atomic<uint32_t>* word, uint32_t seen, TimePoint deadline);
void futex_wake(std::atomic<uint32_t>* word);

class Bell {
 public:
  uint32_t rings() const { return rings_.load(); }

  void ring(uint32_t reason) {
    rings_.fetch_add(1);
    if ((wanted_.load() & reason) != 0) futex_wake(&rings_);
  }

  // Makes a sleeper wake for `reason` from now on, without waking it. The add comes first: a
  // sleeper that overwrites the reason afterwards sees it and does not sleep.
  void expect(uint32_t reason) {
    rings_.fetch_add(1);
    wanted_.fetch_or(reason);
  }

  // `seen` must be read before the last poll that found nothing to do.
  void sleep(uint32_t seen, uint32_t reasons, TimePoint deadline) {
    wanted_.store(reasons);
    if (rings_.load() == seen) futex_wait(&rings_, seen, deadline);
    wanted_.store(0);
  }

 private:
  std::atomic<uint32_t> rings_{0};
  std::atomic<uint32_t> wanted_{0};
};

static_assert(std::atomic<uint32_t>::is_always_lock_free, "shared-memory words must be lock free");

}  // namespace feplb
