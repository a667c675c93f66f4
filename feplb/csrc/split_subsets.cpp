#include "split_subsets.h"

#include <algorithm>
#include <cstring>

namespace feplb {
namespace {

constexpr int kMaxEnumerated = MatchScratch::kMaxEnumerated;
constexpr int kMaxSearchSteps = 128;  // groups tried for fewest copies

// Looks for the disjoint groups that take fewest copies. With e experts that its owners must cut
// at least, a group takes max(e, o + h - 1) copies or more; counted is what exceeds e.
struct GroupSearch {
  const MatchScratch& scratch;
  int64_t slack;  // tiles that all groups together may waste
  int num_owners = static_cast<int>(scratch.surplus.size());
  uint32_t full = (1u << (scratch.surplus.size() + scratch.room.size())) - 1;  // all ranks
  uint32_t owners = (1u << num_owners) - 1;
  uint32_t cutters = 0;          // owners that cut more than one expert
  const Cover* cover = nullptr;  // what groups really take; null: what they take at least
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

  void keep_if_better(int extra, int depth) {
    if (cover != nullptr) extra = (*cover)(chosen, depth);
    if (extra >= best_extra) return;
    best_extra = extra;
    num_best = depth;
    std::copy_n(chosen, depth, best);
  }

  void search(size_t first, uint32_t used, int64_t waste, int cost, int depth) {
    const int total = cost + extra_of_rest(full & ~used);
    if (total < best_extra) keep_if_better(total, depth);
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

}  // namespace

void find_groups(int64_t slack, MatchScratch& scratch, const Cover& cover) {
  sum_subsets(slack, scratch);
  GroupSearch search(scratch, slack);
  search.list(scratch.groups);
  search.search(0, 0, 0, 0, 0);
  const int extra = cover(search.best, search.num_best);
  if (extra <= search.best_extra) return;
  GroupSearch real(scratch, slack);
  real.cover = &cover;
  real.best_extra = extra;
  real.search(0, 0, 0, 0, 0);
}

}  // namespace feplb
