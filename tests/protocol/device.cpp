// The device of model.h: what the driver has accepted runs here, in the order its streams and
// hardware queues allow.
#include "model.h"

namespace protocol {

// --- what is visible where ---

// The flag of job `ref`, by what its sender has pushed. Jobs of one flag run in order, so "at least
// this epoch" is "this job or a later one".
bool Model::is_flag_pushed(const State& state, const JobRef& ref) const {
  const RankState& sender = state.ranks[ref.rank];
  const uint32_t pushed = config().has(Rule::kFlagAfterData) ? sender.ended : sender.begun;
  if ((pushed >> ref.job & 1u) == 0) return false;
  const int next = protocol_.job(ref).next_same_flag;
  return config().has(Rule::kEpochAtLeast) || next == kNone || (pushed >> next & 1u) == 0;
}

bool Model::is_wait_satisfied(const State& state, int rank, const Op& op, bool only_pushed) const {
  for (const JobRef& ref : op.jobs) {
    const bool is_lifted = (state.ranks[rank].lifted_flags >> protocol_.job(ref).flag & 1u) != 0 &&
                           config().has(Rule::kEpochAtLeast);
    if (!is_flag_pushed(state, ref) && (only_pushed || !is_lifted)) return false;
  }
  return true;
}

// The EP backend's combine spins until every rank's stream has reached it.
bool Model::have_all_reached(const State& state, int op) const {
  for (int rank = 0; rank < config().ranks; ++rank) {
    const RankState& self = state.ranks[rank];
    if (self.num_executed < op || reached(self, rank).num_ops <= op) return false;
  }
  return true;
}

bool Model::can_execute(const State& state, int rank, int index, bool only_pushed) const {
  const Op& op = program(rank).ops[index];
  if (!config().has(Rule::kNoSpinningKernel)) {
    const int num_ops = reached(state.ranks[rank], rank).num_ops;
    for (int later = index; later < num_ops; ++later) {
      const Op& spinning = program(rank).ops[later];
      if (spinning.kind == OpKind::kWait &&
          !is_wait_satisfied(state, rank, spinning, only_pushed)) {
        return false;
      }
    }
  }
  if (op.kind == OpKind::kWait) return is_wait_satisfied(state, rank, op, only_pushed);
  return op.kind != OpKind::kCollective || have_all_reached(state, index);
}

bool Model::can_begin(const State& state, int rank, const Job& job) const {
  const bool is_source_ready = state.ranks[rank].num_executed > job.source_op;
  if (config().has(Rule::kCopyAfterEvent) && !is_source_ready) return false;
  return config().has(Rule::kWithholdOnHost) || are_released(state, job);
}

// Whether the entry at `place` has nothing left before it, in its hardware queue.
bool Model::is_at_head(const RankState& self, int rank, int place) const {
  if (place == 0) return true;
  if (config().single_queue) return false;
  return stream_of(rank, self.queue[place - 1]) != stream_of(rank, self.queue[place]);
}

// Compute, rows, weights, returns and grads (one stream), releases if they go through the mover.
int Model::stream_of(int rank, uint8_t entry) const {
  if ((entry & kJobEntry) == 0) return 0;
  switch (program(rank).jobs[entry & kIndexMask].kind) {
    case Kind::kRows:
      return 1;
    case Kind::kWeights:
      return 2;
    case Kind::kRelease:
      return 4;
    default:
      return 3;
  }
}

bool Model::device_steps(const State& state, int rank, std::vector<Step>* steps) const {
  const RankState& self = state.ranks[rank];
  if (is_out_of_sight(state, rank)) return false;
  const size_t before = steps->size();
  for (int place = 0; place < self.queue_length; ++place) {
    if (!is_at_head(self, rank, place)) continue;
    const uint8_t entry = self.queue[place];
    const int index = entry & kIndexMask;
    const Step step{Act::kExecute, static_cast<uint8_t>(rank), static_cast<uint8_t>(place)};
    if ((entry & kJobEntry) == 0) {
      if (can_execute(state, rank, index, false)) steps->push_back(step);
    } else if ((self.begun >> index & 1u) != 0) {
      steps->push_back({Act::kEnd, step.rank, step.arg});
    } else if (can_begin(state, rank, program(rank).jobs[index])) {
      steps->push_back({Act::kBegin, step.rank, step.arg});
    }
  }
  return steps->size() > before;
}

// --- taking a step ---

Violation Model::read(int rank, const Op& op, State* state) const {
  RankState& self = state->ranks[rank];
  for (const JobRef& ref : op.jobs) {
    const RankState& sender = state->ranks[ref.rank];
    if ((sender.ended >> ref.job & 1u) != 0) {
      self.is_tainted |= (sender.tainted_jobs >> ref.job & 1u) != 0;
    } else if (self.has_lifted) {
      self.is_tainted = true;
    } else {
      return Violation::kReadTooEarly;
    }
  }
  return Violation::kNothing;
}

Violation Model::execute_op(int rank, const Op& op, State* state) const {
  const RankState& self = state->ranks[rank];
  if (op.kind == OpKind::kRead) return read(rank, op, state);
  if (op.kind != OpKind::kOptimizer || self.is_dead) return Violation::kNothing;
  if (self.is_tainted) return Violation::kPoisonedStep;
  const std::vector<Job>& jobs = program(rank).jobs;
  for (size_t index = 0; index < jobs.size(); ++index) {
    if (jobs[index].kind == Kind::kWeights && (self.ended >> index & 1u) == 0) {
      return Violation::kSourceOverwritten;
    }
  }
  return Violation::kNothing;
}

// Runs the op at `place`, and those glued to it.
Finding Model::execute(int rank, int place, State* state) const {
  RankState& self = state->ranks[rank];
  const std::vector<Op>& ops = program(rank).ops;
  int index = self.queue[place];
  Finding finding;
  do {
    if (finding.is_ok()) {
      finding = {execute_op(rank, ops[index], state), rank, static_cast<uint8_t>(index)};
    }
    ++self.num_executed;
    remove(place, &self);
    ++index;
  } while (index < reached(self, rank).num_ops && ops[index].is_glued);
  return finding;
}

void Model::remove(int place, RankState* self) {
  for (int next = place + 1; next < self->queue_length; ++next) {
    self->queue[next - 1] = self->queue[next];
  }
  --self->queue_length;
}

Finding Model::begin_copy(int rank, int place, State* state) const {
  RankState& self = state->ranks[rank];
  const int index = self.queue[place] & kIndexMask;
  const Job& job = program(rank).jobs[index];
  if (self.num_executed <= job.source_op) {
    return {Violation::kSourceNotReady, rank, self.queue[place]};
  }
  if (job.previous.rank != kNone && !state->ranks[job.dst].is_dead) {
    const int reader = protocol_.job(job.previous).last_reader_op;
    if (state->ranks[job.dst].num_executed <= reader) {
      return {Violation::kOverwritten, rank, self.queue[place]};
    }
  }
  self.begun |= 1u << index;
  self.queue[place] |= kBegunEntry;
  if (self.is_tainted) self.tainted_jobs |= 1u << index;
  return {};
}

// A push overwrites whatever its flag holds, a lifted epoch too.
void Model::end_copy(int rank, int place, State* state) const {
  RankState& self = state->ranks[rank];
  const int index = self.queue[place] & kIndexMask;
  const Job& job = program(rank).jobs[index];
  self.ended |= 1u << index;
  remove(place, &self);
  if (job.flag == kNone) return;
  RankState& receiver = state->ranks[job.dst];
  receiver.lifted_flags = static_cast<uint16_t>(receiver.lifted_flags & ~(1u << job.flag));
}

// --- reductions (model.h) ---

// Reduction 6.
bool Model::is_out_of_sight(const State& state, int rank) const {
  if (!state.ranks[rank].is_dead || !lifts_at_once_) return false;
  for (int other = 0; other < config().ranks; ++other) {
    if (!state.ranks[other].is_marked && !has_ended(state, other)) return false;
  }
  return true;
}

// Takes one step of reductions 1 and 4 on this rank, if there is one.
bool Model::settle_rank(int rank, State* state, Finding* finding) const {
  RankState& self = state->ranks[rank];
  if (is_out_of_sight(*state, rank)) return false;
  if (self.mode == Mode::kBlocked && self.queue_length == 0) {
    self.mode = Mode::kRunning;
    return true;
  }
  if (self.is_marked && !self.is_dead && lifts_at_once_ && self.lifted_flags != all_flags()) {
    lift(rank, state);
    return true;
  }
  for (int place = 0; place < self.queue_length; ++place) {
    if (!is_at_head(self, rank, place)) continue;
    const uint8_t entry = self.queue[place];
    const int index = entry & kIndexMask;
    if ((entry & kJobEntry) == 0) {
      const OpKind kind = program(rank).ops[index].kind;
      if (kind != OpKind::kEvent && kind != OpKind::kWait) continue;
      if (!can_execute(*state, rank, index, !lifts_at_once_ || !self.is_marked)) continue;
      *finding = execute(rank, place, state);
      return true;
    }
    if ((self.begun >> index & 1u) == 0 && can_begin(*state, rank, program(rank).jobs[index])) {
      *finding = begin_copy(rank, place, state);
      return true;
    }
  }
  return false;
}

Finding Model::settle(State* state) const {
  Finding finding;
  for (int rank = 0; rank < config().ranks && finding.is_ok(); ++rank) {
    if (settle_rank(rank, state, &finding)) rank = -1;
  }
  return finding;
}

}  // namespace protocol
