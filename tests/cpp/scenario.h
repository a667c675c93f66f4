// What the ranks of a test do: a seeded list of calls, the same on every rank, and every byte that
// goes into them. Values depend on (micro-batch, layer, rank, expert, row), so that stale, torn or
// missing data changes results.
//
//   expert   out      = f(row, side, all weights of the expert)         per row
//            grad row = g(grad, row, side, weights), grad side likewise per row
//            wgrad    = sum over rows of h(grad, row)
#pragma once

#include <cstdint>
#include <vector>

#include "../../feplb/csrc/arena.h"
#include "../../feplb/csrc/sim_streams.h"

namespace feplb_test {

constexpr int kNumLayers = 3;
constexpr int kNumExperts = 3;  // per rank
constexpr int kNumSlots = 2;

// Sizes of one layer, in words of 8 bytes.
struct Dims {
  int row_words;
  int side_words;
  std::vector<int> weight_words;  // per tensor of an expert
  std::vector<int> grad_tensors;  // those that take gradients
};
const Dims& dims_of(int layer);
std::vector<feplb::LayerShape> layer_shapes();

struct Call {
  feplb::CallKind kind = feplb::CallKind::kForward;
  int layer = 0;
  int micro_batch = 0;
  bool grad_mode = true;
  int refused_by = -1;  // this rank says in its header that it cannot make the call
};

struct Scenario {
  int num_ranks = 0;
  std::vector<Call> calls;
  std::vector<std::vector<int32_t>>
      counts;  // [micro_batch * kNumLayers + layer][rank * E + expert]

  std::vector<int32_t> counts_of(const Call& call, int rank) const;
};

// Several micro-batches through all layers, forward and backward, one or two in flight, some in
// eval mode, some calls refused; counts that make greedy move experts between changing ranks.
Scenario make_scenario(int num_ranks, int num_micro_batches, feplb::SimRandom& random);

// What flows through an expert.
enum class Stuff : uint64_t { kRow = 1, kSide, kGrad, kWeight };

// Word `word` of row `idx` (or of weight tensor `idx`) of an expert.
uint64_t value_of(Stuff stuff, const Call& call, int rank, int expert, int idx, int word);

// One expert on one row; all pointers are to words.
uint64_t fold_weights(const Dims& dims, const std::vector<const uint64_t*>& weights);
void expert_forward(const Dims& dims, const uint64_t* row, const uint64_t* side, uint64_t weights,
                    uint64_t* out);
struct RowInputs {
  const uint64_t* grad;
  const uint64_t* row;
  const uint64_t* side;
};
void expert_backward_row(const Dims& dims, const RowInputs& in, uint64_t weights,
                         uint64_t* grad_row, uint64_t* grad_side);
void add_weight_grad(const RowInputs& in, int row_words, int num_words, uint64_t* grad);

}  // namespace feplb_test
