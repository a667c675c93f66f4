#include <cstdlib>

#include "refine_ranks.h"

namespace feplb {
namespace {

constexpr int32_t kNever = std::numeric_limits<int32_t>::max();
constexpr int32_t kBranches = 4;  // candidates tried per step; most plans need the first only

// Depth first: each step closes one open rank, that is, brings it to at most `most` rows and leaves
// it alone from then on. What a closed rank has below `most` is wasted; together the open ranks
// have `slack` to waste. The last two ranks share what they have.
//
// A board says, per step, what each closing would waste: [src, dst] where dst is filled up by the
// best expert of src; [rank, rank] where the rank is closed as it is (its load is within `most`),
// or by shipping the smallest expert that suffices. One expert changes two ranks, so of a board
// only two rows and two columns are new; the rest is copied.
class ClosingSearch {
 public:
  ClosingSearch(Ranks& ranks, RefineScratch& scratch, int64_t most, int32_t max_steps,
                int32_t& steps)
      : ranks_(ranks),
        open_(scratch.open),
        boards_(scratch.waste),
        n_(ranks.num_ranks()),
        most_(most),
        max_steps_(max_steps),
        steps_(steps) {
    open_.assign(size_t(n_), 1);
    num_open_ = n_;
    boards_.resize(size_t(n_) * n_ * n_);
    for (int32_t rank = 0; rank < n_; ++rank) refresh(board(0), rank);
  }

  // Without the first candidates of the first step, so that another call finds other plans.
  bool run(int32_t copies, int32_t skip) {
    for (; skip > 0; --skip) board(0)[cheapest(board(0))] = kNever;
    return step(0, most_ * n_ - ranks_.total(), copies);
  }

 private:
  int32_t* board(int32_t depth) { return &boards_[size_t(depth) * n_ * n_]; }

  static int32_t clamped(int64_t waste) { return int32_t(std::min<int64_t>(waste, kNever)); }

  int32_t waste_of_filling(int32_t src, int32_t dst) const {
    const int64_t room = most_ - ranks_.load(dst);
    const int32_t fitting = room > 0 ? ranks_.num_below(src, room + 1) : 0;
    return fitting > 0 ? clamped(room - ranks_.rows(src)[fitting - 1]) : kNever;
  }

  int32_t waste_alone(int32_t rank) const {
    const int64_t surplus = ranks_.load(rank) - most_;
    if (surplus <= 0) return clamped(-surplus);
    const int32_t at = ranks_.num_below(rank, surplus);
    return at < ranks_.size(rank) ? clamped(ranks_.rows(rank)[at] - surplus) : kNever;
  }

  // The row and column of a rank whose load, or whose experts, have changed.
  void refresh(int32_t* board, int32_t rank) {
    for (int32_t other = 0; other < n_; ++other) {
      if (!open_[size_t(other)] || other == rank) continue;
      board[rank * n_ + other] = waste_of_filling(rank, other);
      board[other * n_ + rank] = waste_of_filling(other, rank);
    }
    board[rank * n_ + rank] = waste_alone(rank);
  }

  void strike(int32_t* board, int32_t rank) {
    for (int32_t other = 0; other < n_; ++other)
      board[rank * n_ + other] = board[other * n_ + rank] = kNever;
  }

  int32_t cheapest(const int32_t* board) const {
    const int32_t size = n_ * n_;
    int32_t least = kNever;
    for (int32_t i = 0; i < size; ++i) least = std::min(least, board[i]);
    return int32_t(std::find(board, board + size, least) - board);
  }

  bool step(int32_t depth, int64_t slack, int32_t copies) {
    if (num_open_ == 1) return true;
    if (num_open_ == 2) return share(copies);
    if (++steps_ > max_steps_) return false;
    for (int32_t tried = 0; tried < kBranches;) {
      const int32_t found = cheapest(board(depth));
      const int32_t waste = board(depth)[found];
      if (waste == kNever || waste > slack) return false;
      const int32_t src = found / n_, dst = found % n_;
      const bool as_it_is = src == dst && ranks_.load(src) <= most_;
      board(depth)[found] = kNever;
      if (!as_it_is && copies < 1) continue;
      const int32_t partner = as_it_is ? -1 : ship(src, dst);
      if (!as_it_is && partner < 0) continue;
      ++tried;
      if (descend(depth, dst, partner, slack - waste, copies - !as_it_is)) return true;
      if (!as_it_is) ranks_.take_back();
      if (steps_ > max_steps_) return false;
    }
    return false;
  }

  // Makes the shift of board entry [src, dst]; returns the end that stays open, -1 if it is
  // forbidden.
  int32_t ship(int32_t src, int32_t dst) {
    if (src != dst) {
      const int32_t pos = ranks_.num_below(src, most_ - ranks_.load(dst) + 1) - 1;
      if (!ranks_.fits(src, dst, ranks_.rows(src)[pos])) return -1;
      ranks_.give(src, dst, pos);
      return src;
    }
    const int32_t pos = ranks_.num_below(src, ranks_.load(src) - most_);
    const int64_t rows = ranks_.rows(src)[pos];
    int32_t partner = -1;
    int64_t least = std::numeric_limits<int64_t>::max();
    for (int32_t rank = 0; rank < n_; ++rank) {
      if (!open_[size_t(rank)] || rank == src || !ranks_.fits(src, rank, rows)) continue;
      const int64_t off = std::abs(ranks_.load(rank) + rows - ranks_.mean());
      if (off >= least) continue;
      least = off;
      partner = rank;
    }
    if (partner >= 0) ranks_.give(src, partner, pos);
    return partner;
  }

  bool descend(int32_t depth, int32_t closed, int32_t partner, int64_t slack, int32_t copies) {
    open_[size_t(closed)] = 0;
    --num_open_;
    if (num_open_ > 2) {
      std::copy(board(depth), board(depth) + n_ * n_, board(depth + 1));
      strike(board(depth + 1), closed);
      if (partner >= 0) refresh(board(depth + 1), partner);
    }
    if (step(depth + 1, slack, copies)) return true;
    open_[size_t(closed)] = 1;
    ++num_open_;
    return false;
  }

  // The last two: the transfer nearest half their difference.
  bool share(int32_t copies) {
    const int32_t first = int32_t(std::find(open_.begin(), open_.end(), 1) - open_.begin());
    const int32_t second =
        int32_t(std::find(open_.begin() + first + 1, open_.end(), 1) - open_.begin());
    const bool turned = ranks_.load(first) < ranks_.load(second);
    const int32_t src = turned ? second : first, dst = turned ? first : second;
    if (ranks_.load(src) <= most_) return true;
    const int64_t half = (ranks_.load(src) - ranks_.load(dst)) / 2;
    const Transfer transfer = best_transfer(ranks_, src, dst, half, copies);
    if (transfer.give < 0) return false;
    const size_t before = ranks_.num_shifts();
    if (!carry_out(ranks_, src, dst, transfer)) return false;
    if (std::max(ranks_.load(src), ranks_.load(dst)) <= most_) return true;
    ranks_.take_back_to(before);
    return false;
  }

  Ranks& ranks_;
  std::vector<uint8_t>& open_;
  std::vector<int32_t>& boards_;
  const int32_t n_;
  const int64_t most_;
  const int32_t max_steps_;
  int32_t& steps_;
  int32_t num_open_ = 0;
};

}  // namespace

bool close_one_by_one(Ranks& ranks, RefineScratch& scratch, int64_t most, int32_t max_copies,
                      int32_t skip, int32_t max_steps, int32_t& steps) {
  ClosingSearch search(ranks, scratch, most, steps + max_steps, steps);
  const bool found = search.run(max_copies, skip);
  return ranks.keep_if_better() && found;
}

}  // namespace feplb
