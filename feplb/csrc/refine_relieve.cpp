#include "refine_ranks.h"

namespace feplb {
namespace {

constexpr int32_t kExperts = 3;  // tried per step: the smallest that suffices, and the next larger
constexpr int32_t kHelpers = 2;  // tried per expert: the tightest room, and the next

// Depth first: the fullest rank ships the smallest expert that brings it to `most` rows into the
// tightest room that takes it; where none does, the largest that fits anywhere.
class Relief {
 public:
  Relief(Ranks& ranks, int64_t most, int32_t max_steps, int32_t& steps)
      : ranks_(ranks), most_(most), max_steps_(max_steps), steps_(steps) {}

  bool step(int32_t copies) {
    int32_t src = 0, num_over = 0;
    for (int32_t rank = 0; rank < ranks_.num_ranks(); ++rank) {
      num_over += ranks_.load(rank) > most_;
      if (ranks_.load(rank) > ranks_.load(src)) src = rank;
    }
    if (num_over == 0) return true;
    if (num_over > copies || ++steps_ > max_steps_) return false;
    const int32_t enough = ranks_.num_below(src, ranks_.load(src) - most_);
    const int32_t end = std::min(ranks_.size(src), enough + kExperts);
    for (int32_t pos = enough; pos < end; ++pos)
      if (ship(src, pos, copies)) return true;
    return ship_largest(src, enough, copies);
  }

 private:
  // The tightest room for these rows that is wider than `last`; -1 if there is none.
  int32_t tightest(int32_t src, int64_t rows, int64_t last) const {
    int64_t least = std::numeric_limits<int64_t>::max();
    int32_t found = -1;
    for (int32_t rank = 0; rank < ranks_.num_ranks(); ++rank) {
      const int64_t room = most_ - ranks_.load(rank);
      if (room < rows || room <= last || room >= least) continue;
      if (rank == src || !ranks_.fits(src, rank, rows)) continue;
      least = room;
      found = rank;
    }
    return found;
  }

  bool ship(int32_t src, int32_t pos, int32_t copies) {
    const int64_t rows = ranks_.rows(src)[pos];
    int64_t last = -1;
    for (int32_t tried = 0; tried < kHelpers; ++tried) {
      const int32_t dst = tightest(src, rows, last);
      if (dst < 0) return false;
      last = most_ - ranks_.load(dst);
      ranks_.give(src, dst, pos);
      if (step(copies - 1)) return true;
      ranks_.take_back();
    }
    return false;
  }

  bool ship_largest(int32_t src, int32_t enough, int32_t copies) {
    for (int32_t pos = enough - 1; pos >= 0; --pos)
      if (tightest(src, ranks_.rows(src)[pos], -1) >= 0) return ship(src, pos, copies);
    return false;
  }

  Ranks& ranks_;
  const int64_t most_;
  const int32_t max_steps_;
  int32_t& steps_;
};

}  // namespace

bool relieve(Ranks& ranks, int64_t most, int32_t max_copies, int32_t max_steps, int32_t& steps) {
  const bool found = Relief(ranks, most, steps + max_steps, steps).step(max_copies);
  return ranks.keep_if_better() && found;
}

}  // namespace feplb
