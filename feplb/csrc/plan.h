// The plan: which expert's rows are computed by another rank for one call. Pure mathematics:
// integers in, integers out; no device, thread, time or log. Equal input gives equal bytes on every
// rank, so no message is needed to agree. Called by the mover's thread, one PlanScratch per thread.
//
// Worked example, 2 ranks x 2 experts, all dynamic, counts = [[10, 6], [2, 0]], min_tokens = 3:
//   loads 16 | 2, mean 9. The paper's greedy moves rank 0's busiest expert that helps (expert 0,
//   10 rows: 6 | 12 lowers the most loaded rank from 16 to 12); then rank 1 is the most loaded, and
//   its expert of 2 rows is too small to move. The plan is
//   [Move{expert_idx=0, owner_rank=0, dst_rank=1, row_start=0, row_end=10}].
//   Rank 1 then has one received segment: rows [0, 10) of its row area, weight slot 0; rank 0 finds
//   the outputs in rows [0, 10) of its return area, and the weight grads in its grad slot 0.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "auto_plan.h"
#include "error.h"
#include "plan_types.h"

namespace feplb {

enum class Policy : int32_t { kNone = 0, kGreedy = 1, kRefine = 2, kSplit = 3, kAuto = 4 };

struct Plan {
  std::vector<Move> moves;  // ordered by (owner_rank, expert_idx, row_start)
  uint64_t hash = 0;        // hash_moves(moves)
};

// What make_plan keeps between calls, so that it allocates nothing once it has seen a shape (the
// plan's moves keep their capacity the same way). Its content means nothing to callers.
struct PlanScratch {
  AutoScratch by_cost;  // with that of every other policy in it
};

// Fills `plan` (its old content is discarded). Throws UserError on a policy it does not know, on
// limits or sizes that mean nothing, and, if it reads counts, on a negative one; `plan` is then
// empty.
void make_plan(Policy policy, const PlanInput& input, PlanScratch& scratch, Plan& plan);

// "none", "greedy", "refine", "split", "auto" -> Policy. Throws UserError, naming the known ones.
Policy policy_from_name(const std::string& name);

// FNV-1a, 64 bits, taken over the five integers of each move (not their bytes: a fifth of the
// multiplications). Never 0, except for no moves.
uint64_t hash_moves(const std::vector<Move>& moves);

}  // namespace feplb
