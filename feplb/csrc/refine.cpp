#include "refine.h"

#include "refine_ranks.h"

namespace feplb {
namespace {

// Steps of the search are counted over all tries of a plan. With 8 ranks x 128 experts 64 steps
// take about 19 us and leave 0.7 % of the straggler, 400 take about 67 us and leave 0.55 %.
constexpr int32_t kSteps = 64;
constexpr int32_t kStepsPerRank = 4;  // where there are many ranks: each takes a step
constexpr int32_t kStepsPerTry = 32;
constexpr int32_t kMoreSteps = 4;   // times as many where these leave much
constexpr int32_t kLate = 4;        // of the first tries, see Effort
constexpr int32_t kMostRanks = 16;  // that are closed one by one: a board grows with their square
constexpr int32_t kStarts = 3;      // of pairing off
constexpr int64_t kFirstAim = 200;  // the first aim is this part of the mean above the goal
constexpr int64_t kGood = 400;      // a rest below this part of the goal is not searched further

// The rows that no rank should exceed: the mean, or what the target allows.
int64_t goal_of(const Ranks& ranks, const PlanLimits& limits) {
  constexpr int64_t kMillion = 1'000'000;
  const int64_t mean = ranks.mean();
  const int64_t wanted =
      mean / kMillion * limits.target_ppm + mean % kMillion * limits.target_ppm / kMillion;
  return std::max(mean, wanted);
}

class Refiner {
 public:
  Refiner(Ranks& ranks, RefineScratch& scratch, const PlanLimits& limits)
      : ranks_(ranks),
        scratch_(scratch),
        copies_(limits.max_copies > 0 ? limits.max_copies : std::max(4, ranks.num_ranks())),
        steps_given_(limits.search_steps > 0),
        max_steps_(limits.search_steps > 0 ? limits.search_steps
                                           : std::max(kSteps, kStepsPerRank * ranks.num_ranks())),
        goal_(goal_of(ranks, limits)) {}

  void run() {
    const int32_t n = ranks_.num_ranks();
    if (goal_ > ranks_.mean()) reach_with_few_copies();
    const bool pairs = copies_ >= 2 * (n - 1) || n > kMostRanks;
    if (pairs) pair_up(goal_);
    if (n <= kMostRanks && copies_ >= n - 1 && (!pairs || above(good_enough()))) close_all();
    if (above(good_enough()))
      bisect(max_steps_, 2, [this](int64_t aim) { return relieve_to(aim, copies_); });
    if (!pairs && above(good_enough())) pair_up(good_enough());
    if (above(goal_)) polish(ranks_, scratch_, goal_);
  }

 private:
  bool above(int64_t rows) const { return ranks_.best_fullest() > rows; }
  int64_t good_enough() const { return goal_ + goal_ / kGood; }

  void pair_up(int64_t enough) {
    const int32_t starts = ranks_.num_ranks() > kMostRanks ? 1 : kStarts;
    for (int32_t skip = 0; skip < starts && above(enough); ++skip)
      pair_off(ranks_, scratch_, copies_, skip);
  }

  bool relieve_to(int64_t aim, int32_t copies) {
    return relieve(ranks_, aim, copies, std::max(kStepsPerTry, 2 * ranks_.num_ranks()), steps_);
  }

  void reach_with_few_copies() {
    for (int32_t copies = 1; copies <= copies_ && above(goal_); ++copies) relieve_to(goal_, copies);
    steps_ = 0;
  }

  // Short tries first. Then long ones, each round with more of the closings that waste much.
  void close_all() {
    close_to_aims(max_steps_, 2, {kStepsPerTry, kLate});
    const int32_t max_steps = steps_given_ ? max_steps_ : kMoreSteps * max_steps_;
    const int32_t per_try = steps_given_ ? max_steps_ / 2 : max_steps_;
    for (int32_t late = kLate + 1; late <= ranks_.num_ranks(); ++late)
      if (steps_given_ || above(good_enough())) close_to_aims(max_steps, 4, {per_try, late});
    steps_ = 0;
  }

  void close_to_aims(int32_t max_steps, int32_t part, const Effort& effort) {
    bisect(max_steps, part, [&](int64_t aim) {
      const int32_t steps = std::min(effort.steps, max_steps - steps_);
      return close_one_by_one(ranks_, scratch_, aim, copies_, {steps, effort.late}, steps_);
    });
  }

  // Aims below the best plan, by a part-th of what lies between it and the last miss, until a miss
  // is near.
  template <class Try>
  void bisect(int32_t max_steps, int32_t part, Try attempt) {
    int64_t reached = ranks_.best_fullest(), missed = goal_ - 1;
    int64_t aim = std::min(goal_ + goal_ / kFirstAim, reached - (reached - missed) / part);
    while (reached > goal_ && steps_ < max_steps && missed + 1 < reached) {
      if (attempt(aim)) {
        reached = ranks_.best_fullest();
      } else {
        missed = aim;
        if (reached - missed <= 1 + (reached - goal_) / 8) return;
      }
      aim = std::max(reached - (reached - missed) / part, missed + 1);
    }
  }

  Ranks& ranks_;
  RefineScratch& scratch_;
  const int32_t copies_;
  const bool steps_given_;  // else few, and more where these leave much
  const int32_t max_steps_;
  const int64_t goal_;
  int32_t steps_ = 0;
};

}  // namespace

void refine(const PlanInput& input, RefineScratch& scratch, std::vector<Move>& moves) {
  if (input.num_ranks < 2 || input.limits.num_dynamic < 1) return;
  Ranks ranks(input, scratch);
  Refiner(ranks, scratch, input.limits).run();
  for (const Shift& shift : scratch.best)
    moves.push_back({shift.expert, shift.src, shift.dst, 0, shift.rows});
}

}  // namespace feplb
