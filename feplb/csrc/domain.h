// A domain as one rank sees it: arena, count board, lane, mover, watchdog, and the caller's side of
// a call. two_phase.py walks through these methods in the order they stand here; each one blocks
// the calling thread (GIL released) at most until its deadline.
//
//   begin            level 0: publish the header                       never blocks
//   wait_plan        until every rank's header is there and the plan is made
//   post_rows        level 1: rows and weights of sent moves, after what computes them
//   await_rows       deadlock rule for level 1, then wait for what this rank received
//   release_weights, release_rows    directly after their last reader
//   post_returns     level 2, after the received GEMMs
//   await_grad_outbox, post_grads    level 3 (backward)
//   await_returns    deadlock rule for level 2, then wait for what comes home
//   release_returns  after placing
//   finish           all of the call's copies are submitted and have read the caller's tensors
//   await_grads, release_grads       later, where the late weight grads are added
//
// The deadlock rule: a wait of (seq, level k) enters the compute stream only after the driver has
// accepted this rank's own submissions up to and including (seq, k). Releases are enqueued by the
// caller itself, so every one posted so far has been accepted by then.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "arena.h"
#include "copier.h"
#include "count_board.h"
#include "device.h"
#include "failure.h"
#include "mover.h"
#include "relay.h"
#include "watchdog.h"

namespace feplb {

struct DomainConfig {
  int rank = 0;
  int num_ranks = 1;
  uint64_t config_hash = 0;
  double deadline_s = 60;
  // False leaves every submission to the mover, as what is withheld always is.
  bool caller_submits = true;
  std::vector<LayerShape> layers;
  int num_slots = 0;
  int num_grad_slots = 0;
  std::vector<pid_t> pids;        // [num_ranks]; 0 where a rank is on another host
  std::vector<int> global_ranks;  // [num_ranks], see CountBoard
};

// To every other rank of a domain over several hosts, which has a board in each process; empty
// where the board is shared memory. See Relay.
using RelaySockets = std::vector<Fd>;

constexpr const char* kProvingLane = "proving the lane at start-up";
constexpr const char* kMeasuringLane = "measuring the lane at start-up";

// What messages call the call under way.
struct CallName {
  CallKind kind = CallKind::kForward;
  int32_t layer = 0;
  int64_t micro_batch = 0;
  uint64_t seq = 0;
};

// Memory that the domain lives in.
struct DomainMemory {
  std::byte* board = nullptr;
  std::vector<std::byte*> arenas;  // [num_ranks], as mapped into this process
  std::shared_ptr<void> owner;     // of board and own arena; every view of the arena holds it too
  std::shared_ptr<void> peers;     // of the peers' arenas
  bool is_freed_last = false;      // peers must have unmapped this rank's arena before it is freed
};

class Domain {
 public:
  Domain(DomainConfig config, DomainMemory memory, std::unique_ptr<Device> device,
         RelaySockets sockets = {});
  ~Domain();

  // Starts mover and watchdog, once every rank has built its domain.
  // What auto decides by; before open().
  void set_costs(int32_t layer, const UnitCosts& costs) { mover_.set_costs(layer, costs); }
  void open();
  // Ends threads and lane without any collective and lets go of the memory; only closed(),
  // failure_text() and still_mapped_by() may be called afterwards. Idempotent; in a forked child it
  // does nothing. Where peers map what must be freed last, it waits a second at most for them.
  void close() noexcept;
  bool closed() const { return closed_; }
  // Global ranks for which close() has kept the arena until the process ends.
  const std::vector<int>& still_mapped_by() const { return still_mapped_by_; }

  // What the lane's rates are made of, before prove_lane(): pushes `bytes` kCopiesAtATime times to
  // `dst`, `times` over, into this rank's place in its arena. Returns when it began and when each
  // time had arrived, [times + 1] nanoseconds of a clock that the ranks of one host share. Blocks.
  static constexpr int kCopiesAtATime = 4;
  std::vector<int64_t> push_times(int dst, std::size_t bytes, int times);
  // Start-up canary: pushes a pattern to every peer through the lane and checks what peers pushed.
  // `bytes` per peer must fit num_ranks times into the arena.
  void prove_lane(std::size_t bytes);

  // Before the header: throws UserError where the caller's stream is captured into a graph.
  void refuse_capture(std::uintptr_t stream);
  // Names the stream that the caller's kernels run on from here on; every method from post_rows on
  // that records, waits or releases does so there.
  void bind_compute(std::uintptr_t stream);
  uint64_t begin(CallHeader header, std::vector<Move> saved_moves);
  const Agreement& wait_plan();
  void post_rows(const CallSources& sources, const std::vector<int64_t>& first_row);
  void await_rows();
  void release_weights();
  void release_rows();
  void post_returns();
  void await_grad_outbox();
  void post_grads(const std::vector<int>& tensors);
  void await_returns();
  void release_returns();
  void finish();
  void await_grads(uint64_t seq, const std::vector<int>& helper_ranks);
  void release_grads(uint64_t seq);

  // The call cannot go on (the caller failed after its header was published): every rank raises.
  void fail(const std::string& text);
  // Throws what went wrong on this rank or was reported by another, if anything did.
  void check_failure(const char* phase);
  // Waits until this rank's compute stream has run everything feplb put there.
  void drain();

  std::string failure_text() const { return failure_.poisoned() ? failure_.text() : ""; }
  const ArenaLayout& layout() const { return layout_; }
  std::byte* arena() const { return memory_.arenas[static_cast<std::size_t>(config_.rank)]; }
  const std::shared_ptr<void>& memory_owner() const { return memory_.owner; }
  PushStats stats() const { return mover_.stats(); }
  int64_t copy_thread_cpu_ns() const { return device_->copy_thread_cpu_ns(); }
  Mover& mover() { return mover_; }

 private:
  void refuse_fork(const char* phase) const;
  void check_usable(const char* phase);
  WaitLimits limits() const;
  CallGeometry geometry() const;
  void post(Level level, std::vector<Push> pushes);
  Event record_compute();
  void carry_pattern(std::size_t bytes);
  std::byte* pattern_place(int owner, int src, std::size_t bytes) const;
  Flag* own_word() const;
  void push_pattern(int dst, std::vector<std::byte>& buffer);
  void check_pattern(int src, std::vector<std::byte>& buffer);
  void handshake(Level level, const char* phase);
  void await_flag(int src_rank, FlagKind kind, uint64_t seq, const char* phase);
  void await_event(Event event, const char* phase);
  void release(Region region, uint64_t seq);
  void await_submitted(Level level, const char* phase);
  void settle(WaitResult result, const char* phase, const std::string& missing);
  void let_go_of_inputs() noexcept;
  void await_drained() noexcept;
  void let_go_of_memory() noexcept;
  void await_on_host(const Flag* flag, Epoch epoch, const char* phase, const std::string& whom);
  template <typename Call>
  auto on_device(const char* phase, const Call& call);
  [[noreturn]] void raise(const std::string& what);
  std::string where(const char* phase) const;
  int own_global_rank() const { return board_.global_rank(config_.rank); }
  bool forked() const;
  std::vector<int64_t> timed_pushes(int dst, std::size_t bytes, int times);

  DomainConfig config_;
  DomainMemory memory_;
  ArenaLayout layout_;
  CountBoard board_;
  std::unique_ptr<Device> device_;
  Bell caller_bell_;
  Failure failure_;
  Mover mover_;
  Watchdog watchdog_;
  std::unique_ptr<Relay> relay_;  // only where the domain spans hosts
  pid_t pid_;
  bool closed_ = false;
  std::vector<int> still_mapped_by_;
  bool is_driven_ = false;  // the lane runs all threads (simulation): only its mover may plan

  uint64_t seq_ = 0;
  CallName call_;
  bool in_call_ = false;
  bool grads_posted_ = false;
  std::vector<std::byte> pushed_;  // by push_times, on a host lane

  Worker mover_thread_;  // last: they use all of the above
  Worker watchdog_thread_;
  Worker relay_thread_;
};

}  // namespace feplb
