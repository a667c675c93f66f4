#include "split_cover.h"

#include <algorithm>
#include <limits>
#include <tuple>

namespace feplb {
namespace {

using Nodes = std::vector<SplitNode>;

constexpr int64_t kAll = std::numeric_limits<int64_t>::max();

// The helper with the least room that is enough, or else the one with the most.
SplitNode& best_fit(Nodes& room, int64_t tiles) {
  size_t fit = 0;
  size_t roomiest = 0;
  int64_t fit_tiles = kAll;
  for (size_t i = 0; i < room.size(); ++i) {
    const bool fits = (room[i].tiles >= tiles) & (room[i].tiles < fit_tiles);
    fit = fits ? i : fit;
    fit_tiles = fits ? room[i].tiles : fit_tiles;
    roomiest = room[i].tiles > room[roomiest].tiles ? i : roomiest;
  }
  return room[fit_tiles < kAll ? fit : roomiest];
}

// The helper with most room that an expert of `low` to `high` tiles fills, or null.
SplitNode* filled_by(Nodes& room, int64_t low, int64_t high) {
  SplitNode* found = nullptr;
  for (SplitNode& helper : room)
    if (low <= helper.tiles && helper.tiles <= high && (!found || helper.tiles > found->tiles))
      found = &helper;
  return found;
}

}  // namespace

// Appends the next fullest expert to expert_tiles.
void GroupCover::next_expert() const {
  const auto next =
      scratch.expert_rows.begin() + static_cast<std::ptrdiff_t>(scratch.expert_tiles.size());
  std::iter_swap(next, std::max_element(next, scratch.expert_rows.end()));
  scratch.expert_tiles.push_back(divide(*next, grain));
}

int32_t GroupCover::experts_needed(int32_t rank, int64_t tiles) const {
  const int32_t* rows = experts_of(rank);
  const int32_t* end = rows + input.limits.num_dynamic;
  if (*std::max_element(rows, end) >= tiles * grain) return 1;
  scratch.expert_rows.assign(rows, end);
  scratch.expert_tiles.clear();
  for (int32_t needed = 1;; ++needed) {
    next_expert();
    tiles -= scratch.expert_tiles.back();
    if (tiles <= 0 || needed == input.limits.num_dynamic) return needed;
  }
}

// Pieces for one owner out of group_left. Each ends the need, or a helper's room, or one of the
// experts that the need takes in any case. A need that no room is left for stays. Returns the
// copies that it takes beyond one for each piece.
int64_t GroupCover::cover_owner(const SplitNode& owner, bool widest) {
  const std::vector<int64_t>& experts = scratch.expert_tiles;
  int64_t others = 0;  // tiles of the experts that the next pieces may take, most first
  int64_t more = 0;
  if (owner.experts > 1) experts_needed(owner.rank, owner.tiles);
  for (int32_t i = 1; i < owner.experts; ++i) others += experts[static_cast<size_t>(i)];
  size_t expert = 0;
  for (int64_t need = owner.tiles; need > 0;) {
    const bool whole = owner.experts == 1 || experts[expert] >= need;
    const int64_t most = whole || others == 0 ? need : experts[expert];
    SplitNode* helper = whole ? nullptr : filled_by(scratch.group_left, need - others, most);
    if (helper == nullptr) helper = &best_fit(scratch.group_left, widest ? kAll : most);
    int64_t tiles = std::min(most, helper->tiles);
    if (need > tiles && need - tiles < least) tiles = need - least;
    if (tiles < least) break;
    pieces.push_back({owner.rank, helper->rank, tiles});
    more += !whole && tiles > experts[expert];
    helper->tiles = --helper->slots > 0 ? helper->tiles - tiles : 0;
    need -= tiles;
    if (!whole && need <= others && others > 0) others -= experts[++expert];
  }
  return more;
}

// Covers the group in one of four ways: who cuts several experts comes first or last, the others
// take the tightest room or the widest. Returns the copies, as far as can be told from here.
int64_t GroupCover::cover_as(int way) {
  const size_t before = pieces.size();
  int64_t copies = 0;
  scratch.group_left = scratch.group_room;
  for (const bool cuts : {(way & 1) == 0, (way & 1) != 0})
    for (const SplitNode& owner : scratch.group_surplus)
      if ((owner.experts > 1) == cuts) copies += cover_owner(owner, !cuts && (way & 2) != 0);
  return copies + static_cast<int64_t>(pieces.size() - before);
}

// How many pieces of this owner, from the first-th on, find no expert with as many tiles left.
int32_t GroupCover::misfits(const SplitNode& owner, size_t first) {
  if (owner.experts == 1) return 0;
  const auto begin = pieces.begin() + static_cast<std::ptrdiff_t>(first);
  std::sort(begin, pieces.end(), [](const SplitPiece& a, const SplitPiece& b) {
    return std::tie(b.tiles, a.helper) < std::tie(a.tiles, b.helper);
  });
  const int32_t* rows = experts_of(owner.rank);
  scratch.expert_rows.assign(rows, rows + input.limits.num_dynamic);
  int32_t found = 0;
  for (auto piece = begin; piece != pieces.end(); ++piece) {
    int32_t* fit = nullptr;
    for (int32_t& left : scratch.expert_rows)
      if (left >= piece->tiles * grain && (fit == nullptr || left < *fit)) fit = &left;
    if (fit == nullptr)
      ++found;
    else
      *fit -= static_cast<int32_t>(piece->tiles * grain);
  }
  return found;
}

// One owner after the other fills one helper after the other: owners + helpers - 1 pieces, each of
// one expert but for the misfits. Returns the copies, or kAll where a limit is in the way.
int64_t GroupCover::cover_in_order() {
  const size_t before = pieces.size();
  int64_t copies = 0;
  scratch.group_left = scratch.group_room;
  auto helper = scratch.group_left.begin();
  for (const SplitNode& owner : scratch.group_surplus) {
    const size_t first = pieces.size();
    for (int64_t need = owner.tiles; need > 0;) {
      if (helper == scratch.group_left.end()) return kAll;
      const int64_t tiles = std::min(need, helper->tiles);
      if (tiles < least || helper->slots == 0) return kAll;
      pieces.push_back({owner.rank, helper->rank, tiles});
      need -= tiles;
      helper->tiles -= tiles;
      --helper->slots;
      if (helper->tiles == 0) ++helper;
    }
    copies += misfits(owner, first);
  }
  return copies + static_cast<int64_t>(pieces.size() - before);
}

// Tries the helpers in every order, beginning with each of the owners. Returns the copies of the
// first cover that takes fewer than these; if none does, kAll, and no pieces.
int64_t GroupCover::cover_with_less_than(int64_t copies) {
  const size_t before = pieces.size();
  Nodes &owners = scratch.group_surplus, &helpers = scratch.group_room;
  for (size_t i = 0; i < owners.size(); ++i) {
    do {
      if (--scratch.orders_left < 0) break;
      const int64_t found = cover_in_order();
      if (found < copies) return found;
      pieces.resize(before);
    } while (std::next_permutation(helpers.begin(), helpers.end(), more_tiles));
    std::rotate(owners.begin(), owners.begin() + 1, owners.end());
  }
  std::sort(helpers.begin(), helpers.end(), more_tiles);
  return kAll;
}

int64_t GroupCover::cover() {
  if (scratch.group_room.empty()) return 0;
  const size_t before = pieces.size();
  int64_t fewest = cover_as(0);
  int64_t experts = 0;
  for (const SplitNode& owner : scratch.group_surplus) experts += owner.experts;
  const size_t tree = scratch.group_surplus.size() + scratch.group_room.size() - 1;
  const int64_t enough = std::max(experts, static_cast<int64_t>(tree));
  int best = 0;
  for (int way = 1; way < 4 && fewest > enough; ++way) {
    pieces.resize(before);
    const int64_t copies = cover_as(way);
    if (copies < fewest) best = way;
    fewest = std::min(fewest, copies);
  }
  if (fewest <= enough) return fewest;
  pieces.resize(before);
  const int64_t copies = scratch.orders_left > 0 ? cover_with_less_than(fewest) : kAll;
  if (copies < fewest) return copies;
  return cover_as(best);
}

}  // namespace feplb
