// What the stand-in driver was asked, and what it shall answer. The environment sets it up before
// the first call; the functions exported by stand_in.cpp change it later.
//
//   STAND_IN_GPUS=2            GPUs in the machine
//   STAND_IN_UUIDS_FROM=0      the first one's number in its UUID: masked GPUs differ in it
//   STAND_IN_HAS_VMM=1         memory may be shared as a file descriptor
//   STAND_IN_HAS_FABRIC=0      memory may be shared by a fabric handle
//   STAND_IN_VERSION=13000     CUDA version that the driver supports
//   STAND_IN_CALL_NS=6000      what every call that submits work costs
//   STAND_IN_FAIL=cuMemSetAccess:217:3    this call fails with this code, after 3 that did not
//   STAND_IN_BLOCK=cuMemcpyBatchAsync:50  this call is held for so many milliseconds
//   STAND_IN_CAPTURING=1       what cuStreamIsCapturing says of every stream
//   STAND_IN_JITTER_US=200     operations start late, by up to so much
//   STAND_IN_QUEUED_DEFAULT=1  stream 0 is behind, too
//   STAND_IN_ONE_QUEUE=1       a GPU's streams share one hardware queue: what was submitted before,
//                              in whatever stream, has ended before the next one starts
//   STAND_IN_ONE_LOCK=1        one lock per GPU: calls that submit take it, and cuMemFree and
//                              cuMemAlloc hold it until everything submitted has run
//   STAND_IN_QUEUE_DEPTH=8     with the one lock: a call that submits holds it until its stream has
//                              so few operations to do
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace stand_in {

using Clock = std::chrono::steady_clock;

// One call that submitted work: when it returned (steady clock), on which thread, which.
struct Submission {
  int64_t end_ns;
  int64_t thread;
  char symbol[32];
};

struct Failing {
  int code = 0;
  int64_t after = 0;
  bool once = false;
};

class Ledger {
 public:
  static Ledger& the() {
    static Ledger* ledger = new Ledger;  // threads may still call while the process exits
    return *ledger;
  }

  std::atomic<int> num_gpus{1};
  int uuids_from = 0;
  bool has_vmm = true;
  bool has_fabric = false;
  int version = 13000;
  std::atomic<int64_t> call_ns{0};
  std::atomic<int> capturing{0};
  std::atomic<int64_t> jitter_us{0};
  std::atomic<bool> one_queue{false};
  std::atomic<bool> one_lock{false};
  std::atomic<int64_t> queue_depth{0};
  std::atomic<bool> shares_pins{false};
  std::atomic<bool> queued_default{false};  // stream 0 has a queue of its own, as on a GPU

  // Writes a call down; 0, or the code it shall fail with.
  int enter(const char* symbol, bool submits) {
    int64_t held_ms = 0;
    int code = 0;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const int64_t before = calls_[symbol]++;
      const auto failing = failing_.find(symbol);
      if (failing != failing_.end() && before >= failing->second.after) code = failing->second.code;
      if (code != 0) ++failures_;
      if (code != 0 && failing->second.once) failing_.erase(failing);
      const auto blocking = blocking_.find(symbol);
      if (blocking != blocking_.end()) held_ms = blocking->second;
    }
    if (held_ms > 0) std::this_thread::sleep_for(std::chrono::milliseconds(held_ms));
    if (submits && call_ns > 0) {
      const auto end = Clock::now() + std::chrono::nanoseconds(call_ns);
      while (Clock::now() < end) {
      }
    }
    if (submits && code == 0) note(symbol);
    return code;
  }

  // What has been submitted since this was asked last.
  std::vector<Submission> take_log() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Submission> taken;
    taken.swap(log_);
    return taken;
  }

  int64_t calls(const std::string& symbol) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!symbol.empty()) return calls_[symbol];
    int64_t all = 0;
    for (const auto& [name, count] : calls_) all += count;
    return all;
  }

  // How many calls were told to fail so far.
  int64_t failures() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return failures_;
  }

  // Things that the driver made and that nobody has given back: "stream", "pin", ...
  void made(const char* kind) { count(kind, 1); }
  void gone(const char* kind) { count(kind, -1); }
  int64_t alive(const std::string& kind) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return alive_[kind];
  }

  void fail(const std::string& symbol, int code, int64_t after, bool once) {
    const std::lock_guard<std::mutex> lock(mutex_);
    failing_[symbol] = Failing{code, calls_[symbol] + after, once};
  }

  void block(const std::string& symbol, int64_t ms) {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocking_[symbol] = ms;
  }

 private:
  Ledger() {
    num_gpus = static_cast<int>(number("STAND_IN_GPUS", num_gpus));
    uuids_from = static_cast<int>(number("STAND_IN_UUIDS_FROM", 0));
    has_vmm = number("STAND_IN_HAS_VMM", 1) != 0;
    has_fabric = number("STAND_IN_HAS_FABRIC", 0) != 0;
    version = static_cast<int>(number("STAND_IN_VERSION", version));
    call_ns = number("STAND_IN_CALL_NS", 0);
    capturing = static_cast<int>(number("STAND_IN_CAPTURING", 0));
    jitter_us = number("STAND_IN_JITTER_US", 0);
    queued_default = number("STAND_IN_QUEUED_DEFAULT", 0) != 0;
    one_queue = number("STAND_IN_ONE_QUEUE", 0) != 0;
    one_lock = number("STAND_IN_ONE_LOCK", 0) != 0;
    queue_depth = number("STAND_IN_QUEUE_DEPTH", 0);
    std::istringstream failing(text("STAND_IN_FAIL"));
    std::string symbol, code, after;
    if (std::getline(failing, symbol, ':') && std::getline(failing, code, ':')) {
      failing_[symbol] =
          Failing{std::stoi(code), std::getline(failing, after) ? std::stol(after) : 0, false};
    }
    std::istringstream blocking(text("STAND_IN_BLOCK"));
    if (std::getline(blocking, symbol, ':') && std::getline(blocking, code)) {
      blocking_[symbol] = std::stol(code);
    }
  }

  void note(const char* symbol) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (log_.size() >= kMostLogged) return;
    Submission entry{};
    entry.end_ns = Clock::now().time_since_epoch().count();
    entry.thread = static_cast<int64_t>(std::hash<std::thread::id>()(std::this_thread::get_id()));
    std::strncpy(entry.symbol, symbol, sizeof(entry.symbol) - 1);
    log_.push_back(entry);
  }

  void count(const char* kind, int64_t by) {
    const std::lock_guard<std::mutex> lock(mutex_);
    alive_[kind] += by;
  }
  static std::string text(const char* name) {
    const char* value = std::getenv(name);
    return value == nullptr ? "" : value;
  }
  static int64_t number(const char* name, int64_t otherwise) {
    const std::string value = text(name);
    return value.empty() ? otherwise : std::stoll(value);
  }

  static constexpr std::size_t kMostLogged = 1 << 16;
  std::mutex mutex_;
  std::vector<Submission> log_;
  std::map<std::string, int64_t> calls_;
  std::map<std::string, Failing> failing_;
  std::map<std::string, int64_t> blocking_;
  std::map<std::string, int64_t> alive_;
  int64_t failures_ = 0;
};

}  // namespace stand_in
