#include "refine_ranks.h"

namespace feplb {

Ranks::Ranks(const PlanInput& input, RefineScratch& scratch)
    : s_(scratch),
      num_ranks_(input.num_ranks),
      width_((size_t(input.limits.num_dynamic) + 3) / 4 * 4) {
  const PlanLimits& limits = input.limits;
  const size_t num_ranks = size_t(num_ranks_);
  const int32_t min_rows = std::max(1, limits.min_tokens);
  s_.rows.assign(num_ranks * width_, int32_t{kMostRows});
  s_.experts.resize(num_ranks * width_);
  s_.sizes.assign(num_ranks, 0);
  s_.load.assign(num_ranks, 0);
  s_.slots.assign(num_ranks, limits.num_slots);
  s_.grad_slots.assign(num_ranks, limits.num_grad_slots);
  s_.recv_room.assign(num_ranks, limits.max_recv_rows);
  s_.return_room.assign(num_ranks, limits.max_return_rows);
  s_.shifts.clear();
  s_.best.clear();
  const int32_t first = input.num_local_experts - limits.num_dynamic;
  const int32_t* counts = input.counts;
  for (size_t rank = 0; rank < num_ranks; ++rank, counts += input.num_local_experts) {
    int32_t* rows = s_.rows.data() + rank * width_;
    int32_t* experts = s_.experts.data() + rank * width_;
    int32_t size = 0;
    for (int32_t expert = 0; expert < input.num_local_experts; ++expert) {
      s_.load[rank] += counts[expert];
      if (expert < first || counts[expert] < min_rows) continue;
      int32_t at = size++;  // insertion: ranks have few experts, and equal ones keep their order
      for (; at > 0 && rows[at - 1] > counts[expert]; --at) {
        rows[at] = rows[at - 1];
        experts[at] = experts[at - 1];
      }
      rows[at] = counts[expert];
      experts[at] = expert;
    }
    s_.sizes[rank] = size;
    total_ += s_.load[rank];
  }
  mean_ = (total_ + num_ranks_ - 1) / num_ranks_;
  best_fullest_ = fullest();
}

void Ranks::account(const Shift& shift, int32_t sign) {
  const size_t src = size_t(shift.src), dst = size_t(shift.dst);
  const int64_t rows = int64_t{shift.rows} * sign;
  s_.load[src] -= rows;
  s_.load[dst] += rows;
  s_.return_room[src] -= rows;
  s_.recv_room[dst] -= rows;
  s_.grad_slots[src] -= sign;
  s_.slots[dst] -= sign;
}

void Ranks::give(int32_t src, int32_t dst, int32_t pos) {
  int32_t* rows = &s_.rows[size_t(src) * width_];
  int32_t* experts = &s_.experts[size_t(src) * width_];
  const Shift shift{src, dst, experts[pos], rows[pos], pos};
  const int32_t left = --s_.sizes[size_t(src)];
  std::copy(rows + pos + 1, rows + left + 1, rows + pos);
  std::copy(experts + pos + 1, experts + left + 1, experts + pos);
  rows[left] = int32_t{kMostRows};
  s_.shifts.push_back(shift);
  account(shift, 1);
}

void Ranks::take_back() {
  const Shift shift = s_.shifts.back();
  s_.shifts.pop_back();
  int32_t* rows = &s_.rows[size_t(shift.src) * width_];
  int32_t* experts = &s_.experts[size_t(shift.src) * width_];
  const int32_t size = s_.sizes[size_t(shift.src)]++;
  std::copy_backward(rows + shift.pos, rows + size, rows + size + 1);
  std::copy_backward(experts + shift.pos, experts + size, experts + size + 1);
  rows[shift.pos] = shift.rows;
  experts[shift.pos] = shift.expert;
  account(shift, -1);
}

bool Ranks::keep_if_better() {
  const int64_t now = fullest();
  const bool better =
      now < best_fullest_ || (now == best_fullest_ && s_.shifts.size() < s_.best.size());
  if (better) {
    best_fullest_ = now;
    s_.best = s_.shifts;
  }
  take_back_to(0);
  return better;
}

void Ranks::make_best() {
  for (const Shift& shift : s_.best) give(shift.src, shift.dst, shift.pos);
}

void Ranks::replace(size_t shift, int32_t pos) {
  Shift& changed = s_.shifts[shift];
  const Shift before = changed;
  account(before, -1);
  int32_t* rows = &s_.rows[size_t(before.src) * width_];
  int32_t* experts = &s_.experts[size_t(before.src) * width_];
  changed.rows = rows[pos];
  changed.expert = experts[pos];
  // The expert that stays finds its place among the others, from where the one that goes was.
  const int32_t last = s_.sizes[size_t(before.src)] - 1;
  int32_t at = pos;
  for (; at < last && rows[at + 1] < before.rows; ++at) {
    rows[at] = rows[at + 1];
    experts[at] = experts[at + 1];
  }
  for (; at > 0 && rows[at - 1] > before.rows; --at) {
    rows[at] = rows[at - 1];
    experts[at] = experts[at - 1];
  }
  rows[at] = before.rows;
  experts[at] = before.expert;
  account(changed, 1);
}

void Ranks::change_over(size_t shift, size_t other) {
  Shift &first = s_.shifts[shift], &second = s_.shifts[other];
  account(first, -1);
  account(second, -1);
  std::swap(first.dst, second.dst);
  account(first, 1);
  account(second, 1);
}

namespace {

void see(Transfer& best, int64_t rows, int64_t goal, int32_t give, int32_t give_too, int32_t take) {
  const int64_t error = rows > goal ? rows - goal : goal - rows;
  if (error < best.error) best = Transfer{error, give, give_too, take};
}

// The expert of a sorted list nearest to `rows`: itself or the one below.
template <class Seen>
void nearest(const Ranks& ranks, int32_t rank, int64_t rows, Seen seen) {
  const int32_t at = ranks.num_below(rank, rows);
  if (at < ranks.size(rank)) seen(at);
  if (at > 0) seen(at - 1);
}

// One against one: as the given expert grows, so does the one to take for it.
void see_exchanges(const Ranks& ranks, int32_t src, int32_t dst, int64_t goal, Transfer& best) {
  const int32_t *given = ranks.rows(src), *taken = ranks.rows(dst);
  const int32_t num_given = ranks.size(src), num_taken = ranks.size(dst);
  for (int32_t give = 0, take = 0; num_taken > 0 && give < num_given; ++give) {
    while (take + 1 < num_taken && given[give] - taken[take + 1] >= goal) ++take;
    see(best, given[give] - taken[take], goal, give, -1, take);
    if (take + 1 < num_taken) see(best, given[give] - taken[take + 1], goal, give, -1, take + 1);
  }
}

void see_pairs(const Ranks& ranks, int32_t src, int64_t goal, Transfer& best) {
  const int32_t* given = ranks.rows(src);
  for (int32_t low = 0, high = ranks.size(src) - 1; low < high;) {
    const int64_t rows = int64_t{given[low]} + given[high];
    see(best, rows, goal, low, high, -1);
    rows < goal ? ++low : --high;
  }
}

void see_two_against_one(const Ranks& ranks, int32_t src, int32_t dst, int64_t goal,
                         Transfer& best) {
  const int32_t *given = ranks.rows(src), *taken = ranks.rows(dst);
  for (int32_t low = 0; low < ranks.size(src); ++low)
    for (int32_t high = low + 1; high < ranks.size(src); ++high) {
      const int64_t rows = int64_t{given[low]} + given[high];
      if (rows <= goal) continue;
      nearest(ranks, dst, rows - goal,
              [&](int32_t take) { see(best, rows - taken[take], goal, low, high, take); });
    }
}

constexpr int32_t kMostForTriples = 16;  // experts of a rank; above, pairs are dense enough

}  // namespace

Transfer best_transfer(const Ranks& ranks, int32_t src, int32_t dst, int64_t goal,
                       int32_t max_copies) {
  Transfer best;
  const int32_t gives = std::min(ranks.slots(dst), ranks.grad_slots(src));
  const int32_t takes = std::min(ranks.slots(src), ranks.grad_slots(dst));
  if (max_copies < 1 || gives < 1) return best;
  nearest(ranks, src, goal,
          [&](int32_t give) { see(best, ranks.rows(src)[give], goal, give, -1, -1); });
  if (max_copies >= 2 && best.error > 0 && takes >= 1) see_exchanges(ranks, src, dst, goal, best);
  if (max_copies >= 2 && best.error > 0 && gives >= 2) see_pairs(ranks, src, goal, best);
  if (max_copies >= 3 && best.error > 1 && gives >= 2 && takes >= 1 &&
      ranks.size(src) <= kMostForTriples)
    see_two_against_one(ranks, src, dst, goal, best);
  return best;
}

bool carry_out(Ranks& ranks, int32_t src, int32_t dst, const Transfer& transfer) {
  const size_t before = ranks.num_shifts();
  const auto try_one = [&ranks](int32_t from, int32_t to, int32_t pos) {
    if (pos < 0) return true;
    if (!ranks.fits(from, to, ranks.rows(from)[pos])) return false;
    ranks.give(from, to, pos);
    return true;
  };
  // The higher position first: giving it does not move the lower one.
  if (try_one(src, dst, transfer.give_too) && try_one(src, dst, transfer.give) &&
      try_one(dst, src, transfer.take))
    return true;
  ranks.take_back_to(before);
  return false;
}

}  // namespace feplb
