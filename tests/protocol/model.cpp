// The host side of model.h: Python thread, mover, watchdog, and what each of them sees. The device
// is in device.cpp, the encoding and the words of a trace in state.cpp.
#include "model.h"

namespace protocol {
namespace {

// Host waits, which end with the error once the call is marked. check()'s drain does not: only an
// empty stream says that nothing enqueued will still run on poison.
bool is_host_wait(Guard guard) {
  return guard == Guard::kHeaders || guard == Guard::kSubmitted || guard == Guard::kAllChecked;
}

}  // namespace

Model::Model(const Config& config)
    : protocol_(build_protocol(config)),
      lifts_at_once_(!config.plain && config.has(Rule::kLift) &&
                     config.has(Rule::kMarkBeforeLift) && config.has(Rule::kLiftRepeated) &&
                     config.has(Rule::kLiftUntilCallEnds) && config.has(Rule::kLiftByPlainStore) &&
                     config.has(Rule::kEpochAtLeast)) {}

uint16_t Model::all_flags() const {
  return static_cast<uint16_t>((1u << (kNumTravelling * (config().ranks - 1))) - 1);
}

State Model::initial() const {
  State state;
  if (!config().plain) settle(&state);
  return state;
}

// The totals that the Python thread has reached before instruction `index`.
const Instr& Model::reached(const RankState& rank, int index) const {
  static const Instr kStart;
  return rank.pc == 0 ? kStart : program(index).instrs[rank.pc - 1];
}

// --- what is visible where ---

// The dead have nothing left that must happen.
bool Model::has_ended(const State& state, int rank) const {
  const RankState& self = state.ranks[rank];
  if (self.is_dead) return true;
  const bool is_all_submitted = (reached(self, rank).posted & ~self.submitted) == 0;
  if (self.queue_length != 0) return false;
  if (self.mode == Mode::kClosing)
    return is_all_submitted || config().has(Rule::kMoverBlocksOnNone);
  return self.pc == program(rank).instrs.size() && is_all_submitted;
}

bool Model::is_released(const State& state, const JobRef& ref) const {
  const Job& job = protocol_.job(ref);
  const RankState& reader = state.ranks[job.dst];
  if (job.release_job != kNone) return (reader.ended >> job.release_job & 1u) != 0;
  return job.release_op != kNone && reader.num_executed > job.release_op;
}

bool Model::are_released(const State& state, const Job& job) const {
  for (const JobRef& ref : job.awaits) {
    if (!is_released(state, ref)) return false;
  }
  return true;
}

// The others' death and mark are seen by everyone: by pidfd, and as the error bit on the board.
bool Model::has_trouble(const State& state, int rank) const {
  for (int other = 0; other < config().ranks; ++other) {
    if (other == rank) continue;
    if (state.ranks[other].is_dead || state.ranks[other].is_marked) return true;
  }
  return false;
}

bool Model::is_guard_open(const State& state, int rank, const Instr& instr) const {
  const RankState& self = state.ranks[rank];
  switch (instr.guard) {
    case Guard::kNothing:
      return true;
    case Guard::kSubmitted:
      return (instr.submitted & ~self.submitted) == 0;
    case Guard::kDrained:
      return self.num_executed == reached(self, rank).num_ops;
    case Guard::kHeaders:
      for (int other = 0; other < config().ranks; ++other) {
        if (reached(state.ranks[other], other).header < instr.seq) return false;
      }
      return true;
    case Guard::kAllChecked:
      for (int other = 0; other < config().ranks; ++other) {
        if (!reached(state.ranks[other], other).has_checked) return false;
      }
      return true;
  }
  return false;
}

// --- possible steps; each function says whether one of them must happen ---

bool Model::python_steps(const State& state, int rank, std::vector<Step>* steps) const {
  const RankState& self = state.ranks[rank];
  const uint8_t index = static_cast<uint8_t>(rank);
  if (self.mode == Mode::kBlocked) {
    if (self.queue_length != 0) return false;
    steps->push_back({Act::kUnblock, index, 0});
    return true;
  }
  if (self.mode == Mode::kClosing || self.pc == program(rank).instrs.size()) return false;
  if (config().blocking && self.queue_length != 0) steps->push_back({Act::kBlock, index, 0});
  const Instr& instr = program(rank).instrs[self.pc];
  bool must = false;
  if (is_guard_open(state, rank, instr)) {
    steps->push_back({Act::kPython, index, 0});
    must = true;
  }
  if (self.is_marked && is_host_wait(instr.guard) && config().has(Rule::kHostWaitsEnd)) {
    steps->push_back({Act::kRaise, index, 0});
    must = true;
  }
  return must;
}

// Jobs of one kind are submitted in order, as one list per stream gives it. Once the call is marked
// the mover may stop, and an error that has left Python has stopped it.
bool Model::mover_steps(const State& state, int rank, std::vector<Step>* steps) const {
  const RankState& self = state.ranks[rank];
  const bool is_polling = config().has(Rule::kMoverBlocksOnNone);
  if (self.mode == Mode::kBlocked) return false;
  if (self.mode == Mode::kClosing && is_polling && config().has(Rule::kErrorStopsMover))
    return false;
  const uint32_t waiting = reached(self, rank).posted & ~self.submitted;
  const std::vector<Job>& jobs = program(rank).jobs;
  uint32_t seen_kinds = 0;
  bool must = false;
  for (size_t index = 0; index < jobs.size(); ++index) {
    if ((waiting >> index & 1u) == 0) continue;
    const uint32_t kind = 1u << static_cast<int>(jobs[index].kind);
    const bool is_free = !config().has(Rule::kWithholdOnHost) || are_released(state, jobs[index]);
    if ((seen_kinds & kind) == 0 && is_free) {
      steps->push_back({Act::kSubmit, static_cast<uint8_t>(rank), static_cast<uint8_t>(index)});
      must = !self.is_marked || !is_polling;
    }
    seen_kinds |= kind;
    if (!is_polling) break;
  }
  return must;
}

// What the watchdog does first (mark, unless the rule is taken out) may be its answer to the fault.
bool Model::watchdog_steps(const State& state, int rank, std::vector<Step>* steps) const {
  const RankState& self = state.ranks[rank];
  if (has_ended(state, rank)) return false;
  const bool is_mark_first = config().has(Rule::kMarkBeforeLift);
  const bool has_seen = has_trouble(state, rank);
  const bool is_locked_out = self.mode == Mode::kBlocked && !config().has(Rule::kLiftByPlainStore);
  const uint8_t index = static_cast<uint8_t>(rank);
  const size_t before = steps->size();
  if (!self.is_marked && (is_mark_first ? has_seen : self.has_lifted)) {
    steps->push_back({Act::kMark, index, kNoFault});
  }
  const bool may_lift = is_mark_first ? self.is_marked : has_seen || self.has_lifted;
  const bool is_over = self.has_stopped || (self.has_lifted && !config().has(Rule::kLiftRepeated));
  if (may_lift && self.lifted_flags != all_flags() && !is_over && !is_locked_out &&
      config().has(Rule::kLift)) {
    steps->push_back({Act::kLift, index, kNoFault});
  }
  const bool must = steps->size() > before;
  if (state.has_fault || (is_locked_out && !is_mark_first)) return must;
  const Act first = is_mark_first ? Act::kMark : Act::kLift;
  if (config().deadline) steps->push_back({first, index, kDeadlineFault});
  for (int other = 0; other < config().ranks; ++other) {
    if (!config().death || config().plain || other == rank || has_ended(state, other)) continue;
    steps->push_back({first, index, static_cast<uint8_t>(kDeathFault + other)});
  }
  return must;
}

void Model::steps(const State& state, std::vector<Step>* steps, bool* is_stuck) const {
  steps->clear();
  bool must = false;
  bool is_waiting = false;
  for (int rank = 0; rank < config().ranks; ++rank) {
    const bool must_run = device_steps(state, rank, steps);
    if (state.ranks[rank].is_dead) continue;
    must |= must_run;
    must |= python_steps(state, rank, steps);
    must |= mover_steps(state, rank, steps);
    must |= watchdog_steps(state, rank, steps);
    const bool is_alive = !has_ended(state, rank);
    is_waiting |= is_alive;
    if (is_alive && config().death && config().plain && !state.has_fault) {
      steps->push_back({Act::kDie, static_cast<uint8_t>(rank), 0});
    }
  }
  *is_stuck = is_waiting && !must;
}

// --- taking a step ---

// Queue entries of separate hardware queues are kept stream by stream, so that submissions whose
// order means nothing do not make two states.
void Model::enqueue(uint8_t entry, RankState* self, int rank) const {
  int place = self->queue_length;
  if (!config().single_queue) {
    while (place > 0 && stream_of(rank, self->queue[place - 1]) > stream_of(rank, entry)) {
      self->queue[place] = self->queue[place - 1];
      --place;
    }
  }
  self->queue[place] = entry;
  ++self->queue_length;
}

void Model::run_instr(int rank, State* state) const {
  RankState& self = state->ranks[rank];
  const Instr& instr = program(rank).instrs[self.pc];
  const int num_before = reached(self, rank).num_ops;
  if (instr.has_checked && !reached(self, rank).has_checked && self.is_marked) {
    self.mode = Mode::kClosing;
    return;
  }
  for (int op = num_before; op < instr.num_ops; ++op)
    enqueue(static_cast<uint8_t>(op), &self, rank);
  ++self.pc;
}

Finding Model::submit(int rank, int job, State* state) const {
  RankState& self = state->ranks[rank];
  const bool has_left = self.mode == Mode::kClosing && !config().has(Rule::kErrorStopsMover);
  const Job& submitted = program(rank).jobs[job];
  if (submitted.kind != Kind::kRelease &&
      (has_left || reached(self, rank).returned >= submitted.seq)) {
    return {Violation::kFreedMemory, rank, static_cast<uint8_t>(kJobEntry | job)};
  }
  self.submitted |= 1u << job;
  enqueue(static_cast<uint8_t>(kJobEntry | job), &self, rank);
  return {};
}

void Model::suffer(uint8_t fault, State* state) {
  if (fault == kNoFault) return;
  state->has_fault = true;
  if (fault < kDeathFault) return;
  state->ranks[fault - kDeathFault].is_dead = true;
  state->ranks[fault - kDeathFault].mode = Mode::kRunning;
}

void Model::lift(int rank, State* state) const {
  state->ranks[rank].lifted_flags = all_flags();
  state->ranks[rank].has_lifted = true;
}

Finding Model::apply(const Step& step, State* state) const {
  RankState& self = state->ranks[step.rank];
  Finding finding;
  switch (step.act) {
    case Act::kPython:
      run_instr(step.rank, state);
      break;
    case Act::kRaise:
      self.mode = Mode::kClosing;
      break;
    case Act::kBlock:
      self.mode = Mode::kBlocked;
      break;
    case Act::kUnblock:
      self.mode = Mode::kRunning;
      break;
    case Act::kSubmit:
      finding = submit(step.rank, step.arg, state);
      break;
    case Act::kExecute:
      finding = execute(step.rank, step.arg, state);
      break;
    case Act::kBegin:
      finding = begin_copy(step.rank, step.arg, state);
      break;
    case Act::kEnd:
      end_copy(step.rank, step.arg, state);
      break;
    case Act::kMark:
      suffer(step.arg, state);
      self.is_marked = true;
      break;
    case Act::kLift:
      suffer(step.arg, state);
      lift(step.rank, state);
      break;
    case Act::kDie:
      suffer(static_cast<uint8_t>(kDeathFault + step.rank), state);
      break;
  }
  if (finding.is_ok() && !config().plain) finding = settle(state);
  if (self.has_lifted && self.queue_length == 0 && !config().has(Rule::kLiftUntilCallEnds)) {
    self.has_stopped = true;
  }
  return finding;
}

}  // namespace protocol
