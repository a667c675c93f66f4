#include "device_cuda.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>

#include "error.h"
#include "stream_marker.h"

namespace feplb::cuda {
namespace {

// Recorded points of one stream that somebody may still wait for. A call records a handful, and
// nobody waits for one of an earlier call but the last push of each region.
constexpr std::size_t kNumEvents = 256;
// The driver takes fewer than 256 memory operations in one call.
constexpr std::size_t kMostMemOps = 255;
// Copies of this size let what is more urgent in between.
constexpr std::size_t kChunkBytes = std::size_t{8} << 20;

// Something the driver made, and the driver that destroys it.
template <typename Thing>
struct Made {
  const Driver* driver = nullptr;
  Thing thing{};
  bool operator!=(const Made& other) const { return thing != other.thing; }
};

struct StreamTraits {
  using Value = Made<Stream>;
  static constexpr Value kNone{};
  static void destroy(Value value) noexcept { value.driver->stream_destroy(value.thing); }
};

struct EventTraits {
  using Value = Made<EventHandle>;
  static constexpr Value kNone{};
  static void destroy(Value value) noexcept { value.driver->event_destroy(value.thing); }
};

struct WordsTraits {
  using Value = Made<Address>;
  static constexpr Value kNone{};
  static void destroy(Value value) noexcept { value.driver->free(value.thing); }
};

// One stream of ours, or the caller's, with the points recorded in it.
struct StreamState {
  Handle<StreamTraits> own;  // empty for the caller's
  Stream stream = nullptr;
  std::array<Handle<EventTraits>, kNumEvents> events;
  uint64_t recorded = 0;
  Event awaited;     // the point it waited for last: a second wait for it says nothing new
  Address word = 0;  // of the GPU's memory, for flags that are copied
};

class CudaDevice final : public feplb::Device {
 public:
  CudaDevice(std::shared_ptr<DeviceContext> context, std::byte* board, std::size_t board_bytes,
             LaneOptions options);
  ~CudaDevice() override { stop(); }

  void bind_compute(std::uintptr_t stream) override;
  bool is_captured(std::uintptr_t stream) override;
  Event record(StreamKind stream) override;
  WaitResult wait_event(Event event, const WaitLimits& limits) override;
  WaitResult wait_flag(const Flag* flag, Epoch epoch, const WaitLimits& limits) override;
  void after_event(StreamKind stream, Event event) override;
  void copy_batch(StreamKind stream, const std::vector<CopyOp>& copies) override;
  void write_flag(StreamKind stream, Flag* flag, Epoch epoch) override;
  void write_flags(StreamKind stream, const std::vector<Flag*>& flags, Epoch epoch) override;
  bool joins_pushes() const override { return true; }
  void mark_compute() override;
  bool compute_drained() override;
  bool is_inline() const override { return false; }
  bool lifts_flags() const override { return options_.flags_in_arenas.empty(); }
  void put(std::byte* dst, const std::byte* src, std::size_t bytes) override;
  void get(std::byte* dst, const std::byte* src, std::size_t bytes) override;
  void stop() noexcept override;

 protected:
  // Streams ring no bell.
  Clock::duration longest_nap() const override { return std::chrono::microseconds(50); }

 private:
  StreamState& at(StreamKind kind) { return streams_[static_cast<std::size_t>(kind)]; }
  const Driver& driver() const { return *driver_; }
  Context context_of(Address address) const;
  void make_stream(StreamState& state);
  void reach(const DeviceContext& peer);
  Address address_of(const Flag* flag) const;
  void write_words(StreamState& state, const std::vector<std::pair<Address, uint32_t>>& words);
  void copy_word(StreamState& state, const std::vector<Address>& targets, uint32_t value);
  void await_word(Address word, uint32_t value);
  void copy_chunks(StreamState& state);
  void give_back();
  void abandon() noexcept;

  std::shared_ptr<DeviceContext> context_;
  std::shared_ptr<const Driver> driver_;
  LaneOptions options_;
  unsigned wait_flags_;
  std::unique_ptr<PinnedMemory> board_;
  StreamMarker marker_;
  std::unique_ptr<PinnedMemory> own_;
  std::vector<std::unique_ptr<DeviceContext>> peers_;  // as options_.peers
  Handle<WordsTraits> words_;                          // one for each stream
  std::array<StreamState, kNumStreams> streams_;
  // Of the batch under way; the mover's alone.
  std::vector<Address> destinations_, sources_;
  std::vector<std::size_t> sizes_;
  bool stopped_ = false;
  pid_t pid_;
};

CudaDevice::CudaDevice(std::shared_ptr<DeviceContext> context, std::byte* board,
                       std::size_t board_bytes, LaneOptions options)
    : context_(std::move(context)),
      driver_(context_->shared_driver()),
      options_(std::move(options)),
      wait_flags_(context_->has(kCanFlushRemoteWrites) ? kWaitAtLeast | kWaitFlush : kWaitAtLeast),
      board_(std::make_unique<PinnedMemory>(context_, board, board_bytes)),
      own_(std::make_unique<PinnedMemory>(context_, marker_.data(), StreamMarker::kBytes)),
      pid_(getpid()) {
  if (options_.copies == CopyCall::kPeer) {
    for (const PeerArena& peer : options_.peers) {
      peers_.push_back(std::make_unique<DeviceContext>(driver_, peer.ordinal));
      reach(*peers_.back());
    }
  }
  const CurrentContext current(*context_);
  WordsTraits::Value words{&driver(), 0};
  driver().check(driver().allocate(&words.thing, kNumStreams * sizeof(uint64_t)),
                 "allocating the flag words");
  words_ = Handle<WordsTraits>(words);
  for (std::size_t i = 0; i < streams_.size(); ++i) {
    StreamState& state = streams_[i];
    state.word = words.thing + i * sizeof(uint64_t);
    for (Handle<EventTraits>& event : state.events) {
      EventTraits::Value made{&driver(), nullptr};
      driver().check(driver().event_create(&made.thing, kEventDisableTiming), "creating an event");
      event = Handle<EventTraits>(made);
    }
    if (static_cast<StreamKind>(i) != StreamKind::kCompute) make_stream(state);
  }
}

// Without it the driver would stage peer copies through the host, and say nothing.
void CudaDevice::reach(const DeviceContext& peer) {
  if (peer.ordinal() == context_->ordinal()) return;
  const CurrentContext current(*context_);
  const Result result = driver().enable_peer_access(peer.handle(), 0);
  if (result != kPeerAccessAlreadyEnabled) {
    driver().check(result, cat("reaching GPU ", peer.ordinal(), " from GPU ", context_->ordinal()));
  }
}

void CudaDevice::make_stream(StreamState& state) {
  StreamTraits::Value made{&driver(), nullptr};
  driver().check(driver().stream_create(&made.thing, kStreamNonBlocking), "creating a stream");
  state.own = Handle<StreamTraits>(made);
  state.stream = made.thing;
}

bool CudaDevice::is_captured(std::uintptr_t stream) {
  const CurrentContext current(*context_);
  int status = 0;
  const Result asked = driver().stream_is_capturing(reinterpret_cast<Stream>(stream), &status);
  if (asked == kCaptureImplicit || status != 0) return true;
  driver().check(asked, "asking whether the compute stream is captured");
  return false;
}

// Halves of the arena are handed on from call to call, flags count up, and compute_drained() speaks
// of one stream: the new one waits for the last mark of the one before, and sets one of its own.
// Only a wait that no release has followed needs the old stream once more.
void CudaDevice::bind_compute(std::uintptr_t stream) {
  StreamState& compute = at(StreamKind::kCompute);
  auto* next = reinterpret_cast<Stream>(stream);
  if (next == compute.stream) return;
  if (marker_.has_open_wait()) mark_compute();
  compute.stream = next;
  compute.awaited = Event{};
  const uint32_t last = marker_.last_mark();
  if (last == 0) return;
  await_word(own_->at(marker_.word()), last);
  mark_compute();
}

Event CudaDevice::record(StreamKind kind) {
  const CurrentContext current(*context_);
  StreamState& state = at(kind);
  const uint64_t position = ++state.recorded;
  driver().check(
      driver().event_record(state.events[position % kNumEvents].get().thing, state.stream),
      "recording an event");
  return Event{kind, position};
}

WaitResult CudaDevice::wait_event(Event event, const WaitLimits& /*limits*/) {
  after_event(StreamKind::kCompute, event);
  return WaitResult::kEnqueued;
}

void CudaDevice::after_event(StreamKind kind, Event event) {
  StreamState& state = at(kind);
  if (event.position == 0) return;
  if (state.awaited.stream == event.stream && state.awaited.position >= event.position) return;
  const CurrentContext current(*context_);
  const StreamState& recorded = at(event.stream);
  driver().check(driver().stream_wait_event(
                     state.stream, recorded.events[event.position % kNumEvents].get().thing, 0),
                 "waiting for an event");
  state.awaited = event;
}

// Where streams write and await it.
Address CudaDevice::address_of(const Flag* flag) const {
  for (const FlagPlace& place : options_.flags_in_arenas) {
    if (flag < place.on_board || flag >= place.on_board + place.count) continue;
    const auto offset = static_cast<std::size_t>(flag - place.on_board) * sizeof(Flag);
    return reinterpret_cast<Address>(place.in_arena) + offset;
  }
  return board_->at(flag);
}

WaitResult CudaDevice::wait_flag(const Flag* flag, Epoch epoch, const WaitLimits& /*limits*/) {
  await_word(address_of(flag), epoch);
  if (!lifts_flags()) {
    const CurrentContext current(*context_);
    write_words(at(StreamKind::kCompute), {{board_->at(flag), epoch}});
  }
  return WaitResult::kEnqueued;
}

void CudaDevice::await_word(Address word, uint32_t value) {
  const CurrentContext current(*context_);
  StreamState& compute = at(StreamKind::kCompute);
  marker_.note_wait();
  driver().check(driver().stream_wait_value(compute.stream, word, value, wait_flags_),
                 "enqueueing the wait for a flag");
}

void CudaDevice::copy_batch(StreamKind kind, const std::vector<CopyOp>& copies) {
  const CurrentContext current(*context_);
  destinations_.clear();
  sources_.clear();
  sizes_.clear();
  for (const CopyOp& copy : copies) {
    for (std::size_t done = 0; done < copy.bytes; done += kChunkBytes) {
      destinations_.push_back(reinterpret_cast<Address>(copy.dst) + done);
      sources_.push_back(reinterpret_cast<Address>(copy.src) + done);
      sizes_.push_back(std::min(kChunkBytes, copy.bytes - done));
    }
  }
  if (!sizes_.empty()) copy_chunks(at(kind));
}

void CudaDevice::copy_chunks(StreamState& state) {
  if (options_.copies == CopyCall::kBatch) {
    CopyAttributes attributes;
    std::memset(&attributes, 0, sizeof(attributes));
    attributes.source_access_order = kSourceInStreamOrder;
    attributes.flags = kPreferOverlap;
    std::size_t first = 0, failed = 0;
    driver().check(
        driver().copy_batch(destinations_.data(), sources_.data(), sizes_.data(), sizes_.size(),
                            &attributes, &first, 1, &failed, state.stream),
        cat("submitting a batch of ", sizes_.size(), " copies"));
    return;
  }
  for (std::size_t i = 0; i < sizes_.size(); ++i) {
    const Result result =
        options_.copies == CopyCall::kPeer
            ? driver().copy_peer_async(destinations_[i], context_of(destinations_[i]), sources_[i],
                                       context_->handle(), sizes_[i], state.stream)
            : driver().copy_async(destinations_[i], sources_[i], sizes_[i], state.stream);
    driver().check(result, cat("submitting a copy of ", sizes_[i], " bytes"));
  }
}

Context CudaDevice::context_of(Address address) const {
  const auto* at = reinterpret_cast<const std::byte*>(address);
  for (std::size_t i = 0; i < peers_.size(); ++i) {
    const PeerArena& peer = options_.peers[i];
    if (at >= peer.data && at < peer.data + peer.bytes) return peers_[i]->handle();
  }
  return context_->handle();
}

void CudaDevice::write_flag(StreamKind kind, Flag* flag, Epoch epoch) {
  write_flags(kind, {flag}, epoch);
}

// A release on the compute stream comes after the waits for what was released: it tells, in the
// same call, that they have passed.
void CudaDevice::write_flags(StreamKind kind, const std::vector<Flag*>& flags, Epoch epoch) {
  std::vector<std::pair<Address, uint32_t>> words;
  std::vector<Address> of_peers;
  for (const Flag* flag : flags) {
    const Address address = address_of(flag);
    if (lifts_flags() || address == board_->at(flag)) {
      words.emplace_back(address, epoch);
    } else {
      of_peers.push_back(address);
    }
  }
  if (kind == StreamKind::kCompute)
    words.emplace_back(own_->at(marker_.word()), marker_.next_mark());
  const CurrentContext current(*context_);
  if (!of_peers.empty()) copy_word(at(kind), of_peers, epoch);
  if (!words.empty()) write_words(at(kind), words);
}

// To words of other GPUs, which lie side by side in no call but a batch.
void CudaDevice::copy_word(StreamState& state, const std::vector<Address>& targets,
                           uint32_t value) {
  driver().check(driver().stream_write_value(state.stream, state.word, value, kWriteDefault),
                 "enqueueing a flag");
  destinations_ = targets;
  sources_.assign(targets.size(), state.word);
  sizes_.assign(targets.size(), sizeof(value));
  copy_chunks(state);
}

void CudaDevice::write_words(StreamState& state,
                             const std::vector<std::pair<Address, uint32_t>>& words) {
  if (options_.flags == FlagCall::kMemOps) {
    std::vector<MemOp> ops;
    for (const auto& [address, value] : words) {
      MemOp op;
      std::memset(&op, 0, sizeof(op));
      op.value.operation = kWriteValue32;
      op.value.address = address;
      op.value.value = value;
      op.value.flags = kWriteDefault;
      ops.push_back(op);
    }
    for (std::size_t at = 0; at < ops.size(); at += kMostMemOps) {
      const auto count = static_cast<unsigned>(std::min(kMostMemOps, ops.size() - at));
      driver().check(driver().stream_mem_ops(state.stream, count, ops.data() + at, 0),
                     "enqueueing flags");
    }
    return;
  }
  for (const auto& [address, value] : words) {
    const Address target = options_.flags == FlagCall::kCopy ? state.word : address;
    driver().check(driver().stream_write_value(state.stream, target, value, kWriteDefault),
                   "enqueueing a flag");
    if (options_.flags == FlagCall::kWrite) continue;
    driver().check(driver().copy_async(address, state.word, sizeof(value), state.stream),
                   "enqueueing a flag's copy");
  }
}

void CudaDevice::mark_compute() {
  const CurrentContext current(*context_);
  write_words(at(StreamKind::kCompute), {{own_->at(marker_.word()), marker_.next_mark()}});
}

// Plain memory only: a driver call might queue behind the very wait that is to be lifted.
bool CudaDevice::compute_drained() { return marker_.is_past_all_waits(); }

void CudaDevice::put(std::byte* dst, const std::byte* src, std::size_t bytes) {
  const CurrentContext current(*context_);
  driver().check(driver().copy_to_device(reinterpret_cast<Address>(dst), src, bytes),
                 "copying to the GPU");
}

void CudaDevice::get(std::byte* dst, const std::byte* src, std::size_t bytes) {
  const CurrentContext current(*context_);
  driver().check(driver().copy_to_host(dst, reinterpret_cast<Address>(src), bytes),
                 "copying from the GPU");
}

// A compute stream that has not drained holds on to everything: waits that lie in it would read
// memory that is gone. Our streams wait for nothing else, so they end.
void CudaDevice::stop() noexcept {
  if (stopped_) return;
  stopped_ = true;
  if (getpid() != pid_ || !compute_drained()) {
    abandon();
    return;
  }
  try {
    give_back();
    context_.reset();
  } catch (const Error&) {
    abandon();
  }
}

void CudaDevice::give_back() {
  const CurrentContext current(*context_);
  for (StreamState& state : streams_) {
    if (state.own) driver().stream_synchronize(state.stream);
    state.own.reset();
    for (Handle<EventTraits>& event : state.events) event.reset();
  }
  words_.reset();
  board_.reset();
  own_.reset();
  peers_.clear();
}

void CudaDevice::abandon() noexcept {
  static_cast<void>(board_.release());
  static_cast<void>(own_.release());
  marker_.abandon();
  words_.release();
  for (StreamState& state : streams_) {
    state.own.release();
    for (Handle<EventTraits>& event : state.events) event.release();
  }
}

template <typename Call, std::size_t N>
Call call_from(const std::string& name, const char* what,
               const std::array<std::pair<const char*, Call>, N>& known) {
  for (const auto& [text, call] : known) {
    if (name == text) return call;
  }
  throw UserError(cat(what, "=\"", name, "\" is not known"));
}

template <typename Call, std::size_t N>
const char* name_of(Call call, const std::array<std::pair<const char*, Call>, N>& known) {
  for (const auto& [text, other] : known) {
    if (call == other) return text;
  }
  return "unknown";
}

constexpr std::array<std::pair<const char*, CopyCall>, 3> kCopyCalls{
    {{"batch", CopyCall::kBatch}, {"peer", CopyCall::kPeer}, {"plain", CopyCall::kPlain}}};
constexpr std::array<std::pair<const char*, FlagCall>, 3> kFlagCalls{
    {{"memops", FlagCall::kMemOps}, {"write", FlagCall::kWrite}, {"copy", FlagCall::kCopy}}};

}  // namespace

CopyCall copy_call_from(const std::string& name, const Driver& driver) {
  const bool has_batches = driver.copy_batch != nullptr;
  if (name == "auto") return has_batches ? CopyCall::kBatch : CopyCall::kPlain;
  const CopyCall call = call_from(name, "copy_call", kCopyCalls);
  if (call == CopyCall::kBatch && !has_batches) {
    throw Error(cat("copy_call=\"batch\" needs a driver of CUDA 12.8 or newer, this one supports ",
                    driver.version() / 1000, ".", driver.version() % 1000 / 10,
                    ". Update the driver, or use \"plain\"."));
  }
  return call;
}

FlagCall flag_call_from(const std::string& name) {
  return name == "auto" ? FlagCall::kMemOps : call_from(name, "flag_call", kFlagCalls);
}

const char* copy_call_name(CopyCall call) { return name_of(call, kCopyCalls); }
const char* flag_call_name(FlagCall call) { return name_of(call, kFlagCalls); }

std::unique_ptr<feplb::Device> make_cuda_device(std::shared_ptr<DeviceContext> context,
                                                std::byte* board, std::size_t board_bytes,
                                                LaneOptions options) {
  return std::make_unique<CudaDevice>(std::move(context), board, board_bytes, std::move(options));
}

}  // namespace feplb::cuda
