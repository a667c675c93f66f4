#include "auto_plan.h"

#include <algorithm>
#include <array>
#include <limits>

namespace feplb {
namespace {

// Max / mean aimed at where exact balance costs more copies than hide, millionths.
constexpr std::array<int32_t, 8> kTargets = {1'010'000, 1'020'000, 1'050'000, 1'100'000,
                                             1'200'000, 1'350'000, 1'600'000, 2'000'000};
// Copies out of one rank: it has one engine for them, and on hot loads that is the limit.
constexpr std::array<int32_t, 3> kCopiesOut = {6, 4, 3};
constexpr int32_t kMostRanks = 16;  // above, refine takes too long to be tried for every target
constexpr int64_t kVeryGood = 32;   // nothing else is tried if less than this part is missing
constexpr int64_t kGood = 16;       // no other targets are tried

class Chooser {
 public:
  Chooser(const PlanInput& input, AutoScratch& scratch)
      : input_(input), s_(scratch), tiled_(in_tiles()), cap_(input.limits.num_grad_slots) {}

  void run() {
    s_.best.clear();
    s_.tried.clear();
    const int64_t none = predict(input_, *input_.costs, s_.tried, s_.cost);
    best_time_ = none;
    const int64_t ceiling = even_time();
    const int32_t one = input_.limits.max_copies;
    const int32_t two = one > 0 ? one : 2 * input_.num_ranks;
    const auto missing_less_than = [&](int64_t part) {
      return best_time_ - ceiling <= (none - ceiling) / part;
    };
    try_refine(0, one);
    try_split(0);
    if (missing_less_than(kVeryGood)) return;
    if (two != one) try_refine(0, two);
    if (missing_less_than(kGood)) return;
    try_greedy();
    for (const int32_t copies_out : kCopiesOut) {
      if (copies_out >= input_.limits.num_grad_slots) continue;  // no cap: tried above
      cap_ = copies_out;
      try_greedy();
      if (input_.num_ranks <= kMostRanks) try_refine(0, two);
    }
    cap_ = input_.limits.num_grad_slots;
    for (const int32_t target : kTargets) {
      if (input_.num_ranks <= kMostRanks) try_refine(target, two);
      try_split(target);
    }
  }

 private:
  // An expert's last tile costs as a full one, so ranks are balanced in tiles. One that is too
  // small to move stays as it is, and too small.
  PlanInput in_tiles() {
    PlanInput tiled = input_;
    const int64_t tile = input_.costs->tile_rows;
    const int64_t most = std::numeric_limits<int32_t>::max() / tile * tile;
    const size_t size = size_t(input_.num_ranks) * size_t(input_.num_local_experts);
    s_.tiled.resize(size);
    for (size_t i = 0; i < size; ++i) {
      const int32_t rows = input_.counts[i];
      s_.tiled[i] = rows < input_.limits.min_tokens
                        ? rows
                        : int32_t(std::min((rows + tile - 1) / tile * tile, most));
    }
    tiled.counts = s_.tiled.data();
    return tiled;
  }

  // Forward and backward of the un-balanced work, were it spread evenly; needs the cost scratch of
  // the prediction without moves.
  int64_t even_time() const {
    const UnitCosts& costs = *input_.costs;
    int64_t tiles = 0, experts = 0;
    for (const int32_t rows : s_.tiled) {
      tiles += rows;
      experts += rows > 0;
    }
    const int64_t row = costs.row_forward + costs.row_dgrad + costs.row_wgrad;
    return (tiles * row + experts * 3 * costs.gemm) / std::max(1, input_.num_ranks);
  }

  void try_refine(int32_t target, int32_t max_copies) {
    PlanInput input = tiled_;
    input.limits.max_copies = max_copies;
    input.limits.num_grad_slots = cap_;
    input.limits.target_ppm = std::max(target, input_.limits.target_ppm);
    s_.tried.clear();
    refine(input, s_.refine, s_.tried);
    for (Move& move : s_.tried)
      move.row_end = input_.counts[size_t(move.owner_rank) * size_t(input_.num_local_experts) +
                                   size_t(move.expert_idx)];
    std::sort(s_.tried.begin(), s_.tried.end(), by_owner);
    judge();
  }

  void try_greedy() {
    PlanInput input = input_;
    input.limits.num_grad_slots = cap_;
    s_.tried.clear();
    greedy(input, s_.greedy, s_.tried);
    judge();
  }

  void try_split(int32_t target) {
    if (input_.limits.grain_rows < 1) return;
    PlanInput input = input_;
    input.limits.target_ppm = std::max(target, input_.limits.target_ppm);
    s_.tried.clear();
    split(input, s_.split, s_.tried);
    judge();
  }

  void judge() {
    if (s_.tried.empty()) return;
    const int64_t time = predict(input_, *input_.costs, s_.tried, s_.cost);
    if (time >= best_time_ || fills_a_rank()) return;
    best_time_ = time;
    std::swap(s_.best, s_.tried);
  }

  // What is even in tiles may leave a rank with more rows than the fullest had: more memory, and
  // not what a plan is for.
  bool fills_a_rank() {
    const size_t width = size_t(input_.num_local_experts);
    s_.load.assign(size_t(input_.num_ranks), 0);
    for (size_t r = 0; r < s_.load.size(); ++r)
      for (size_t e = 0; e < width; ++e) s_.load[r] += input_.counts[r * width + e];
    const int64_t before = *std::max_element(s_.load.begin(), s_.load.end());
    for (const Move& move : s_.tried) {
      s_.load[size_t(move.owner_rank)] -= move.row_end - move.row_start;
      s_.load[size_t(move.dst_rank)] += move.row_end - move.row_start;
    }
    return *std::max_element(s_.load.begin(), s_.load.end()) > before;
  }

  const PlanInput& input_;
  AutoScratch& s_;
  const PlanInput tiled_;
  int32_t cap_;  // on the copies out of one rank
  int64_t best_time_ = 0;
};

}  // namespace

void plan_by_cost(const PlanInput& input, AutoScratch& scratch, std::vector<Move>& moves) {
  if (input.num_ranks < 2) return;
  Chooser(input, scratch).run();
  moves.insert(moves.end(), scratch.best.begin(), scratch.best.end());
}

}  // namespace feplb
