// One group of a split plan, whose owners and helpers serve each other alone: who takes how much of
// whom.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "split_match.h"

namespace feplb {

struct GroupCover {
  const PlanInput& input;
  MatchScratch& scratch;
  std::vector<SplitPiece>& pieces;
  int64_t grain;
  int64_t least;  // fewest tiles worth a move

  // Fewest experts of this owner that have the tiles; all, if they do not. Fills expert_tiles with
  // them, unless one will do.
  int32_t experts_needed(int32_t rank, int64_t tiles) const;

  // Appends pieces for group_surplus and group_room, both with most tiles first: at most (owners +
  // helpers - 1), where no owner cuts more than one expert; else of the ways tried the best.
  // Returns the copies, as far as can be told from here.
  int64_t cover();

 private:
  const int32_t* experts_of(int32_t rank) const {
    return input.counts + int64_t{rank + 1} * input.num_local_experts - input.limits.num_dynamic;
  }
  void next_expert() const;
  int64_t cover_owner(const SplitNode& owner, bool widest);
  int64_t cover_as(int way);
  int32_t misfits(const SplitNode& owner, std::size_t first);
  int64_t cover_in_order();
  int64_t cover_with_less_than(int64_t copies);
};

}  // namespace feplb
