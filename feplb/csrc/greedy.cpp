#include "greedy.h"

#include <algorithm>
#include <limits>

namespace feplb {
namespace {

// Loads, the rows that may move, and all the room there is.
void reset_scratch(const PlanInput& input, GreedyScratch& scratch) {
  const PlanLimits& limits = input.limits;
  const size_t num_ranks = static_cast<size_t>(input.num_ranks);
  scratch.load.resize(num_ranks);
  scratch.rows.resize(num_ranks * limits.num_dynamic);
  scratch.slots.assign(num_ranks, limits.num_slots);
  scratch.grad_slots.assign(num_ranks, limits.num_grad_slots);
  scratch.recv_room.assign(num_ranks, limits.num_slots > 0 ? limits.max_recv_rows : -1);
  scratch.return_room.assign(num_ranks, limits.num_grad_slots > 0 ? limits.max_return_rows : -1);

  const int32_t* counts = input.counts;
  int32_t* rows = scratch.rows.data();
  for (size_t rank = 0; rank < num_ranks; ++rank, counts += input.num_local_experts) {
    int64_t load = 0;
    for (int32_t expert = 0; expert < input.num_local_experts; ++expert) load += counts[expert];
    scratch.load[rank] = load;
    rows = std::copy_n(counts + input.num_local_experts - limits.num_dynamic, limits.num_dynamic,
                       rows);
  }
}

// Written without branches, like least_loaded: which rank it is cannot be predicted.
int32_t most_loaded(const GreedyScratch& scratch) {
  int64_t most = -1;
  int32_t found = -1;
  for (size_t rank = 0; rank < scratch.load.size(); ++rank) {
    const bool better = scratch.load[rank] > most;
    most = better ? scratch.load[rank] : most;
    found = better ? static_cast<int32_t>(rank) : found;
  }
  return found;
}

// The least loaded rank that still takes `rows` rows (at least 1), or -1.
int32_t least_loaded(const GreedyScratch& scratch, int64_t rows) {
  int64_t least = std::numeric_limits<int64_t>::max();
  int32_t found = -1;
  for (size_t rank = 0; rank < scratch.load.size(); ++rank) {
    const bool better = (scratch.recv_room[rank] >= rows) & (scratch.load[rank] < least);
    least = better ? scratch.load[rank] : least;
    found = better ? static_cast<int32_t>(rank) : found;
  }
  return found;
}

// Most rows that an unmoved expert of this rank has, among those with at most `limit`; 0 if none.
int32_t busiest_within(const int32_t* rows, int32_t num_dynamic, int64_t limit) {
  const int32_t most =
      static_cast<int32_t>(std::min<int64_t>(limit, std::numeric_limits<int32_t>::max()));
  int32_t busiest = 0;
  for (int32_t i = 0; i < num_dynamic; ++i)
    busiest = std::max(busiest, rows[i] <= most ? rows[i] : 0);
  return busiest;
}

void take(int32_t src, int32_t dst, int32_t rows, int32_t num_dynamic, GreedyScratch& scratch) {
  int32_t* expert = &scratch.rows[size_t(src) * num_dynamic];
  *std::find(expert, expert + num_dynamic, rows) = ~dst;
  scratch.load[src] -= rows;
  scratch.load[dst] += rows;
  scratch.recv_room[dst] = --scratch.slots[dst] > 0 ? scratch.recv_room[dst] - rows : -1;
  scratch.return_room[src] = --scratch.grad_slots[src] > 0 ? scratch.return_room[src] - rows : -1;
}

// One round of greedy; false when nothing helps the most loaded rank any more.
bool move_one(const PlanInput& input, GreedyScratch& scratch) {
  const int32_t num_dynamic = input.limits.num_dynamic;
  const int32_t min_rows = std::max(1, input.limits.min_tokens);
  const int32_t src = most_loaded(scratch);
  const int32_t roomy = least_loaded(scratch, min_rows);
  if (roomy < 0) return false;

  // No helper is less loaded than `roomy`, so an expert above this limit helps nowhere.
  int64_t limit = std::min(scratch.load[src] - scratch.load[roomy] - 1, scratch.return_room[src]);
  for (;;) {
    const int32_t rows =
        busiest_within(&scratch.rows[int64_t{src} * num_dynamic], num_dynamic, limit);
    if (rows < min_rows) return false;
    const int32_t dst = scratch.recv_room[roomy] >= rows ? roomy : least_loaded(scratch, rows);
    if (dst >= 0 && scratch.load[dst] + rows < scratch.load[src]) {
      take(src, dst, rows, num_dynamic, scratch);
      return true;
    }
    limit = rows - 1;
  }
}

// The moves that `take` left behind, by owner and expert.
void collect_moves(const PlanInput& input, const GreedyScratch& scratch, std::vector<Move>& moves) {
  const int32_t first_dynamic = input.num_local_experts - input.limits.num_dynamic;
  const int32_t* counts = input.counts;
  const int32_t* rows = scratch.rows.data();
  for (int32_t owner = 0; owner < input.num_ranks; ++owner, counts += input.num_local_experts)
    for (int32_t expert = first_dynamic; expert < input.num_local_experts; ++expert, ++rows)
      if (*rows < 0) moves.push_back({expert, owner, ~*rows, 0, counts[expert]});
}

}  // namespace

// The paper's greedy (arXiv 2604.19654, its scheduler): most loaded
// rank, its busiest dynamic expert, whole, to the least loaded rank, until nothing helps.
// What the paper leaves open, as decided here:
//   helps      the helper ends below what the owner had; else the owner's next busiest is tried
//   no room    of slot or rows: the next least loaded rank that has room for this expert
//   ends       when nothing helps the most loaded rank, for then the maximum stays
//   received   experts stay where they are; a helper may still send experts of its own
//   static     experts count as load
// Each round moves one expert for good, so there are at most num_ranks * num_dynamic rounds.
void greedy(const PlanInput& input, GreedyScratch& scratch, std::vector<Move>& moves) {
  reset_scratch(input, scratch);
  if (scratch.rows.empty()) return;
  while (move_one(input, scratch)) {
  }
  moves.reserve(scratch.rows.size());
  collect_moves(input, scratch, moves);
}

}  // namespace feplb
