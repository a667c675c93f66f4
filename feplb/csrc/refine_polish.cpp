#include <cstdlib>

#include "refine_ranks.h"

namespace feplb {
namespace {

constexpr int32_t kRounds = 32;  // each lowers the fullest rank

// A shift with another expert in its place, or two shifts with their helpers changed over.
struct Change {
  int64_t fullest = std::numeric_limits<int64_t>::max();  // of the two ranks it changes
  size_t shift = 0;
  size_t other = 0;  // changes helpers with this one, if it is not `shift` itself
  int32_t pos = -1;  // of the expert that takes the place
};

void consider(Change& best, int64_t first, int64_t second, const Change& change) {
  const int64_t fullest = std::max(first, second);
  if (fullest >= best.fullest) return;
  best = change;
  best.fullest = fullest;
}

// The expert that evens out the two ends of a shift best.
void see_experts(const Ranks& ranks, const Shift& shift, size_t idx, Change& best) {
  const int64_t src = ranks.load(shift.src), dst = ranks.load(shift.dst);
  const int32_t at = ranks.num_below(shift.src, shift.rows + (src - dst) / 2);
  for (int32_t pos = std::max(0, at - 1); pos < std::min(at + 1, ranks.size(shift.src)); ++pos) {
    const int64_t more = ranks.rows(shift.src)[pos] - shift.rows;
    if (ranks.has_room(shift, more)) consider(best, src - more, dst + more, {0, idx, idx, pos});
  }
}

void see_helpers(const Ranks& ranks, const std::vector<Shift>& shifts, size_t idx, Change& best) {
  const Shift& shift = shifts[idx];
  for (size_t other = 0; other < shifts.size(); ++other) {
    const Shift& with = shifts[other];
    if (with.dst == shift.dst || with.dst == shift.src || with.src == shift.dst) continue;
    const int64_t more = int64_t{with.rows} - shift.rows;  // for the helper of `shift`
    if (!ranks.takes(shift.dst, more) || !ranks.takes(with.dst, -more)) continue;
    consider(best, ranks.load(shift.dst) + more, ranks.load(with.dst) - more, {0, idx, other, -1});
  }
}

}  // namespace

void polish(Ranks& ranks, RefineScratch& scratch, int64_t goal) {
  ranks.make_best();
  for (int32_t round = 0; round < kRounds && ranks.fullest() > goal; ++round) {
    Change best;
    for (size_t idx = 0; idx < scratch.shifts.size(); ++idx) {
      const Shift& shift = scratch.shifts[idx];
      const bool relieves = ranks.load(shift.src) == ranks.fullest();
      const bool burdens = ranks.load(shift.dst) == ranks.fullest();
      if (relieves || burdens) see_experts(ranks, shift, idx, best);
      if (burdens) see_helpers(ranks, scratch.shifts, idx, best);
    }
    if (best.fullest >= ranks.fullest()) break;
    if (best.pos >= 0)
      ranks.replace(best.shift, best.pos);
    else
      ranks.change_over(best.shift, best.other);
  }
  ranks.accept();
}

}  // namespace feplb
