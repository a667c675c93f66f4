// What a lane can do. Everything above this header is the same for copy engines (ce), shared memory
// between processes (host) and the seeded adversary of the tests (sim).
//
// A Device belongs to one rank. It has one compute stream and three copy streams; work in a stream
// runs in order, nothing else is ordered but by events (within a rank) and flags (between ranks).
//
//   method        called by                may block
//   record, wait_event, wait_flag,
//   write_flag on kCompute    the caller (Python's thread, GIL released)   inline lanes: the wait
//   itself,
//                                                                          until its deadline
//   after_event, copy_batch,
//   write_flag on copies      the mover, or the caller before the mover
//                             would wake; never both at once               never for a peer
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bell.h"

namespace feplb {

// The caller's stream, and one copy stream for each level that moves bytes: rows and weights, what
// comes home, weight grads. The order is the urgency: a source has about one engine.
enum class StreamKind : int { kCompute = 0, kPushes = 1, kReturns = 2, kGrads = 3 };
constexpr int kNumStreams = 4;

// Epochs count calls, are never reset, and are compared as "at least", cyclically: a flag may jump
// ahead (the watchdog lifts it by 2^30) and the counter may wrap.
using Epoch = uint32_t;
constexpr Epoch kLift = 1u << 30;
inline bool epoch_reached(Epoch seen, Epoch wanted) {
  return static_cast<int32_t>(seen - wanted) >= 0;
}

// One word of host shared memory: written by the sender's stream after its data, awaited by the
// receiver's stream, read and lifted by the host as plain memory. Between hosts it stands for a
// word of the receiver's GPU (device_cuda.h), and the receiver's stream writes it once it has that.
struct Flag {
  std::atomic<uint32_t> epoch{0};
};

// A rank's inbound flags in a domain over several hosts: `count` words of the board, and the words
// of its arena, as mapped here, that they stand for.
struct FlagPlace {
  const Flag* on_board;
  std::size_t count;
  std::byte* in_arena;
};

// A point in one stream of this device; position 0 is "done since ever".
struct Event {
  StreamKind stream = StreamKind::kCompute;
  uint64_t position = 0;
};

struct CopyOp {
  std::byte* dst;
  const std::byte* src;
  std::size_t bytes;
};

// Until when a wait may last, and the mark that ends it early.
struct WaitLimits {
  TimePoint deadline;
  const std::atomic<bool>* poisoned;
};

enum class WaitResult {
  kReached,   // the wait is over
  kEnqueued,  // it lies in the compute stream; what is enqueued behind it will see the data
  kTimedOut,
  kPoisoned,
};

// One rank's mover and watchdog as steps, for a lane that runs them itself.
struct Crew {
  Bell* mover_bell;                         // the mover has a reason to step once it rang
  std::function<bool()> mover_step;         // true if it got anything done
  std::function<bool()> awaits_release;     // the mover must step without a ring, too
  std::function<void()> watchdog_look;      // never calls the driver
  std::function<void(int rank)> peer_died;  // as the watchdog notices it
};

// Which of them it runs: the simulation both, a lane that submits on the caller's thread the mover.
enum class Drives { kNothing, kMover, kMoverAndWatchdog };

class Device {
 public:
  virtual ~Device() = default;

  // Names the stream that the caller's own kernels run on during the coming call. What this device
  // put into another one before comes first; that one need not exist any more.
  virtual void bind_compute(std::uintptr_t stream) = 0;
  // A stream that is being captured into a graph runs nothing: no call can be made in it.
  virtual bool is_captured(std::uintptr_t /*stream*/) { return false; }

  // The compute stream, from the caller's thread.
  virtual Event record(StreamKind stream) = 0;
  virtual WaitResult wait_event(Event event, const WaitLimits& limits) = 0;
  virtual WaitResult wait_flag(const Flag* flag, Epoch epoch, const WaitLimits& limits) = 0;

  // The copy streams, from the mover. A batch has no order inside.
  virtual void after_event(StreamKind stream, Event event) = 0;
  virtual void copy_batch(StreamKind stream, const std::vector<CopyOp>& copies) = 0;

  // Either: `flag` becomes `epoch` once everything before it in the stream is done and visible.
  virtual void write_flag(StreamKind stream, Flag* flag, Epoch epoch) = 0;
  virtual void write_flags(StreamKind stream, const std::vector<Flag*>& flags, Epoch epoch);

  // A submission costs more than a copy's delay: pushes of one stream to several peers go in one
  // batch, and their flags follow together.
  virtual bool joins_pushes() const { return false; }

  // The call has failed and its caller goes: compute_drained() means what was enqueued up to here.
  virtual void mark_compute() {}

  // True once everything enqueued on the compute stream has run (check() and the watchdog ask).
  virtual bool compute_drained() = 0;

  // Between host and lane memory, at start-up only; blocks until it is done.
  virtual void put(std::byte* dst, const std::byte* src, std::size_t bytes);
  virtual void get(std::byte* dst, const std::byte* src, std::size_t bytes);

  // The caller waits on the host for `done`, which the mover makes true and rings `bell` for, or
  // which becomes true with nobody to ring.
  virtual WaitResult wait_host(Bell& bell, const std::function<bool()>& done,
                               const WaitLimits& limits);

  // A lane that runs the mover, or both, itself takes them, until stop(), and says so.
  virtual Drives drive(Crew /*crew*/) { return Drives::kNothing; }

  // False where flags lie in memory that no host thread writes: a wait that lies in a stream can
  // then be ended by the process alone.
  virtual bool lifts_flags() const { return true; }

  // Flags written on the compute stream are visible at once, so the writer may ring for them.
  virtual bool is_inline() const = 0;

  // CPU time of the lane's own copy threads, nanoseconds.
  virtual int64_t copy_thread_cpu_ns() const { return 0; }

  // Ends the lane's threads; copies already accepted finish first. Idempotent. The board and the
  // arenas may be unmapped afterwards if the compute stream has drained.
  virtual void stop() noexcept = 0;

 protected:
  // Between two looks of wait_host() at what nobody rings for.
  virtual Clock::duration longest_nap() const;
};

std::unique_ptr<Device> make_host_device(const std::string& thread_name);

// Names the calling thread for debuggers and profilers (15 characters are kept).
// Looks for `done` for some tens of microseconds before anybody has to be woken for it, and gives
// the core away between two looks: true if it came to be. Ranks that call together need no futex.
bool poll_briefly(const std::function<bool()>& done);

void name_this_thread(const std::string& name);

}  // namespace feplb
