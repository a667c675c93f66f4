#include "split_match.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>

namespace feplb {
namespace {

using Nodes = std::vector<SplitNode>;

constexpr int kMaxEnumerated = MatchScratch::kMaxEnumerated;
constexpr int kMaxSearchSteps = 256;  // groups tried for fewest copies

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

  void sort_experts(int32_t rank) const;
  int32_t experts_needed(int32_t rank, int64_t tiles) const;
  int64_t find_nodes(const std::vector<int64_t>& load, int64_t target);
  SplitPiece cut(const SplitNode& owner, int64_t need, SplitNode*& helper) const;
  void cover_owner(const SplitNode& owner);
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

void Matcher::sort_experts(int32_t rank) const {
  const int32_t* rows = experts_of(rank);
  std::vector<int64_t>& tiles = scratch.expert_tiles;
  tiles.clear();
  for (int32_t i = 0; i < input.limits.num_dynamic; ++i) tiles.push_back(divide(rows[i], grain));
  std::sort(tiles.begin(), tiles.end(), std::greater<>());
}

int32_t Matcher::experts_needed(int32_t rank, int64_t tiles) const {
  const int32_t* rows = experts_of(rank);
  if (*std::max_element(rows, rows + input.limits.num_dynamic) >= tiles * grain) return 1;
  sort_experts(rank);
  int32_t needed = 0;
  for (; needed < input.limits.num_dynamic && tiles > 0; ++needed)
    tiles -= scratch.expert_tiles[static_cast<size_t>(needed)];
  return needed;
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
      const int32_t experts = experts_needed(rank, tiles);
      scratch.surplus.push_back({rank, 0, experts, tiles});
      copies += experts;
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
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  size_t fit = 0;
  size_t roomiest = 0;
  int64_t fit_tiles = kMost;
  for (size_t i = 0; i < room.size(); ++i) {
    const bool fits = (room[i].tiles >= tiles) & (room[i].tiles < fit_tiles);
    fit = fits ? i : fit;
    fit_tiles = fits ? room[i].tiles : fit_tiles;
    roomiest = room[i].tiles > room[roomiest].tiles ? i : roomiest;
  }
  return room[fit_tiles < kMost ? fit : roomiest];
}

// The helper with most room that an expert of `low` to `high` tiles fills, or null.
SplitNode* filled_by(Nodes& room, int64_t low, int64_t high) {
  SplitNode* found = nullptr;
  for (SplitNode& helper : room)
    if (low <= helper.tiles && helper.tiles <= high && (!found || helper.tiles > found->tiles))
      found = &helper;
  return found;
}

// Pieces for one owner out of group_room. Each ends the need, or a helper's room, or one of the
// experts that the need takes in any case. A need that no room is left for stays.
void Matcher::cover_owner(const SplitNode& owner) {
  const std::vector<int64_t>& experts = scratch.expert_tiles;
  int64_t others = 0;  // tiles of the experts that the next pieces may take, most first
  if (owner.experts > 1) sort_experts(owner.rank);
  for (int32_t i = 1; i < owner.experts; ++i) others += experts[static_cast<size_t>(i)];
  size_t expert = 0;
  for (int64_t need = owner.tiles; need > 0;) {
    const bool whole = others == 0 || experts[expert] >= need;
    const int64_t most = whole ? need : experts[expert];
    SplitNode* helper = whole ? nullptr : filled_by(scratch.group_room, need - others, most);
    if (helper == nullptr) helper = &best_fit(scratch.group_room, most);
    int64_t tiles = std::min(most, helper->tiles);
    if (need > tiles && need - tiles < least) tiles = need - least;
    if (tiles < least) return;
    pieces.push_back({owner.rank, helper->rank, tiles});
    helper->tiles = --helper->slots > 0 ? helper->tiles - tiles : 0;
    need -= tiles;
    if (!whole && need <= others) others -= experts[++expert];
  }
}

// At most (owners + helpers - 1) pieces, where no owner takes more than one expert.
void Matcher::cover_group() {
  if (scratch.group_room.empty()) return;
  for (const bool cuts : {true, false})
    for (const SplitNode& owner : scratch.group_surplus)
      if ((owner.experts > 1) == cuts) cover_owner(owner);
}

void Matcher::cover_all() {
  scratch.group_surplus = scratch.surplus;
  scratch.group_room = scratch.room;
  cover_group();
}

// ----------------------------------------------------------------------------- few ranks: subsets

// Looks for the disjoint groups that take fewest copies among the subsets of few ranks. Bit i of a
// mask is the i-th owner, or helper from bit num_owners on. With e experts that its owners must cut
// at least, a group takes max(e, o + h - 1) copies; counted is what exceeds e.
struct GroupSearch {
  const MatchScratch& scratch;
  int64_t slack;  // tiles that all groups together may waste
  int num_owners = static_cast<int>(scratch.surplus.size());
  uint32_t full = (1u << (scratch.surplus.size() + scratch.room.size())) - 1;  // all ranks
  uint32_t owners = (1u << num_owners) - 1;
  uint32_t cutters = 0;  // owners that cut more than one expert
  int steps_left = kMaxSearchSteps;
  int best_extra = kMaxEnumerated;
  int num_best = 0;
  uint32_t chosen[kMaxEnumerated] = {};
  uint32_t best[kMaxEnumerated] = {};

  GroupSearch(const MatchScratch& given, int64_t most) : scratch(given), slack(most) {
    for (int i = 0; i < num_owners; ++i)
      if (scratch.surplus[static_cast<size_t>(i)].experts > 1) cutters |= 1u << i;
  }

  int extra(uint32_t mask, int num_helpers) const {
    int free = 1;  // helpers that cost no copy more
    for (uint32_t left = mask & cutters; left != 0; left &= left - 1)
      free += scratch.surplus[static_cast<size_t>(__builtin_ctz(left))].experts - 1;
    return std::max(0, num_helpers - free);
  }

  // What the ranks of no group take as one group, of their roomiest helpers only.
  int extra_of_rest(uint32_t rest) const {
    int64_t sum = scratch.sums[rest & owners];
    int num_helpers = 0;
    for (uint32_t left = rest & ~owners; sum < 0; left &= left - 1, ++num_helpers)
      sum += scratch.sums[left & (~left + 1)];
    return extra(rest, num_helpers);
  }

  // Groups with what they cost, then what they waste: those that need each of their helpers.
  void list(std::vector<uint64_t>& groups) const {
    groups.clear();
    for (uint32_t first = 0; first < full; first += 8) {
      uint64_t any = 0;
      std::memcpy(&any, &scratch.within[first], 8);
      for (uint32_t mask = first; any != 0 && mask < first + 8; ++mask) {
        if (scratch.within[mask] == 0 || (mask & owners) == 0 || mask == full) continue;
        const int tightest = 31 - __builtin_clz(mask);
        if (scratch.sums[mask] >= scratch.sums[size_t{1} << tightest]) continue;
        const int cost = extra(mask, __builtin_popcount(mask & ~owners));
        groups.push_back(uint64_t(cost) << 48 | uint64_t(scratch.sums[mask]) << 16 | mask);
      }
    }
    std::sort(groups.begin(), groups.end());
  }

  void search(size_t first, uint32_t used, int64_t waste, int cost, int depth) {
    const int total = cost + extra_of_rest(full & ~used);
    if (total < best_extra) {
      best_extra = total;
      num_best = depth;
      std::copy_n(chosen, depth, best);
    }
    for (size_t i = first; i < scratch.groups.size(); ++i) {
      const uint32_t mask = static_cast<uint32_t>(scratch.groups[i]) & full;
      const int more = static_cast<int>(scratch.groups[i] >> 48);
      if (cost + more >= best_extra) return;  // so do all that follow
      if ((mask & used) != 0 || waste + scratch.sums[mask] > slack) continue;
      if (--steps_left < 0) return;
      chosen[depth] = mask;
      search(i + 1, used | mask, waste + scratch.sums[mask], cost + more, depth + 1);
    }
  }
};

// The sums of all subsets, and whether each lies in [0, slack].
void sum_subsets(int64_t slack, MatchScratch& scratch) {
  size_t size = 1;
  scratch.sums[0] = 0;
  const auto add = [&](int32_t tiles) {
    for (size_t mask = 0; mask < size; ++mask)
      scratch.sums[size + mask] = scratch.sums[mask] + tiles;
    size *= 2;
  };
  for (const SplitNode& owner : scratch.surplus) add(-static_cast<int32_t>(owner.tiles));
  for (const SplitNode& helper : scratch.room) add(static_cast<int32_t>(helper.tiles));
  const uint32_t most = static_cast<uint32_t>(slack);
  for (size_t mask = 0; mask < size; ++mask)
    scratch.within[mask] = static_cast<uint32_t>(scratch.sums[mask]) <= most;
}

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
  sum_subsets(slack, scratch);
  GroupSearch search(scratch, slack);
  search.list(scratch.groups);
  search.search(0, 0, 0, 0, 0);
  uint32_t rest = search.full;
  for (int i = 0; i < search.num_best; ++i) {
    cover_mask(search.best[i]);
    rest &= ~search.best[i];
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
    match_two_owners(slack);
    match_two_helpers(slack);
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
