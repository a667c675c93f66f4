// Predicts how long a layer's experts take under a plan: what `auto` decides by. The twin of
// feplb/scheduler/cost_model.py, which explains the model and has the worked example; both count in
// integer picoseconds and agree to the last one.
#pragma once

#include <cstdint>
#include <vector>

#include "plan_types.h"

namespace feplb {

// Kept between predictions, so that nothing is allocated once a shape has been seen.
struct CostScratch {
  std::vector<int32_t> left;          // [num_ranks, num_local_experts] rows that stay
  std::vector<int64_t> kept;          // [num_ranks] GEMM time of what stays
  std::vector<int64_t> first;         // [num_ranks] of received rows: what goes back at level 2
  std::vector<int64_t> second;        // [num_ranks] their wgrad
  std::vector<int64_t> sent;          // [num_ranks] rows
  std::vector<int64_t> got;           // [num_ranks] rows
  std::vector<int64_t> back_out;      // [num_ranks] rows whose way out and way in is the way back
  std::vector<int64_t> back_in;       // [num_ranks] that kept B should cover
  std::vector<int64_t> stolen;        // [num_ranks] of the core, by copies of level 1
  std::vector<int64_t> stolen_later;  // [num_ranks] by those of levels 2 and 3
  std::vector<int64_t> engine;        // [num_ranks] when it is free
  std::vector<int64_t> inbound;       // [num_ranks]
  std::vector<int64_t> arrived;       // [num_ranks]
  std::vector<int64_t> computed;      // [num_ranks]
  std::vector<int64_t> ends;          // [num_ranks]
  std::vector<int64_t> home;          // [num_ranks]
};

// Picoseconds of the slowest rank, forward and backward together. `moves` as plans order them.
int64_t predict(const PlanInput& input, const UnitCosts& costs, const std::vector<Move>& moves,
                CostScratch& scratch);

}  // namespace feplb
