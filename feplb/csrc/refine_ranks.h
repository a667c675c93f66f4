// What refine's searches share: the ranks with their loads, what they still can give, and a stack
// of shifts that can be taken back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "refine.h"

namespace feplb {

constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();  // of one expert
constexpr size_t kScanned = 32;  // experts of a rank; more are searched in halves

class Ranks {
 public:
  Ranks(const PlanInput& input, RefineScratch& scratch);

  int32_t num_ranks() const { return num_ranks_; }
  int64_t total() const { return total_; }
  int64_t mean() const { return mean_; }  // rounded up: no plan's fullest rank is below it
  int64_t load(int32_t rank) const { return s_.load[size_t(rank)]; }
  int64_t fullest() const { return *std::max_element(s_.load.begin(), s_.load.end()); }

  // What a rank may still give, ascending; then the most rows there can be, up to a multiple of 4.
  const int32_t* rows(int32_t rank) const { return &s_.rows[size_t(rank) * width_]; }
  int32_t size(int32_t rank) const { return s_.sizes[size_t(rank)]; }
  // How many of these have fewer than `least` rows. Without branches: where they end cannot be
  // predicted.
  int32_t num_below(int32_t rank, int64_t least) const {
    const int32_t* rows = this->rows(rank);
    const int32_t limit = int32_t(std::clamp<int64_t>(least, 0, kMostRows));
    int32_t found = 0;
    if (width_ <= kScanned) {
      const size_t width = width_ / 4 * 4;  // it is a multiple of 4, and full ones run as vectors
      for (size_t i = 0; i < width; ++i) found += rows[i] < limit;
      return found;
    }
    int32_t size = this->size(rank);
    while (size > 1) {
      const int32_t half = size / 2;
      found += half & -int32_t{rows[found + half - 1] < limit};
      size -= half;
    }
    return size == 1 ? found + (rows[found] < limit) : found;
  }

  int32_t slots(int32_t rank) const { return s_.slots[size_t(rank)]; }
  int32_t grad_slots(int32_t rank) const { return s_.grad_slots[size_t(rank)]; }
  bool fits(int32_t src, int32_t dst, int64_t rows) const {
    return s_.slots[size_t(dst)] > 0 && s_.grad_slots[size_t(src)] > 0 &&
           s_.recv_room[size_t(dst)] >= rows && s_.return_room[size_t(src)] >= rows;
  }

  void give(int32_t src, int32_t dst, int32_t pos);  // the pos-th of rows(src)
  void take_back();                                  // the last one given
  void take_back_to(size_t num_shifts) {
    while (s_.shifts.size() > num_shifts) take_back();
  }
  size_t num_shifts() const { return s_.shifts.size(); }

  // Remember the shifts made so far if their fullest rank is below that of the best plan, or equal
  // with fewer copies. Then take them back.
  bool keep_if_better();
  int64_t best_fullest() const { return best_fullest_; }

  // What follows changes shifts below the top of the stack: nothing can be taken back any more.
  void make_best();                              // the best plan's shifts
  void replace(size_t shift, int32_t pos);       // its expert by the pos-th that its src still has
  void change_over(size_t shift, size_t other);  // each gets the other's helper
  void accept() { s_.best = s_.shifts; }
  bool takes(int32_t dst, int64_t more) const { return s_.recv_room[size_t(dst)] >= more; }
  bool has_room(const Shift& shift, int64_t more) const {
    return takes(shift.dst, more) && s_.return_room[size_t(shift.src)] >= more;
  }

 private:
  void account(const Shift& shift, int32_t sign);

  RefineScratch& s_;
  int32_t num_ranks_;
  size_t width_;
  int64_t total_ = 0;
  int64_t mean_ = 0;
  int64_t best_fullest_ = 0;
};

// At most two experts from one rank, and at most one back, so that about `goal` rows change sides.
struct Transfer {
  int64_t error = std::numeric_limits<int64_t>::max();  // |rows that change sides - goal|
  int32_t give = -1;                                    // positions in rows(src); -1: none
  int32_t give_too = -1;                                // above `give`
  int32_t take = -1;                                    // in rows(dst)
  int32_t copies() const { return (give >= 0) + (give_too >= 0) + (take >= 0); }
};

Transfer best_transfer(const Ranks& ranks, int32_t src, int32_t dst, int64_t goal,
                       int32_t max_copies);
// False, and nothing done, where a limit forbids it.
bool carry_out(Ranks& ranks, int32_t src, int32_t dst, const Transfer& transfer);

// How long a try of close_one_by_one goes on, and how widely it looks.
struct Effort {
  int32_t steps;
  int32_t late;  // while so many ranks are open, or fewer, one closing may waste all the slack
};

// Each fills the best plan of `ranks` if it finds a better one; all shifts are taken back.
// One copy brings one rank to at most `most` rows and near it; false if it finds no such plan. At
// most 31 ranks.
bool close_one_by_one(Ranks& ranks, RefineScratch& scratch, int64_t most, int32_t max_copies,
                      const Effort& effort, int32_t& steps);
// The rank farthest from the mean gets a transfer of up to two copies, again and again; `skip`
// starts with the second or third farthest.
void pair_off(Ranks& ranks, RefineScratch& scratch, int32_t max_copies, int32_t skip);
// Lowers the fullest rank of the best plan without another copy: a neighbour of an expert in its
// place, or two helpers changed over. The last step: it leaves the ranks as they are then.
void polish(Ranks& ranks, RefineScratch& scratch, int64_t goal);
// Ships only from ranks above `most`, as little as that takes.
bool relieve(Ranks& ranks, int64_t most, int32_t max_copies, int32_t max_steps, int32_t& steps);

}  // namespace feplb
