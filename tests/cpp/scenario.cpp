#include "scenario.h"

#include <algorithm>

namespace feplb_test {
namespace {

uint64_t mix(uint64_t a, uint64_t b) {
  return feplb::SimRandom(a * 0x9e3779b97f4a7c15u ^ (b + 0x632be59bd9b4e019u)).next();
}

// A few experts of one or two ranks get most rows.
std::vector<int32_t> draw_counts(int num_ranks, feplb::SimRandom& random) {
  std::vector<int32_t> counts(static_cast<std::size_t>(num_ranks * kNumExperts));
  for (int32_t& count : counts) count = static_cast<int32_t>(random.below(3));
  const uint32_t num_hot = 1 + random.below(2);
  for (uint32_t i = 0; i < num_hot; ++i) {
    const uint32_t rank = random.below(static_cast<uint32_t>(num_ranks));
    for (uint32_t expert = 0; expert < kNumExperts; ++expert) {
      counts[rank * kNumExperts + expert] = static_cast<int32_t>(2 + random.below(6));
    }
  }
  return counts;
}

void add_pass(std::vector<Call>& calls, feplb::CallKind kind, int micro_batch, bool grad_mode) {
  for (int i = 0; i < kNumLayers; ++i) {
    Call call;
    call.kind = kind;
    call.layer = kind == feplb::CallKind::kForward ? i : kNumLayers - 1 - i;
    call.micro_batch = micro_batch;
    call.grad_mode = grad_mode;
    calls.push_back(call);
  }
}

}  // namespace

const Dims& dims_of(int layer) {
  static const std::vector<Dims> kDims = {
      {2, 1, {6, 2}, {0, 1}},
      {4, 2, {4}, {0}},
      {3, 1, {8, 3}, {0}},
  };
  return kDims[static_cast<std::size_t>(layer)];
}

std::vector<feplb::LayerShape> layer_shapes() {
  std::vector<feplb::LayerShape> shapes;
  for (int layer = 0; layer < kNumLayers; ++layer) {
    const Dims& dims = dims_of(layer);
    feplb::LayerShape shape;
    shape.num_local_experts = kNumExperts;
    shape.row_bytes = 8 * static_cast<std::size_t>(dims.row_words);
    shape.side_row_bytes = {8 * static_cast<std::size_t>(dims.side_words)};
    for (const int words : dims.weight_words) {
      shape.weight_bytes.push_back(8 * static_cast<std::size_t>(words));
    }
    shape.max_rows = 16;
    shape.policy = feplb::Policy::kGreedy;
    shape.limits.num_dynamic = layer == 1 ? kNumExperts - 1 : kNumExperts;
    shape.limits.num_slots = kNumSlots;
    shape.limits.num_grad_slots = kNumSlots;
    shape.limits.max_recv_rows = shape.max_rows;
    shape.limits.max_return_rows = shape.max_rows;
    shapes.push_back(shape);
  }
  return shapes;
}

std::vector<int32_t> Scenario::counts_of(const Call& call, int rank) const {
  const auto& all = counts[static_cast<std::size_t>(call.micro_batch * kNumLayers + call.layer)];
  return {all.begin() + rank * kNumExperts, all.begin() + (rank + 1) * kNumExperts};
}

Scenario make_scenario(int num_ranks, int num_micro_batches, feplb::SimRandom& random) {
  Scenario scenario;
  scenario.num_ranks = num_ranks;
  for (int i = 0; i < num_micro_batches * kNumLayers; ++i) {
    scenario.counts.push_back(draw_counts(num_ranks, random));
  }
  std::vector<int> in_flight;
  const auto run_backward = [&] {
    add_pass(scenario.calls, feplb::CallKind::kBackward, in_flight.front(), true);
    in_flight.erase(in_flight.begin());
  };
  const std::size_t most_in_flight = 1 + random.below(2);
  for (int micro_batch = 0; micro_batch < num_micro_batches; ++micro_batch) {
    const bool grad_mode = !random.one_in(6);
    add_pass(scenario.calls, feplb::CallKind::kForward, micro_batch, grad_mode);
    if (grad_mode) in_flight.push_back(micro_batch);
    if (in_flight.size() >= most_in_flight) run_backward();
  }
  while (!in_flight.empty()) run_backward();
  if (random.one_in(4)) {
    const std::size_t at = random.below(static_cast<uint32_t>(scenario.calls.size()));
    Call refused = scenario.calls[at];
    refused.kind = feplb::CallKind::kForward;
    refused.refused_by = static_cast<int>(random.below(static_cast<uint32_t>(num_ranks)));
    scenario.calls.insert(scenario.calls.begin() + static_cast<std::ptrdiff_t>(at), refused);
  }
  return scenario;
}

uint64_t value_of(Stuff stuff, const Call& call, int rank, int expert, int idx, int word) {
  const auto place = static_cast<uint64_t>((rank * kNumExperts + expert) * 1000 + idx) * 64 +
                     static_cast<uint64_t>(word);
  const auto when = static_cast<uint64_t>(call.micro_batch * kNumLayers + call.layer);
  return mix(when * 8 + static_cast<uint64_t>(stuff), place);
}

uint64_t fold_weights(const Dims& dims, const std::vector<const uint64_t*>& weights) {
  uint64_t folded = 1;
  for (std::size_t t = 0; t < dims.weight_words.size(); ++t) {
    for (int word = 0; word < dims.weight_words[t]; ++word) {
      folded = folded * 31 + weights[t][word];
    }
  }
  return folded;
}

void expert_forward(const Dims& dims, const uint64_t* row, const uint64_t* side, uint64_t weights,
                    uint64_t* out) {
  for (int word = 0; word < dims.row_words; ++word) {
    out[word] = mix(row[word] + 3 * side[word % dims.side_words], weights);
  }
}

void expert_backward_row(const Dims& dims, const RowInputs& in, uint64_t weights,
                         uint64_t* grad_row, uint64_t* grad_side) {
  for (int word = 0; word < dims.row_words; ++word) {
    grad_row[word] =
        mix(in.grad[word] + 5 * in.row[word] + 7 * in.side[word % dims.side_words], weights + 1);
  }
  for (int word = 0; word < dims.side_words; ++word) {
    grad_side[word] = mix(in.grad[word] * 3 + in.row[word] + 9 * in.side[word], weights + 2);
  }
}

void add_weight_grad(const RowInputs& in, int row_words, int num_words, uint64_t* grad) {
  for (int word = 0; word < num_words; ++word) {
    grad[word] += mix(in.grad[word % row_words] + 11 * in.row[(word + 1) % row_words],
                      static_cast<uint64_t>(word));
  }
}

}  // namespace feplb_test
