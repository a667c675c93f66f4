#include "plan.h"

#include <algorithm>

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
    case Policy::kGreedy:
      check_signs(input);
      greedy(input, scratch.by_cost.greedy, plan.moves);
      break;
    case Policy::kRefine:
      check_signs(input);
      refine(input, scratch.by_cost.refine, plan.moves);
      std::sort(plan.moves.begin(), plan.moves.end(), by_owner);
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
