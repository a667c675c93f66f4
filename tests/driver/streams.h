// Streams and events of the stand-in driver. A stream is a queue of operations with a thread that
// runs them in order, or shares its GPU's only queue. Stream 0 runs them at once, on the thread
// that enqueues (a GPU that is never behind), or has a queue of its GPU, if it is told so. Other
// streams are not ordered by it: all of them are non-blocking.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "ledger.h"

namespace stand_in {

using Operation = std::function<void()>;

inline void pause_briefly() { std::this_thread::sleep_for(std::chrono::microseconds(20)); }

class Queue {
 public:
  Queue() : thread_([this] { run(); }) { Ledger::the().made("queue"); }
  ~Queue() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ending_ = true;
    }
    changed_.notify_all();
    thread_.join();
    Ledger::the().gone("queue");
  }

  void add(Operation operation) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      operations_.push_back(std::move(operation));
    }
    changed_.notify_all();
  }

  // Until no more than this many operations are left to be done.
  void wait_for(std::size_t num_left) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return operations_.size() + (running_ ? 1 : 0) <= num_left; });
  }

 private:
  void run() {
    static std::atomic<unsigned> seed{1};
    std::minstd_rand random(seed.fetch_add(1));
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return ending_ || !operations_.empty(); });
      if (operations_.empty()) return;
      const Operation operation = std::move(operations_.front());
      operations_.pop_front();
      running_ = true;
      lock.unlock();
      const int64_t most_us = Ledger::the().jitter_us.load();
      if (most_us > 0 && random() % 4 == 0) {
        std::this_thread::sleep_for(
            std::chrono::microseconds(random() % static_cast<unsigned>(most_us)));
      }
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

// One GPU's streams and the lock of its context.
class Gpu {
 public:
  static Gpu& of(int device) {
    static std::array<Gpu, 64>* gpus = new std::array<Gpu, 64>;
    return (*gpus)[static_cast<std::size_t>(device)];
  }

  std::shared_ptr<Queue> make_queue() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<Queue> queue = Ledger::the().one_queue ? only_.lock() : nullptr;
    if (queue == nullptr) queue = std::make_shared<Queue>();
    if (Ledger::the().one_queue) only_ = queue;
    queues_.push_back(queue);
    return queue;
  }

  void drain() {
    std::vector<std::weak_ptr<Queue>> queues;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      queues = queues_;
    }
    for (const auto& weak : queues) {
      if (const auto queue = weak.lock()) queue->wait_for(0);
    }
  }

  // That of stream 0, where it has one.
  std::shared_ptr<Queue> default_queue() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (default_ != nullptr) return default_;
    }
    const std::shared_ptr<Queue> made = make_queue();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (default_ == nullptr) default_ = made;
    return default_;
  }
  void drop_default_queue() {
    const std::lock_guard<std::mutex> lock(mutex_);
    default_.reset();
  }

  std::mutex& driver_lock() { return driver_lock_; }

 private:
  std::mutex mutex_;
  std::shared_ptr<Queue> default_;
  std::weak_ptr<Queue> only_;
  std::vector<std::weak_ptr<Queue>> queues_;
  std::mutex driver_lock_;
};

struct StreamRecord {
  std::shared_ptr<Queue> queue;
};

// The streams there are: a call that names another one is refused, as after cuStreamDestroy.
class Streams {
 public:
  static Streams& the() {
    static Streams* streams = new Streams;
    return *streams;
  }
  void add(const void* stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    streams_.insert(stream);
  }
  bool remove(const void* stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return streams_.erase(stream) != 0;
  }
  bool has(const void* stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return stream == nullptr || streams_.count(stream) != 0;
  }

 private:
  std::mutex mutex_;
  std::set<const void*> streams_;
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
