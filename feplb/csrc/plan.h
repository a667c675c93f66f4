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

#include "error.h"

namespace feplb {

// Rows [row_start, row_end) of one expert are computed by dst_rank instead of owner_rank.
struct Move {
  int32_t expert_idx;  // local to the owner
  int32_t owner_rank;
  int32_t dst_rank;   // the helper
  int32_t row_start;  // in rows of this expert on its owner
  int32_t row_end;
};

enum class Policy : int32_t { kNone = 0, kGreedy = 1 };

// What the arena can hold, and which experts may move; the same on every rank.
struct PlanLimits {
  int32_t num_dynamic = 0;      // the last num_dynamic local experts of each rank may move
  int32_t num_slots = 0;        // received experts a helper can hold
  int32_t num_grad_slots = 0;   // moves an owner can take weight grads back from
  int32_t min_tokens = 1;       // fewest rows worth a move; 0 means 1 (paper: tau)
  int64_t max_recv_rows = 0;    // rows a helper can take in
  int64_t max_return_rows = 0;  // rows an owner can get back
};

// counts[r * num_local_experts + e] = rows that rank r owns for its local expert e, at least 0.
struct PlanInput {
  const int32_t* counts = nullptr;
  int32_t num_ranks = 0;
  int32_t num_local_experts = 0;
  PlanLimits limits;
};

struct Plan {
  std::vector<Move> moves;  // ordered by (owner_rank, expert_idx, row_start)
  uint64_t hash = 0;        // hash_moves(moves)
};

// What make_plan keeps between calls, so that it allocates nothing once it has seen a shape (the
// plan's moves keep their capacity the same way). Its content means nothing to callers.
struct PlanScratch {
  std::vector<int64_t> load;       // [num_ranks] rows now on each rank
  std::vector<int64_t> recv_room;  // [num_ranks] rows a helper still takes; -1 without a free slot
  std::vector<int64_t> return_room;  // [num_ranks] rows an owner still gets back; -1 likewise
  std::vector<int32_t> slots;        // [num_ranks] free weight slots
  std::vector<int32_t> grad_slots;   // [num_ranks] free grad slots
  std::vector<int32_t> rows;  // [num_ranks, num_dynamic] rows that may move; ~dst_rank once moved
};

// Fills `plan` (its old content is discarded). Throws UserError on a policy it does not know, on
// limits or sizes that mean nothing, and, if it reads counts, on a negative one; `plan` is then
// empty.
void make_plan(Policy policy, const PlanInput& input, PlanScratch& scratch, Plan& plan);

// "none", "greedy" -> Policy. Throws UserError, naming the known ones.
Policy policy_from_name(const std::string& name);

// FNV-1a, 64 bits, taken over the five integers of each move (not their bytes: a fifth of the
// multiplications). Never 0, except for no moves.
uint64_t hash_moves(const std::vector<Move>& moves);

}  // namespace feplb
