// The lane proves itself at start-up: what is pushed arrives, flags and all, and how fast.
#include "domain.h"
#include "error.h"

namespace feplb {
namespace {

constexpr const char* kOwnCopies = "this rank's own copies";

// Byte `i` of what `src` pushes to `dst`.
std::byte pattern_byte(int src, int dst, std::size_t i) {
  return static_cast<std::byte>(
      (i * 31 + static_cast<std::size_t>(src) * 7 + static_cast<std::size_t>(dst) * 13 + 1) & 0xff);
}

}  // namespace

void Domain::carry_pattern(std::size_t bytes) {
  seq_ = 1;  // the canary's epoch; calls count on from here
  std::vector<std::byte> buffer(bytes);
  for (int dst = 0; dst < config_.num_ranks; ++dst) {
    if (dst != config_.rank) push_pattern(dst, buffer);
  }
  for (int src = 0; src < config_.num_ranks; ++src) {
    if (src != config_.rank) check_pattern(src, buffer);
  }
  own_word()->epoch.store(0);
}

// In rank `owner`'s arena, what `src` pushes there.
std::byte* Domain::pattern_place(int owner, int src, std::size_t bytes) const {
  return memory_.arenas[static_cast<std::size_t>(owner)] + static_cast<std::size_t>(src) * bytes;
}

// A word that this rank's streams may write while nobody else looks at it.
Flag* Domain::own_word() const { return board_.released(config_.rank, kRowsRegion, 0); }

void Domain::push_pattern(int dst, std::vector<std::byte>& buffer) {
  const std::size_t bytes = buffer.size();
  for (std::size_t i = 0; i < bytes; ++i) buffer[i] = pattern_byte(config_.rank, dst, i);
  std::byte* const source = pattern_place(config_.rank, config_.rank, bytes);
  device_->put(source, buffer.data(), bytes);
  device_->copy_batch(StreamKind::kPushes,
                      {CopyOp{pattern_place(dst, config_.rank, bytes), source, bytes}});
  device_->write_flag(StreamKind::kPushes, board_.inbound(dst, config_.rank, kRowsFlag), 1);
  const auto pushed = static_cast<Epoch>(own_word()->epoch.load() + 1);
  device_->write_flag(StreamKind::kPushes, own_word(), pushed);
  await_on_host(own_word(), pushed, kProvingLane, kOwnCopies);
}

void Domain::check_pattern(int src, std::vector<std::byte>& buffer) {
  const Flag* flag = board_.inbound(config_.rank, src, kRowsFlag);
  const std::string whom = cat("rank ", board_.global_rank(src));
  if (device_->lifts_flags()) await_on_host(flag, 1, kProvingLane, whom);
  await_flag(src, kRowsFlag, 1, kProvingLane);
  device_->mark_compute();
  await_on_host(flag, 1, kProvingLane, whom);
  drain();  // the wait in the stream has seen the flag, too
  device_->get(buffer.data(), pattern_place(config_.rank, src, buffer.size()), buffer.size());
  for (std::size_t i = 0; i < buffer.size(); ++i) {
    const std::byte expected = pattern_byte(src, config_.rank, i);
    if (buffer[i] == expected) continue;
    failure_.poison(cat("byte ", i, " of rank ", board_.global_rank(src), "'s pattern is ",
                        static_cast<int>(buffer[i]), ", expected ", static_cast<int>(expected),
                        ": this lane does not carry data. On GPUs try copy_call=\"plain\", "
                        "flag_call=\"copy\" or another arena_handle, and ask `feplb doctor`"));
    check_failure(kProvingLane);
  }
}

// A few copies at a time, so that waking the engine hardly counts. On a host lane out of more
// memory than caches keep.
std::vector<int64_t> Domain::timed_pushes(int dst, std::size_t bytes, int times) {
  constexpr std::size_t kPieces = 16;  // of the source
  const auto now_ns = [] {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch())
        .count();
  };
  const bool is_host = device_->is_inline();
  if (is_host) pushed_.resize(kPieces * bytes, std::byte{1});
  std::byte* const own = pattern_place(config_.rank, config_.rank, bytes);
  std::byte* const target = pattern_place(dst, config_.rank, bytes);
  std::vector<int64_t> clock{now_ns()};
  for (int time = 0; time < times; ++time) {
    std::vector<CopyOp> copies;
    for (int i = 0; i < kCopiesAtATime; ++i) {
      const auto piece = static_cast<std::size_t>(time * kCopiesAtATime + i) % kPieces;
      copies.push_back(CopyOp{target, is_host ? pushed_.data() + piece * bytes : own, bytes});
    }
    const auto pushed = static_cast<Epoch>(own_word()->epoch.load() + 1);
    device_->copy_batch(StreamKind::kPushes, copies);
    device_->write_flag(StreamKind::kPushes, own_word(), pushed);
    await_on_host(own_word(), pushed, kMeasuringLane, kOwnCopies);
    clock.push_back(now_ns());
  }
  return clock;
}

void Domain::await_on_host(const Flag* flag, Epoch epoch, const char* phase,
                           const std::string& whom) {
  const auto done = [&] { return epoch_reached(flag->epoch.load(), epoch) || board_.aborted(); };
  const WaitResult result = device_->is_inline() ? device_->wait_flag(flag, epoch, limits())
                                                 : device_->wait_host(caller_bell_, done, limits());
  if (board_.aborted()) failure_.poison(board_.abort_text());  // no thread of ours looks yet
  settle(result, phase, whom);
}

}  // namespace feplb
