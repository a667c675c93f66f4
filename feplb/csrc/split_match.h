// Which rank helps which in a split plan, in as few weight copies as possible. A copy joins an
// owner and a helper, so a group of o owners and h helpers that serve each other alone takes o + h
// - 1 of them, and the more groups, the fewer copies. An owner takes one copy for each expert it
// must cut at least, too.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "plan_types.h"

namespace feplb {

struct SplitNode {  // a rank with tiles of grain_rows to ship, or with room for some
  int32_t rank;
  int32_t slots;    // moves that a helper still takes in
  int32_t experts;  // fewest experts of an owner that have the tiles
  int64_t tiles;
};

inline bool more_tiles(const SplitNode& a, const SplitNode& b) {
  return a.tiles > b.tiles || (a.tiles == b.tiles && a.rank < b.rank);
}

struct SplitPiece {
  int32_t owner;
  int32_t helper;
  int64_t tiles;
};

struct MatchScratch {
  static constexpr int kMaxEnumerated = 10;  // ranks whose subsets are all looked at
  static constexpr int kMaxOrders = 16;      // of few ranks, tried for one plan

  int orders_left = 0;  // of these

  std::vector<SplitNode> surplus, room;  // most tiles first
  std::vector<SplitNode> group_surplus, group_room, group_left;
  std::vector<int32_t> expert_rows;   // [num_dynamic] of one owner
  std::vector<int64_t> expert_tiles;  // of the same owner, only of its fullest, most first
  std::vector<uint64_t> groups;
  std::vector<SplitPiece> best_pieces;
  std::array<int32_t, 1 << kMaxEnumerated> sums;
  std::array<uint8_t, 1 << kMaxEnumerated> within;
};

// floor(a / b); a at least 0, b at least 1. Divisions of 64 bits take several times as long.
inline int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

inline int64_t divide_up(int64_t a, int64_t b) { return divide(a + b - 1, b); }

// Pieces that bring every rank to `target` rows or fewer, those of one owner together. False if
// there is not enough room, or if it would take more than `budget` copies in any case.
bool match(const PlanInput& input, const std::vector<int64_t>& load, int64_t target, int64_t budget,
           MatchScratch& scratch, std::vector<SplitPiece>& pieces);

}  // namespace feplb
