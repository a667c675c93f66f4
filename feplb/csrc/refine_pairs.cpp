#include <cstdlib>

#include "refine_ranks.h"

namespace feplb {
namespace {

// With two copies per rank, one rank after the other can be brought to the mean almost exactly:
// with 16 experts on either side there are hundreds of sums and differences to choose from.
class Pairing {
 public:
  Pairing(Ranks& ranks, RefineScratch& scratch, int32_t max_copies)
      : ranks_(ranks),
        open_(scratch.open),
        near_(std::max<int64_t>(1, ranks.mean() / kNear)),
        left_(max_copies) {
    open_.assign(size_t(ranks.num_ranks()), 1);
    num_open_ = ranks.num_ranks();
  }

  void run(int32_t skip) {
    for (int32_t round = 0; round < 4 * ranks_.num_ranks(); ++round) {
      if (num_open_ < 2 || left_ < 1) return;
      const int32_t rank = farthest(round == 0 ? skip : 0);
      if (!improve(rank)) close(rank);
    }
  }

 private:
  static constexpr int64_t kNear = 512;  // of the mean: as near as is worth closing a rank

  int64_t off(int32_t rank) const { return ranks_.load(rank) - ranks_.mean(); }

  void close(int32_t rank) {
    open_[size_t(rank)] = 0;
    --num_open_;
  }

  // The open rank that is farthest from the mean, after `skip` others.
  int32_t farthest(int32_t skip) const {
    int32_t found = -1;
    int64_t below = std::numeric_limits<int64_t>::max(), last = -1;
    for (;; --skip) {
      int64_t most = -1;
      int32_t next = -1;
      for (int32_t rank = 0; rank < ranks_.num_ranks(); ++rank) {
        const int64_t distance = std::abs(off(rank));
        const bool later = distance < below || (distance == below && rank > last);
        if (!open_[size_t(rank)] || !later || distance <= most) continue;
        most = distance;
        next = rank;
      }
      if (next < 0) return found;
      found = next;
      if (skip <= 0) return found;
      below = most;
      last = next;
    }
  }

  // One transfer between `rank` and a rank on the other side of the mean; false if none helps.
  bool improve(int32_t rank) {
    const bool last_two = num_open_ == 2;
    const int32_t copies = last_two ? std::min(left_, 3) : std::clamp(left_ - num_open_ + 2, 1, 2);
    int32_t partner = -1;
    Transfer best = find(rank, copies, partner);
    const bool far = best.error > near_;
    if (far && best.copies() > 1 && left_ > num_open_) best = find(rank, 1, partner);
    if (partner < 0 || best.error >= std::abs(off(rank))) return false;
    const bool gives = off(rank) > 0;
    if (!carry_out(ranks_, gives ? rank : partner, gives ? partner : rank, best)) return false;
    left_ -= best.copies();
    if (!last_two && best.error <= near_) close(rank);
    return true;
  }

  Transfer find(int32_t rank, int32_t copies, int32_t& partner) const {
    Transfer best;
    partner = -1;
    const bool gives = off(rank) > 0;
    for (int32_t other = 0; other < ranks_.num_ranks(); ++other) {
      if (!open_[size_t(other)] || other == rank || (off(other) > 0) == gives) continue;
      const Transfer found = gives ? best_transfer(ranks_, rank, other, off(rank), copies)
                                   : best_transfer(ranks_, other, rank, -off(rank), copies);
      if (found.error >= best.error) continue;
      best = found;
      partner = other;
    }
    return best;
  }

  Ranks& ranks_;
  std::vector<uint8_t>& open_;
  const int64_t near_;
  int32_t left_;
  int32_t num_open_ = 0;
};

}  // namespace

void pair_off(Ranks& ranks, RefineScratch& scratch, int32_t max_copies, int32_t skip) {
  Pairing(ranks, scratch, max_copies).run(skip);
  ranks.keep_if_better();
}

}  // namespace feplb
