#include "watchdog.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "error.h"

namespace feplb {
namespace {

// While all is well, a nap is as long as it takes to notice another rank's abort in time; deaths
// end it at once. While lifted flags must stay lifted, look often.
constexpr int kNapMs = 250;
constexpr int kLiftMs = 2;
// What a stuck process gets to say what happened and to save what it can; never more than
// deadline_s.
constexpr double kMostPatienceS = 10;
constexpr int kStuckExit = 70;

Fd open_pidfd(int rank, pid_t pid) {
  Fd fd(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
  if (!fd) {
    throw Error(cat(errno_text(cat("pidfd_open of rank ", rank, " (pid ", pid, ")"), errno),
                    "; ranks of one domain must see each other's processes (Linux 5.3 or newer, "
                    "one pid namespace, and a seccomp profile that allows pidfd_open)"));
  }
  return fd;
}

}  // namespace

Watchdog::Watchdog(int rank, const std::vector<pid_t>& pids, CountBoard& board, Device& device,
                   Failure& failure, double deadline_s)
    : rank_(rank),
      patience_(duration_of(std::min(deadline_s, kMostPatienceS))),
      pids_(pids),
      board_(board),
      device_(device),
      failure_(failure),
      wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (!wake_) throw Error(errno_text("eventfd", errno));
  for (std::size_t peer = 0; peer < pids.size(); ++peer) {
    if (static_cast<int>(peer) == rank || pids[peer] == 0 || pids[peer] == getpid()) continue;
    const int at = static_cast<int>(peer);
    peers_.push_back(Peer{at, pids[peer], open_pidfd(board.global_rank(at), pids[peer])});
  }
}

void Watchdog::watch(const Flag* flag, Epoch epoch, TimePoint deadline, std::string what) {
  const std::lock_guard<std::mutex> lock(mutex_);
  waits_.push_back(StreamWait{flag, epoch, deadline, std::move(what)});
}

void Watchdog::run() noexcept {
  while (!stopping_.load(std::memory_order_acquire)) {
    try {
      nap();
      look_at_peers();
      look();
    } catch (const std::exception& error) {
      failure_.poison(cat("the watchdog failed: ", error.what()));
    }
  }
}

void Watchdog::look() {
  look_at_waits();
  if (!failure_.poisoned() && board_.aborted()) failure_.poison(board_.abort_text());
  if (!failure_.poisoned() || device_.compute_drained()) return;
  failure_.lift();
  if (!device_.lifts_flags()) end_if_stuck();
}

// Nobody can say it to Python: its thread may be inside the driver, behind the wait.
void Watchdog::end_if_stuck() {
  const Clock::duration now = Clock::now().time_since_epoch();
  int64_t none = 0;
  const int64_t end = (now + patience_).count();
  if (end_ns_.compare_exchange_strong(none, end) || now.count() < none) return;
  const std::string text =
      cat("feplb (rank ", board_.global_rank(rank_), "): ", failure_.text(),
          ". A stream of this GPU waits for a flag that only the peer could write, so this process "
          "is ended (exit status ",
          kStuckExit, "). Restart the job from its last checkpoint.\n");
  static_cast<void>(!write(STDERR_FILENO, text.data(), text.size()));
  _exit(kStuckExit);
}

void Watchdog::nap() {
  std::vector<pollfd> fds{pollfd{wake_.get(), POLLIN, 0}};
  for (const Peer& peer : peers_) fds.push_back(pollfd{peer.pidfd.get(), POLLIN, 0});
  const bool lifts = failure_.poisoned() && !device_.compute_drained();
  poll(fds.data(), fds.size(), lifts ? kLiftMs : kNapMs);
}

void Watchdog::look_at_peers() {
  for (auto peer = peers_.begin(); peer != peers_.end();) {
    pollfd fd{peer->pidfd.get(), POLLIN, 0};
    if (poll(&fd, 1, 0) <= 0) {
      ++peer;
      continue;
    }
    peer_died(peer->rank);
    peer = peers_.erase(peer);
  }
}

void Watchdog::peer_died(int rank) {
  if (board_.has_closed(rank)) return;
  const pid_t pid = pids_[static_cast<std::size_t>(rank)];
  failure_.poison(cat("peer rank ", board_.global_rank(rank),
                      pid == 0 ? "" : cat(" (pid ", pid, ")"),
                      " died; last seen: ", board_.last_seen(rank)));
}

bool Watchdog::is_alive(int rank) const {
  if (pids_[static_cast<std::size_t>(rank)] == getpid()) return true;
  for (const Peer& peer : peers_) {
    pollfd fd{peer.pidfd.get(), POLLIN, 0};
    if (peer.rank == rank) return poll(&fd, 1, 0) <= 0;
  }
  return false;
}

void Watchdog::look_at_waits() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const TimePoint now = Clock::now();
  for (const StreamWait& wait : waits_) {
    const bool over = epoch_reached(wait.flag->epoch.load(std::memory_order_acquire), wait.epoch);
    if (!over && now >= wait.deadline) failure_.poison(wait.what);
  }
  waits_.erase(std::remove_if(waits_.begin(), waits_.end(),
                              [](const StreamWait& wait) {
                                return epoch_reached(
                                    wait.flag->epoch.load(std::memory_order_acquire), wait.epoch);
                              }),
               waits_.end());
}

void Watchdog::stop() noexcept {
  stopping_.store(true, std::memory_order_release);
  const uint64_t one = 1;
  static_cast<void>(!write(wake_.get(), &one, sizeof(one)));
}

void Watchdog::close_fds() noexcept {
  peers_.clear();
  wake_.reset();
}

}  // namespace feplb
