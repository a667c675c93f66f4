// The host lane: ranks are processes of one host (or threads of one process) that map each other's
// arenas; copy threads are the engines. The compute stream is the caller's own thread: what it
// enqueues has run when the call returns, so a wait blocks, until its deadline.
//
// One engine thread per rank serves all three copy streams, as a source GPU has about one peer
// engine. Rows come first: after each chunk the engine looks for work in a more urgent stream.
#include <time.h>

#include <algorithm>
#include <array>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "bulk_copy.h"
#include "device.h"
#include "error.h"
#include "fences.h"

namespace feplb {
namespace {

constexpr std::size_t kChunkBytes = 1 << 20;
constexpr std::chrono::milliseconds kNap{200};

// What one copy stream is asked to do, in order. `flag` set: write it; else copy.
struct StreamOp {
  std::vector<CopyOp> copies;
  Flag* flag = nullptr;
  Epoch epoch = 0;
};

struct CopyStream {
  std::deque<StreamOp> ops;
  std::size_t copy_idx = 0;  // in ops.front().copies
  std::size_t copied = 0;    // bytes of that copy done
  uint64_t accepted = 0;     // ops ever enqueued
  std::atomic<uint64_t> finished{0};
};

class HostDevice final : public Device {
 public:
  explicit HostDevice(const std::string& thread_name)
      : engine_([this, thread_name] {
          name_this_thread(thread_name);
          run_engine();
        }) {}
  ~HostDevice() override { stop(); }

  void bind_compute(std::uintptr_t /*stream*/) override {}
  Event record(StreamKind stream) override;
  WaitResult wait_event(Event event, const WaitLimits& limits) override;
  WaitResult wait_flag(const Flag* flag, Epoch epoch, const WaitLimits& limits) override;
  // The compute stream is the thread that recorded the event: it is done.
  void after_event(StreamKind /*stream*/, Event /*event*/) override {}
  void copy_batch(StreamKind stream, const std::vector<CopyOp>& copies) override;
  void write_flag(StreamKind stream, Flag* flag, Epoch epoch) override;
  bool compute_drained() override { return true; }
  bool is_inline() const override { return true; }
  int64_t copy_thread_cpu_ns() const override;
  void stop() noexcept override;

 private:
  void enqueue(StreamKind stream, StreamOp op);
  void run_engine() noexcept;
  CopyStream* most_urgent();
  void step(CopyStream& stream, std::unique_lock<std::mutex>& lock);
  void finish_op(CopyStream& stream);

  mutable std::mutex mutex_;
  std::condition_variable work_;
  std::array<CopyStream, kNumStreams> streams_;  // kCompute's stays empty
  bool stopping_ = false;
  Bell finished_bell_;
  std::thread engine_;  // last: it uses all of the above
};

void publish_flag(Flag* flag, Epoch epoch) {
  flag->epoch.store(epoch, std::memory_order_release);
  futex_wake(&flag->epoch);
}

Event HostDevice::record(StreamKind stream) {
  if (stream == StreamKind::kCompute) return Event{};
  const std::lock_guard<std::mutex> lock(mutex_);
  return Event{stream, streams_[static_cast<int>(stream)].accepted};
}

WaitResult HostDevice::wait_event(Event event, const WaitLimits& limits) {
  const std::atomic<uint64_t>& finished = streams_[static_cast<int>(event.stream)].finished;
  const auto done = [&] { return finished.load(std::memory_order_acquire) >= event.position; };
  return done() ? WaitResult::kReached : wait_host(finished_bell_, done, limits);
}

WaitResult HostDevice::wait_flag(const Flag* flag, Epoch epoch, const WaitLimits& limits) {
  auto* word = const_cast<std::atomic<uint32_t>*>(&flag->epoch);
  while (true) {
    const uint32_t seen = word->load(std::memory_order_acquire);
    if (epoch_reached(seen, epoch) || (!fence_on(Fence::kEpochCheck) && seen != 0)) {
      return WaitResult::kReached;
    }
    if (limits.poisoned->load(std::memory_order_acquire)) return WaitResult::kPoisoned;
    const TimePoint now = Clock::now();
    if (now >= limits.deadline) return WaitResult::kTimedOut;
    futex_wait(word, seen, std::min(limits.deadline, now + kNap));
  }
}

void HostDevice::copy_batch(StreamKind stream, const std::vector<CopyOp>& copies) {
  StreamOp op;
  op.copies = copies;
  enqueue(stream, std::move(op));
}

void HostDevice::write_flag(StreamKind stream, Flag* flag, Epoch epoch) {
  if (stream == StreamKind::kCompute) {
    publish_flag(flag, epoch);
    return;
  }
  StreamOp op;
  op.flag = flag;
  op.epoch = epoch;
  enqueue(stream, std::move(op));
}

void HostDevice::enqueue(StreamKind stream, StreamOp op) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    FEPLB_CHECK(!stopping_, "copy submitted to a lane that was stopped");
    CopyStream& target = streams_[static_cast<int>(stream)];
    target.ops.push_back(std::move(op));
    ++target.accepted;
  }
  work_.notify_one();
}

CopyStream* HostDevice::most_urgent() {
  for (CopyStream& stream : streams_) {
    if (!stream.ops.empty()) return &stream;
  }
  return nullptr;
}

void HostDevice::run_engine() noexcept {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    CopyStream* stream = most_urgent();
    if (stream != nullptr) {
      step(*stream, lock);
      continue;
    }
    if (stopping_) return;
    work_.wait_for(lock, kNap);
  }
}

// One chunk of the stream's first operation, copied without the lock.
void HostDevice::step(CopyStream& stream, std::unique_lock<std::mutex>& lock) {
  StreamOp& op = stream.ops.front();  // stays put: only this thread pops, and deques do not move
  if (op.flag != nullptr) {
    publish_flag(op.flag, op.epoch);
    finish_op(stream);
    return;
  }
  if (stream.copy_idx == op.copies.size()) {
    finish_op(stream);
    return;
  }
  const CopyOp copy = op.copies[stream.copy_idx];
  const std::size_t bytes = std::min(kChunkBytes, copy.bytes - stream.copied);
  lock.unlock();
  bulk_copy(copy.dst + stream.copied, copy.src + stream.copied, bytes);
  lock.lock();
  stream.copied += bytes;
  if (stream.copied == copy.bytes) {
    ++stream.copy_idx;
    stream.copied = 0;
  }
}

void HostDevice::finish_op(CopyStream& stream) {
  stream.ops.pop_front();
  stream.copy_idx = 0;
  stream.finished.fetch_add(1, std::memory_order_release);
  finished_bell_.ring(1);
}

int64_t HostDevice::copy_thread_cpu_ns() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  clockid_t clock;
  timespec time;
  auto* thread = const_cast<std::thread*>(&engine_);
  if (!stopping_ && pthread_getcpuclockid(thread->native_handle(), &clock) == 0 &&
      clock_gettime(clock, &time) == 0) {
    return static_cast<int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
  }
  return 0;
}

void HostDevice::stop() noexcept {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  work_.notify_one();
  if (engine_.joinable()) engine_.join();
}

}  // namespace

std::unique_ptr<Device> make_host_device(const std::string& thread_name) {
  return std::make_unique<HostDevice>(thread_name);
}

}  // namespace feplb
