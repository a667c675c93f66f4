// The watchdog: notices what no wait can notice itself. A dead peer (its pidfd becomes readable), a
// failure another rank reported on the board, and a stream wait past its deadline (a wait that lies
// in a stream has none of its own). It marks the call poisoned and lifts this rank's flags, again
// and again until the streams have drained; it never calls the driver.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "count_board.h"
#include "failure.h"
#include "shared_memory.h"

namespace feplb {

class Watchdog {
 public:
  // pids[r] = process of rank r, to be watched; 0, or this process, is not.
  Watchdog(int rank, const std::vector<pid_t>& pids, CountBoard& board, Device& device,
           Failure& failure, double deadline_s);

  // A wait that lies in a stream, or is about to: `what` is the sentence to raise when `deadline`
  // passes first.
  void watch(const Flag* flag, Epoch epoch, TimePoint deadline, std::string what);

  void look();               // one look at waits, abort record and lifted flags; any thread
  void peer_died(int rank);  // unless that rank had closed its Balancer before
  void run() noexcept;       // the thread's body
  void stop() noexcept;
  // Once the thread has ended.
  bool is_alive(int rank) const;
  void close_fds() noexcept;

 private:
  struct Peer {
    int rank;
    pid_t pid;
    Fd pidfd;
  };
  struct StreamWait {
    const Flag* flag;
    Epoch epoch;
    TimePoint deadline;
    std::string what;
  };

  void look_at_peers();
  void look_at_waits();
  void nap();
  void end_if_stuck();

  const int rank_;
  const Clock::duration patience_;  // between a failure and the end of a process that is stuck
  const std::vector<pid_t> pids_;
  CountBoard& board_;
  Device& device_;
  Failure& failure_;
  std::vector<Peer> peers_;
  Fd wake_;  // eventfd: stop() ends a nap
  std::mutex mutex_;
  std::vector<StreamWait> waits_;
  std::atomic<int64_t> end_ns_{0};  // when a stuck process is ended; 0: it is not stuck
  std::atomic<bool> stopping_{false};
};

}  // namespace feplb
