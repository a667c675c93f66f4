#include "plan_check.h"

#include <algorithm>
#include <set>
#include <utility>

#include "error.h"

namespace feplb {
namespace {

std::string name_of(const Move& move) {
  return cat("rows ", move.row_start, " to ", move.row_end, " of expert ", move.expert_idx,
             " of rank ", move.owner_rank, " to rank ", move.dst_rank);
}

// One move alone.
std::string move_fault(const PlanInput& input, const Move& move) {
  const int32_t num_ranks = input.num_ranks, width = input.num_local_experts;
  const auto is_rank = [num_ranks](int32_t rank) { return rank >= 0 && rank < num_ranks; };
  if (!is_rank(move.owner_rank) || !is_rank(move.dst_rank))
    return cat(name_of(move), ": expected ranks 0 to ", num_ranks - 1);
  if (move.owner_rank == move.dst_rank) return cat(name_of(move), ": the helper is the owner");
  const int32_t first = width - input.limits.num_dynamic;
  if (move.expert_idx < first || move.expert_idx >= width)
    return cat(name_of(move), ": expected a dynamic expert, ", first, " to ", width - 1);
  const int32_t rows =
      input.counts[size_t(move.owner_rank) * size_t(width) + size_t(move.expert_idx)];
  if (move.row_start < 0 || move.row_start >= move.row_end || move.row_end > rows)
    return cat(name_of(move), ": expected 0 <= row_start < row_end <= ", rows,
               ", the rows of the expert");
  if (move.row_end - move.row_start < input.limits.min_tokens)
    return cat(name_of(move), ": expected at least min_tokens=", input.limits.min_tokens, " rows");
  return "";
}

// What the ranks would hold and compute.
struct Totals {
  explicit Totals(const PlanInput& input, const std::vector<Move>& moves)
      : load(size_t(input.num_ranks)),
        received(load.size()),
        returned(load.size()),
        sent(load.size()),
        experts(load.size()) {
    const size_t width = size_t(input.num_local_experts);
    for (size_t r = 0; r < load.size(); ++r)
      for (size_t e = 0; e < width; ++e) load[r] += input.counts[r * width + e];
    before = load.empty() ? 0 : *std::max_element(load.begin(), load.end());
    for (const Move& move : moves) {
      const size_t owner = size_t(move.owner_rank), dst = size_t(move.dst_rank);
      const int64_t rows = int64_t{move.row_end} - move.row_start;
      load[owner] -= rows;
      load[dst] += rows;
      received[dst] += rows;
      returned[owner] += rows;
      ++sent[owner];
      experts[dst].insert({move.owner_rank, move.expert_idx});
    }
  }
  int64_t before = 0;  // rows of the fullest rank
  std::vector<int64_t> load, received, returned;
  std::vector<int32_t> sent;
  std::vector<std::set<std::pair<int32_t, int32_t>>> experts;
};

std::string total_fault(const PlanInput& input, const std::vector<Move>& moves) {
  const PlanLimits& limits = input.limits;
  const Totals totals(input, moves);
  for (size_t r = 0; r < totals.load.size(); ++r) {
    if (totals.experts[r].size() > size_t(limits.num_slots))
      return cat("rank ", r, " receives ", totals.experts[r].size(),
                 " experts, num_slots=", limits.num_slots);
    if (totals.sent[r] > limits.num_grad_slots)
      return cat("rank ", r, " gets grads of ", totals.sent[r],
                 " moves, num_grad_slots=", limits.num_grad_slots);
    if (totals.received[r] > limits.max_recv_rows)
      return cat("rank ", r, " receives ", totals.received[r], " rows, expected at most ",
                 limits.max_recv_rows, " (max_rows of the LayerSpec)");
    if (totals.returned[r] > limits.max_return_rows)
      return cat("rank ", r, " gets back ", totals.returned[r], " rows, expected at most ",
                 limits.max_return_rows, " (max_rows of the LayerSpec)");
    if (totals.load[r] > totals.before)
      return cat("rank ", r, " computes ", totals.load[r], " rows, the fullest rank ",
                 totals.before, " without the plan");
  }
  return "";
}

}  // namespace

std::string plan_fault(const PlanInput& input, const std::vector<Move>& moves) {
  for (const Move& move : moves) {
    const std::string fault = move_fault(input, move);
    if (!fault.empty()) return fault;
  }
  for (size_t i = 1; i < moves.size(); ++i) {
    const Move &first = moves[i - 1], &second = moves[i];
    if (!by_owner(first, second))
      return cat(name_of(second), ": expected moves by owner_rank, expert_idx, row_start");
    if (first.owner_rank == second.owner_rank && first.expert_idx == second.expert_idx &&
        second.row_start < first.row_end)
      return cat(name_of(second), ": rows below ", first.row_end, " already move to rank ",
                 first.dst_rank);
  }
  return total_fault(input, moves);
}

}  // namespace feplb
