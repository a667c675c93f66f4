// What every policy is given, and what it answers with. Integers only.
#pragma once

#include <cstdint>
#include <tuple>

namespace feplb {

// Rows [row_start, row_end) of one expert are computed by dst_rank instead of owner_rank.
struct Move {
  int32_t expert_idx;  // local to the owner
  int32_t owner_rank;
  int32_t dst_rank;   // the helper
  int32_t row_start;  // in rows of this expert on its owner
  int32_t row_end;
};

// The order of moves in a plan.
inline bool by_owner(const Move& a, const Move& b) {
  return std::tie(a.owner_rank, a.expert_idx, a.row_start) <
         std::tie(b.owner_rank, b.expert_idx, b.row_start);
}

// What the arena can hold, and which experts may move; the same on every rank.
struct PlanLimits {
  int32_t num_dynamic = 0;      // the last num_dynamic local experts of each rank may move
  int32_t num_slots = 0;        // received experts a helper can hold
  int32_t num_grad_slots = 0;   // moves an owner can take weight grads back from
  int32_t min_tokens = 1;       // fewest rows worth a move; 0 means 1 (paper: tau)
  int64_t max_recv_rows = 0;    // rows a helper can take in
  int64_t max_return_rows = 0;  // rows an owner can get back
  // What refine and split aim at (greedy, the paper's, has no such knobs).
  int32_t max_copies = 0;  // most weight copies of a plan, over all ranks; 0: at least four, one
                           // per rank in refine, two in split
  int32_t target_ppm = 0;  // max / mean wanted, in millionths; below 1'000'000: the least there is
  int32_t grain_rows = 128;  // split sends multiples of this, or all rows that an expert has;
                             // 0: auto moves whole experts only
  int32_t search_steps = 0;  // most steps of refine's search; 0: about 20 us for 8 ranks x 128
};

// What one row, expert or copy of a layer costs, in picoseconds; the same on every rank.
// feplb/scheduler/cost_model.py says what each of them is.
struct UnitCosts {
  int64_t tile_rows = 1;  // rows
  int64_t row_forward = 0;
  int64_t row_dgrad = 0;
  int64_t row_wgrad = 0;
  int64_t weight_read = 0;
  int64_t gemm = 0;
  int64_t row_push = 0;
  int64_t row_push_backward = 0;
  int64_t weight_push = 0;
  int64_t row_return = 0;
  int64_t row_return_backward = 0;
  int64_t grad_push = 0;
  int64_t row_place = 0;
  int64_t grad_add = 0;
  int64_t late_window = 0;
  int64_t start = 0;
  int64_t copy = 0;
  int64_t shares_core = 0;          // 0 or 1
  int64_t inbound_permille = 1000;  // of a copy's time at its source
};

// counts[r * num_local_experts + e] = rows that rank r owns for its local expert e, at least 0.
struct PlanInput {
  const int32_t* counts = nullptr;
  int32_t num_ranks = 0;
  int32_t num_local_experts = 0;
  PlanLimits limits;
  const UnitCosts* costs = nullptr;  // auto needs them
};

}  // namespace feplb
