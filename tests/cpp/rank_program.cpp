#include "rank_program.h"

#include <algorithm>

#include "check.h"

namespace feplb_test {

using feplb::CallKind;
using feplb::cat;
using feplb::Move;
using feplb::RoutedMove;

void Verdict::expect_right(const std::string& wrong) {
  if (wrong.empty() || (excuses && excuses())) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (wrong_.empty()) wrong_ = wrong;
}

void Verdict::forbid(const std::vector<feplb::CopyOp>& memory) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const feplb::CopyOp& part : memory) forbidden_[part.src] = part.bytes;
}

void Verdict::see_copy(const feplb::CopyOp& copy) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto after = forbidden_.upper_bound(copy.src);
  if (after == forbidden_.begin()) return;
  const auto& [begin, bytes] = *--after;
  if (copy.src < begin + bytes && wrong_.empty()) {
    wrong_ = "a copy reads memory that the caller has let go of";
  }
}

void Verdict::count_moves(int64_t sent, int64_t received) {
  const std::lock_guard<std::mutex> lock(mutex_);
  sent_ += sent;
  received_ += received;
}

std::string Verdict::wrong() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return wrong_;
}

std::string Verdict::moves() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return cat(sent_, " moves sent, ", received_, " received");
}

RankProgram::RankProgram(feplb::Domain& domain, Launch launch, const Scenario& scenario,
                         Config config, Verdict& verdict)
    : domain_(domain),
      launch_(std::move(launch)),
      scenario_(scenario),
      rank_(config.rank),
      streams_(std::move(config.streams)),
      stream_(streams_.front()),
      verdict_(verdict),
      random_(config.seed * 64 + static_cast<uint64_t>(config.rank)) {}

void RankProgram::run() {
  for (const Call& call : scenario_.calls) {
    if (call.kind == CallKind::kForward) {
      run_forward(call);
    } else {
      add_late_grads();
      run_backward(call);
      // Where prepare_weights's backward runs: soon, or just before the next layer's backward.
      // It runs in the stream of its backward call.
      if (streams_.size() > 1 || random_.one_in(2)) add_late_grads();
    }
  }
  add_late_grads();
  domain_.drain();
  domain_.check_failure("ending the test's program");
}

void RankProgram::abandon() {
  while (num_let_go_ < all_tensors_.size()) let_go(all_tensors_[num_let_go_], false);
}

feplb::CallHeader RankProgram::header_of(const Call& call) const {
  feplb::CallHeader header;
  header.kind = call.kind;
  header.layer = call.layer;
  header.micro_batch = call.micro_batch;
  header.counts = scenario_.counts_of(call, rank_);
  if (call.refused_by == rank_) header.error = "this rank was told to refuse";
  header.grad_bits = feplb::kNeedsKnown;
  if (!call.grad_mode) return header;
  header.grad_bits |= feplb::kGradMode | feplb::kNeedsRows | feplb::kNeedsSideFirst;
  for (const int t : dims_of(call.layer).grad_tensors) {
    header.grad_bits |= static_cast<uint32_t>(feplb::kNeedsWeightFirst) << t;
  }
  return header;
}

// Half of the backward calls split what forward moved whole: the owner keeps the first rows.
std::vector<Move> RankProgram::backward_moves(const Call& call) const {
  std::vector<Move> moves = plans_.at({call.micro_batch, call.layer});
  if ((call.micro_batch + call.layer) % 2 == 0) return moves;
  for (Move& move : moves) move.row_start = (move.row_start + move.row_end) / 2;
  return moves;
}

bool RankProgram::begin(CallState& state, std::vector<Move> saved_moves) {
  const Call& call = state.call;
  state.tensors = std::make_shared<CallTensors>(call, rank_, scenario_.counts_of(call, rank_));
  all_tensors_.push_back(state.tensors);
  feplb::CallHeader header = header_of(call);
  header.plan_hash = call.kind == CallKind::kBackward ? feplb::hash_moves(saved_moves) : 0;
  if (streams_.size() > 1) stream_ = streams_[random_.below(streams_.size())];
  domain_.bind_compute(stream_);
  state.seq = domain_.begin(std::move(header), std::move(saved_moves));
  launch([tensors = state.tensors] { tensors->fill(); });
  const feplb::Agreement& agreement = domain_.wait_plan();
  CHECK_EQ(agreement.refusal.empty(), call.refused_by < 0);
  if (!agreement.refusal.empty()) {
    CHECK_EQ(agreement.refused_by, call.refused_by);
    let_go(state.tensors, false);
    return false;
  }
  agree(state, agreement);
  return true;
}

void RankProgram::agree(CallState& state, const feplb::Agreement& agreement) {
  state.route = agreement.route;
  state.view = ArenaView{domain_.arena(), &domain_.layout(), state.call, state.seq};
  state.kept = state.tensors->kept(state.route.sent);
  if (state.call.kind == CallKind::kForward) {
    plans_[{state.call.micro_batch, state.call.layer}] = agreement.plan.moves;
  }
  verdict_.count_moves(static_cast<int64_t>(state.route.sent.size()),
                       static_cast<int64_t>(state.route.received.size()));
}

void RankProgram::run_forward(const Call& call) {
  CallState state;
  state.call = call;
  if (!begin(state, {})) return;
  domain_.post_rows(state.tensors->sources(), state.tensors->first_row());
  run_kept(state, true);
  domain_.await_rows();
  for (const RoutedMove& move : state.route.received) {
    launch([view = state.view, move] { view.run_forward(move); });
  }
  domain_.release_weights();
  domain_.release_rows();
  domain_.post_returns();
  run_kept(state, false);
  bring_home(state);
  let_go(state.tensors, true);
}

void RankProgram::run_backward(const Call& call) {
  CallState state;
  state.call = call;
  begin(state, backward_moves(call));
  domain_.post_rows(state.tensors->sources(), state.tensors->first_row());
  run_kept(state, true);
  domain_.await_rows();
  run_received_backward(state);
  run_kept(state, false);
  bring_home(state);
  let_go(state.tensors, true);
  late_ = std::make_unique<CallState>(state);
}

// Kept A is the first half of what stays, kept B the rest; either may be empty.
void RankProgram::run_kept(const CallState& state, bool is_part_a) {
  const auto middle = state.kept.begin() + static_cast<std::ptrdiff_t>((state.kept.size() + 1) / 2);
  std::vector<RowRange> part(is_part_a ? state.kept.begin() : middle,
                             is_part_a ? middle : state.kept.end());
  if (part.empty()) return;
  launch([tensors = state.tensors, part] {
    for (const RowRange& range : part) tensors->run(range);
  });
}

void RankProgram::run_received_backward(const CallState& state) {
  for (const RoutedMove& move : state.route.received) {
    launch([view = state.view, move] { view.run_backward_rows(move); });
  }
  domain_.release_weights();
  domain_.post_returns();
  if (!state.route.received.empty()) domain_.await_grad_outbox();
  for (const RoutedMove& move : state.route.received) {
    launch([view = state.view, move] { view.run_backward_weights(move); });
  }
  domain_.release_rows();
  const bool received = !state.route.received.empty();
  domain_.post_grads(received ? dims_of(state.call.layer).grad_tensors : std::vector<int>());
}

void RankProgram::bring_home(const CallState& state) {
  domain_.await_returns();
  for (const RoutedMove& move : state.route.sent) {
    launch([tensors = state.tensors, view = state.view, move] { tensors->place(move, view); });
  }
  domain_.release_returns();
  domain_.finish();
}

// run_experts has returned: its results are used, and its inputs are somebody else's memory.
void RankProgram::let_go(const Tensors& tensors, bool check_results) {
  ++num_let_go_;
  launch([this, tensors, check_results] {
    if (check_results) verdict_.expect_right(tensors->wrong_rows());
    verdict_.forbid(tensors->inputs_memory());
    tensors->overwrite();
  });
}

void RankProgram::add_late_grads() {
  if (!late_) return;
  const CallState state = *std::exchange(late_, nullptr);
  std::vector<int> helpers;
  for (const RoutedMove& move : state.route.sent) {
    if (std::find(helpers.begin(), helpers.end(), move.move.dst_rank) == helpers.end()) {
      helpers.push_back(move.move.dst_rank);
    }
  }
  if (!helpers.empty()) {
    domain_.await_grads(state.seq, helpers);
    for (const RoutedMove& move : state.route.sent) {
      launch([tensors = state.tensors, view = state.view, move] {
        tensors->add_late_grads(move, view);
      });
    }
    domain_.release_grads(state.seq);
  }
  launch([this, tensors = state.tensors] { verdict_.expect_right(tensors->wrong_weight_grads()); });
}

}  // namespace feplb_test
