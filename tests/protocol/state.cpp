// The encoding of a state of model.h, and the words of a trace.
//
// Encoding: 1 byte fault, then per rank: pc, bits, lifted flags, 4 bytes submitted, 4 bytes tainted
// jobs if the bits say so, queue length, queue. The rest of a RankState follows from these.
#include <cstring>

#include "model.h"

namespace protocol {
namespace {

enum Bit : uint8_t {  // above the two bits of Mode
  kDeadBit = 1 << 2,
  kMarkedBit = 1 << 3,
  kHasLiftedBit = 1 << 4,
  kHasStoppedBit = 1 << 5,
  kTaintedBit = 1 << 6,
  kTaintedJobsBit = 1 << 7,
};

uint8_t bits_of(const RankState& self) {
  return static_cast<uint8_t>(
      static_cast<uint8_t>(self.mode) | (self.is_dead ? kDeadBit : 0) |
      (self.is_marked ? kMarkedBit : 0) | (self.has_lifted ? kHasLiftedBit : 0) |
      (self.has_stopped ? kHasStoppedBit : 0) | (self.is_tainted ? kTaintedBit : 0) |
      (self.tainted_jobs != 0 ? kTaintedJobsBit : 0));
}

void append_u32(uint32_t value, std::string* bytes) {
  char raw[sizeof(value)];
  std::memcpy(raw, &value, sizeof(value));
  bytes->append(raw, sizeof(value));
}

uint32_t take_u32(const char** cursor) {
  uint32_t value = 0;
  std::memcpy(&value, *cursor, sizeof(value));
  *cursor += sizeof(value);
  return value;
}

void take_bits(uint8_t bits, RankState* self) {
  self->mode = static_cast<Mode>(bits & 3);
  self->is_dead = (bits & kDeadBit) != 0;
  self->is_marked = (bits & kMarkedBit) != 0;
  self->has_lifted = (bits & kHasLiftedBit) != 0;
  self->has_stopped = (bits & kHasStoppedBit) != 0;
  self->is_tainted = (bits & kTaintedBit) != 0;
}

std::string fault_text(uint8_t fault) {
  if (fault == kNoFault) return "";
  if (fault == kDeadlineFault) return "its deadline expires: ";
  return "rank " + std::to_string(fault - kDeathFault) + " has died: ";
}

}  // namespace

void Model::serialize(const State& state, int rotation, std::string* bytes) const {
  bytes->assign(1, static_cast<char>(state.has_fault));
  for (int place = 0; place < config().ranks; ++place) {
    const RankState& self = state.ranks[(place + rotation) % config().ranks];
    bytes->push_back(static_cast<char>(self.pc));
    bytes->push_back(static_cast<char>(bits_of(self)));
    bytes->push_back(static_cast<char>(self.lifted_flags & 0xff));
    bytes->push_back(static_cast<char>(self.lifted_flags >> 8));
    append_u32(self.submitted, bytes);
    if (self.tainted_jobs != 0) append_u32(self.tainted_jobs, bytes);
    bytes->push_back(static_cast<char>(self.queue_length));
    bytes->append(reinterpret_cast<const char*>(self.queue.data()), self.queue_length);
  }
}

State Model::deserialize(const char* bytes) const {
  State state;
  state.has_fault = *bytes++ != 0;
  for (int rank = 0; rank < config().ranks; ++rank) {
    RankState& self = state.ranks[rank];
    self.pc = static_cast<uint8_t>(*bytes++);
    const uint8_t bits = static_cast<uint8_t>(*bytes++);
    take_bits(bits, &self);
    self.lifted_flags = static_cast<uint8_t>(*bytes++);
    self.lifted_flags |= static_cast<uint16_t>(static_cast<uint8_t>(*bytes++) << 8);
    self.submitted = take_u32(&bytes);
    if ((bits & kTaintedJobsBit) != 0) self.tainted_jobs = take_u32(&bytes);
    self.queue_length = static_cast<uint8_t>(*bytes++);
    std::memcpy(self.queue.data(), bytes, self.queue_length);
    bytes += self.queue_length;
    self.ended = self.submitted;
    self.begun = self.submitted;
    int num_pending = 0;
    for (int place = 0; place < self.queue_length; ++place) {
      const uint8_t entry = self.queue[place];
      const uint32_t job = 1u << (entry & kIndexMask & 31);
      if ((entry & kJobEntry) == 0) {
        ++num_pending;
        continue;
      }
      self.ended &= ~job;
      if ((entry & kBegunEntry) == 0) self.begun &= ~job;
    }
    self.num_executed = static_cast<uint8_t>(reached(self, rank).num_ops - num_pending);
  }
  return state;
}

// --- words ---

const char* violation_text(Violation violation) {
  switch (violation) {
    case Violation::kDeadlock:
      return "deadlock: nothing must happen any more, and a living rank has not ended";
    case Violation::kOverwritten:
      return "memory overwritten before it is read";
    case Violation::kReadTooEarly:
      return "memory read before its data has arrived";
    case Violation::kPoisonedStep:
      return "optimizer step on poisoned data";
    case Violation::kFreedMemory:
      return "copy submitted after run_experts left its memory to be freed";
    case Violation::kSourceNotReady:
      return "copy begins before its source is computed";
    case Violation::kSourceOverwritten:
      return "optimizer step while a copy still reads the weights";
    case Violation::kNothing:
      break;
  }
  return "none";
}

std::string Model::job_text(int rank, int job) const {
  const Job& self = program(rank).jobs[job];
  std::string text = std::string(kind_name(self.kind)) + "(" + std::to_string(self.seq) + ")";
  return self.dst == kNone ? text : text + " to rank " + std::to_string(self.dst);
}

std::string Model::entry_text(int rank, uint8_t entry) const {
  const int index = entry & kIndexMask;
  if ((entry & kJobEntry) == 0) return program(rank).ops[index].text;
  return "copy " + job_text(rank, index) + ((entry & kBegunEntry) != 0 ? " (begun)" : "");
}

std::string Model::describe(const Finding& finding) const {
  const std::string text = violation_text(finding.violation);
  if (finding.violation == Violation::kDeadlock) return text;
  return text + ": rank " + std::to_string(finding.rank) + ", " +
         entry_text(finding.rank, finding.entry);
}

std::string Model::describe(const State& state, const Step& step) const {
  const RankState& self = state.ranks[step.rank];
  const std::string who = "rank " + std::to_string(step.rank) + " ";
  switch (step.act) {
    case Act::kPython:
      return who + "python:   " + program(step.rank).instrs[self.pc].text;
    case Act::kRaise:
      return who + "python:   the host wait ends with the error; close() waits for the streams";
    case Act::kBlock:
      return who + "python:   a driver call takes the lock until the device has drained";
    case Act::kUnblock:
      return who + "python:   the driver call returns";
    case Act::kSubmit:
      return who + "mover:    submits " + job_text(step.rank, step.arg);
    case Act::kExecute:
      return who + "device:   runs " + entry_text(step.rank, self.queue[step.arg]);
    case Act::kBegin:
      return who + "device:   begins " + entry_text(step.rank, self.queue[step.arg]);
    case Act::kEnd:
      return who + "device:   ends " + entry_text(step.rank, self.queue[step.arg]) + ", flag";
    case Act::kMark:
      return who + "watchdog: " + fault_text(step.arg) + "marks the call poisoned";
    case Act::kLift:
      return who + "watchdog: " + fault_text(step.arg) + "lifts its flags";
    case Act::kDie:
      return who + "dies";
  }
  return who;
}

std::string Model::describe(const State& state) const {
  std::string text;
  for (int rank = 0; rank < config().ranks; ++rank) {
    const RankState& self = state.ranks[rank];
    text += "  rank " + std::to_string(rank) + (self.is_dead ? " (dead)" : "") +
            (self.is_marked ? " (marked)" : "") + (self.is_tainted ? " (read poison)" : "") + ": ";
    if (self.mode == Mode::kBlocked) text += "in a driver call; ";
    if (self.mode == Mode::kClosing) text += "closing; ";
    const std::vector<Instr>& instrs = program(rank).instrs;
    text += "next: " + (self.pc < instrs.size() ? instrs[self.pc].text : "-") + "; device queue:";
    for (int place = 0; place < self.queue_length; ++place) {
      text += " [" + entry_text(rank, self.queue[place]) + "]";
    }
    text += "; withheld or not yet submitted:";
    const uint32_t waiting = reached(self, rank).posted & ~self.submitted;
    for (size_t job = 0; job < program(rank).jobs.size(); ++job) {
      if ((waiting >> job & 1u) != 0) text += " [" + job_text(rank, static_cast<int>(job)) + "]";
    }
    text += "\n";
  }
  return text;
}

}  // namespace protocol
