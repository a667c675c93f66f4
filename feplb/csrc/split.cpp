#include "split.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <tuple>

namespace feplb {
namespace {

constexpr int kMaxTries = 16;  // targets tried where a limit forbids the least one

int64_t least_rows(const PlanLimits& limits) { return std::max(1, limits.min_tokens); }

int64_t copy_budget(const PlanInput& input) {
  return input.limits.max_copies > 0 ? input.limits.max_copies : std::max(4, 2 * input.num_ranks);
}

// ------------------------------------------------------------------------------------- target T

// With load = q * g + m and T = Q * g + t, the sum of floor((T - load) / g) over R ranks is
// R * Q - sum q - (number of m > t). So Q is the mean of q, rounded up, and of the m in descending
// order as many may exceed t as the rounding has added.
int64_t least_target(const PlanInput& input, SplitScratch& scratch) {
  const int64_t grain = input.limits.grain_rows;
  scratch.order.resize(scratch.load.size());
  int64_t sum = 0;
  for (size_t rank = 0; rank < scratch.load.size(); ++rank) {
    const int64_t quotient = divide(scratch.load[rank], grain);
    scratch.order[rank] = scratch.load[rank] - quotient * grain;
    sum += quotient;
  }
  const int64_t quotient = divide_up(sum, input.num_ranks);
  const auto found = scratch.order.begin() + (quotient * input.num_ranks - sum);
  std::nth_element(scratch.order.begin(), found, scratch.order.end(), std::greater<>());
  return quotient * grain + *found;
}

// floor(total * ppm / (num_ranks * 1'000'000)) in parts that fit 64 bits.
int64_t wished_target(int64_t total, int64_t num_ranks, int64_t ppm) {
  constexpr int64_t kMillion = 1'000'000;
  if (ppm < kMillion) return 0;
  if (divide(ppm, kMillion) >= num_ranks) return total;
  const int64_t mean = total / num_ranks;
  const int64_t fine = mean % kMillion * ppm + total % num_ranks * ppm / num_ranks;
  return mean / kMillion * ppm + fine / kMillion;
}

// The lowest target worth a try. Fills `load`.
int64_t first_target(const PlanInput& input, SplitScratch& scratch) {
  const PlanLimits& limits = input.limits;
  const int32_t num_static = input.num_local_experts - limits.num_dynamic;
  scratch.load.resize(static_cast<size_t>(input.num_ranks));
  int64_t total = 0;
  int64_t stuck = 0;  // most rows of a rank that cannot leave it
  const int32_t* counts = input.counts;
  for (int64_t& load : scratch.load) {
    int64_t staying = 0;
    int64_t moving = 0;
    for (int32_t i = 0; i < num_static; ++i) staying += *counts++;
    for (int32_t i = 0; i < limits.num_dynamic; ++i) moving += *counts++;
    load = staying + moving;
    total += load;
    stuck = std::max(stuck, load - std::min(moving, limits.max_return_rows));
  }
  const int64_t target = std::max({least_target(input, scratch), stuck,
                                   wished_target(total, input.num_ranks, limits.target_ppm)});
  if (copy_budget(input) >= input.num_ranks) return target;
  scratch.order = scratch.load;  // each rank above the target takes one copy or more
  const auto found = scratch.order.begin() + copy_budget(input);
  std::nth_element(scratch.order.begin(), found, scratch.order.end(), std::greater<>());
  return std::max(target, *found);
}

// --------------------------------------------------------------------- which experts: ship_pieces

struct Pick {
  size_t expert;
  int64_t rows;  // 0: no expert will do
};

// All rows of the expert in `left` that has most without exceeding `most`.
Pick largest_within(const std::vector<int32_t>& left, int64_t most) {
  Pick pick{0, 0};
  for (size_t i = 0; i < left.size(); ++i)
    if (left[i] <= most && left[i] > pick.rows) pick = {i, left[i]};
  return pick;
}

// The smallest expert that has `want` rows, a multiple of the grain; none: the largest, in tiles if
// the tiles of this owner suffice for the `owed` rows that it has to ship, else whole.
Pick pick_expert(const PlanLimits& limits, int64_t want, int64_t owed,
                 const std::vector<int32_t>& left) {
  const int64_t grain = limits.grain_rows;
  const int64_t tiled = divide(want, grain) * grain;
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  size_t fit = left.size();
  int32_t fit_rows = kMost;
  for (size_t i = 0; i < left.size() && tiled > 0; ++i) {
    const bool fits = (left[i] >= tiled) & ((left[i] < fit_rows) | (fit == left.size()));
    fit = fits ? i : fit;
    fit_rows = fits ? left[i] : fit_rows;
  }
  if (fit < left.size()) return {fit, tiled};
  Pick pick = largest_within(left, want);
  int64_t in_tiles = 0;
  for (const int32_t rows : left) in_tiles += divide(rows, grain) * grain;
  if (pick.rows < grain || in_tiles < owed) return pick;
  pick.rows = divide(pick.rows, grain) * grain;
  const int64_t least = divide_up(least_rows(limits), grain) * grain;
  if (tiled > pick.rows && tiled - pick.rows < least)
    pick.rows = std::max<int64_t>(0, tiled - least);
  return pick;
}

// Ships one piece, of as few experts as it takes, as far as the limits allow.
void ship(const PlanInput& input, const SplitPiece& piece, int64_t owed, SplitScratch& scratch) {
  const PlanLimits& limits = input.limits;
  const size_t owner = static_cast<size_t>(piece.owner);
  const size_t helper = static_cast<size_t>(piece.helper);
  const int64_t return_room = limits.max_return_rows - (scratch.load[owner] - scratch.after[owner]);
  const int64_t recv_room = limits.max_recv_rows - (scratch.after[helper] - scratch.load[helper]);
  int64_t want = std::min({piece.tiles * limits.grain_rows, return_room, recv_room});
  while (want >= least_rows(limits)) {
    if (static_cast<int64_t>(scratch.tried.size()) >= copy_budget(input) ||
        scratch.num_moves[owner] >= limits.num_grad_slots ||
        scratch.num_moves[helper] >= limits.num_slots)
      return;
    const Pick pick = pick_expert(limits, want, owed, scratch.left);
    if (pick.rows < least_rows(limits)) return;
    const auto expert = input.num_local_experts - limits.num_dynamic + int32_t(pick.expert);
    const auto rows = static_cast<int32_t>(pick.rows);
    scratch.tried.push_back({expert, piece.owner, piece.helper, 0, rows});
    ++scratch.num_moves[owner];
    ++scratch.num_moves[helper];
    scratch.after[owner] -= rows;
    scratch.after[helper] += rows;
    scratch.left[pick.expert] -= rows;
    want -= rows;
    owed -= rows;
    // What is left of a cut expert would be a second range for the same helper.
    if (want > 0) scratch.left[pick.expert] = 0;
  }
}

// Owner after owner, so that the moves are found nearly in order.
void ship_pieces(const PlanInput& input, SplitScratch& scratch) {
  const std::vector<SplitPiece>& pieces = scratch.pieces;
  const int32_t* end = input.counts;
  scratch.after = scratch.load;
  scratch.num_moves.assign(scratch.load.size(), 0);
  scratch.first_piece.assign(scratch.load.size(), pieces.size());
  scratch.tried.clear();
  for (size_t i = pieces.size(); i-- > 0;)
    scratch.first_piece[static_cast<size_t>(pieces[i].owner)] = i;
  for (int32_t owner = 0; owner < input.num_ranks; ++owner) {
    const size_t first = scratch.first_piece[static_cast<size_t>(owner)];
    size_t last = first;
    int64_t owed = 0;
    end += input.num_local_experts;
    for (; last < pieces.size() && pieces[last].owner == owner; ++last)
      owed += pieces[last].tiles * input.limits.grain_rows;
    if (first < last) scratch.left.assign(end - input.limits.num_dynamic, end);
    for (size_t i = first; i < last; ++i) {
      ship(input, pieces[i], owed, scratch);
      owed -= pieces[i].tiles * input.limits.grain_rows;
    }
  }
}

// ------------------------------------------------------------------------------------------ split

int64_t most_rows(const std::vector<int64_t>& loads) {
  return *std::max_element(loads.begin(), loads.end());
}

// Keeps the plan if it is the best so far. False if some rank has more rows than `target`.
bool try_target(const PlanInput& input, int64_t target, int64_t& best_most, SplitScratch& scratch) {
  if (!match(input, scratch.load, target, copy_budget(input), scratch.match, scratch.pieces))
    return false;
  ship_pieces(input, scratch);
  const int64_t most = most_rows(scratch.after);
  if (most < best_most) {
    best_most = most;
    scratch.best.swap(scratch.tried);
  }
  return most <= target;
}

// Looks for the least target that can be met, to a quarter of a tile: growing steps, then halves.
void search_target(const PlanInput& input, int64_t low, int64_t& best_most, SplitScratch& scratch) {
  const int64_t near = std::max(1, input.limits.grain_rows / 4);
  int64_t high = best_most;
  for (int64_t step = near; low + step < high; step *= 4) {
    if (try_target(input, low + step, best_most, scratch))
      high = low + step;
    else
      low += step;
    high = std::min(high, best_most);
  }
  for (int tries = 0; tries < kMaxTries && high - low > near; ++tries) {
    const int64_t target = low + (high - low) / 2;
    (try_target(input, target, best_most, scratch) ? high : low) = target;
    high = std::min(high, best_most);
  }
}

// Turns numbers of rows into ranges: the last rows of the expert, helpers by rank.
void place_ranges(const PlanInput& input, std::vector<Move>& moves) {
  std::sort(moves.begin(), moves.end(), [](const Move& a, const Move& b) {
    return std::tie(a.owner_rank, a.expert_idx, a.dst_rank) <
           std::tie(b.owner_rank, b.expert_idx, b.dst_rank);
  });
  int32_t end = 0;
  for (size_t i = moves.size(); i-- > 0;) {
    Move& move = moves[i];
    const bool last = i + 1 == moves.size() || moves[i + 1].owner_rank != move.owner_rank ||
                      moves[i + 1].expert_idx != move.expert_idx;
    if (last)
      end = input.counts[int64_t{move.owner_rank} * input.num_local_experts + move.expert_idx];
    move.row_start = end - move.row_end;
    move.row_end = end;
    end = move.row_start;
  }
}

// A piece ends a rank's need or room, or a copy an expert: so no shape needs more than this.
void reserve(const PlanInput& input, SplitScratch& scratch, std::vector<Move>& moves) {
  const size_t num_ranks = static_cast<size_t>(input.num_ranks);
  const size_t most = num_ranks * (static_cast<size_t>(input.limits.num_dynamic) + 1);
  const size_t copies = std::min(most, static_cast<size_t>(copy_budget(input)));
  moves.reserve(moves.size() + copies);
  scratch.tried.reserve(copies);
  scratch.best.reserve(copies);
  scratch.pieces.reserve(most);
  scratch.match.best_pieces.reserve(most);
  for (auto* of_ranks : {&scratch.load, &scratch.after, &scratch.order})
    of_ranks->reserve(num_ranks);
  scratch.num_moves.reserve(num_ranks);
  scratch.first_piece.reserve(num_ranks);
  scratch.left.reserve(static_cast<size_t>(input.limits.num_dynamic));
  MatchScratch& match = scratch.match;
  match.expert_rows.reserve(scratch.left.capacity());
  match.expert_tiles.reserve(scratch.left.capacity());
  match.groups.reserve(match.sums.size());
  for (auto* nodes :
       {&match.surplus, &match.room, &match.group_surplus, &match.group_room, &match.group_left})
    nodes->reserve(num_ranks);
}

}  // namespace

void split(const PlanInput& input, SplitScratch& scratch, std::vector<Move>& moves) {
  const PlanLimits& limits = input.limits;
  if (input.num_ranks < 2 || limits.num_dynamic == 0) return;
  reserve(input, scratch, moves);
  const int64_t target = first_target(input, scratch);
  int64_t best_most = most_rows(scratch.load);
  const bool few_ranks = input.num_ranks <= MatchScratch::kMaxEnumerated;
  scratch.match.orders_left = few_ranks ? MatchScratch::kMaxOrders : 0;
  scratch.best.clear();
  if (target >= best_most) return;
  if (!try_target(input, target, best_most, scratch))
    search_target(input, target, best_most, scratch);
  place_ranges(input, scratch.best);
  moves.insert(moves.end(), scratch.best.begin(), scratch.best.end());
}

}  // namespace feplb
