// How far the compute stream is, as the host can read it without the driver: a word that the stream
// writes with every release, in a page of this process alone that the lane pins. The marks count
// up, so the next compute stream can wait for the last one and needs nothing of the stream before.
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
  void note_wait() { covering_.store(marks_.load() + 1); }
  // What the stream is to write into the word next.
  uint32_t next_mark() { return marks_.fetch_add(1) + 1; }
  // What it was told to write last; 0: nothing yet.
  uint32_t last_mark() const { return marks_.load(); }
  // No mark has followed the latest wait, so nothing would tell that it is over.
  bool has_open_wait() const { return !epoch_reached(marks_.load(), covering_.load()); }
  // The stream has passed every wait it was given, and a mark behind them.
  bool is_past_all_waits() const {
    return epoch_reached(word()->epoch.load(std::memory_order_acquire), covering_.load());
  }
  // A stream that never ends may still write the word: nobody frees it.
  void abandon() noexcept { static_cast<void>(page_.release()); }

 private:
  std::unique_ptr<std::byte, void (*)(void*)> page_;
  std::atomic<uint32_t> marks_{0};
  std::atomic<uint32_t> covering_{0};  // the mark that tells that the latest wait is over
};

}  // namespace feplb
