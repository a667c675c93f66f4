#include "unmapping.h"

#include <algorithm>

namespace feplb {
namespace {

constexpr double kLongestWaitS = 1;
constexpr std::chrono::milliseconds kNap{20};  // a peer that dies rings nobody

}  // namespace

void tell_unmapped(CountBoard& board, int rank) noexcept {
  board.set_state(rank, RankState::kUnmapped);
  for (int peer = 0; peer < board.num_ranks(); ++peer) {
    if (peer != rank) board.bell(peer).ring(kStopRing);
  }
}

std::vector<int> await_unmapped(const CountBoard& board, int rank,
                                const std::function<bool(int rank)>& is_alive, double deadline_s) {
  const TimePoint end = Clock::now() + duration_of(std::min(kLongestWaitS, deadline_s));
  while (true) {
    const uint32_t seen = board.bell(rank).rings();
    std::vector<int> missing;
    for (int peer = 0; peer < board.num_ranks(); ++peer) {
      const bool has_unmapped = peer == rank || board.state(peer) == RankState::kUnmapped;
      if (!has_unmapped && is_alive(peer)) missing.push_back(board.global_rank(peer));
    }
    const TimePoint now = Clock::now();
    if (missing.empty() || now >= end) return missing;
    board.bell(rank).sleep(seen, ~0u, std::min(end, now + kNap));
  }
}

}  // namespace feplb
