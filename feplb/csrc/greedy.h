// greedy: the paper's policy. Whole experts, each moved once.
#pragma once

#include <cstdint>
#include <vector>

#include "plan_types.h"

namespace feplb {

// Kept between calls, so that nothing is allocated once a shape has been seen. Its content means
// nothing to callers.
struct GreedyScratch {
  std::vector<int64_t> load;       // [num_ranks] rows now on each rank
  std::vector<int64_t> recv_room;  // [num_ranks] rows a helper still takes; -1 without a free slot
  std::vector<int64_t> return_room;  // [num_ranks] rows an owner still gets back; -1 likewise
  std::vector<int32_t> slots;        // [num_ranks] free weight slots
  std::vector<int32_t> grad_slots;   // [num_ranks] free grad slots
  std::vector<int32_t> rows;  // [num_ranks, num_dynamic] rows that may move; ~dst_rank once moved
};

// Appends the moves, in the order of plans. `input` has been checked.
void greedy(const PlanInput& input, GreedyScratch& scratch, std::vector<Move>& moves);

}  // namespace feplb
