// The watchdog, look by look, and a peer process that dies.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "../../feplb/csrc/watchdog.h"
#include "check.h"
#include "memory.h"
#include "paper_device.h"

namespace feplb_test {
namespace {

using namespace feplb;

// Rank 0 of two.
struct Watched {
  explicit Watched(pid_t peer = getpid(), double deadline_s = 60)
      : memory(CountBoard::bytes_needed(2, 1)),
        board(memory.data(), 2, 1),
        failure(board, 0, caller),
        flag(board.inbound(0, 1, kRowsFlag)),
        watchdog(0, {getpid(), peer}, board, device, failure, deadline_s) {
    failure.note_call(5);
  }
  void watch(std::chrono::milliseconds from_now) {
    watchdog.watch(flag, 5, Clock::now() + from_now, "no answer from rank 1");
  }
  Memory memory;
  CountBoard board;
  Bell caller;
  PaperDevice device;
  Failure failure;
  Flag* flag;
  Watchdog watchdog;
};

TEST(wait_past_its_deadline_poisons_the_call) {
  Watched rank;
  rank.watch(std::chrono::milliseconds(-1));
  rank.watchdog.look();
  CHECK_EQ(rank.failure.text(), std::string("no answer from rank 1"));
  CHECK_EQ(rank.flag->epoch.load(), 5 + kLift);
}

TEST(wait_that_is_over_has_no_deadline) {
  Watched rank;
  rank.watch(std::chrono::milliseconds(-1));
  rank.flag->epoch.store(6);
  rank.watchdog.look();
  rank.flag->epoch.store(0);
  rank.watchdog.look();
  rank.watch(std::chrono::hours(1));
  rank.watchdog.look();
  CHECK(!rank.failure.poisoned(), rank.failure.text());
}

TEST(flags_are_lifted_until_the_streams_have_drained) {
  Watched rank;
  rank.failure.poison("why");
  for (const bool is_drained : {false, false, true}) {
    rank.device.is_drained = is_drained;
    rank.flag->epoch.store(4);  // a late push
    rank.watchdog.look();
    CHECK_EQ(rank.flag->epoch.load(), is_drained ? 4 : 5 + kLift);
  }
}

TEST(abort_of_another_rank_is_taken_over) {
  Watched rank;
  rank.board.abort(1, "out of memory");
  rank.watchdog.look();
  CHECK_EQ(rank.failure.text(), std::string("rank 1: out of memory"));
}

TEST(death_after_close_is_no_failure) {
  Watched rank;
  rank.board.set_state(1, RankState::kClosed);
  rank.watchdog.peer_died(1);
  CHECK(!rank.failure.poisoned(), rank.failure.text());
}

TEST(dead_process_is_noticed_within_two_seconds) {
  const pid_t child = fork();
  if (child == 0) {
    pause();
    _exit(0);
  }
  Watched rank(child);
  std::thread thread([&] { rank.watchdog.run(); });
  const TimePoint start = Clock::now();
  kill(child, SIGKILL);
  while (!rank.failure.poisoned() && Clock::now() - start < std::chrono::seconds(10)) {
    std::this_thread::yield();
  }
  const std::chrono::duration<double> took = Clock::now() - start;
  rank.watchdog.stop();
  thread.join();
  waitpid(child, nullptr, 0);
  CHECK(took.count() < 2, "noticed after ", took.count(), " s");
  const std::string text = cat("peer rank 1 (pid ", child, ") died; last seen: no call yet");
  CHECK_EQ(rank.failure.text(), text);
}

// The exit status of a process whose streams never drain; 0 if it outlives its patience.
int fate_of_the_stuck(bool lifts_flags) {
  const pid_t child = fork();
  if (child == 0) {
    Watched rank(getpid(), 0.05);
    rank.device.is_drained = false;
    rank.device.can_lift = lifts_flags;
    rank.failure.poison("why");
    for (int look = 0; look < 100; ++look) {
      rank.watchdog.look();
      usleep(2000);
    }
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(process_that_no_flag_can_free_is_ended) { CHECK_EQ(fate_of_the_stuck(false), 70); }

TEST(process_whose_flags_can_be_lifted_is_left_alone) { CHECK_EQ(fate_of_the_stuck(true), 0); }

}  // namespace
}  // namespace feplb_test
