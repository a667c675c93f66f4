#include "mover.h"

#include <algorithm>
#include <utility>

#include "error.h"
#include "fences.h"
#include "plan_check.h"

namespace feplb {
namespace {

constexpr std::chrono::milliseconds kNap{500};
// Releases written by a device ring no bell: while one is awaited, look this often.
constexpr std::chrono::microseconds kReleasePoll{20};

// While it lives the mover is calling the driver; tells the caller when it is done, or has thrown.
struct DriverMark {
  std::atomic<bool>& mark;
  Bell& caller_bell;
  ~DriverMark() {
    mark.store(false);
    caller_bell.ring(kJobRing);
  }
};

std::string describe(const CallHeader& header) {
  if (header.kind == CallKind::kCheck) return "check()";
  return cat(call_kind_name(header.kind), " of layer ", header.layer, ", micro-batch ",
             header.micro_batch);
}

std::string describe_grad_bits(uint32_t bits) {
  std::string text = (bits & kGradMode) != 0 ? "grad mode on" : "grad mode off";
  if ((bits & kNeedsKnown) == 0) return text;
  text += (bits & kNeedsRows) != 0 ? ", rows need grad" : ", rows need no grad";
  for (int i = 0; i < 8; ++i) {
    if ((bits & (kNeedsSideFirst << i)) != 0) text += cat(", row_data ", i, " needs grad");
  }
  for (int t = 0; t < 20; ++t) {
    if ((bits & (kNeedsWeightFirst << t)) != 0) text += cat(", weight ", t, " needs grad");
  }
  return text;
}

bool same_grad_bits(uint32_t a, uint32_t b) {
  const uint32_t mask = (a & b & kNeedsKnown) != 0 ? ~0u : static_cast<uint32_t>(kGradMode);
  return ((a ^ b) & mask) == 0;
}

// Empty if the two ranks mean the same call; else what differs, naming both sides.
std::string disagreement(int rank_a, const CallHeader& a, int rank_b, const CallHeader& b) {
  if (a.kind != b.kind || a.layer != b.layer || a.micro_batch != b.micro_batch) {
    return cat("ranks call in different order: rank ", rank_a, " began the ", describe(a),
               ", rank ", rank_b, " the ", describe(b),
               ". Every rank must run the same layers in the same order, forward and backward.");
  }
  if (a.config_hash != b.config_hash) {
    return cat("ranks differ in their config: rank ", rank_a, " has hash ", a.config_hash,
               ", rank ", rank_b, " has ", b.config_hash);
  }
  if (!same_grad_bits(a.grad_bits, b.grad_bits)) {
    return cat("ranks differ in what needs a gradient: rank ", rank_a, " has ",
               describe_grad_bits(a.grad_bits), "; rank ", rank_b, " has ",
               describe_grad_bits(b.grad_bits),
               ". Use one grad mode on all ranks and freeze a layer's experts on all or none.");
  }
  if (a.plan_hash != b.plan_hash) {
    return cat("ranks have different plans for the ", describe(a), ": rank ", rank_a, " has hash ",
               a.plan_hash, ", rank ", rank_b, " has ", b.plan_hash);
  }
  return "";
}

}  // namespace

Mover::Mover(int rank, const ArenaLayout& layout, CountBoard& board, Device& device,
             Failure& failure, Bell& caller_bell)
    : rank_(rank),
      layout_(layout),
      board_(board),
      device_(device),
      failure_(failure),
      caller_bell_(caller_bell),
      headers_(static_cast<std::size_t>(board.num_ranks())),
      last_use_(static_cast<std::size_t>(board.num_ranks()) * kNumRegions * kNumHalves, 0) {}

void Mover::begin(CallHeader header, std::vector<Move> saved_moves) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    FEPLB_CHECK(!live_, "a call was begun before the ", describe(header_), " ended");
    header_ = std::move(header);
    saved_moves_ = std::move(saved_moves);
    for (Job& job : jobs_) job = Job{};
    planned_.store(false, std::memory_order_relaxed);
    submitted_level_.store(0, std::memory_order_relaxed);
    live_ = true;
  }
  board_.publish(rank_, header_);
}

void Mover::await_headers() { board_.bell(rank_).expect(kHeaderRing); }

// A peer that has not published yet will find this header itself. The board's seq words are written
// and read seq_cst, so of two ranks that publish at once, at least one sees the other.
void Mover::ring_waiting_peers() {
  for (int rank = 0; rank < board_.num_ranks(); ++rank) {
    const bool waits = rank != rank_ && board_.published_seq(rank, header_.seq) == header_.seq;
    if (waits) board_.bell(rank).ring(kHeaderRing);
  }
}

void Mover::post(Level level, Event ready, std::vector<Push> pushes) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    Job& job = jobs_[static_cast<int>(level)];
    FEPLB_CHECK(live_ && !job.posted, "level ", static_cast<int>(level), " was posted twice");
    job.ready = ready;
    job.pushes = std::move(pushes);
    job.posted = true;
    // Nothing to submit and nothing below it outstanding: no need to wake the mover.
    if (job.pushes.empty() && submitted_level_.load() == static_cast<int>(level) - 1) {
      submitted_level_.store(static_cast<int>(level), std::memory_order_release);
    }
  }
}

void Mover::submit_now() {
  try {
    while (!failure_.poisoned() && try_submit()) {
    }
  } catch (const std::exception& error) {
    fail("handing copies to the driver failed", error.what());
  }
  wake();
}

// The mover sleeps until a job is posted that the caller could not submit itself.
void Mover::wake() {
  if (has_work()) board_.bell(rank_).ring(kJobRing);
}

bool Mover::has_work() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int level = submitted_level_.load() + 1;
  return live_ && level < kNumLevels && jobs_[level].posted;
}

bool Mover::submitted(Level level) const {
  return submitted_level_.load(std::memory_order_acquire) >= static_cast<int>(level);
}

Event Mover::last_push(Region region, int half) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return last_push_[region][half];
}

void Mover::end() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (live_ && planned()) note_uses();
  live_ = false;
}

bool Mover::cancelled() {
  const std::lock_guard<std::mutex> lock(mutex_);
  live_ = false;
  return !in_driver_.load();
}

// Every rank knows the whole plan, hence which halves the next pusher must find released.
void Mover::note_uses() {
  const auto note = [this](int rank, Region region) {
    const std::size_t half = static_cast<std::size_t>(region_half(region, header_.seq));
    last_use_[(static_cast<std::size_t>(rank) * kNumRegions + region) * kNumHalves + half] =
        header_.seq;
  };
  const bool grads_return =
      header_.kind == CallKind::kBackward && (header_.grad_bits / kNeedsWeightFirst) != 0;
  for (const Move& move : agreement_.plan.moves) {
    note(move.dst_rank, kRowsRegion);
    note(move.dst_rank, kWeightsRegion);
    note(move.owner_rank, kReturnsRegion);
    if (grads_return) note(move.owner_rank, kGradsRegion);
  }
}

bool Mover::step() {
  try {
    return try_step();
  } catch (const std::exception& error) {
    fail("the mover failed", error.what());
    return false;
  }
}

void Mover::fail(const char* what, const char* why) {
  std::string call;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    call = describe(header_);
  }
  failure_.poison(cat(what, " in the ", call, ": ", why));
}

bool Mover::try_step() {
  // Whoever aborts rings every mover: no need to wait for the watchdog's next look.
  if (!failure_.poisoned() && board_.aborted()) failure_.poison(board_.abort_text());
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!live_ || failure_.poisoned()) return false;
    if (!planned()) return try_plan();
  }
  return try_submit();
}

bool Mover::plan_now() {
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (live_ && !planned() && !failure_.poisoned()) try_plan();
  } catch (const std::exception& error) {
    failure_.poison(cat("planning failed: ", error.what()));
  }
  return planned();
}

bool Mover::try_plan() {
  const int num_ranks = board_.num_ranks();
  for (int rank = 0; rank < num_ranks; ++rank) {
    if (board_.published_seq(rank, header_.seq) != header_.seq) return false;
  }
  for (int rank = 0; rank < num_ranks; ++rank) {
    board_.read(rank, header_.seq, headers_[static_cast<std::size_t>(rank)]);
  }
  if (!check_headers(headers_)) return true;
  choose_moves();
  make_route(agreement_.plan.moves, rank_, num_ranks, agreement_.route);
  planned_.store(true, std::memory_order_release);
  caller_bell_.ring(kJobRing);
  return true;
}

// Forward: plans from all counts, unless a plan was handed in. Backward: the forward's plan. Such
// plans are the same on all ranks: check_headers has compared their hashes.
void Mover::choose_moves() {
  agreement_.counts.clear();
  agreement_.plan.moves.clear();
  agreement_.plan_ns = 0;
  if (header_.kind == CallKind::kCheck) return;
  if (header_.kind == CallKind::kBackward) {
    agreement_.plan.moves = saved_moves_;
    agreement_.plan.hash = header_.plan_hash;
    return;
  }
  const LayerShape& shape = layout_.layer(header_.layer);
  for (const CallHeader& header : headers_) {
    FEPLB_CHECK(static_cast<int32_t>(header.counts.size()) == shape.num_local_experts,
                "counts must be ", shape.num_local_experts, ", got ", header.counts.size());
    agreement_.counts.insert(agreement_.counts.end(), header.counts.begin(), header.counts.end());
  }
  PlanInput input;
  input.counts = agreement_.counts.data();
  input.num_ranks = board_.num_ranks();
  input.num_local_experts = shape.num_local_experts;
  input.limits = shape.limits;
  const auto costs = costs_.find(header_.layer);
  input.costs = costs != costs_.end() ? &costs->second : nullptr;
  if (header_.plan_hash != 0) {  // a plan from outside, the same on every rank
    agreement_.refusal = plan_fault(input, saved_moves_);
    if (!agreement_.refusal.empty()) {
      agreement_.refused_by = rank_;  // every rank finds it, and none waits for another
      return;
    }
    agreement_.plan.moves = saved_moves_;
    agreement_.plan.hash = header_.plan_hash;
    return;
  }
  const TimePoint start = Clock::now();
  make_plan(shape.policy, input, scratch_, agreement_.plan);
  agreement_.plan_ns =
      std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
}

// True if all ranks mean the same call and can make it.
bool Mover::check_headers(const std::vector<CallHeader>& headers) {
  agreement_.refusal.clear();
  for (std::size_t rank = 1; rank < headers.size(); ++rank) {
    const std::string text =
        disagreement(board_.global_rank(0), headers[0], board_.global_rank(static_cast<int>(rank)),
                     headers[rank]);
    if (!text.empty() && headers[0].error.empty() && headers[rank].error.empty()) {
      failure_.poison(text);
      return false;
    }
  }
  for (std::size_t rank = 0; rank < headers.size(); ++rank) {
    if (headers[rank].error.empty()) continue;
    agreement_.refusal = headers[rank].error;
    agreement_.refused_by = static_cast<int>(rank);
    agreement_.plan.moves.clear();
    agreement_.route = Route{};
    planned_.store(true, std::memory_order_release);
    caller_bell_.ring(kJobRing);
    return false;
  }
  return true;
}

bool Mover::try_submit() {
  std::vector<Push> ready;
  Event event;
  int level = 0;
  if (!take_releasable(ready, event, level)) return false;
  const DriverMark mark{in_driver_, caller_bell_};
  for (std::size_t first = 0, end; first < ready.size(); first = end) {
    std::vector<const Push*> joined{&ready[first]};
    for (end = first + 1; end < ready.size() && joins(*joined.back(), ready[end]); ++end) {
      joined.push_back(&ready[end]);
    }
    submit(joined, event);
  }
  Event done{};  // a level has one stream
  if (!ready.empty()) done = device_.record(ready.front().stream);
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const Push& push : ready) {
    last_push_[push.region][region_half(push.region, header_.seq)] = done;
  }
  count(ready);
  if (jobs_[level].pushes.empty()) submitted_level_.store(level, std::memory_order_release);
  return true;
}

// Moves out of the lowest unfinished level every push whose destination is released. The call stays
// live until the caller has seen the level submitted, so the driver may be called without the lock.
bool Mover::take_releasable(std::vector<Push>& ready, Event& event, int& level) {
  const std::lock_guard<std::mutex> lock(mutex_);
  level = submitted_level_.load() + 1;
  if (!live_ || level >= kNumLevels || !jobs_[level].posted) return false;
  if (in_driver_.load()) return false;  // the other thread of the two submits, and looks again
  Job& job = jobs_[level];
  event = job.ready;
  const auto withheld = std::stable_partition(job.pushes.begin(), job.pushes.end(),
                                              [this](const Push& p) { return is_released(p); });
  ready.assign(std::make_move_iterator(job.pushes.begin()), std::make_move_iterator(withheld));
  job.pushes.erase(job.pushes.begin(), withheld);
  in_driver_.store(!ready.empty());
  return !ready.empty() || job.pushes.empty();
}

bool Mover::is_released(const Push& push) const {
  static constexpr Fence kFences[kNumRegions] = {Fence::kReleaseRows, Fence::kReleaseWeights,
                                                 Fence::kReleaseReturns, Fence::kReleaseGrads};
  if (!fence_on(kFences[push.region])) return true;
  const int half = region_half(push.region, header_.seq);
  const uint64_t used =
      last_use_[(static_cast<std::size_t>(push.dst_rank) * kNumRegions + push.region) * kNumHalves +
                static_cast<std::size_t>(half)];
  if (used == 0) return true;
  const Flag* flag = board_.released(push.dst_rank, push.region, half);
  return epoch_reached(flag->epoch.load(std::memory_order_acquire), static_cast<Epoch>(used));
}

// May `next` travel in one batch with `push`, which comes before it? Rows and weights may: a helper
// starts when it has both.
bool Mover::joins(const Push& push, const Push& next) const {
  return device_.joins_pushes() && next.stream == push.stream;
}

// Pushes of one stream, as one batch with its flags behind it.
void Mover::submit(const std::vector<const Push*>& pushes, Event ready) {
  const Push& first = *pushes.front();
  const Fence fence = first.flag == kReturnsFlag ? Fence::kEventReturns
                      : first.flag == kGradsFlag ? Fence::kEventGrads
                                                 : Fence::kEventInputs;
  if (fence_on(fence)) device_.after_event(first.stream, ready);
  if (!fence_on(Fence::kFlagAfterData)) write_flags(pushes);
  if (pushes.size() == 1) {
    device_.copy_batch(first.stream, first.copies);
  } else {
    std::vector<CopyOp> copies;
    for (const Push* push : pushes) {
      copies.insert(copies.end(), push->copies.begin(), push->copies.end());
    }
    device_.copy_batch(first.stream, copies);
  }
  last_accepted_ = Clock::now();
  if (fence_on(Fence::kFlagAfterData)) write_flags(pushes);
}

void Mover::write_flags(const std::vector<const Push*>& pushes) {
  std::vector<Flag*> flags;
  for (const Push* push : pushes)
    flags.push_back(board_.inbound(push->dst_rank, rank_, push->flag));
  device_.write_flags(pushes.front()->stream, flags, static_cast<Epoch>(header_.seq));
}

void Mover::count(const std::vector<Push>& pushes) {
  for (const Push& push : pushes) {
    for (const CopyOp& copy : push.copies) stats_.bytes[push.region] += copy.bytes;
    stats_.copies += push.copies.size();
  }
  using std::chrono::nanoseconds;
  stats_.last_accepted_ns =
      std::chrono::duration_cast<nanoseconds>(last_accepted_.time_since_epoch()).count();
}

PushStats Mover::stats() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

std::string Mover::missing_headers() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string text;
  for (int rank = 0; rank < board_.num_ranks(); ++rank) {
    if (board_.published_seq(rank, header_.seq) == header_.seq) continue;
    text += cat(text.empty() ? "" : ", ", "rank ", board_.global_rank(rank),
                " (last seen: ", board_.last_seen(rank),
                board_.has_closed(rank) ? ", has closed its Balancer" : "", ")");
  }
  return text;
}

std::string Mover::withheld() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string text;
  for (const Job& job : jobs_) {
    for (const Push& push : job.pushes) {
      text += cat(text.empty() ? "" : ", ", "rank ", board_.global_rank(push.dst_rank),
                  " (last seen: ", board_.last_seen(push.dst_rank), ")");
    }
  }
  return text;
}

bool Mover::awaits_release() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!live_ || failure_.poisoned()) return false;
  const int level = submitted_level_.load() + 1;
  return level < kNumLevels && !jobs_[level].pushes.empty();
}

// What the mover needs to be woken for, in its present state.
uint32_t Mover::wanted() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!live_) return kJobRing | kStopRing;
  if (!planned()) return kHeaderRing | kStopRing;
  return kJobRing | kReleaseRing | kStopRing;
}

void Mover::run() noexcept {
  Bell& bell = board_.bell(rank_);
  while (!stopping_.load(std::memory_order_acquire)) {
    const uint32_t seen = bell.rings();
    if (step()) continue;
    const bool polls = !device_.is_inline() && awaits_release();
    const auto nap = polls ? Clock::duration(kReleasePoll) : Clock::duration(kNap);
    bell.sleep(seen, wanted(), Clock::now() + nap);
  }
}

void Mover::stop() noexcept {
  stopping_.store(true, std::memory_order_release);
  board_.bell(rank_).ring(kStopRing);
}

Worker::Worker(const std::string& name, std::function<void()> body)
    : thread_(std::make_unique<std::thread>([name, body = std::move(body)] {
        name_this_thread(name);
        body();
      })) {}

Worker& Worker::operator=(Worker&& other) noexcept {
  join();
  thread_ = std::move(other.thread_);
  return *this;
}

void Worker::join() noexcept {
  if (thread_ != nullptr && thread_->joinable()) thread_->join();
}

}  // namespace feplb
