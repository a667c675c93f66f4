// Streams and events of the stand-in driver: each stream has a thread that runs its operations in
// order; stream 0 runs them at once, on the thread that enqueues (a GPU that is never behind).
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace stand_in {

using Operation = std::function<void()>;

inline void pause_briefly() { std::this_thread::sleep_for(std::chrono::microseconds(20)); }

class StreamThread {
 public:
  StreamThread() : thread_([this] { run(); }) {}
  ~StreamThread() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ending_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  void add(Operation operation) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      operations_.push_back(std::move(operation));
    }
    changed_.notify_all();
  }

  void synchronize() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return operations_.empty() && !running_; });
  }

 private:
  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return ending_ || !operations_.empty(); });
      if (operations_.empty()) return;
      const Operation operation = std::move(operations_.front());
      operations_.pop_front();
      running_ = true;
      lock.unlock();
      operation();
      lock.lock();
      running_ = false;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Operation> operations_;
  bool running_ = false;
  bool ending_ = false;
  std::thread thread_;
};

// What an event stands for: the point at which it was recorded last.
struct Point {
  std::atomic<bool> reached{false};
};

struct EventRecord {
  std::mutex mutex;
  std::shared_ptr<Point> point;  // null: never recorded, waits for it are no-ops

  std::shared_ptr<Point> latest() {
    const std::lock_guard<std::mutex> lock(mutex);
    return point;
  }
};

}  // namespace stand_in
