// Waits in compute streams that really are behind: the deadlock rule, where the driver holds its
// lock or has one queue, and what the watchdog must lift. Also run under ThreadSanitizer, and
// AddressSanitizer with UBSan.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "../../feplb/csrc/fences.h"
#include "check.h"
#include "gpu_ranks.h"

namespace feplb_test {
namespace {

using feplb::cat;
using feplb::Move;

// ---------------------------------------------------------------------------- the deadlock rule

// Takes a fence out for as long as it lives.
class WithoutFence {
 public:
  explicit WithoutFence(feplb::Fence fence) : fence_(fence) { feplb::set_fence(fence, false); }
  ~WithoutFence() { feplb::set_fence(fence_, true); }

 private:
  const feplb::Fence fence_;
};

// One rank's forward, step by step. Two ranks give each other an expert, or one gives the other.
enum class Giving { kBoth, kOne };

class Exchange {
 public:
  Exchange(GpuRanks& gpus, int rank, Giving giving = Giving::kBoth)
      : gpus_(gpus),
        rank_(rank),
        domain_(gpus.ranks().domain(rank)),
        moves_{{1, 0, 1, 0, 4}},
        counts_(giving == Giving::kBoth || rank == 0 ? std::vector<int32_t>{4, 4, 0}
                                                     : std::vector<int32_t>{0, 0, 0}),
        tensors_(Call{}, rank, counts_) {
    if (giving == Giving::kBoth) moves_.push_back({1, 1, 0, 0, 4});
  }
  ~Exchange() { gpus_.synchronize(rank_); }  // kernels that run over it

  void begin() {
    feplb::CallHeader header;
    header.counts = counts_;
    header.plan_hash = feplb::hash_moves(moves_);
    header.grad_bits = feplb::kNeedsKnown;
    domain_.bind_compute(stream());
    view_.seq = domain_.begin(header, moves_);
    const feplb::Agreement& agreement = domain_.wait_plan();
    CHECK(agreement.refusal.empty(), agreement.refusal);
    route_ = agreement.route;
    view_.arena = domain_.arena();
    view_.layout = &domain_.layout();
    launch([this] { tensors_.fill(); });
  }
  void post_rows() { domain_.post_rows(tensors_.sources(), tensors_.first_row()); }
  void await_rows() { domain_.await_rows(); }
  void run_received() {
    for (const feplb::RoutedMove& move : route_.received) {
      launch([view = view_, move] { view.run_forward(move); });
    }
    domain_.release_weights();
    domain_.release_rows();
    domain_.post_returns();
  }
  void bring_home() {
    for (const RowRange& range : tensors_.kept(route_.sent)) {
      launch([this, range] { tensors_.run(range); });
    }
    domain_.await_returns();
    for (const feplb::RoutedMove& move : route_.sent) {
      launch([this, move] { tensors_.place(move, view_); });
    }
    domain_.release_returns();
    domain_.finish();
  }
  void end() {
    domain_.drain();
    domain_.check_failure("ending the exchange");
    gpus_.synchronize(rank_);
    CHECK(tensors_.wrong_rows().empty(), tensors_.wrong_rows());
  }
  std::uintptr_t stream() const { return gpus_.streams(rank_).front(); }

 private:
  // Behind a lifted wait nothing is read: a late push may write there.
  void launch(std::function<void()> kernel) {
    gpus_.launch(stream(), [this, kernel = std::move(kernel)] {
      if (!gpus_.ranks().board().aborted()) kernel();
    });
  }

  GpuRanks& gpus_;
  const int rank_;
  feplb::Domain& domain_;
  std::vector<Move> moves_;
  const std::vector<int32_t> counts_;
  CallTensors tensors_;
  ArenaView view_;
  feplb::Route route_;
};

// A forward on both ranks; after each wait in the stream the caller frees memory if it may.
std::string exchange(DriverMood mood, bool frees, double deadline_s) {
  mood.held = "cuStreamWaitEvent";  // the mover's first call of a submission
  mood.held_ms = 20;
  GpuRanks::Config config = ranks_of(2, mood);
  config.deadline_s = deadline_s;
  GpuRanks gpus(config);
  gpus.ranks().leave_to_movers();
  gpus.make_domains();
  return joined(gpus.ranks().run([&](int rank) {
    Exchange call(gpus, rank);
    call.begin();
    call.post_rows();
    call.await_rows();
    if (frees) gpus.free_memory(rank);
    call.run_received();
    if (frees) gpus.free_memory(rank);
    call.bring_home();
    call.end();
  }));
}

// Goes right with the handshake, and hangs without it until the deadline ends it.
void expect_handshake_is_missed(const DriverMood& mood, bool frees) {
  const std::string with = exchange(mood, frees, 60);
  CHECK(with.empty(), with);
  const WithoutFence without(feplb::Fence::kHandshake);
  const std::string text = exchange(mood, frees, 0.4);
  CHECK(text.find("no answer from rank") != std::string::npos, "nothing hung: ", text);
  CHECK(text.find("for 0.4 s (deadline_s) while waiting for rows and weights") != std::string::npos,
        text);
}

TEST(cuda_handshake_is_missed_with_one_queue) { expect_handshake_is_missed(one_queue(), false); }
TEST(cuda_handshake_is_missed_while_memory_is_freed) {
  expect_handshake_is_missed(one_lock(), true);
}

// Without either there is no need of it: what is missed is missed for that reason.
TEST(cuda_handshake_is_not_missed_with_many_queues_and_no_lock) {
  const WithoutFence without(feplb::Fence::kHandshake);
  const std::string text = exchange(DriverMood{}, false, 60);
  CHECK(text.empty(), text);
}

// ------------------------------------------------------------------------------ the watchdog

// Another process, which a rank is taken to be.
class Child {
 public:
  Child() : pid_(fork()) {
    if (pid_ == 0) {
      pause();
      _exit(0);
    }
  }
  ~Child() {
    kill();
    waitpid(pid_, nullptr, 0);
  }
  void kill() const { ::kill(pid_, SIGKILL); }
  pid_t pid() const { return pid_; }

 private:
  const pid_t pid_;
};

struct Silence {
  std::string error;   // of the helper, whose owner fell silent
  double seconds = 0;  // from then on, until it was raised and the stream had drained
};

// Rank 0 owns, and falls silent once all have planned; rank 1 has its waits for rows in its stream.
// `fall` runs then.
Silence fall_silent(GpuRanks& gpus, const std::function<void()>& fall) {
  Silence seen;
  std::atomic<bool> parked{false}, ended{false};
  const auto errors = gpus.ranks().run([&](int rank) {
    Exchange call(gpus, rank, Giving::kOne);
    call.begin();
    if (rank == 0) {
      while (!parked) std::this_thread::yield();
      fall();
      while (!ended) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      return;
    }
    const auto start = feplb::Clock::now();
    bool ran = false;
    try {
      call.post_rows();
      call.await_rows();
      call.run_received();
      call.bring_home();
      gpus.launch(call.stream(), [&] { ran = true; });
      parked = true;
      call.end();
    } catch (const feplb::Error& error) {
      seen.error = error.what();
    }
    parked = true;
    gpus.synchronize(rank);
    seen.seconds = std::chrono::duration<double>(feplb::Clock::now() - start).count();
    ended = true;
    CHECK(ran || !seen.error.empty(), "the stream has not drained");
  });
  CHECK(joined(errors).empty(), joined(errors));
  return seen;
}

void check_silent_peer(const DriverMood& mood) {
  GpuRanks::Config config = ranks_of(2, mood);
  config.deadline_s = 0.3;
  GpuRanks gpus(config);
  gpus.make_domains();
  const Silence seen = fall_silent(gpus, [] {});
  const std::string part =
      "no answer from rank 0 (last seen: forward of layer 0, micro-batch 0) for 0.3 s (deadline_s) "
      "while waiting for rows and weights from an owner";
  CHECK(seen.error.find(part) != std::string::npos, seen.error);
  CHECK(seen.seconds >= 0.3 && seen.seconds < 2.3, seen.seconds, " s");
}

TEST(cuda_silent_peer_is_named_at_the_deadline) { check_silent_peer(DriverMood{}); }
TEST(cuda_silent_peer_is_named_at_the_deadline_with_one_queue) { check_silent_peer(one_queue()); }
TEST(cuda_silent_peer_is_named_at_the_deadline_with_a_full_launch_queue) {
  DriverMood mood = one_lock();
  mood.queue_depth = 1;
  check_silent_peer(mood);
}

void check_killed_peer(const DriverMood& mood) {
  const Child child;
  GpuRanks gpus(ranks_of(2, mood));
  gpus.ranks().set_pid(0, child.pid());
  gpus.make_domains();
  const Silence seen = fall_silent(gpus, [&] { child.kill(); });
  const std::string part =
      cat("peer rank 0 (pid ", child.pid(), ") died; last seen: forward of layer 0, micro-batch 0");
  CHECK(seen.error.find(part) != std::string::npos, seen.error);
  CHECK(seen.seconds < 2, seen.seconds, " s");
}

TEST(cuda_killed_peer_is_named_within_two_seconds) { check_killed_peer(DriverMood{}); }
TEST(cuda_killed_peer_is_named_within_two_seconds_with_one_queue) {
  check_killed_peer(one_queue());
}

// The driver may hold the call that enqueues a wait, for as long as the wait itself takes.
TEST(cuda_wait_that_the_driver_holds_has_a_deadline) {
  GpuRanks::Config config = ranks_of(2);
  config.deadline_s = 0.3;
  GpuRanks gpus(config);
  gpus.make_domains();
  std::atomic<bool> ended{false};
  const auto errors = gpus.ranks().run([&](int rank) {
    Exchange call(gpus, rank, Giving::kOne);
    call.begin();
    if (rank == 0) {
      while (!ended) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      return;
    }
    gpus.ranks().domain(rank).bind_compute(0);  // the stand-in runs what stream 0 is given at once
    try {
      call.post_rows();
      call.await_rows();
    } catch (const feplb::Error&) {
      ended = true;
      throw;
    }
    ended = true;
  });
  CHECK(errors[1].find("no answer from rank 0") != std::string::npos, errors[1]);
}

}  // namespace
}  // namespace feplb_test
