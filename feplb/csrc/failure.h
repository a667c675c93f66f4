// One rank's failure state: the poison mark, the error that explains it, and the lifting of flags.
//
// Order matters (design: mark before lift). The mark and its text come first, so that whoever gets
// past a lifted wait finds them; then this rank's inbound flags are lifted by 2^30, which satisfies
// every wait that lies in a stream; late pushes overwrite lifted flags, so the watchdog lifts again
// until the streams have drained. No driver call is made here.
#pragma once

#include <atomic>
#include <mutex>
#include <string>

#include "count_board.h"

namespace feplb {

class Failure {
 public:
  Failure(CountBoard& board, int rank, Bell& caller_bell)
      : board_(board), rank_(rank), caller_bell_(caller_bell) {}

  // The call that may have waits in streams; lifted flags must pass for its epoch.
  void note_call(uint64_t seq) { seq_.store(seq, std::memory_order_relaxed); }

  // First call wins; tells the other ranks, wakes every local waiter. Any thread.
  void poison(const std::string& text);

  // Lifts every inbound flag past this call's epoch and wakes who sleeps on it.
  void lift();

  bool poisoned() const { return poisoned_.load(std::memory_order_acquire); }
  const std::atomic<bool>& mark() const { return poisoned_; }
  std::string text() const;

 private:
  CountBoard& board_;
  int rank_;
  Bell& caller_bell_;
  mutable std::mutex mutex_;
  std::string text_;
  std::atomic<uint64_t> seq_{0};
  std::atomic<bool> poisoned_{false};
};

}  // namespace feplb
