// Every fence of the protocol is missed when it is taken out.
#include "check.h"
#include "sim_run.h"

namespace feplb_test {
namespace {

using feplb::cat;
using feplb::Fence;

constexpr uint64_t kMostSeeds = 2000;

// Takes a fence out for as long as it lives.
class WithoutFence {
 public:
  explicit WithoutFence(Fence fence) : fence_(fence) { feplb::set_fence(fence, false); }
  ~WithoutFence() { feplb::set_fence(fence_, true); }

 private:
  const Fence fence_;
};

SimRunOptions any_variant(uint64_t seed) { return variant(static_cast<int>(seed % kNumVariants)); }

// Where a fence is missed in one variant only, or there most often.
SimRunOptions separate_queues(uint64_t /*seed*/) { return variant(0); }
SimRunOptions single_queue(uint64_t /*seed*/) { return variant(1); }
SimRunOptions blocking_driver(uint64_t /*seed*/) { return variant(2); }
SimRunOptions two_streams(uint64_t /*seed*/) { return variant(4); }

// Also a rank dies. While all is well an owner cannot place results before its helpers have had its
// rows and weights; once waits are lifted, only its own copies tell it that they were read.
SimRunOptions options_with_death(uint64_t seed) {
  feplb::SimRandom random(seed);
  SimRunOptions options = any_variant(seed);
  options.world.fault = feplb::SimFault::kKill;
  options.world.fault_rank = static_cast<int>(random.below(4));
  options.world.fault_step = random.below(3000);
  return options;
}

// Finds a seed that goes wrong without the fence, and goes right with it.
void expect_missed(Fence fence, SimRunOptions (*options)(uint64_t seed) = any_variant) {
  uint64_t seed = 0;
  std::string wrong;
  {
    const WithoutFence without(fence);
    while (wrong.empty()) {
      CHECK(++seed <= kMostSeeds, "no seed of ", kMostSeeds, " misses fence ",
            feplb::fence_name(fence));
      wrong = run_simulation(seed, options(seed)).wrong;
    }
  }
  const std::string with = run_simulation(seed, options(seed)).wrong;
  CHECK(with.empty(), "seed ", seed, " goes wrong with the fence, too: ", with);
  note(cat("seed ", seed, ": ", wrong.substr(0, wrong.find('\n'))));
}

TEST(fence_handshake_is_missed) { expect_missed(Fence::kHandshake); }
TEST(fence_handshake_is_missed_with_a_single_queue) {
  expect_missed(Fence::kHandshake, single_queue);
}
TEST(fence_handshake_is_missed_with_a_blocking_driver) {
  expect_missed(Fence::kHandshake, blocking_driver);
}
TEST(fence_wait_rows_is_missed) { expect_missed(Fence::kWaitRows); }
TEST(fence_wait_weights_is_missed) { expect_missed(Fence::kWaitWeights); }
TEST(fence_wait_returns_is_missed) { expect_missed(Fence::kWaitReturns); }
TEST(fence_wait_grads_is_missed) { expect_missed(Fence::kWaitGrads); }
TEST(fence_event_inputs_is_missed) { expect_missed(Fence::kEventInputs); }
TEST(fence_event_returns_is_missed) { expect_missed(Fence::kEventReturns); }
TEST(fence_event_grads_is_missed) { expect_missed(Fence::kEventGrads); }
TEST(fence_release_rows_is_missed) { expect_missed(Fence::kReleaseRows); }
TEST(fence_release_weights_is_missed) { expect_missed(Fence::kReleaseWeights); }
// With one compute stream, an owner's rows of a later call leave after it has placed what came home
// from this one; only calls on streams that nothing orders need these two.
TEST(fence_release_returns_is_missed) { expect_missed(Fence::kReleaseReturns, two_streams); }
TEST(fence_release_grads_is_missed) { expect_missed(Fence::kReleaseGrads, two_streams); }
TEST(fence_drain_inputs_is_missed) { expect_missed(Fence::kDrainInputs, options_with_death); }
TEST(fence_drain_outbox_is_missed) { expect_missed(Fence::kDrainOutbox, separate_queues); }
TEST(fence_drain_grad_outbox_is_missed) { expect_missed(Fence::kDrainGradOutbox); }
TEST(fence_flag_after_data_is_missed) { expect_missed(Fence::kFlagAfterData); }
TEST(fence_epoch_check_is_missed) { expect_missed(Fence::kEpochCheck); }

}  // namespace
}  // namespace feplb_test
