// Few ranks of a split plan: the groups that serve each other alone, found among all subsets.
#pragma once

#include <cstdint>
#include <functional>

#include "split_match.h"

namespace feplb {

// Covers these groups, and all other ranks together; returns the copies beyond the fewest experts
// that the owners must cut. Bit i of a mask is the i-th owner, or helper from bit surplus.size()
// on.
using Cover = std::function<int(const uint32_t* groups, int num_groups)>;

// Has disjoint groups of `surplus` and `room` covered that take few copies; where they take more
// than they must, others too, as long as these may take less. `slack` is the room beyond the need,
// at least 0. At most kMaxEnumerated ranks, with fewer than 2^30 tiles.
void find_groups(int64_t slack, MatchScratch& scratch, const Cover& cover);

}  // namespace feplb
