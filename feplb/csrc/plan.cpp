#include "plan.h"

#include <algorithm>
#include <limits>

namespace feplb {
namespace {

void check_input(const PlanInput& input) {
  const PlanLimits& limits = input.limits;
  if (input.num_ranks < 0 || input.num_local_experts < 0)
    throw UserError(cat("plan: num_ranks=", input.num_ranks,
                        ", num_local_experts=", input.num_local_experts, ", expected at least 0"));
  if (limits.num_dynamic < 0 || limits.num_dynamic > input.num_local_experts)
    throw UserError(cat("plan: num_dynamic=", limits.num_dynamic, ", expected 0 to ",
                        input.num_local_experts, " (the experts of one rank)"));
  if (limits.grain_rows < 0 || limits.max_copies < 0 || limits.target_ppm < 0 ||
      limits.search_steps < 0)
    throw UserError(cat("plan: grain_rows=", limits.grain_rows, ", max_copies=", limits.max_copies,
                        ", target_ppm=", limits.target_ppm, ", search_steps=", limits.search_steps,
                        ", expected at least 0"));
  if (limits.num_slots < 0 || limits.num_grad_slots < 0 || limits.min_tokens < 0 ||
      limits.max_recv_rows < 0 || limits.max_return_rows < 0)
    throw UserError(
        cat("plan: num_slots=", limits.num_slots, ", num_grad_slots=", limits.num_grad_slots,
            ", min_tokens=", limits.min_tokens, ", max_recv_rows=", limits.max_recv_rows,
            ", max_return_rows=", limits.max_return_rows, ", expected at least 0"));
}

[[noreturn]] void throw_negative_count(const PlanInput& input) {
  const int32_t* end = input.counts + int64_t{input.num_ranks} * input.num_local_experts;
  const int32_t* found = std::find_if(input.counts, end, [](int32_t rows) { return rows < 0; });
  const int64_t index = found - input.counts;
  throw UserError(cat("plan: counts of rank ", index / input.num_local_experts, ", local expert ",
                      index % input.num_local_experts, ": ", *found, ", expected at least 0"));
}

void check_signs(const PlanInput& input) {
  const int64_t num_counts = int64_t{input.num_ranks} * input.num_local_experts;
  int32_t signs = 0;
  for (int64_t i = 0; i < num_counts; ++i) signs |= input.counts[i];
  if (signs < 0) throw_negative_count(input);
}

// Loads, the rows that may move, and all the room there is.
void reset_scratch(const PlanInput& input, PlanScratch& scratch) {
  const PlanLimits& limits = input.limits;
  const size_t num_ranks = static_cast<size_t>(input.num_ranks);
  scratch.load.resize(num_ranks);
  scratch.rows.resize(num_ranks * limits.num_dynamic);
  scratch.slots.assign(num_ranks, limits.num_slots);
  scratch.grad_slots.assign(num_ranks, limits.num_grad_slots);
  scratch.recv_room.assign(num_ranks, limits.num_slots > 0 ? limits.max_recv_rows : -1);
  scratch.return_room.assign(num_ranks, limits.num_grad_slots > 0 ? limits.max_return_rows : -1);

  int32_t signs = 0;
  const int32_t* counts = input.counts;
  int32_t* rows = scratch.rows.data();
  for (size_t rank = 0; rank < num_ranks; ++rank, counts += input.num_local_experts) {
    int64_t load = 0;
    for (int32_t expert = 0; expert < input.num_local_experts; ++expert) {
      load += counts[expert];
      signs |= counts[expert];
    }
    scratch.load[rank] = load;
    rows = std::copy_n(counts + input.num_local_experts - limits.num_dynamic, limits.num_dynamic,
                       rows);
  }
  if (signs < 0) throw_negative_count(input);
}

// Written without branches, like least_loaded: which rank it is cannot be predicted.
int32_t most_loaded(const PlanScratch& scratch) {
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
int32_t least_loaded(const PlanScratch& scratch, int64_t rows) {
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

void take(int32_t src, int32_t dst, int32_t rows, int32_t num_dynamic, PlanScratch& scratch) {
  int32_t* expert = &scratch.rows[size_t(src) * num_dynamic];
  *std::find(expert, expert + num_dynamic, rows) = ~dst;
  scratch.load[src] -= rows;
  scratch.load[dst] += rows;
  scratch.recv_room[dst] = --scratch.slots[dst] > 0 ? scratch.recv_room[dst] - rows : -1;
  scratch.return_room[src] = --scratch.grad_slots[src] > 0 ? scratch.return_room[src] - rows : -1;
}

// One round of greedy; false when nothing helps the most loaded rank any more.
bool move_one(const PlanInput& input, PlanScratch& scratch) {
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
void collect_moves(const PlanInput& input, const PlanScratch& scratch, Plan& plan) {
  const int32_t first_dynamic = input.num_local_experts - input.limits.num_dynamic;
  const int32_t* counts = input.counts;
  const int32_t* rows = scratch.rows.data();
  for (int32_t owner = 0; owner < input.num_ranks; ++owner, counts += input.num_local_experts)
    for (int32_t expert = first_dynamic; expert < input.num_local_experts; ++expert, ++rows)
      if (*rows < 0) plan.moves.push_back({expert, owner, ~*rows, 0, counts[expert]});
}

// The paper's greedy (arXiv 2604.19654, its scheduler; paper.md, Mechanism, step 2): most loaded
// rank, its busiest dynamic expert, whole, to the least loaded rank, until nothing helps.
// What the paper leaves open, as decided here:
//   helps      the helper ends below what the owner had; else the owner's next busiest is tried
//   no room    of slot or rows: the next least loaded rank that has room for this expert
//   ends       when nothing helps the most loaded rank, for then the maximum stays
//   received   experts stay where they are; a helper may still send experts of its own
//   static     experts count as load
// Each round moves one expert for good, so there are at most num_ranks * num_dynamic rounds.
void greedy(const PlanInput& input, PlanScratch& scratch, Plan& plan) {
  reset_scratch(input, scratch);
  if (scratch.rows.empty()) return;
  while (move_one(input, scratch)) {
  }
  plan.moves.reserve(scratch.rows.size());
  collect_moves(input, scratch, plan);
}

}  // namespace

Policy policy_from_name(const std::string& name) {
  if (name == "none") return Policy::kNone;
  if (name == "greedy") return Policy::kGreedy;
  if (name == "refine") return Policy::kRefine;
  if (name == "split") return Policy::kSplit;
  if (name == "auto") return Policy::kAuto;
  throw UserError(cat("plan: policy=\"", name,
                      "\", expected \"none\", \"greedy\", \"refine\", \"split\" or \"auto\""));
}

void make_plan(Policy policy, const PlanInput& input, PlanScratch& scratch, Plan& plan) {
  plan.moves.clear();
  plan.hash = 0;
  check_input(input);
  switch (policy) {
    case Policy::kNone:
      break;
    case Policy::kGreedy:  // finds its moves in order
      greedy(input, scratch, plan);
      break;
    case Policy::kRefine:
      check_signs(input);
      refine(input, scratch.by_cost.refine, plan.moves);
      break;
    case Policy::kSplit:
      check_signs(input);
      if (input.limits.grain_rows < 1)
        throw UserError("plan: grain_rows=0, expected at least 1 for split");
      split(input, scratch.by_cost.split, plan.moves);
      break;
    case Policy::kAuto:
      check_signs(input);
      if (input.costs == nullptr) throw UserError("plan: auto needs costs to decide by");
      plan_by_cost(input, scratch.by_cost, plan.moves);
      break;
    default:
      throw UserError(cat("plan: policy ", static_cast<int32_t>(policy), ", expected 0 to 4"));
  }
  std::sort(plan.moves.begin(), plan.moves.end(), by_owner);
  plan.hash = hash_moves(plan.moves);
}

uint64_t hash_moves(const std::vector<Move>& moves) {
  constexpr uint64_t kOffset = 14695981039346656037u;
  constexpr uint64_t kPrime = 1099511628211u;
  if (moves.empty()) return 0;
  uint64_t hash = kOffset;
  const auto add = [&hash](int32_t value) {
    hash = (hash ^ static_cast<uint32_t>(value)) * kPrime;
  };
  for (const Move& move : moves) {
    add(move.expert_idx);
    add(move.owner_rank);
    add(move.dst_rank);
    add(move.row_start);
    add(move.row_end);
  }
  return hash != 0 ? hash : 1;
}

}  // namespace feplb
