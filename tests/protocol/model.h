// The states of the protocol and the steps between them: 2 to 4 ranks, each with a Python thread, a
// mover, a device and a watchdog, running the lists of program.h. explore.h visits every state.
//
// A copy is two steps (begin; end and flag), so that overlap is seen; a reader is one. Streams are
// FIFO; with separate hardware queues the head of each may run, with a single one only the oldest
// submission of the rank. (Hardware that overlaps what it has dispatched from one queue lies
// between the two: it can overwrite no more than separate queues can, and what it has dispatched
// always ends, so it gets stuck no sooner than one strict queue.) One training step is enough:
// after a check() that passed, all streams are empty and all is released, as at the start. No state
// comes twice in a run (a flag is lifted again only after one of finitely many pushes), so a run
// that never gets stuck ends.
//
// Reductions. Config::plain leaves all of them out; a test compares the verdicts.
//   1. settle() takes some steps as soon as they are possible. Each stays possible, takes nothing
//      from another actor, and can only bring a violation closer: an event at the head fires; a
//      wait passes that a push has satisfied (pushes only raise a flag); a copy begins (from then
//      on its area must have been read and may not be); Python comes back from a driver call once
//      its device has drained.
//   2. A release runs with its reader, and what Python enqueues between two points where it may
//      wait or block is enqueued in one step: both may still run later, which is no different from
//      being released or enqueued later.
//   3. The ranks of a ring run the same program, so states that differ by a rotation are one
//      (explore.cpp).
//   4. While every rule of the watchdog holds, it lifts as soon as it has marked and again as soon
//      as a push lowers a flag, and waits pass at once: it needs no lock, and a flag not yet lifted
//      is no different from a stream that has not looked yet.
//   5. A rank dies in the step in which the first watchdog notices: until then it cannot be told
//      from one that is slow. Its device runs on, or stops anywhere.
//   6. With 4, its device stops when every living rank is marked: its pushes change no wait any
//      more, only whether poison was read, and never arriving is the worse case.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "program.h"

namespace protocol {

constexpr int kMaxQueue = 96;

// An entry of a rank's queue: a compute op's index, or a job's with kJobEntry.
constexpr uint8_t kJobEntry = 0x80;
constexpr uint8_t kBegunEntry = 0x40;
constexpr uint8_t kIndexMask = 0x3f;

enum class Mode : uint8_t {
  kRunning,
  kBlocked,  // Python sits in a driver call that holds the lock until the device has drained
  kClosing,  // an error was raised; close() waits for the streams
};

struct RankState {
  uint8_t pc = 0;  // next instruction of the Python thread
  Mode mode = Mode::kRunning;
  bool is_dead = false;
  bool is_marked = false;     // the watchdog marked the call poisoned and stored the error
  bool has_lifted = false;    // the watchdog has lifted flags at least once
  bool has_stopped = false;   // Rule::kLiftUntilCallEnds taken out: it lifts no more
  bool is_tainted = false;    // the compute stream has read what had not arrived
  uint16_t lifted_flags = 0;  // inbound flags that read epoch + 2^30
  uint32_t submitted = 0;     // own jobs the driver has accepted
  uint32_t begun = 0;         // own jobs whose copy has begun
  uint32_t ended = 0;         // own jobs whose copy has ended and whose flag is written
  uint32_t tainted_jobs = 0;  // own jobs that carried tainted data
  uint8_t num_executed = 0;   // compute ops executed
  uint8_t queue_length = 0;   // accepted by the driver and not done: ops and jobs
  std::array<uint8_t, kMaxQueue> queue;  // submission order; separate queues: stream by stream
};

struct State {
  std::array<RankState, kMaxRanks> ranks;
  bool has_fault = false;  // the one death or the one expired deadline has happened
};

enum class Act : uint8_t {
  kPython,   // the next instruction
  kRaise,    // a host wait ends with the error
  kBlock,    // Python enters a driver call that holds the lock until the device has drained
  kUnblock,  // and comes back
  kSubmit,   // the mover submits job `arg`
  kExecute,  // the compute op at place `arg` of the queue runs
  kBegin,    // the copy at place `arg` of the queue begins
  kEnd,      // it ends and writes its flag
  kMark,     // the watchdog marks the call poisoned and stores the error
  kLift,     // the watchdog lifts all inbound flags
  kDie,
};

// The fault a watchdog reacts to first (`arg` of kMark, kLift).
constexpr uint8_t kNoFault = 0;        // none, or it has been counted already
constexpr uint8_t kDeadlineFault = 1;  // its deadline expired
constexpr uint8_t kDeathFault = 2;     // + rank that died

struct Step {
  Act act = Act::kPython;
  uint8_t rank = 0;
  uint8_t arg = 0;
};

enum class Violation : uint8_t {
  kNothing,
  kDeadlock,
  kOverwritten,       // a copy begins in an area whose content has not been read
  kReadTooEarly,      // a reader runs before its data has arrived, and no flag was lifted
  kPoisonedStep,      // an optimizer step on data computed behind a lifted wait
  kFreedMemory,       // a job is submitted after run_experts has left its memory to be freed
  kSourceNotReady,    // a copy begins before its source is computed
  kSourceOverwritten  // an optimizer step while a copy still reads the weights
};
const char* violation_text(Violation violation);

struct Finding {
  Violation violation = Violation::kNothing;
  int rank = 0;       // whose device or mover met it
  uint8_t entry = 0;  // at this queue entry

  bool is_ok() const { return violation == Violation::kNothing; }
};

class Model {
 public:
  explicit Model(const Config& config);

  const Config& config() const { return protocol_.config; }
  State initial() const;

  // All steps possible in `state`. is_stuck: a living rank has not ended its program, and none of
  // them must happen (a driver call need not block, a mark ends the mover's work, the dead are
  // dead).
  void steps(const State& state, std::vector<Step>* steps, bool* is_stuck) const;

  Finding apply(const Step& step, State* state) const;

  std::string describe(const Finding& finding) const;
  std::string describe(const State& state, const Step& step) const;
  std::string describe(const State& state) const;

  void serialize(const State& state, int rotation, std::string* bytes) const;
  State deserialize(const char* bytes) const;

 private:
  const Program& program(int rank) const { return protocol_.ranks[rank]; }
  const Instr& reached(const RankState& rank, int index) const;

  // --- model.cpp: Python thread, mover, watchdog ---
  bool has_ended(const State& state, int rank) const;
  bool is_released(const State& state, const JobRef& ref) const;
  bool are_released(const State& state, const Job& job) const;
  bool has_trouble(const State& state, int rank) const;
  bool is_guard_open(const State& state, int rank, const Instr& instr) const;
  bool python_steps(const State& state, int rank, std::vector<Step>* steps) const;
  bool mover_steps(const State& state, int rank, std::vector<Step>* steps) const;
  bool watchdog_steps(const State& state, int rank, std::vector<Step>* steps) const;
  static void suffer(uint8_t fault, State* state);
  void lift(int rank, State* state) const;
  uint16_t all_flags() const;
  void enqueue(uint8_t entry, RankState* self, int rank) const;
  void run_instr(int rank, State* state) const;
  Finding submit(int rank, int job, State* state) const;

  // --- device.cpp ---
  bool is_flag_pushed(const State& state, const JobRef& ref) const;
  bool is_wait_satisfied(const State& state, int rank, const Op& op, bool only_pushed) const;
  bool have_all_reached(const State& state, int op) const;
  bool can_execute(const State& state, int rank, int index, bool only_pushed) const;
  bool can_begin(const State& state, int rank, const Job& job) const;
  bool is_at_head(const RankState& self, int rank, int place) const;
  int stream_of(int rank, uint8_t entry) const;
  bool device_steps(const State& state, int rank, std::vector<Step>* steps) const;
  Violation read(int rank, const Op& op, State* state) const;
  Violation execute_op(int rank, const Op& op, State* state) const;
  Finding execute(int rank, int place, State* state) const;
  static void remove(int place, RankState* self);
  Finding begin_copy(int rank, int place, State* state) const;
  void end_copy(int rank, int place, State* state) const;
  bool is_out_of_sight(const State& state, int rank) const;
  bool settle_rank(int rank, State* state, Finding* finding) const;
  Finding settle(State* state) const;

  // --- state.cpp ---
  std::string job_text(int rank, int job) const;
  std::string entry_text(int rank, uint8_t entry) const;

  Protocol protocol_;
  bool lifts_at_once_;
};

}  // namespace protocol
