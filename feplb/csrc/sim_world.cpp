#include "sim_world.h"

#include <algorithm>
#include <utility>

namespace feplb {
namespace {

// How a mover's thread unwinds when it shall end; no error, hence not to be caught as one.
struct Dismissed {};

struct Current {
  const SimWorld* world = nullptr;
  int thread = -1;
};
thread_local Current current;

// Says that a thread waits on the host, for as long as it lives.
struct HostWait {
  explicit HostWait(bool& waits_on_host) : waits(waits_on_host) { waits = true; }
  ~HostWait() { waits = false; }
  bool& waits;
};

}  // namespace

SimWorld::SimWorld(int num_ranks, uint64_t seed, SimOptions options)
    : num_ranks_(num_ranks),
      seed_(seed),
      options_(std::move(options)),
      random_(seed),
      threads_(2 * static_cast<std::size_t>(num_ranks)),
      weights_((3 + kNumSimStreams) * static_cast<std::size_t>(num_ranks), 1),
      fault_pending_(options_.fault != SimFault::kNone),
      turn_changed_(threads_.size()) {
  pause_one_in_ = 1u << random_.below(7);
  load_one_in_ = 2u << random_.below(4);
  change_one_in_ = 8u << random_.below(8);
  weight_spread_ = 1 + 4 * random_.below(4);
  for (int rank = 0; rank < num_ranks; ++rank) ranks_.emplace_back(options_.single_queue);
  for (uint32_t& weight : weights_) weight = 1u << random_.below(weight_spread_);
}

SimWorld::~SimWorld() = default;

// ------------------------------------------------------------------------------------------ turns

void SimWorld::enter(int rank) {
  current = Current{this, rank};
  std::unique_lock<std::mutex> lock(mutex_);
  threads_[static_cast<std::size_t>(rank)].has_started = true;
  if (++num_entered_ == num_ranks_) {
    turn_ = static_cast<int>(random_.below(static_cast<uint32_t>(num_ranks_)));
    turn_changed_[static_cast<std::size_t>(turn_)].notify_one();
  }
  lock.unlock();
  await_turn(rank);
}

void SimWorld::leave() noexcept {
  const int self = current_thread();
  current = Current{};
  threads_[static_cast<std::size_t>(self)].has_ended = true;
  ++progress_;
  give_turn(self);
}

int SimWorld::current_thread() const { return current.world == this ? current.thread : -1; }

void SimWorld::pass_turn(int to) {
  const std::lock_guard<std::mutex> lock(mutex_);
  turn_ = to;
  if (to >= 0) turn_changed_[static_cast<std::size_t>(to)].notify_one();
}

void SimWorld::await_turn(int self) {
  std::unique_lock<std::mutex> lock(mutex_);
  turn_changed_[static_cast<std::size_t>(self)].wait(lock, [&] { return turn_ == self; });
}

// Lets the adversary choose until it chooses `self`, or for good if that has ended.
void SimWorld::give_turn(int self) {
  while (true) {
    if (all_ranks_ended()) return retire();
    apply_fault();
    const int actor = choose();
    if (actor < 0) {
      resolve_stuck();
      continue;
    }
    ++num_steps_;
    order_hash_ = (order_hash_ ^ static_cast<uint64_t>(actor)) * 1099511628211u;
    if (actor >= static_cast<int>(threads_.size())) {
      run_here(actor);
      continue;
    }
    ++progress_;
    if (actor == self) return;
    pass_turn(actor);
    if (!threads_[static_cast<std::size_t>(self)].has_ended) await_turn(self);
    return;
  }
}

// No rank is left: movers that were dismissed end one by one, then nobody has the turn.
void SimWorld::retire() {
  const std::lock_guard<std::mutex> lock(mutex_);
  turn_ = -1;
  for (int id = num_ranks_; id < 2 * num_ranks_; ++id) {
    const Thread& mover = threads_[static_cast<std::size_t>(id)];
    if (mover.has_started && !mover.has_ended && mover.dismissed.load()) turn_ = id;
  }
  if (turn_ >= 0) turn_changed_[static_cast<std::size_t>(turn_)].notify_one();
}

// Gives the turn away until `ready` holds (nullptr: whenever the adversary likes).
void SimWorld::pause(int self, const std::function<bool()>* ready, const char* waits_for) {
  Thread& thread = threads_[static_cast<std::size_t>(self)];
  thread.ready = ready;
  thread.waits_for = waits_for;
  give_turn(self);
  thread.ready = nullptr;
  if (self >= num_ranks_) {
    if (thread.dismissed.load() || !failure_.empty() || !ranks_[rank_of(self)].is_alive) {
      throw Dismissed();
    }
    return;
  }
  if (!ranks_[static_cast<std::size_t>(self)].is_alive) {
    throw SimKilled(cat("rank ", self, " was killed at step ", options_.fault_step));
  }
  if (!failure_.empty()) throw SimDeadlock(failure_);
}

bool SimWorld::all_ranks_ended() const {
  return std::all_of(threads_.begin(), threads_.begin() + num_ranks_,
                     [](const Thread& thread) { return thread.has_ended; });
}

// --------------------------------------------------------------------------- what a device does

void SimWorld::driver_call(int rank) {
  const int self = current_thread();
  if (self < 0) return;
  if (random_.one_in(pause_one_in_)) pause(self, nullptr, "its turn");
  const bool& held = ranks_[static_cast<std::size_t>(rank)].driver_held;
  if (!held) return;
  const std::function<bool()> is_free = [&held] { return !held; };
  pause(self, &is_free, "the driver, which its rank's thread holds");
}

void SimWorld::load_module(int rank) {
  if (current_thread() != rank || !options_.blocking_driver) return;
  if (!random_.one_in(load_one_in_)) return;
  Rank& holder = ranks_[static_cast<std::size_t>(rank)];
  const SimStreams::Positions queued = holder.streams.accepted();
  const std::function<bool()> has_run = [&] { return holder.streams.has_run(queued); };
  holder.driver_held = true;
  pause(rank, &has_run, "its device to drain, inside the driver");
  holder.driver_held = false;
}

WaitResult SimWorld::wait_on_host(const std::function<bool()>& done, const WaitLimits& limits) {
  const int self = current_thread();
  FEPLB_CHECK(self >= 0, "a wait on the host needs a thread that entered the simulated world");
  Thread& thread = threads_[static_cast<std::size_t>(self)];
  const std::function<bool()> over = [&] {
    return thread.timed_out || limits.poisoned->load() || done();
  };
  thread.timed_out = false;
  const HostWait mark(thread.waits_on_host);
  if (!over()) pause(self, &over, "something on the host");
  if (done()) return WaitResult::kReached;
  return thread.timed_out ? WaitResult::kTimedOut : WaitResult::kPoisoned;
}

void SimWorld::start_crew(int rank, Crew crew) {
  Rank& owner = ranks_[static_cast<std::size_t>(rank)];
  owner.crew = std::move(crew);
  owner.has_crew = true;
  threads_[static_cast<std::size_t>(mover_of(rank))].has_started = true;
  owner.mover = std::thread([this, rank] {
    name_this_thread(cat("feplb-sim-", rank));
    run_mover(rank);
  });
}

void SimWorld::run_mover(int rank) {
  const int self = mover_of(rank);
  Crew& crew = ranks_[static_cast<std::size_t>(rank)].crew;
  current = Current{this, self};
  await_turn(self);
  try {
    uint32_t rings = 0;
    uint64_t flags = 0;
    const std::function<bool()> has_reason = [&] {
      return crew.mover_bell->rings() != rings || (flag_writes_ != flags && crew.awaits_release());
    };
    while (true) {
      rings = crew.mover_bell->rings();
      flags = flag_writes_;
      const bool did_something = crew.mover_step();
      pause(self, did_something ? nullptr : &has_reason, "a ring or a release");
    }
  } catch (const Dismissed&) {
    crew = Crew{};
    ranks_[static_cast<std::size_t>(rank)].has_crew = false;
  }
  leave();
}

void SimWorld::stop_crew(int rank) noexcept {
  Rank& owner = ranks_[static_cast<std::size_t>(rank)];
  if (!owner.mover.joinable()) return;
  const int mover = mover_of(rank);
  const Thread& thread = threads_[static_cast<std::size_t>(mover)];
  threads_[static_cast<std::size_t>(mover)].dismissed.store(true);
  const int self = current_thread();
  if (self >= 0) {
    const std::function<bool()> has_ended = [&] { return thread.has_ended; };
    threads_[static_cast<std::size_t>(self)].ready = &has_ended;
    while (!thread.has_ended) give_turn(self);
    threads_[static_cast<std::size_t>(self)].ready = nullptr;
  } else {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (turn_ < 0 && !thread.has_ended) {
      turn_ = mover;
      turn_changed_[static_cast<std::size_t>(mover)].notify_one();
    }
  }
  owner.mover.join();
}

// ------------------------------------------------------------------------------------ the
// adversary

bool SimWorld::thread_can_run(int thread) const {
  const Thread& state = threads_[static_cast<std::size_t>(thread)];
  if (!state.has_started || state.has_ended) return false;
  const bool must_end = state.dismissed.load() || !failure_.empty() ||
                        !ranks_[static_cast<std::size_t>(rank_of(thread))].is_alive;
  return must_end || state.ready == nullptr || (*state.ready)();
}

void SimWorld::consider(int actor, bool can_run) {
  if (!can_run) return;
  const uint64_t before = candidates_.empty() ? 0 : candidates_.back().second;
  candidates_.emplace_back(actor, before + weights_[static_cast<std::size_t>(actor)]);
}

// Something that can run now, by weight; -1 if there is nothing.
int SimWorld::choose() {
  change_mind();
  candidates_.clear();
  const int num_threads = 2 * num_ranks_;
  for (int thread = 0; thread < num_threads; ++thread) consider(thread, thread_can_run(thread));
  for (int rank = 0; rank < num_ranks_; ++rank) {
    const Rank& state = ranks_[static_cast<std::size_t>(rank)];
    if (!state.is_alive) continue;
    consider(num_threads + rank, state.has_crew && state.looked_at != progress_);
    const int first_stream = num_threads + num_ranks_ + rank * kNumSimStreams;
    for (int i = 0; i < kNumSimStreams; ++i) consider(first_stream + i, state.streams.can_step(i));
  }
  if (candidates_.empty()) return -1;
  const uint32_t drawn = random_.below(static_cast<uint32_t>(candidates_.back().second));
  const auto chosen = std::find_if(candidates_.begin(), candidates_.end(),
                                   [drawn](const auto& entry) { return entry.second > drawn; });
  return chosen->first;
}

void SimWorld::run_here(int actor) {
  const int first_stream = 3 * num_ranks_;
  if (actor < first_stream) return look(actor - 2 * num_ranks_);
  const int rank = (actor - first_stream) / kNumSimStreams;
  SimStreams& streams = ranks_[static_cast<std::size_t>(rank)].streams;
  try {
    const int idx = (actor - first_stream) % kNumSimStreams;
    if (streams.step(idx, random_, options_.see_copy)) ++flag_writes_;
  } catch (const std::exception& error) {
    failure_ = cat("a kernel of rank ", rank, " failed: ", error.what());
  }
  ++progress_;
}

void SimWorld::look(int rank) {
  Rank& watcher = ranks_[static_cast<std::size_t>(rank)];
  watcher.looked_at = progress_;
  while (watcher.deaths_told < static_cast<int>(deaths_.size())) {
    watcher.crew.peer_died(deaths_[static_cast<std::size_t>(watcher.deaths_told++)]);
  }
  watcher.crew.watchdog_look();
}

// Whom the adversary favours changes now and then.
void SimWorld::change_mind() {
  if (!random_.one_in(change_one_in_)) return;
  weights_[random_.below(static_cast<uint32_t>(weights_.size()))] =
      1u << random_.below(weight_spread_);
}

void SimWorld::apply_fault() {
  if (!fault_pending_ || num_steps_ < options_.fault_step) return;
  Thread& thread = threads_[static_cast<std::size_t>(options_.fault_rank)];
  if (options_.fault == SimFault::kKill) {
    fault_pending_ = false;
    if (!thread.has_ended) kill(options_.fault_rank);
  } else if (thread.waits_on_host) {
    fault_pending_ = false;
    thread.timed_out = true;
  }
}

void SimWorld::kill(int rank) {
  Rank& victim = ranks_[static_cast<std::size_t>(rank)];
  victim.is_alive = false;
  victim.driver_held = false;
  victim.streams.vanish();
  deaths_.push_back(rank);
  ++progress_;
}

void SimWorld::resolve_stuck() {
  if (options_.deadlines) {
    for (int rank = 0; rank < num_ranks_; ++rank) {
      Thread& thread = threads_[static_cast<std::size_t>(rank)];
      if (thread.has_ended || !thread.waits_on_host || thread.timed_out) continue;
      thread.timed_out = true;
      return;
    }
  }
  failure_ = describe();
}

std::string SimWorld::describe() const {
  std::string text = cat("deadlock (seed ", seed_, ", step ", num_steps_, ")");
  const auto name = [this](const Flag* flag) {
    return options_.name_flag ? options_.name_flag(flag) : cat(static_cast<const void*>(flag));
  };
  const auto say = [this](int thread) -> std::string {
    const Thread& state = threads_[static_cast<std::size_t>(thread)];
    if (!state.has_started) return "not started";
    return state.has_ended ? "ended" : cat("waits for ", state.waits_for);
  };
  for (int rank = 0; rank < num_ranks_; ++rank) {
    text += cat("\n  rank ", rank, ": thread ", say(rank), "; mover ", say(mover_of(rank)),
                ranks_[static_cast<std::size_t>(rank)].streams.describe(name));
  }
  return text;
}

}  // namespace feplb
