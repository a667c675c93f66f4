#include <cstdlib>

#include "refine_ranks.h"

namespace feplb {
namespace {

constexpr int32_t kNever = std::numeric_limits<int32_t>::max();
constexpr int32_t kBranches = 5;  // closings tried per step; most plans need the first only

// `rank` is brought to at most `most` rows and left alone, by the pos-th expert that src still has.
struct Closing {
  int64_t waste;
  int64_t off;  // of the other end from the mean, where there is a choice of them
  int32_t rank;
  int32_t src;  // -1: nothing is shipped
  int32_t dst;
  int32_t pos;
};

// The best few, best first; of equal ones the first seen.
class Shortlist {
 public:
  void add(const Closing& closing) {
    int32_t at = std::min(count_++, kBranches);
    count_ = std::min(count_, kBranches);
    for (; at > 0 && better(closing, closings_[at - 1]); --at)
      if (at < kBranches) closings_[at] = closings_[at - 1];
    if (at < kBranches) closings_[at] = closing;
  }
  const Closing* begin() const { return closings_; }
  const Closing* end() const { return closings_ + count_; }

 private:
  static bool better(const Closing& a, const Closing& b) {
    return a.waste < b.waste || (a.waste == b.waste && a.off < b.off);
  }

  Closing closings_[kBranches];
  int32_t count_ = 0;
};

// Depth first: each step closes one open rank, that is, brings it to at most `most` rows and leaves
// it alone from then on. What a closed rank has below `most` is wasted; together the open ranks
// have `slack` to waste. The last two ranks share what they have.
//
// A board says, per step, what each closing would waste: [src, dst] where dst is filled up by the
// best expert of src; [rank, rank] where the rank is closed as it is (its load is within `most`),
// or by shipping the smallest expert that suffices, to whichever rank. One expert changes two
// ranks, so of a board only two rows and two columns are new; the rest is copied.
//
// Sets of ranks are masks: bit i is rank i.
class ClosingSearch {
 public:
  ClosingSearch(Ranks& ranks, RefineScratch& scratch, int64_t most, const Effort& effort,
                int32_t& steps)
      : ranks_(ranks),
        boards_(scratch.waste),
        n_(ranks.num_ranks()),
        most_(most),
        late_(effort.late),
        max_steps_(steps + effort.steps),
        steps_(steps) {
    boards_.resize(size_t(n_) * n_ * n_);
    for (int32_t rank = 0; rank < n_; ++rank) refresh(board(0), all(), rank);
  }

  bool run(int32_t copies) { return step(all(), n_, most_ * n_ - ranks_.total(), copies); }

 private:
  uint32_t all() const { return (1u << n_) - 1; }
  int32_t* board(int32_t depth) { return &boards_[size_t(depth) * n_ * n_]; }

  template <class Visit>
  static void for_each(uint32_t mask, Visit visit) {
    for (; mask != 0; mask &= mask - 1) visit(__builtin_ctz(mask));
  }

  static int32_t clamped(int64_t waste) { return int32_t(std::min<int64_t>(waste, kNever)); }

  // Of the experts of src, the largest that dst has room for, and the smallest that suffices.
  int32_t filling(int32_t src, int32_t dst) const {
    return ranks_.num_below(src, most_ - ranks_.load(dst) + 1) - 1;
  }
  int32_t relieving(int32_t src) const { return ranks_.num_below(src, ranks_.load(src) - most_); }

  int32_t waste_of_filling(int32_t src, int32_t dst) const {
    const int64_t room = most_ - ranks_.load(dst);
    const int32_t pos = room > 0 ? filling(src, dst) : -1;
    return pos >= 0 ? clamped(room - ranks_.rows(src)[pos]) : kNever;
  }

  int32_t waste_alone(int32_t rank) const {
    const int64_t surplus = ranks_.load(rank) - most_;
    if (surplus <= 0) return clamped(-surplus);
    const int32_t pos = relieving(rank);
    return pos < ranks_.size(rank) ? clamped(ranks_.rows(rank)[pos] - surplus) : kNever;
  }

  // The row and column of a rank whose load, or whose experts, have changed.
  void refresh(int32_t* board, uint32_t open, int32_t rank) const {
    for_each(open & ~(1u << rank), [&](int32_t other) {
      board[rank * n_ + other] = waste_of_filling(rank, other);
      board[other * n_ + rank] = waste_of_filling(other, rank);
    });
    board[rank * n_ + rank] = waste_alone(rank);
  }

  // The ways to close `rank` without an expert of another rank.
  void see_alone(int32_t waste, uint32_t open, int32_t rank, int32_t copies, Shortlist& found) {
    if (ranks_.load(rank) <= most_) {
      found.add({waste, 0, rank, -1, -1, -1});
    } else if (copies > 0) {
      const int32_t pos = relieving(rank);
      const int64_t rows = ranks_.rows(rank)[pos];
      for_each(open & ~(1u << rank), [&](int32_t dst) {
        const int64_t off = std::abs(ranks_.load(dst) + rows - ranks_.mean());
        if (ranks_.fits(rank, dst, rows)) found.add({waste, off, rank, rank, dst, pos});
      });
    }
  }

  Shortlist see(const int32_t* board, uint32_t open, int64_t limit, int32_t copies) {
    Shortlist found;
    for_each(open, [&](int32_t src) {
      const int32_t* wastes = board + src * n_;
      for_each(open, [&](int32_t dst) {
        if (wastes[dst] > limit) return;
        if (dst == src) return see_alone(wastes[dst], open, src, copies, found);
        const int32_t pos = filling(src, dst);
        if (copies > 0 && ranks_.fits(src, dst, ranks_.rows(src)[pos]))
          found.add({wastes[dst], 0, dst, src, dst, pos});
      });
    });
    return found;
  }

  // The last ranks have few closings to choose from, so the slack is kept for them: while more than
  // `late` are open, one closing may waste only its share.
  bool step(uint32_t open, int32_t num_open, int64_t slack, int32_t copies) {
    if (num_open == 2) return share(open, copies);
    if (++steps_ > max_steps_) return false;
    int32_t* board = this->board(n_ - num_open);
    const int64_t limit = std::min<int64_t>(slack / std::max(1, num_open + 1 - late_), kNever - 1);
    for (const Closing& closing : see(board, open, limit, copies)) {
      if (descend(board, open, num_open, slack, copies, closing)) return true;
      if (steps_ > max_steps_) return false;
      // Below the next closing, this one would lead to what was just searched.
      const int32_t other = closing.rank == closing.dst ? closing.src : closing.rank;
      board[other * n_ + closing.rank] = kNever;
    }
    return false;
  }

  bool descend(const int32_t* board, uint32_t open, int32_t num_open, int64_t slack, int32_t copies,
               const Closing& closing) {
    const bool ships = closing.src >= 0;
    open &= ~(1u << closing.rank);
    if (ships) ranks_.give(closing.src, closing.dst, closing.pos);
    if (num_open > 3) {
      int32_t* next = this->board(n_ - num_open + 1);
      std::copy(board, board + n_ * n_, next);
      if (ships) refresh(next, open, closing.rank == closing.src ? closing.dst : closing.src);
    }
    if (step(open, num_open - 1, slack - closing.waste, copies - ships)) return true;
    if (ships) ranks_.take_back();
    return false;
  }

  // The last two: the transfer nearest half their difference.
  bool share(uint32_t open, int32_t copies) {
    const int32_t first = __builtin_ctz(open), second = __builtin_ctz(open & (open - 1));
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
  std::vector<int32_t>& boards_;
  const int32_t n_;
  const int64_t most_;
  const int32_t late_;
  const int32_t max_steps_;
  int32_t& steps_;
};

}  // namespace

bool close_one_by_one(Ranks& ranks, RefineScratch& scratch, int64_t most, int32_t max_copies,
                      const Effort& effort, int32_t& steps) {
  ClosingSearch search(ranks, scratch, most, effort, steps);
  const bool found = search.run(max_copies);
  return ranks.keep_if_better() && found;
}

}  // namespace feplb
