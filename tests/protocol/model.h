// The states of the protocol and the steps between them: 2 or 3 ranks, each with a Python thread, a
// mover, a device and a watchdog, running the lists of program.h. explore.h visits every state.
//
// A copy is two steps (begin, end + flag), so that overlap is seen; a reader is one. Device streams
// are FIFO; with separate hardware queues the head of each stream may run, with a single one only
// the oldest submission of the rank. (Hardware that dispatches from one queue but overlaps what it
// dispatched lies between the two: it can overwrite no more than separate queues can, and what
// it dispatched always ends, so it gets stuck no more than one strict queue does.)
//
// Reductions, each left out by Config::plain, which a test compares with the reduced model:
//   1. settle() takes some steps at once, in no order of its own. Each of them stays possible once
//      it is, takes no possibility from any other actor, and can only bring a violation closer:
//      an event at the head fires (it only lets copies begin); a wait passes that a pushed flag
//      satisfies (such a flag never falls below again; one that the watchdog lifted may, and there
//      passing is a step of its own); a copy begins (from then on its area may not be read or still
//      be unread: sooner is the harder case); Python comes out of a blocking driver call once its
//      device has drained (nobody else may enqueue there meanwhile).
//   2. A release runs with its reader, and the ops that Python enqueues between two points where it
//      may block or wait are enqueued together: running or enqueueing later is still possible for
//      all that follows, and the state between is one in which the second has not been reached yet.
//   3. In the ring plan all ranks run the same program, so states that differ only by a rotation of
//      the ranks are one state (explore.cpp).
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

class Model {
 public:
  explicit Model(const Config& config);

  const Config& config() const { return protocol_.config; }
  State initial() const;

  // All steps possible in `state`. is_stuck: a living rank has not ended its program, and none of
  // them must happen (a driver call need not block, a mark ends the mover's work, the dead are
  // dead).
  void steps(const State& state, std::vector<Step>* steps, bool* is_stuck) const;

  Violation apply(const Step& step, State* state) const;

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
  Violation submit(int rank, int job, State* state) const;

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
  Violation execute(int rank, int place, State* state) const;
  static void remove(int place, RankState* self);
  Violation begin_copy(int rank, int place, State* state) const;
  void end_copy(int rank, int place, State* state) const;
  bool is_out_of_sight(const State& state, int rank) const;
  bool settle_rank(int rank, State* state, Violation* violation) const;
  Violation settle(State* state) const;

  // --- state.cpp ---
  std::string job_text(int rank, int job) const;
  std::string entry_text(int rank, uint8_t entry) const;

  Protocol protocol_;
  bool lifts_at_once_;
};

}  // namespace protocol
