// What each rank of the model does, fixed before the exploration starts: the Python thread's
// instructions, the compute stream's ops they enqueue, and the mover's jobs they post. model.h runs
// these lists against each other; a rule taken out (rules.h) changes them here or there.
//
// One rank, forward call s of the ring plan (every rank is owner and helper in every call):
//   Python                                    compute stream           mover
//   publish(s)
//   wait headers(s), enqueue, post       ->   event                    rows(s), weights(s)
//   shake (s,1), enqueue                 ->   wait rows, weights
//   enqueue, post                        ->   received GEMMs, release  returns(s)
//   shake (s,2), enqueue                 ->   wait returns
//   enqueue                              ->   place, release
//   return (all of s is submitted)
// Kept A and kept B touch nothing that travels, so they are only points at which Python may block.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "rules.h"

namespace protocol {

constexpr int kMaxRanks = 4;
constexpr int kNone = -1;
constexpr size_t kMaxJobs = 32;  // of a rank; a state has them as bits
constexpr size_t kMaxOps = 64;   // of a rank's compute stream

// Who helps whom. A layer's backward has its forward's plan.
enum class Shape {
  kRing,       // in every call rank r is helped by r+1 and helps r-1; with 2 ranks a swap
  kAlternate,  // 2 ranks: 1 helps 0 in even layers, 0 helps 1 in odd ones
  kFanIn,      // rank 0 helps: rank 1 in layer 0, rank 2 in layer 1, ..., then rank 1 again
  kFanOut,     // rank 0 is helped: by rank 1 in layer 0, by rank 2 in layer 1, ...
};

struct Config {
  int ranks = 2;
  int layers = 2;
  Shape shape = Shape::kRing;
  bool backward_only = false;  // the forward calls are over and everything they did is drained
  bool single_queue = false;   // all streams of a rank share one hardware queue
  bool blocking = false;       // a driver call of Python may hold the lock until the device drains
  bool death = false;          // one rank may die, at any moment
  bool deadline = false;       // or the deadline of one rank's watchdog may expire, at any moment
  bool collective = false;     // the EP backend's combine follows every call on the compute stream
  bool plain = false;          // without the reductions of model.h
  Rule without = Rule::kNone;

  bool has(Rule rule) const { return without != rule; }
  int num_calls() const { return backward_only ? layers : 2 * layers; }
  bool is_backward(int seq) const { return backward_only || seq > layers; }
  int layer(int seq) const { return is_backward(seq) ? num_calls() - seq : seq - 1; }
};

// What travels. kRelease only where releases go through the mover (Rule::kHandshakeReleases).
enum class Kind : uint8_t { kRows, kWeights, kReturns, kGrads, kRelease };
constexpr int kNumTravelling = 4;
const char* kind_name(Kind kind);

struct JobRef {
  int rank = kNone;
  int job = kNone;
};

// One submission of the mover: event wait, copy, flag.
struct Job {
  Kind kind = Kind::kRows;
  int seq = 0;
  int level = 0;
  int dst = kNone;
  int flag = kNone;            // index among the flags of dst
  int source_op = kNone;       // own compute op behind which the source is ready
  int last_reader_op = kNone;  // dst's compute op that reads the area last
  int release_op = kNone;      // dst's compute op that releases the area, or
  int release_job = kNone;     // dst's mover job that does
  int next_same_flag = kNone;  // own job that writes the same flag next
  JobRef previous;             // the job whose content this one overwrites
  std::vector<JobRef> awaits;  // the jobs whose release must be visible before this is submitted
};

enum class OpKind : uint8_t { kEvent, kWait, kRead, kRelease, kCollective, kOptimizer };

// One op of the compute stream.
struct Op {
  OpKind kind = OpKind::kEvent;
  bool is_glued = false;     // runs in one step with the op before it
  std::vector<JobRef> jobs;  // kWait: whose flags; kRead: whose data
  std::string text;
};

enum class Guard : uint8_t { kNothing, kHeaders, kSubmitted, kDrained, kAllChecked };

// One step of the Python thread: waits for its guard, then brings about the state given by the rest
// (all fields are totals since the start, so a program counter says everything).
struct Instr {
  Guard guard = Guard::kNothing;
  uint32_t submitted = 0;  // Guard::kSubmitted: these jobs
  int seq = 0;             // Guard::kHeaders: of this call
  int num_ops = 0;         // ops enqueued
  uint32_t posted = 0;     // jobs posted
  int header = 0;          // last seq published
  int returned = 0;        // last seq whose run_experts returned and freed its memory
  bool has_checked = false;
  std::string text;
};

struct Program {
  std::vector<Instr> instrs;
  std::vector<Op> ops;
  std::vector<Job> jobs;
};

struct Protocol {
  Config config;
  std::array<Program, kMaxRanks> ranks;

  const Job& job(const JobRef& ref) const { return ranks[ref.rank].jobs[ref.job]; }
  Job& job(const JobRef& ref) { return ranks[ref.rank].jobs[ref.job]; }
};

Protocol build_protocol(const Config& config);

}  // namespace protocol
