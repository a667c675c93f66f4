// One run of a scenario in the simulated world: builds ranks, runs their threads, says what came
// of it. A run is a function of its seed and its options.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../../feplb/csrc/device_sim.h"
#include "../../feplb/csrc/fences.h"
#include "rank_program.h"

namespace feplb_test {

struct SimRunOptions {
  feplb::SimOptions world;
  int num_ranks = 4;
  int num_micro_batches = 2;
  bool two_streams = false;  // calls run on one of two compute streams
  bool lifts_once = false;   // mutation: a watchdog that lifted flags never lifts again
  int absent_rank = -1;      // this rank never makes a call
};

struct SimRunResult {
  std::string wrong;                // deadlock, wrong data or an error nobody expected; "" if fine
  std::vector<std::string> errors;  // [rank] what its program threw
  uint64_t num_steps = 0;
  uint64_t order_hash = 0;
  int64_t num_moves = 0;
};

SimRunResult run_simulation(uint64_t seed, SimRunOptions options);

// The variants, by number: single queue or not, blocking driver or not, two compute streams or one.
constexpr int kNumVariants = 8;
SimRunOptions variant(int number);
std::string variant_name(int number);

}  // namespace feplb_test
