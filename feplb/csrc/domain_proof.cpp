// The lane proves itself at start-up: what is pushed arrives, flags and all, and how fast.
#include <algorithm>

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

double Domain::carry_pattern(std::size_t bytes) {
  seq_ = 1;  // the canary's epoch; calls count on from here
  const double gbps = measured_gbps(bytes);
  std::vector<std::byte> buffer(bytes);
  for (int dst = 0; dst < config_.num_ranks; ++dst) {
    if (dst != config_.rank) push_pattern(dst, buffer);
  }
  for (int src = 0; src < config_.num_ranks; ++src) {
    if (src != config_.rank) check_pattern(src, buffer);
  }
  own_word()->epoch.store(0);
  return gbps;
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
                        ": this lane does not carry data"));
    check_failure(kProvingLane);
  }
}

// Copies alone, a few at a time, so that waking the engine hardly counts, into this rank's place in
// its neighbour's arena, before the pattern goes there. On a host lane out of more memory than
// caches keep. The fastest time: other work only ever slows a copy, and on a busy machine a short
// one is more often left alone.
double Domain::measured_gbps(std::size_t bytes) {
  constexpr std::size_t kTimes = 24;
  constexpr std::size_t kCopies = 4;
  constexpr std::size_t kPieces = 16;  // of the source
  if (config_.num_ranks < 2 || bytes == 0) return 0;
  const auto rank = static_cast<std::size_t>(config_.rank);
  const bool is_host = device_->is_inline();
  const std::vector<std::byte> memory(is_host ? kPieces * bytes : 0, std::byte{1});
  const auto source = [&](std::size_t i) {
    return is_host ? memory.data() + i % kPieces * bytes : memory_.arenas[rank] + rank * bytes;
  };
  std::byte* const target =
      memory_.arenas[(rank + 1) % static_cast<std::size_t>(config_.num_ranks)] + rank * bytes;
  double fastest = 0;
  for (std::size_t time = 0; time < kTimes; ++time) {
    std::vector<CopyOp> copies;
    for (std::size_t i = 0; i < kCopies; ++i) {
      copies.push_back(CopyOp{target, source(time * kCopies + i), bytes});
    }
    const auto epoch = static_cast<Epoch>(time + 1);
    const TimePoint start = Clock::now();
    device_->copy_batch(StreamKind::kPushes, copies);
    device_->write_flag(StreamKind::kPushes, own_word(), epoch);
    await_on_host(own_word(), epoch, "measuring the lane at start-up", kOwnCopies);
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    fastest = std::max(fastest, static_cast<double>(kCopies * bytes) / seconds / 1e9);
  }
  return fastest;
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
