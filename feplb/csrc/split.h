// split: row ranges of experts, so that even one expert hotter than a rank can be shared. Rows move
// in tiles of g = grain_rows. T, the most rows that a rank may have, is the least for which
// sum over ranks of floor((T - load) / g) >= 0: ranks above T ship ceil((load - T) / g) tiles,
// ranks below take up to floor((T - load) / g). Which rank helps which is then chosen for few
// weight copies, and which experts are cut, too.
//
// Worked example, 2 ranks x 2 experts, all dynamic, counts = [[300, 100], [40, 0]], g = 16:
//   loads 400 | 40. T = 224: floor(-176 / 16) + floor(184 / 16) = -11 + 11 = 0, and 223 gives -1.
//   Rank 0 ships 11 tiles, 176 rows, of the smallest expert that has as many; it keeps the first
//   rows: [Move{expert_idx=0, owner_rank=0, dst_rank=1, row_start=124, row_end=300}], 224 | 216.
//   With target_ppm = 1'500'000, T = 330: 70 rows too many are 5 tiles, 80 rows, and expert 1 has
//   them: [Move{expert_idx=1, owner_rank=0, dst_rank=1, row_start=20, row_end=100}], 320 | 120.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "plan_types.h"
#include "split_match.h"

namespace feplb {

// Kept between calls, so that nothing is allocated once a shape has been seen. Its content means
// nothing to callers.
struct SplitScratch {
  std::vector<int64_t> load;             // [num_ranks] rows of each rank without a plan
  std::vector<int64_t> after;            // [num_ranks] under the plan tried
  std::vector<int64_t> order;            // [num_ranks] values to select from
  std::vector<int32_t> num_moves;        // [num_ranks] moves that each rank sends or takes in
  std::vector<int32_t> left;             // [num_dynamic] rows that the owner in hand still has
  std::vector<SplitPiece> pieces;        // those of one owner together
  std::vector<std::size_t> first_piece;  // [num_ranks]
  std::vector<Move> tried, best;         // row_start 0, row_end the number of rows
  MatchScratch match;
};

// Appends the moves, ordered by (owner_rank, expert_idx, dst_rank). `input` has been checked.
// Of a split expert the owner keeps the first rows, the helpers follow by rank. Each move has a
// multiple of g rows, or all that its expert has left. Where a limit or experts below a tile forbid
// T, higher targets are tried, and the plan whose fullest rank has fewest rows is taken.
void split(const PlanInput& input, SplitScratch& scratch, std::vector<Move>& moves);

}  // namespace feplb
