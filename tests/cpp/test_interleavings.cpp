// The whole protocol under the adversary: 4 ranks, 3 layers, forward and backward.
#include "check.h"
#include "sim_run.h"

namespace feplb_test {
namespace {

using feplb::cat;

// Every fence that is taken out is missed within 110 of them (test_fences).
constexpr uint64_t kSeedsPerVariant = 300;

void run_seeds(int number) {
  const SimRunOptions options = variant(number);
  uint64_t steps = 0;
  int64_t moves = 0;
  for (uint64_t seed = 1; seed <= kSeedsPerVariant; ++seed) {
    const SimRunResult result = run_simulation(seed, options);
    CHECK(result.wrong.empty(), "seed ", seed, ", ", variant_name(number), ": ", result.wrong);
    for (const std::string& error : result.errors) {
      CHECK(error.empty(), "seed ", seed, ", ", variant_name(number), ": ", error);
    }
    steps += result.num_steps;
    moves += result.num_moves;
  }
  CHECK(moves > 10 * static_cast<int64_t>(kSeedsPerVariant), "only ", moves, " moves");
  note(cat(kSeedsPerVariant, " interleavings, ", steps, " steps, ", moves, " moves"));
}

TEST(interleavings_separate_queues) { run_seeds(0); }
TEST(interleavings_single_queue) { run_seeds(1); }
TEST(interleavings_separate_queues_blocking_driver) { run_seeds(2); }
TEST(interleavings_single_queue_blocking_driver) { run_seeds(3); }
TEST(interleavings_two_streams_separate_queues) { run_seeds(4); }
TEST(interleavings_two_streams_single_queue) { run_seeds(5); }
TEST(interleavings_two_streams_separate_queues_blocking_driver) { run_seeds(6); }
TEST(interleavings_two_streams_single_queue_blocking_driver) { run_seeds(7); }

TEST(same_seed_same_order) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const SimRunOptions options = variant(static_cast<int>(seed % kNumVariants));
    const SimRunResult first = run_simulation(seed, options);
    const SimRunResult second = run_simulation(seed, options);
    CHECK_EQ(first.order_hash, second.order_hash);
    CHECK_EQ(first.num_steps, second.num_steps);
    const SimRunResult other = run_simulation(seed + 1000, options);
    CHECK(first.order_hash != other.order_hash, "seeds ", seed, " and ", seed + 1000,
          " gave the same order");
  }
}

}  // namespace
}  // namespace feplb_test
