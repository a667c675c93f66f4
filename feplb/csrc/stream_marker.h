// How far the compute stream is, as the host can read it without the driver: a word that the stream
// writes after its waits, in a page of this process alone that the lane pins.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>

#include "device.h"
#include "error.h"

namespace feplb {

class StreamMarker {
 public:
  static constexpr std::size_t kBytes = 4096;

  StreamMarker() : page_(static_cast<std::byte*>(std::aligned_alloc(kBytes, kBytes)), &std::free) {
    FEPLB_CHECK(page_ != nullptr, "out of memory");
    std::memset(page_.get(), 0, kBytes);
  }

  std::byte* data() const { return page_.get(); }
  Flag* word() const { return reinterpret_cast<Flag*>(page_.get()); }
  // Called before a wait lies in the stream: the watchdog lifts what may lie there.
  void note_wait() { waits_.fetch_add(1); }
  // What the stream writes into the word behind the waits so far.
  uint32_t num_waits() const { return waits_.load(); }
  // The stream has passed every wait it was given, and what was enqueued up to its last marker.
  bool is_past_all_waits() const {
    return epoch_reached(word()->epoch.load(std::memory_order_acquire), waits_.load());
  }
  // A stream that never ends may still write the word: nobody frees it.
  void abandon() noexcept { static_cast<void>(page_.release()); }

 private:
  std::unique_ptr<std::byte, void (*)(void*)> page_;
  std::atomic<uint32_t> waits_{0};
};

}  // namespace feplb
