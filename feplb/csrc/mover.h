// The mover: the C++ thread that plans a call once all headers are there and submits its copies in
// level order, each push as soon as its destination was released. It polls, blocks on nothing but
// the driver, and never takes the GIL. Where a thread of its own would only be woken for it, the
// caller's takes the step itself: plan_now(), submit_now().
//
// Hand-over, one call at a time (the caller is Python's thread with the GIL released):
//   caller                               mover
//   begin(header, saved moves)    ->     reads headers, plans            -> planned()
//   post(level, event, pushes)    ->     submits what was withheld       -> submitted(level)
//   end()  (all posted levels submitted)
// `call_` is guarded by mutex_; the driver is called outside it. The caller sleeps on caller_bell,
// the mover on its bell of the count board.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "copier.h"
#include "count_board.h"
#include "device.h"
#include "failure.h"
#include "plan.h"

namespace feplb {

// Level 0 is the header; these are the levels that move bytes.
enum class Level : int { kRows = 1, kReturns = 2, kGrads = 3 };
constexpr int kNumLevels = 4;

// What the ranks derive from their headers. `refusal` set: a rank could not make the call and said
// so before anything moved; every rank gives the call up alike and the domain stays usable.
struct Agreement {
  std::string refusal;
  int refused_by = -1;
  Plan plan;
  int64_t plan_ns = 0;  // what make_plan took
  Route route;
  std::vector<int32_t> counts;  // [num_ranks * num_local_experts]
};

// What this rank has pushed since the start.
struct PushStats {
  uint64_t bytes[kNumRegions] = {0, 0, 0, 0};  // by the region they went into
  uint64_t copies = 0;
  int64_t last_accepted_ns = 0;  // when the device had taken the latest copies (steady clock)
};

class Mover {
 public:
  Mover(int rank, const ArenaLayout& layout, CountBoard& board, Device& device, Failure& failure,
        Bell& caller_bell);

  // -- the caller's side --
  void set_costs(int32_t layer, const UnitCosts& costs) { costs_[layer] = costs; }  // before all
  void begin(CallHeader header, std::vector<Move> saved_moves);
  bool planned() const { return planned_.load(std::memory_order_acquire); }
  void ring_waiting_peers();  // must follow begin()
  // Plans on the caller's thread if all headers are there: no hand-over between threads of one
  // core. A mover that sleeps is not woken for headers (a peer would pay for the wake) before the
  // caller has nothing left to do but to sleep too: await_headers().
  bool plan_now();
  void await_headers();
  const Agreement& agreement() const { return agreement_; }  // once planned()
  void post(Level level, Event ready, std::vector<Push> pushes);
  // Submits on the caller's thread what is released by now, which is nearly always all: the mover
  // need not be woken (that takes longer than the driver does). It gets what is left.
  void submit_now();
  void wake();                        // after post(), where the mover shall do it
  bool submitted(Level level) const;  // this level and every lower one, as far as posted
  // The last event of what `stream` was given for this rank's pushes of a region's half.
  Event last_push(Region region, int half) const;
  PushStats stats() const;
  void end();
  // After a failure: submits no more; true once the mover is out of the driver.
  bool cancelled();
  std::string missing_headers() const;  // "rank 2 (last seen: forward of layer 0, ...)", for errors
  std::string withheld() const;         // what the submission waits for, for errors

  // -- the mover's side --
  bool step();            // one poll; true if it got anything done; an error poisons the call
  bool awaits_release();  // a push is withheld until a peer's device has written a flag
  void run() noexcept;    // the thread's body: steps and sleeps until stop()
  void stop() noexcept;

 private:
  struct Job {
    bool posted = false;
    Event ready;
    std::vector<Push> pushes;  // not yet submitted
  };

  bool try_step();
  void fail(const char* what, const char* why);  // poisons, naming the call under way
  bool try_plan();
  void choose_moves();
  bool check_headers(const std::vector<CallHeader>& headers);
  bool try_submit();
  bool has_work() const;
  bool take_releasable(std::vector<Push>& ready, Event& event, int& level);
  bool is_released(const Push& push) const;
  bool joins(const Push& push, const Push& next) const;
  void submit(const std::vector<const Push*>& pushes, Event ready);
  void write_flags(const std::vector<const Push*>& pushes);
  void count(const std::vector<Push>& pushes);
  void note_uses();
  uint32_t wanted() const;

  const int rank_;
  const ArenaLayout& layout_;
  CountBoard& board_;
  Device& device_;
  Failure& failure_;
  Bell& caller_bell_;

  mutable std::mutex mutex_;
  bool live_ = false;
  CallHeader header_;
  std::vector<Move> saved_moves_;
  Agreement agreement_;
  PlanScratch scratch_;
  std::map<int32_t, UnitCosts> costs_;  // by layer; not changed once the thread runs
  std::vector<CallHeader> headers_;
  Job jobs_[kNumLevels];
  // Last seq that used a region's half on each rank; a push there waits for its release.
  std::vector<uint64_t> last_use_;  // [num_ranks][kNumRegions][kNumHalves]
  Event last_push_[kNumRegions][kNumHalves];
  PushStats stats_;
  TimePoint last_accepted_;  // the thread's that submits
  std::atomic<bool> planned_{false};
  std::atomic<int> submitted_level_{0};
  std::atomic<bool> in_driver_{false};  // set under mutex_
  std::atomic<bool> stopping_{false};
};

// A named thread that runs `body` until the owner makes it return; joined on destruction.
class Worker {
 public:
  Worker() = default;
  Worker(const std::string& name, std::function<void()> body);
  Worker(Worker&&) noexcept = default;
  Worker& operator=(Worker&& other) noexcept;
  ~Worker() { join(); }
  void join() noexcept;
  // In a forked child the thread does not exist: forget it.
  void abandon() noexcept { static_cast<void>(thread_.release()); }

 private:
  std::unique_ptr<std::thread> thread_;
};

}  // namespace feplb
