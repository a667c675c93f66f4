// What goes wrong, under the adversary: a rank dies, a deadline passes, a rank never calls. Every
// rank that is left must end, with an error that names the culprit; its streams must drain, however
// late pushes overwrite lifted flags; and wrong data may flow only once the failure is announced.
#include "check.h"
#include "sim_run.h"

namespace feplb_test {
namespace {

using feplb::cat;
using feplb::SimFault;

// AddressSanitizer, ten times as slow, looks at the memory of fewer.
#ifdef __SANITIZE_ADDRESS__
constexpr uint64_t kSeeds = 80;
#else
constexpr uint64_t kSeeds = 250;
#endif

// Fault `fault` at a random rank and step; most runs take 2,500 to 5,000 steps.
SimRunOptions options_for(uint64_t seed, SimFault fault) {
  feplb::SimRandom random(seed + 77);
  SimRunOptions options = variant(static_cast<int>(seed % kNumVariants));
  options.world.fault = fault;
  options.world.fault_rank = static_cast<int>(random.below(4));
  options.world.fault_step = random.below(4000);
  return options;
}

// Counts errors; each must contain `part` or `other_part`.
int count_errors(const SimRunResult& result, const std::string& part, const std::string& other) {
  int count = 0;
  for (const std::string& error : result.errors) {
    if (error.empty()) continue;
    ++count;
    const bool is_told = error.find(part) != std::string::npos;
    CHECK(is_told || error.find(other) != std::string::npos, "expected \"", part, "\" or \"", other,
          "\", got: ", error);
  }
  return count;
}

TEST(killed_rank_ends_every_rank) {
  int num_noticed = 0;
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    const SimRunOptions options = options_for(seed, SimFault::kKill);
    const SimRunResult result = run_simulation(seed, options);
    CHECK(result.wrong.empty(), "seed ", seed, ": ", result.wrong);
    const std::string died = cat("peer rank ", options.world.fault_rank, " (pid ");
    num_noticed += count_errors(result, died, "was killed at step");
  }
  CHECK(num_noticed > static_cast<int>(kSeeds), "only ", num_noticed, " ranks noticed");
  note(cat(kSeeds, " interleavings, ", num_noticed, " ranks ended"));
}

TEST(passed_deadline_ends_every_rank) {
  int num_noticed = 0;
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    const SimRunOptions options = options_for(seed, SimFault::kTimeOut);
    const SimRunResult result = run_simulation(seed, options);
    CHECK(result.wrong.empty(), "seed ", seed, ": ", result.wrong);
    num_noticed += count_errors(result, "no answer from", "no answer from");
  }
  CHECK(num_noticed > static_cast<int>(kSeeds), "only ", num_noticed, " ranks noticed");
  note(cat(kSeeds, " interleavings, ", num_noticed, " ranks ended"));
}

TEST(absent_rank_is_named) {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    SimRunOptions options = variant(static_cast<int>(seed % kNumVariants));
    options.world.deadlines = true;
    options.absent_rank = static_cast<int>(seed % 4);
    const SimRunResult result = run_simulation(seed, options);
    CHECK(result.wrong.empty(), "seed ", seed, ": ", result.wrong);
    const std::string part = cat("rank ", options.absent_rank, " (last seen: no call yet)");
    CHECK_EQ(count_errors(result, part, part), 3);
  }
}

// A deadlock is found at once, and says who waits for what.
TEST(deadlock_is_described) {
  SimRunOptions options;
  options.absent_rank = 2;
  const SimRunResult result = run_simulation(1, options);
  for (const char* part : {"deadlock (seed 1, step ", "rank 2: thread ended; mover waits for",
                           "rank 0: thread waits for something on the host"}) {
    CHECK(result.wrong.find(part) != std::string::npos, "no \"", part, "\" in: ", result.wrong);
  }
}

// Late pushes do overwrite lifted flags: a watchdog that lifts only once leaves streams stuck.
TEST(lifting_once_is_not_enough) {
  uint64_t seed = 0;
  std::string wrong;
  while (wrong.empty()) {
    CHECK(++seed <= 2000, "lifting once was enough for ", seed, " seeds");
    SimRunOptions options = options_for(seed, SimFault::kKill);
    options.lifts_once = true;
    wrong = run_simulation(seed, options).wrong;
  }
  CHECK(wrong.find("deadlock") != std::string::npos, "expected a deadlock, got: ", wrong);
  note(cat("seed ", seed));
}

}  // namespace
}  // namespace feplb_test
