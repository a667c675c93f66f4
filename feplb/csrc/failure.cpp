#include "failure.h"

namespace feplb {

void Failure::poison(const std::string& text) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (poisoned_.load()) return;
    text_ = text;
    poisoned_.store(true, std::memory_order_release);
  }
  board_.abort(rank_, text);
  lift();
  caller_bell_.ring(kStopRing);
  for (int rank = 0; rank < board_.num_ranks(); ++rank) board_.bell(rank).ring(kStopRing);
}

void Failure::lift() {
  const Epoch epoch = static_cast<Epoch>(seq_.load(std::memory_order_relaxed)) + kLift;
  for (int src = 0; src < board_.num_ranks(); ++src) {
    for (int kind = 0; kind < kNumFlagKinds; ++kind) {
      Flag* flag = board_.inbound(rank_, src, static_cast<FlagKind>(kind));
      flag->epoch.store(epoch, std::memory_order_release);
      futex_wake(&flag->epoch);
    }
  }
}

std::string Failure::text() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return text_;
}

}  // namespace feplb
