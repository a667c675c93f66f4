#include "split_match.h"

#include <algorithm>
#include <limits>

#include "split_cover.h"
#include "split_subsets.h"

namespace feplb {
namespace {

using Nodes = std::vector<SplitNode>;

constexpr int kMaxEnumerated = MatchScratch::kMaxEnumerated;
constexpr int64_t kAll = std::numeric_limits<int64_t>::max();

void drop_empty(Nodes& nodes) {
  const auto empty = [](const SplitNode& node) { return node.tiles == 0; };
  nodes.erase(std::remove_if(nodes.begin(), nodes.end(), empty), nodes.end());
}

struct Matcher {
  const PlanInput& input;
  MatchScratch& scratch;
  std::vector<SplitPiece>& pieces;
  int64_t grain;
  int64_t least;      // fewest tiles worth a move
  int64_t slack = 0;  // tiles of room beyond the need
  GroupCover group{input, scratch, pieces, grain, least};
  size_t num_matched = 0;      // pieces made before subsets are looked at
  int64_t best_copies = kAll;  // that best_pieces take beyond these

  int64_t find_nodes(const std::vector<int64_t>& load, int64_t target);
  void cover_all();
  int64_t cover_mask(uint32_t mask);
  int cover_groups(const uint32_t* groups, int num_groups);
  void match_pairs(int64_t most);
  void match_two_owners(int64_t most);
  void match_two_helpers(int64_t most);
  bool few_ranks() const;
  void match_subsets();
  void match_all();
};

// ------------------------------------------------------------------------------ needs and rooms

// Fills `surplus` and `room`; returns how many copies it takes at least.
int64_t Matcher::find_nodes(const std::vector<int64_t>& load, int64_t target) {
  const PlanLimits& limits = input.limits;
  scratch.surplus.clear();
  scratch.room.clear();
  slack = 0;
  int64_t copies = 0;
  for (int32_t rank = 0; rank < input.num_ranks; ++rank) {
    const int64_t over = load[static_cast<size_t>(rank)] - target;
    if (over > 0) {
      const int64_t tiles = std::max(least, divide_up(over, grain));
      scratch.surplus.push_back({rank, 0, group.experts_needed(rank, tiles), tiles});
      copies += scratch.surplus.back().experts;
      slack -= tiles;
    } else {
      const int64_t tiles = divide(std::min(-over, limits.max_recv_rows), grain);
      if (tiles < least || limits.num_slots == 0) continue;
      scratch.room.push_back({rank, limits.num_slots, 0, tiles});
      slack += tiles;
    }
  }
  std::sort(scratch.surplus.begin(), scratch.surplus.end(), more_tiles);
  std::sort(scratch.room.begin(), scratch.room.end(), more_tiles);
  return copies;
}

void Matcher::cover_all() {
  scratch.group_surplus = scratch.surplus;
  scratch.group_room = scratch.room;
  group.cover();
}

// ----------------------------------------------------------------------------- few ranks: subsets

int64_t Matcher::cover_mask(uint32_t mask) {
  const size_t num_owners = scratch.surplus.size();
  scratch.group_surplus.clear();
  scratch.group_room.clear();
  for (size_t i = 0; i < num_owners; ++i)
    if (mask >> i & 1) scratch.group_surplus.push_back(scratch.surplus[i]);
  for (size_t i = 0; i < scratch.room.size(); ++i)
    if (mask >> (num_owners + i) & 1) scratch.group_room.push_back(scratch.room[i]);
  return group.cover();
}

// Two owners and two helpers at least: with fewer, there is but one group.
bool Matcher::few_ranks() const {
  int64_t tiles = 0;
  for (const SplitNode& helper : scratch.room) tiles += helper.tiles;
  return scratch.surplus.size() > 1 && scratch.room.size() > 1 &&
         scratch.surplus.size() + scratch.room.size() <= kMaxEnumerated && tiles < 1 << 30;
}

// Covers these groups, and all other ranks together; keeps the pieces if they take fewest copies.
// Returns the copies beyond the experts that the owners must cut.
int Matcher::cover_groups(const uint32_t* groups, int num_groups) {
  uint32_t rest = (1u << (scratch.surplus.size() + scratch.room.size())) - 1;
  int64_t copies = 0;
  pieces.resize(num_matched);
  for (int i = 0; i < num_groups; ++i) {
    copies += cover_mask(groups[i]);
    rest &= ~groups[i];
  }
  copies += cover_mask(rest);
  if (copies < best_copies) {
    best_copies = copies;
    scratch.best_pieces = pieces;
  }
  for (const SplitNode& owner : scratch.surplus) copies -= owner.experts;
  return static_cast<int>(copies);
}

void Matcher::match_subsets() {
  num_matched = pieces.size();
  find_groups(slack, scratch, [this](const uint32_t* groups, int num_groups) {
    return cover_groups(groups, num_groups);
  });
  pieces.swap(scratch.best_pieces);
}

// ---------------------------------------------------------------------- many ranks: small groups

// One copy serves two ranks for good, where the room exceeds the need by at most `most`.
void Matcher::match_pairs(int64_t most) {
  auto helper = scratch.room.begin();
  for (SplitNode& owner : scratch.surplus) {
    if (owner.experts > 1) continue;  // can take two helpers at no cost
    const int64_t high = owner.tiles + std::min(most, slack);
    while (helper != scratch.room.end() && helper->tiles > high) ++helper;
    if (helper == scratch.room.end()) break;
    if (helper->tiles < owner.tiles) continue;
    pieces.push_back({owner.rank, helper->rank, owner.tiles});
    slack -= helper->tiles - owner.tiles;
    owner.tiles = helper->tiles = 0;
    ++helper;
  }
  drop_empty(scratch.surplus);
  drop_empty(scratch.room);
}

// Two nodes whose tiles sum to [low, high]; false if there are none.
bool find_two(const Nodes& nodes, int64_t low, int64_t high, size_t& i, size_t& j) {
  if (nodes.size() < 2) return false;
  for (i = 0, j = nodes.size() - 1; i < j;) {
    const int64_t sum = nodes[i].tiles + nodes[j].tiles;
    if (low <= sum && sum <= high) return true;
    sum > high ? ++i : --j;
  }
  return false;
}

// Two copies serve three ranks for good: one helper, two owners.
void Matcher::match_two_owners(int64_t most) {
  Nodes& surplus = scratch.surplus;
  if (input.limits.num_slots < 2) return;
  for (SplitNode& helper : scratch.room) {
    size_t i = 0;
    size_t j = 0;
    if (!find_two(surplus, helper.tiles - std::min(most, slack), helper.tiles, i, j)) continue;
    slack -= helper.tiles - surplus[i].tiles - surplus[j].tiles;
    pieces.push_back({surplus[i].rank, helper.rank, surplus[i].tiles});
    pieces.push_back({surplus[j].rank, helper.rank, surplus[j].tiles});
    surplus[i].tiles = surplus[j].tiles = helper.tiles = 0;
    drop_empty(surplus);
  }
  drop_empty(scratch.room);
}

// The same with one owner, two helpers.
void Matcher::match_two_helpers(int64_t most) {
  Nodes& room = scratch.room;
  if (input.limits.num_grad_slots < 2) return;
  for (SplitNode& owner : scratch.surplus) {
    size_t i = 0;
    size_t j = 0;
    if (!find_two(room, owner.tiles, owner.tiles + std::min(most, slack), i, j)) continue;
    if (owner.tiles - room[i].tiles < least) continue;
    slack -= room[i].tiles + room[j].tiles - owner.tiles;
    pieces.push_back({owner.rank, room[i].rank, room[i].tiles});
    pieces.push_back({owner.rank, room[j].rank, owner.tiles - room[i].tiles});
    owner.tiles = room[i].tiles = room[j].tiles = 0;
    drop_empty(room);
  }
  drop_empty(scratch.surplus);
}

void Matcher::match_all() {
  const size_t num_owners = scratch.surplus.size();
  if (slack >= input.num_ranks) {  // much to spare: one copy for each owner may do
    cover_all();
    if (pieces.size() == num_owners) return;
    pieces.clear();
  }
  if (num_owners + scratch.room.size() > kMaxEnumerated) {
    for (int64_t most = 0; most <= slack; most = 2 * most + 1) match_pairs(most);
    match_two_owners(0);
    match_two_helpers(0);
    if (slack > 0) {
      match_two_owners(slack);
      match_two_helpers(slack);
    }
  }
  few_ranks() ? match_subsets() : cover_all();
}

}  // namespace

bool match(const PlanInput& input, const std::vector<int64_t>& load, int64_t target, int64_t budget,
           MatchScratch& scratch, std::vector<SplitPiece>& pieces) {
  const PlanLimits& limits = input.limits;
  const int64_t grain = limits.grain_rows;
  const int64_t least = divide_up(std::max(1, limits.min_tokens), grain);
  Matcher matcher{input, scratch, pieces, grain, least};
  pieces.clear();
  const int64_t copies = matcher.find_nodes(load, target);
  if (copies > budget || matcher.slack < 0) return false;
  matcher.match_all();
  return true;
}

}  // namespace feplb
