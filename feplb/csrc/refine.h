// refine: whole experts, so that every bit stays as it was, moved so well that next to nothing of
// the imbalance is left. The plan is searched for, within a budget of steps that are counted, never
// timed: the same counts give the same plan on every machine.
//
// Worked example, 2 ranks x 3 experts, counts = [[10, 7, 4], [5, 2, 0]], loads 21 | 7. Half the
//   difference is 7: expert 1 of rank 0 moves alone, loads 14 | 14. With counts = [[10, 9], [2,
//   1]], loads 19 | 3, no expert has the 8 rows; expert 0 of rank 0 goes and expert 0 of rank 1
//   comes, 10 - 2 = 8, two copies, loads 11 | 11.
#pragma once

#include <cstdint>
#include <vector>

#include "plan_types.h"

namespace feplb {

// A whole expert on its way: the pos-th smallest of those that src still had to give.
struct Shift {
  int32_t src;
  int32_t dst;
  int32_t expert;
  int32_t rows;
  int32_t pos;
};

// Kept between calls, so that nothing is allocated once a shape has been seen. Its content means
// nothing to callers.
struct RefineScratch {
  std::vector<int32_t> rows;         // [num_ranks, num_dynamic, up to a multiple of 4] ascending
  std::vector<int32_t> experts;      // [num_ranks, num_dynamic] whose rows these are
  std::vector<int32_t> sizes;        // [num_ranks] how many there are
  std::vector<int64_t> load;         // [num_ranks] rows now on each rank
  std::vector<int64_t> recv_room;    // [num_ranks]
  std::vector<int64_t> return_room;  // [num_ranks]
  std::vector<int32_t> slots;        // [num_ranks]
  std::vector<int32_t> grad_slots;   // [num_ranks]
  std::vector<Shift> shifts;         // made so far, the last on top
  std::vector<Shift> best;           // of the best plan so far
  std::vector<uint8_t> open;         // [num_ranks] may still change
  std::vector<int32_t> waste;  // [num_ranks] boards of [num_ranks, num_ranks], see ClosingSearch
};

// Appends the moves, in any order. `input` has been checked.
void refine(const PlanInput& input, RefineScratch& scratch, std::vector<Move>& moves);

}  // namespace feplb
