// The streams of one simulated device: FIFO queues of operations whose heads the adversary may run.
// No thread and no lock of its own; whoever holds the turn (sim_world.h) calls it.
//
//   kernel, flag write     run as a whole
//   batch of copies        each copy is two or more parts; any parts, in any order, at each step,
//                          so that readers see torn data
//   event and flag wait    block their stream until satisfied
// With a single queue, only the operation submitted first of all streams may run.
//
// There are two compute streams, as a caller may bind another one for each call. An event's
// position says which one it lies in.
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "device.h"

namespace feplb {

// SplitMix64: small, and the same numbers everywhere.
class SimRandom {
 public:
  explicit SimRandom(uint64_t seed) : state_(seed) {}
  uint64_t next();
  uint32_t below(uint32_t bound) { return static_cast<uint32_t>((next() >> 32) * bound >> 32); }
  bool one_in(uint32_t n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

constexpr int kNumComputeStreams = 2;
constexpr int kNumSimStreams = kNumStreams + kNumComputeStreams - 1;

class SimStreams {
 public:
  using NameFlag = std::function<std::string(const Flag*)>;
  using SeeCopy = std::function<void(const CopyOp&)>;
  using Positions = std::array<uint64_t, kNumSimStreams>;

  explicit SimStreams(bool single_queue) : single_queue_(single_queue) {}

  // From here on StreamKind::kCompute means this one.
  void bind_compute(int compute_stream) { compute_ = compute_stream == 0 ? 0 : kNumStreams; }

  void add_kernel(std::function<void()> run);
  void add_copies(StreamKind stream, const std::vector<CopyOp>& copies, SimRandom& random);
  void add_flag_write(StreamKind stream, Flag* flag, Epoch epoch);
  void add_event_wait(StreamKind stream, Event event);
  void add_flag_wait(const Flag* flag, Epoch epoch);  // on the compute stream

  Event record(StreamKind stream) const;
  Positions accepted() const;
  bool has_run(const Positions& positions) const;
  bool compute_drained() const {
    return streams_[0].ops.empty() && streams_[kNumStreams].ops.empty();
  }

  // By index: the StreamKinds, then further compute streams.
  bool can_step(int idx) const;
  // Runs the head, or some parts of it, after showing them to `see_copy`. True if it wrote a flag.
  bool step(int idx, SimRandom& random, const SeeCopy& see_copy);
  // The device is gone: nothing of what it had to do happens any more.
  void vanish();

  // "compute: waits for flag returns of rank 2 >= 7, it is 6 (5 behind)" for each stream not empty.
  std::string describe(const NameFlag& name_flag) const;

 private:
  enum class Kind { kKernel, kCopies, kFlagWrite, kEventWait, kFlagWait };
  struct Op {
    Kind kind = Kind::kKernel;
    std::function<void()> run;
    std::vector<CopyOp> parts;  // not yet copied
    Flag* flag = nullptr;
    const Flag* awaited = nullptr;
    Epoch epoch = 0;
    Event event;
  };
  struct Stream {
    std::deque<Op> ops;
    uint64_t accepted = 0;
    uint64_t finished = 0;
  };

  int index_of(StreamKind stream) const {
    return stream == StreamKind::kCompute ? compute_ : static_cast<int>(stream);
  }
  Stream& at(int idx) { return streams_[static_cast<std::size_t>(idx)]; }
  const Stream& at(int idx) const { return streams_[static_cast<std::size_t>(idx)]; }
  void add(StreamKind stream, Op op);
  bool has_fired(const Event& event) const;
  bool is_satisfied(const Op& op) const;

  bool single_queue_;
  int compute_ = 0;  // index of the bound compute stream
  std::array<Stream, kNumSimStreams> streams_;
  std::deque<int> order_;  // of all operations not finished, where there is one queue
};

}  // namespace feplb
