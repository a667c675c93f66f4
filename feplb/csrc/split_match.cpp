#include "split_match.h"

#include <algorithm>
#include <limits>

#include "split_subsets.h"

namespace feplb {
namespace {

using Nodes = std::vector<SplitNode>;

constexpr int kMaxEnumerated = MatchScratch::kMaxEnumerated;
constexpr int64_t kAll = std::numeric_limits<int64_t>::max();

bool more_tiles(const SplitNode& a, const SplitNode& b) {
  return a.tiles > b.tiles || (a.tiles == b.tiles && a.rank < b.rank);
}

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

  const int32_t* experts_of(int32_t rank) const {
    return input.counts + int64_t{rank + 1} * input.num_local_experts - input.limits.num_dynamic;
  }

  void next_expert() const;
  int32_t experts_needed(int32_t rank, int64_t tiles) const;
  int64_t find_nodes(const std::vector<int64_t>& load, int64_t target);
  int64_t cover_owner(const SplitNode& owner, bool widest);
  int64_t cover_as(int way);
  void cover_group();
  void cover_all();
  void cover_mask(uint32_t mask);
  void match_pairs(int64_t most);
  void match_two_owners(int64_t most);
  void match_two_helpers(int64_t most);
  bool few_ranks() const;
  void match_subsets();
  void match_all();
};

// ------------------------------------------------------------------------------ needs and rooms

// Appends the next fullest expert to expert_tiles.
void Matcher::next_expert() const {
  const auto next =
      scratch.expert_rows.begin() + static_cast<std::ptrdiff_t>(scratch.expert_tiles.size());
  std::iter_swap(next, std::max_element(next, scratch.expert_rows.end()));
  scratch.expert_tiles.push_back(divide(*next, grain));
}

// Fewest experts of this owner that have the tiles; all, if they do not. Fills expert_tiles with
// them, unless one will do.
int32_t Matcher::experts_needed(int32_t rank, int64_t tiles) const {
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
      scratch.surplus.push_back({rank, 0, experts_needed(rank, tiles), tiles});
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

// --------------------------------------------------------------------------------- best fit: cover

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

// Pieces for one owner out of group_left. Each ends the need, or a helper's room, or one of the
// experts that the need takes in any case. A need that no room is left for stays. Returns the
// copies that it takes beyond one for each piece.
int64_t Matcher::cover_owner(const SplitNode& owner, bool widest) {
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
int64_t Matcher::cover_as(int way) {
  const size_t before = pieces.size();
  int64_t copies = 0;
  scratch.group_left = scratch.group_room;
  for (const bool cuts : {(way & 1) == 0, (way & 1) != 0})
    for (const SplitNode& owner : scratch.group_surplus)
      if ((owner.experts > 1) == cuts) copies += cover_owner(owner, !cuts && (way & 2) != 0);
  return copies + static_cast<int64_t>(pieces.size() - before);
}

// At most (owners + helpers - 1) pieces, where no owner cuts more than one expert; else the best
// way.
void Matcher::cover_group() {
  if (scratch.group_room.empty()) return;
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
    if (way == 3 && best != 3) {
      pieces.resize(before);
      cover_as(best);
    }
  }
}

void Matcher::cover_all() {
  scratch.group_surplus = scratch.surplus;
  scratch.group_room = scratch.room;
  cover_group();
}

// ----------------------------------------------------------------------------- few ranks: subsets

void Matcher::cover_mask(uint32_t mask) {
  const size_t num_owners = scratch.surplus.size();
  scratch.group_surplus.clear();
  scratch.group_room.clear();
  for (size_t i = 0; i < num_owners; ++i)
    if (mask >> i & 1) scratch.group_surplus.push_back(scratch.surplus[i]);
  for (size_t i = 0; i < scratch.room.size(); ++i)
    if (mask >> (num_owners + i) & 1) scratch.group_room.push_back(scratch.room[i]);
  cover_group();
}

// Two owners and two helpers at least: with fewer, there is but one group.
bool Matcher::few_ranks() const {
  int64_t tiles = 0;
  for (const SplitNode& helper : scratch.room) tiles += helper.tiles;
  return scratch.surplus.size() > 1 && scratch.room.size() > 1 &&
         scratch.surplus.size() + scratch.room.size() <= kMaxEnumerated && tiles < 1 << 30;
}

void Matcher::match_subsets() {
  std::array<uint32_t, kMaxEnumerated> groups;
  const int num_groups = find_groups(slack, scratch, groups);
  uint32_t rest = (1u << (scratch.surplus.size() + scratch.room.size())) - 1;
  for (int i = 0; i < num_groups; ++i) {
    cover_mask(groups[static_cast<size_t>(i)]);
    rest &= ~groups[static_cast<size_t>(i)];
  }
  cover_mask(rest);
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
