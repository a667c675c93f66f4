#include "domain.h"

#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <utility>

#include "error.h"
#include "fences.h"
#include "unmapping.h"

namespace feplb {
namespace {

constexpr const char* kCaptured =
    "feplb was called while its stream is captured into a CUDA graph. A balanced layer plans on "
    "the host in every call and cannot be captured. Leave the MoE layer out of the graph";
constexpr uint64_t kLastSeq = (uint64_t{1} << 31) - 1;

void keep_for_ever(std::shared_ptr<void> memory) {
  static std::mutex mutex;
  static auto* kept = new std::vector<std::shared_ptr<void>>;  // never destroyed
  const std::lock_guard<std::mutex> lock(mutex);
  kept->push_back(std::move(memory));
}

// The distinct ranks in `moves` as `rank_of` names them, in the plan's order.
template <typename RankOf>
std::vector<int> peers_of(const std::vector<RoutedMove>& moves, RankOf rank_of) {
  std::vector<int> peers;
  for (const RoutedMove& move : moves) {
    const int peer = rank_of(move.move);
    if (std::find(peers.begin(), peers.end(), peer) == peers.end()) peers.push_back(peer);
  }
  return peers;
}

}  // namespace

Domain::Domain(DomainConfig config, DomainMemory memory, std::unique_ptr<Device> device,
               RelaySockets sockets)
    : config_(std::move(config)),
      memory_(std::move(memory)),
      layout_(config_.layers, config_.num_slots, config_.num_grad_slots),
      board_(memory_.board, config_.num_ranks, max_local_experts(config_.layers),
             config_.global_ranks),
      device_(std::move(device)),
      failure_(board_, config_.rank, caller_bell_),
      mover_(config_.rank, layout_, board_, *device_, failure_, caller_bell_),
      watchdog_(config_.rank, config_.pids, board_, *device_, failure_, config_.deadline_s),
      pid_(getpid()) {
  if (sockets.empty()) return;
  relay_ =
      std::make_unique<Relay>(config_.rank, board_, failure_, std::move(sockets),
                              config_.deadline_s, [this](int rank) { watchdog_.peer_died(rank); });
  board_.echo_to(config_.rank, relay_.get());
  // From here on: start-up has failures to tell, too.
  relay_thread_ = Worker(cat("feplb-", own_global_rank(), "-relay"), [this] { relay_->run(); });
}

Domain::~Domain() {
  close();
  if (forked()) {
    // The threads are not here, and joining them would hang: leave everything to the exit.
    mover_thread_.abandon();
    watchdog_thread_.abandon();
    relay_thread_.abandon();
    static_cast<void>(relay_.release());
    static_cast<void>(device_.release());
  }
}

void Domain::open() {
  board_.set_state(config_.rank, RankState::kOpen);
  Crew crew;
  crew.mover_bell = &board_.bell(config_.rank);
  crew.mover_step = [this] { return mover_.step(); };
  crew.awaits_release = [this] { return mover_.awaits_release(); };
  crew.watchdog_look = [this] { watchdog_.look(); };
  crew.peer_died = [this](int rank) { watchdog_.peer_died(rank); };
  const Drives drives = device_->drive(std::move(crew));
  is_driven_ = drives == Drives::kMoverAndWatchdog;
  if (is_driven_) return;
  const std::string name = cat("feplb-", own_global_rank());
  if (drives == Drives::kNothing) {
    mover_thread_ = Worker(name + "-mover", [this] { mover_.run(); });
  }
  watchdog_thread_ = Worker(name + "-watch", [this] { watchdog_.run(); });
}

void Domain::close() noexcept {
  if (closed_ || forked()) return;
  closed_ = true;
  board_.set_state(config_.rank, RankState::kClosed);
  mover_.stop();
  mover_thread_.join();
  await_drained();
  watchdog_.stop();
  watchdog_thread_.join();
  if (relay_) relay_->stop();
  relay_thread_.join();
  board_.echo_to(-1, nullptr);
  relay_.reset();  // its sockets end: peers know already that this rank has closed
  const bool is_drained = device_->compute_drained();
  device_->stop();
  if (is_drained) {
    let_go_of_memory();
  } else {  // a stream that waits for ever reads and writes it for ever
    keep_for_ever(std::move(memory_.peers));
    keep_for_ever(std::move(memory_.owner));
  }
  watchdog_.close_fds();
}

// Views that are still alive keep this rank's own memory, and so does a peer that maps it.
void Domain::let_go_of_memory() noexcept {
  memory_.peers.reset();
  tell_unmapped(board_, config_.rank);
  if (memory_.is_freed_last) {
    const auto is_alive = [this](int rank) { return watchdog_.is_alive(rank); };
    still_mapped_by_ = await_unmapped(board_, config_.rank, is_alive, config_.deadline_s);
  }
  if (!still_mapped_by_.empty()) keep_for_ever(std::move(memory_.owner));
  memory_.owner.reset();
}

// What lies in the compute stream may wait for flags of the board: it stays until they have come,
// or the watchdog, which still runs, has lifted them.
void Domain::await_drained() noexcept {
  if (device_->compute_drained()) return;
  static const std::atomic<bool> kNever{false};
  const auto drained = [this] { return device_->compute_drained(); };
  try {
    device_->mark_compute();
    device_->wait_host(caller_bell_, drained, WaitLimits{limits().deadline, &kNever});
  } catch (const Error&) {
  }
}

bool Domain::forked() const { return getpid() != pid_; }

void Domain::refuse_fork(const char* phase) const {
  if (forked()) {
    throw Error(cat("feplb was called in a process forked after its Balancer was built (", phase,
                    ", rank ", own_global_rank(), ", pid ", getpid(), ", built in pid ", pid_,
                    "). Nothing was sent. Build a Balancer in this process, or call it only in the "
                    "one that built it."));
  }
}

void Domain::check_usable(const char* phase) {
  refuse_fork(phase);
  if (closed_) {
    throw Error(cat("the Balancer is closed (", phase, ", rank ", own_global_rank(),
                    "). Nothing was sent. Build a new one."));
  }
  check_failure(phase);
}

void Domain::check_failure(const char* phase) {
  // Once closed, the board may be unmapped.
  if (!closed_ && !failure_.poisoned() && board_.aborted()) failure_.poison(board_.abort_text());
  if (failure_.poisoned()) raise(cat(where(phase), ": ", failure_.text()));
}

std::string Domain::where(const char* phase) const {
  std::string text = cat("feplb failed while ", phase, " (rank ", own_global_rank());
  if (in_call_ && call_.kind == CallKind::kCheck) {
    text += ", check()";
  } else if (in_call_) {
    text += cat(", layer ", call_.layer, ", micro-batch ", call_.micro_batch, ", ",
                call_kind_name(call_.kind));
  }
  return text + ")";
}

// Once the caller hears of a failure it lets go of its tensors, and a lifted wait no longer tells
// that peers have them: what its compute stream does next comes after this rank's own copies.
// A device that fails in here adds nothing to the failure that is being told.
void Domain::let_go_of_inputs() noexcept {
  static const std::atomic<bool> kNever{false};
  const WaitLimits wait{limits().deadline, &kNever};
  try {
    if (in_call_) {
      device_->wait_host(caller_bell_, [this] { return mover_.cancelled(); }, wait);
      for (const Event& event : {mover_.last_push(kRowsRegion, 0), mover_.last_push(kRowsRegion, 1),
                                 mover_.last_push(kWeightsRegion, 0)}) {
        if (fence_on(Fence::kDrainInputs) && event.position != 0) device_->wait_event(event, wait);
      }
    }
    device_->mark_compute();
  } catch (const Error&) {
  }
}

void Domain::raise(const std::string& what) {
  let_go_of_inputs();
  throw Error(cat(what,
                  ". The Balancer is closed on every rank; results of this step must not be "
                  "used. Restart the job from its last checkpoint, or build a new Balancer "
                  "once the cause is gone."));
}

// What the caller asks of the device; where its driver fails, the call fails on every rank.
template <typename Call>
auto Domain::on_device(const char* phase, const Call& call) {
  try {
    return call();
  } catch (const DeviceError& error) {
    const std::string what = failure_.poisoned() ? failure_.text() : error.what();
    const std::string of = in_call_ ? cat(" in the ", call_kind_name(call_.kind), " of layer ",
                                          call_.layer, ", micro-batch ", call_.micro_batch)
                                    : "";
    failure_.poison(cat("failed while ", phase, of, ": ", what));
    raise(cat(where(phase), ": ", what));
  }
}

WaitLimits Domain::limits() const {
  return WaitLimits{Clock::now() + duration_of(config_.deadline_s), &failure_.mark()};
}

// Turns the end of a wait into an error unless it is over or enqueued. `missing` says for whom.
void Domain::settle(WaitResult result, const char* phase, const std::string& missing) {
  if (result == WaitResult::kTimedOut) {
    failure_.poison(cat("no answer from ", missing, " for ", config_.deadline_s,
                        " s (deadline_s) while ", phase));
  }
  if (failure_.poisoned()) raise(cat(where(phase), ": ", failure_.text()));
}

void Domain::refuse_capture(std::uintptr_t stream) {
  constexpr const char* kPhase = "looking at the compute stream";
  check_usable(kPhase);
  if (on_device(kPhase, [&] { return device_->is_captured(stream); })) throw UserError(kCaptured);
}

// A capture may have begun since the header went out.
void Domain::bind_compute(std::uintptr_t stream) {
  constexpr const char* kPhase = "taking over the compute stream";
  check_usable(kPhase);
  on_device(kPhase, [&] {
    if (device_->is_captured(stream)) throw Error(cat(kCaptured, ". No row has moved."));
    device_->bind_compute(stream);
  });
}

uint64_t Domain::begin(CallHeader header, std::vector<Move> saved_moves) {
  check_usable("publishing the counts");
  FEPLB_CHECK(!in_call_, "the ", call_kind_name(call_.kind), " of layer ", call_.layer,
              " has not ended");
  // A flag that no push has touched since the start compares as reached from here on.
  FEPLB_CHECK(seq_ < kLastSeq, "this Balancer has made 2^31 - 1 calls; build a new one");
  header.seq = seq_ + 1;
  header.config_hash = config_.config_hash;
  failure_.note_call(header.seq);
  call_ = CallName{header.kind, header.layer, header.micro_batch, header.seq};
  in_call_ = true;
  grads_posted_ = false;
  seq_ = header.seq;
  mover_.begin(std::move(header), std::move(saved_moves));
  mover_.ring_waiting_peers();
  if (!is_driven_) mover_.plan_now();
  return seq_;
}

const Agreement& Domain::wait_plan() {
  constexpr const char* kPhase = "waiting for the counts of all ranks";
  check_usable(kPhase);
  const auto done = [this] { return is_driven_ ? mover_.planned() : mover_.plan_now(); };
  if (is_driven_ || !poll_briefly(done)) {
    mover_.await_headers();
    const WaitResult result = device_->wait_host(caller_bell_, done, limits());
    if (!mover_.planned()) settle(result, kPhase, mover_.missing_headers());
  }
  const Agreement& agreement = mover_.agreement();
  if (!agreement.refusal.empty() || call_.kind == CallKind::kCheck) {  // nothing will move
    mover_.end();
    in_call_ = false;
  }
  return agreement;
}

CallGeometry Domain::geometry() const {
  return CallGeometry{&layout_, &memory_.arenas, config_.rank, call_.layer, call_.kind, call_.seq};
}

Event Domain::record_compute() {
  return on_device("handing copies to the mover",
                   [&] { return device_->record(StreamKind::kCompute); });
}

void Domain::post(Level level, std::vector<Push> pushes) {
  mover_.post(level, record_compute(), std::move(pushes));
  if (!is_driven_ && config_.caller_submits) {
    mover_.submit_now();
  } else {
    mover_.wake();
  }
}

void Domain::post_rows(const CallSources& sources, const std::vector<int64_t>& first_row) {
  post(Level::kRows, push_rows(geometry(), mover_.agreement().route, sources, first_row));
}

void Domain::handshake(Level level, const char* phase) {
  if (fence_on(Fence::kHandshake)) await_submitted(level, phase);
}

void Domain::await_submitted(Level level, const char* phase) {
  const auto done = [this, level] { return mover_.submitted(level); };
  const WaitResult result = device_->wait_host(caller_bell_, done, limits());
  if (!done()) settle(result, phase, mover_.withheld());
}

void Domain::await_flag(int src_rank, FlagKind kind, uint64_t seq, const char* phase) {
  const Flag* flag = board_.inbound(config_.rank, src_rank, kind);
  const auto epoch = static_cast<Epoch>(seq);
  const WaitLimits wait = limits();
  const std::string peer =
      cat("rank ", board_.global_rank(src_rank), " (last seen: ", board_.last_seen(src_rank), ")");
  // First, since a driver may hold the call that enqueues a wait behind one that lies there.
  if (!device_->is_inline()) {
    watchdog_.watch(
        flag, epoch, wait.deadline,
        cat("no answer from ", peer, " for ", config_.deadline_s, " s (deadline_s) while ", phase));
  }
  const WaitResult result = on_device(phase, [&] { return device_->wait_flag(flag, epoch, wait); });
  settle(result, phase, peer);
}

void Domain::await_event(Event event, const char* phase) {
  if (event.position == 0) return;
  const WaitResult result = on_device(phase, [&] { return device_->wait_event(event, limits()); });
  settle(result, phase, "this rank's own copies");
}

void Domain::await_rows() {
  constexpr const char* kPhase = "waiting for rows and weights from an owner";
  handshake(Level::kRows, kPhase);
  const Route& route = mover_.agreement().route;
  if (route.received.empty()) return;
  if (fence_on(Fence::kDrainOutbox)) {
    const int half = region_half(kReturnsRegion, call_.seq);
    await_event(mover_.last_push(kReturnsRegion, half), "waiting for its outbox");
  }
  for (const int owner : peers_of(route.received, [](const Move& m) { return m.owner_rank; })) {
    if (fence_on(Fence::kWaitRows)) await_flag(owner, kRowsFlag, call_.seq, kPhase);
    if (fence_on(Fence::kWaitWeights)) await_flag(owner, kWeightsFlag, call_.seq, kPhase);
  }
}

void Domain::release(Region region, uint64_t seq) {
  Flag* flag = board_.released(config_.rank, region, region_half(region, seq));
  on_device("handing memory of the arena back",
            [&] { device_->write_flag(StreamKind::kCompute, flag, static_cast<Epoch>(seq)); });
  if (relay_) relay_->expect_release(region, region_half(region, seq), static_cast<Epoch>(seq));
  if (!device_->is_inline()) return;  // the device writes later; movers that wait for it poll
  for (int rank = 0; rank < config_.num_ranks; ++rank) {
    if (rank != config_.rank) board_.bell(rank).ring(kReleaseRing);
  }
}

void Domain::release_weights() {
  if (!mover_.agreement().route.received.empty()) release(kWeightsRegion, call_.seq);
}

void Domain::release_rows() {
  if (!mover_.agreement().route.received.empty()) release(kRowsRegion, call_.seq);
}

void Domain::post_returns() {
  post(Level::kReturns, push_returns(geometry(), mover_.agreement().route));
}

void Domain::await_grad_outbox() {
  if (!fence_on(Fence::kDrainGradOutbox)) return;
  await_event(mover_.last_push(kGradsRegion, 0), "waiting for its grad outbox");
}

void Domain::post_grads(const std::vector<int>& tensors) {
  grads_posted_ = true;
  post(Level::kGrads, push_grads(geometry(), mover_.agreement().route, tensors));
}

void Domain::await_returns() {
  constexpr const char* kPhase = "waiting for results from a helper";
  handshake(Level::kReturns, kPhase);
  const Route& route = mover_.agreement().route;
  for (const int helper : peers_of(route.sent, [](const Move& m) { return m.dst_rank; })) {
    if (fence_on(Fence::kWaitReturns)) await_flag(helper, kReturnsFlag, call_.seq, kPhase);
  }
}

void Domain::release_returns() {
  if (!mover_.agreement().route.sent.empty()) release(kReturnsRegion, call_.seq);
}

void Domain::finish() {
  constexpr const char* kPhase = "submitting the call's last copies";
  await_submitted(grads_posted_ ? Level::kGrads : Level::kReturns, kPhase);
  if (fence_on(Fence::kDrainInputs) && !mover_.agreement().route.sent.empty()) {
    const int half = region_half(kRowsRegion, call_.seq);
    await_event(mover_.last_push(kRowsRegion, half), kPhase);
    await_event(mover_.last_push(kWeightsRegion, 0), kPhase);
  }
  mover_.end();
  in_call_ = false;
}

void Domain::await_grads(uint64_t seq, const std::vector<int>& helper_ranks) {
  constexpr const char* kPhase = "waiting for weight grads from a helper";
  check_usable(kPhase);
  for (const int helper : helper_ranks) {
    if (fence_on(Fence::kWaitGrads)) await_flag(helper, kGradsFlag, seq, kPhase);
  }
}

void Domain::release_grads(uint64_t seq) {
  if (!closed_ && !failure_.poisoned()) release(kGradsRegion, seq);
}

void Domain::fail(const std::string& text) {
  refuse_fork("giving up a call");
  if (closed_) return;
  failure_.poison(text);
  let_go_of_inputs();
  in_call_ = false;
}

std::vector<int64_t> Domain::push_times(int dst, std::size_t bytes, int times) {
  return on_device(kMeasuringLane, [&] { return timed_pushes(dst, bytes, times); });
}

void Domain::prove_lane(std::size_t bytes) {
  pushed_ = std::vector<std::byte>();  // braces alone would keep the memory
  on_device(kProvingLane, [&] { carry_pattern(bytes); });
}

void Domain::drain() {
  constexpr const char* kPhase = "draining the compute stream";
  const auto done = [this] { return device_->compute_drained(); };
  const WaitResult result = device_->wait_host(caller_bell_, done, limits());
  if (result != WaitResult::kTimedOut) return;
  watchdog_.look();  // a wait that lies in the stream is older, and knows for whom
  settle(result, kPhase, "this rank's own device");
}

}  // namespace feplb
