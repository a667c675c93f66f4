// auto: of the plans that other policies make, the one whose layer is predicted to be done first,
// and none where no plan pays.
#pragma once

#include <cstdint>
#include <vector>

#include "cost.h"
#include "greedy.h"
#include "plan_types.h"
#include "refine.h"
#include "split.h"

namespace feplb {

// Kept between calls, so that nothing is allocated once a shape has been seen.
struct AutoScratch {
  GreedyScratch greedy;
  RefineScratch refine;
  SplitScratch split;
  CostScratch cost;
  std::vector<int32_t> tiled;  // [num_ranks, num_local_experts] counts in whole tiles
  std::vector<int64_t> load;   // [num_ranks] rows under the plan tried
  std::vector<Move> tried, best;
};

// Appends the moves. `input` has been checked and has costs; grain_rows 0 leaves split out.
void plan_by_cost(const PlanInput& input, AutoScratch& scratch, std::vector<Move>& moves);

}  // namespace feplb
