// The simulated world: ranks are threads of one process, and a seeded adversary decides who runs.
//
// One thread at a time holds the turn. Whenever it calls its device it may lose the turn to
// anything that could run now:
//   a rank's thread      unless it waits on the host for what has not happened
//   a rank's mover       a thread of its own, so that it can be held inside a driver call
//   a stream             its head (sim_streams.h)
//   a rank's watchdog    one look
// Some seeds starve one of them for long, some change at every call. Same seed, same order, as long
// as the ranks' own programs are deterministic. Nothing sleeps and no clock is read: when nothing
// can run, every rank's thread throws SimDeadlock, with a list of who waits for what.
//
//   method              called by
//   enter, leave        each rank's thread, first and last
//   the rest            SimDevice, on the thread of a rank or of its mover
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "error.h"
#include "sim_streams.h"

namespace feplb {

enum class SimFault {
  kNone,
  kKill,     // the rank's thread throws SimKilled, its mover and streams vanish, even in mid-copy
  kTimeOut,  // the next wait on the host that this rank is found in ends with its deadline
};

struct SimOptions {
  bool single_queue = false;     // the streams of a device share one hardware queue
  bool blocking_driver = false;  // some launches hold the driver until their device has drained
  bool deadlines = false;        // when nothing can run a wait on the host times out: no deadlock
  SimFault fault = SimFault::kNone;
  int fault_rank = 0;
  uint64_t fault_step = 0;
  SimStreams::NameFlag name_flag;  // for messages
  SimStreams::SeeCopy see_copy;  // shown every part of a copy before it is made, to check accesses
};

struct SimDeadlock : Error {
  using Error::Error;
};

struct SimKilled : Error {
  using Error::Error;
};

class SimWorld {
 public:
  SimWorld(int num_ranks, uint64_t seed, SimOptions options = {});
  ~SimWorld();  // every rank's device was stopped before

  // From here on the calling thread is `rank`'s; returns at its first turn, once all have entered.
  void enter(int rank);
  // The calling thread ends. Streams, movers and watchdogs go on while any rank is left.
  void leave() noexcept;

  // enter() and leave() as a scope.
  class Turn {
   public:
    Turn(SimWorld& world, int rank) : world_(world) { world_.enter(rank); }
    ~Turn() { world_.leave(); }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    SimWorld& world_;
  };

  // Every other pair of seeds: as a lane whose submissions are dear.
  bool joins_pushes() const { return (seed_ & 2) != 0; }
  uint64_t num_steps() const { return num_steps_; }
  uint64_t order_hash() const { return order_hash_; }  // of everything that ran, in order

 private:
  friend class SimDevice;

  struct Thread {
    bool has_started = false;
    bool has_ended = false;
    bool waits_on_host = false;
    bool timed_out = false;
    std::atomic<bool> dismissed{false};            // it shall end
    const std::function<bool()>* ready = nullptr;  // what it waits for
    const char* waits_for = "its turn";
  };
  struct Rank {
    explicit Rank(bool single_queue) : streams(single_queue) {}
    SimStreams streams;
    Crew crew;
    std::thread mover;
    bool has_crew = false;
    bool is_alive = true;
    bool driver_held = false;
    uint64_t looked_at = 0;  // progress_ at the watchdog's last look
    int deaths_told = 0;
  };

  // -- what a device does, as the thread that calls it --
  void driver_call(int rank);
  void load_module(int rank);
  WaitResult wait_on_host(const std::function<bool()>& done, const WaitLimits& limits);
  void start_crew(int rank, Crew crew);
  void stop_crew(int rank) noexcept;

  // -- turns --
  int current_thread() const;  // of the caller, or -1
  void pause(int self, const std::function<bool()>* ready, const char* waits_for);
  void give_turn(int self);
  void pass_turn(int to);
  void await_turn(int self);
  void retire();
  void run_mover(int rank);

  // -- the adversary --
  int choose();
  void consider(int actor, bool can_run);
  bool thread_can_run(int thread) const;
  void run_here(int actor);
  void look(int rank);
  void change_mind();
  void apply_fault();
  void kill(int rank);
  void resolve_stuck();
  std::string describe() const;

  int mover_of(int rank) const { return num_ranks_ + rank; }
  int rank_of(int thread) const { return thread % num_ranks_; }
  bool all_ranks_ended() const;

  const int num_ranks_;
  const uint64_t seed_;
  const SimOptions options_;
  SimRandom random_;
  uint32_t pause_one_in_;
  uint32_t load_one_in_;
  uint32_t change_one_in_;
  uint32_t weight_spread_;

  std::vector<Rank> ranks_;
  std::vector<Thread> threads_;    // [2 * num_ranks]: the ranks', then the movers'
  std::vector<uint32_t> weights_;  // [actors]: threads, then watchdogs, then streams
  std::vector<std::pair<int, uint64_t>> candidates_;  // actor, sum of the weights up to it
  uint64_t num_steps_ = 0;
  uint64_t order_hash_ = 0;
  uint64_t progress_ = 1;
  uint64_t flag_writes_ = 0;
  std::vector<int> deaths_;
  bool fault_pending_;
  std::string failure_;

  std::mutex mutex_;  // guards the turn, and with it everything above
  int turn_ = -1;
  int num_entered_ = 0;
  std::vector<std::condition_variable> turn_changed_;  // [threads]
};

}  // namespace feplb
