// Few ranks of a split plan: the groups that serve each other alone, found among all subsets.
#pragma once

#include <array>
#include <cstdint>

#include "split_match.h"

namespace feplb {

// Fills `found` with disjoint groups of `surplus` and `room` so that all take few copies, each
// group on its own and the other ranks together; returns how many. Bit i of a mask is the i-th
// owner, or helper from bit surplus.size() on. `slack` is the room beyond the need, at least 0. At
// most kMaxEnumerated ranks, with fewer than 2^30 tiles.
int find_groups(int64_t slack, MatchScratch& scratch,
                std::array<uint32_t, MatchScratch::kMaxEnumerated>& found);

}  // namespace feplb
