// The relay: how ranks on several hosts have one count board. Each rank has a board of its own, and
// a socket to every other rank; what a rank writes into its block goes to all, and what comes from
// a peer is written into that peer's block here, so that nobody above this file knows the
// difference.
//
//   what                     sent when
//   header                   it is published, on the caller's thread
//   released words           the relay has seen that this rank's compute stream wrote one
//   state, first failure     they are set
//
// The end of a socket is the end of a peer. Messages of one rank come in the order they were sent:
// a header that ends a call (seq + 1) never overtakes it, so the two header slots suffice as they
// do in shared memory.
//
// Worked example, 2 ranks on 2 hosts: rank 1 has read the rows of seq 7; its stream writes
// released(1, kRowsRegion, 1) = 7 on its own board. Its relay sees the word and sends all eight;
// the relay of rank 0 writes 7 into the same place of rank 0's board, and the mover there, which
// has withheld rows of seq 9, pushes them.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "count_board.h"
#include "failure.h"
#include "shared_memory.h"

namespace feplb {

class Relay final : public BoardEcho {
 public:
  // `sockets` [num_ranks]: connected, one to each other rank; this rank's own is empty. `peer_died`
  // is called on the relay's thread. In a forked child the sockets are closed; it must not be
  // destroyed there.
  Relay(int rank, CountBoard& board, Failure& failure, std::vector<Fd> sockets, double deadline_s,
        std::function<void(int rank)> peer_died);
  ~Relay() override;

  void published(const CallHeader& header) override;
  void state_set(RankState state) override;
  void aborted(const std::string& text) override;

  // The compute stream was told to write this word: the peers hear of it once it has.
  void expect_release(Region region, int half, Epoch epoch);

  void run() noexcept;  // the thread's body
  void stop() noexcept;

 private:
  enum class What : uint32_t { kHeader = 1, kReleased, kState, kAbort };
  struct Peer {
    Fd socket;
    std::string heard;  // not yet a whole message
  };
  static constexpr std::size_t kNumWords = std::size_t{kNumRegions} * kNumHalves;

  // Text of what went wrong with a peer, empty if nothing did.
  std::string tell(What what, const std::string& body);
  std::string send_all(const Fd& socket, const std::string& message, TimePoint deadline);
  bool awaits_release() const;
  void tell_releases();
  void nap();
  void hear(int rank);
  void read_messages(int rank);
  void take(int rank, What what, const std::string& body);
  void lose(int rank) noexcept;

  const int rank_;
  CountBoard& board_;
  Failure& failure_;
  const double deadline_s_;
  std::function<void(int)> peer_died_;
  std::vector<Peer> peers_;
  std::mutex send_mutex_;  // whole messages, and sockets that are let go of
  std::array<std::atomic<Epoch>, kNumWords> expected_{};
  std::array<Epoch, kNumWords> told_{};  // the relay's thread alone
  Fd wake_;                              // eventfd: a release is expected, or stop()
  std::atomic<bool> stopping_{false};
};

}  // namespace feplb
