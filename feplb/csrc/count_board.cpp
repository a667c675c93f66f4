#include "count_board.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "error.h"

namespace feplb {
namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kErrorChars = 384;

std::size_t round_up(std::size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

void store_text(char (&target)[kErrorChars], const std::string& text) {
  const std::size_t length = std::min(text.size(), kErrorChars - 1);
  std::memcpy(target, text.data(), length);
  target[length] = '\0';
}

}  // namespace

const char* call_kind_name(CallKind kind) {
  if (kind == CallKind::kCheck) return "check";
  return kind == CallKind::kForward ? "forward" : "backward";
}

int region_half(Region region, uint64_t seq) {
  return region == kRowsRegion || region == kReturnsRegion ? static_cast<int>(seq & 1) : 0;
}

// A header as it lies in shared memory; the counts follow it.
struct CountBoard::Slot {
  std::atomic<uint64_t> seq;
  // Read for messages at any time: what they say may then be of the call after the next.
  std::atomic<int32_t> kind;
  std::atomic<int32_t> layer;
  std::atomic<int64_t> micro_batch;
  uint64_t config_hash;
  uint64_t plan_hash;
  uint32_t grad_bits;
  uint32_t num_counts;
  char error[kErrorChars];

  int32_t* counts() { return reinterpret_cast<int32_t*>(this + 1); }
  const int32_t* counts() const { return reinterpret_cast<const int32_t*>(this + 1); }
};

struct alignas(kLine) CountBoard::AbortRecord {
  std::atomic<uint32_t> state;  // 0 none, 1 being written, 2 readable
  int32_t rank;
  char text[kErrorChars];
};

// A rank's fixed part; its inbound flags and two header slots follow.
struct alignas(kLine) CountBoard::RankBlock {
  Bell bell;
  std::atomic<uint32_t> state;
  std::atomic<uint64_t> last_seq;
  alignas(kLine) Flag released[kNumRegions][kNumHalves];
};

namespace {
std::size_t flags_bytes(int num_ranks) {
  return round_up(sizeof(Flag) * CountBoard::num_inbound(num_ranks));
}
}  // namespace

std::size_t CountBoard::bytes_needed(int num_ranks, int max_local_experts) {
  const std::size_t slot =
      round_up(sizeof(Slot) + sizeof(int32_t) * static_cast<std::size_t>(max_local_experts));
  const std::size_t per_rank = round_up(sizeof(RankBlock)) + flags_bytes(num_ranks) + 2 * slot;
  return round_up(sizeof(AbortRecord)) + per_rank * static_cast<std::size_t>(num_ranks);
}

CountBoard::CountBoard(std::byte* memory, int num_ranks, int max_local_experts,
                       std::vector<int> global_ranks)
    : memory_(memory),
      num_ranks_(num_ranks),
      max_local_experts_(max_local_experts),
      global_ranks_(std::move(global_ranks)) {
  static_assert(std::atomic<uint64_t>::is_always_lock_free, "headers must be lock free");
  const std::size_t num_given = global_ranks_.size();
  FEPLB_CHECK(num_given == 0 || num_given == static_cast<std::size_t>(num_ranks),
              "global_ranks must be ", num_ranks, ", got ", num_given);
}

int CountBoard::global_rank(int rank) const {
  return global_ranks_.empty() ? rank : global_ranks_[static_cast<std::size_t>(rank)];
}

CountBoard::RankBlock& CountBoard::block(int rank) const {
  FEPLB_CHECK(rank >= 0 && rank < num_ranks_, "rank must be < ", num_ranks_, ", got ", rank);
  const std::size_t per_rank =
      (bytes_needed(num_ranks_, max_local_experts_) - round_up(sizeof(AbortRecord))) /
      static_cast<std::size_t>(num_ranks_);
  return *reinterpret_cast<RankBlock*>(memory_ + round_up(sizeof(AbortRecord)) +
                                       per_rank * static_cast<std::size_t>(rank));
}

CountBoard::Slot& CountBoard::slot(int rank, uint64_t seq) const {
  const std::size_t bytes =
      round_up(sizeof(Slot) + sizeof(int32_t) * static_cast<std::size_t>(max_local_experts_));
  std::byte* slots = reinterpret_cast<std::byte*>(&block(rank)) + round_up(sizeof(RankBlock)) +
                     flags_bytes(num_ranks_);
  return *reinterpret_cast<Slot*>(slots + bytes * (seq & 1));
}

void CountBoard::publish(int rank, const CallHeader& header) {
  FEPLB_CHECK(static_cast<int>(header.counts.size()) <= max_local_experts_,
              "counts must be <= ", max_local_experts_, ", got ", header.counts.size());
  Slot& target = slot(rank, header.seq);
  target.kind.store(static_cast<int32_t>(header.kind), std::memory_order_relaxed);
  target.layer.store(header.layer, std::memory_order_relaxed);
  target.micro_batch.store(header.micro_batch, std::memory_order_relaxed);
  target.config_hash = header.config_hash;
  target.plan_hash = header.plan_hash;
  target.grad_bits = header.grad_bits;
  target.num_counts = static_cast<uint32_t>(header.counts.size());
  store_text(target.error, header.error);
  std::copy(header.counts.begin(), header.counts.end(), target.counts());
  target.seq.store(header.seq);
  block(rank).last_seq.store(header.seq, std::memory_order_release);
  if (rank == echo_rank_) echo_->published(header);
}

uint64_t CountBoard::published_seq(int rank, uint64_t seq) const {
  return slot(rank, seq).seq.load();
}

void CountBoard::read(int rank, uint64_t seq, CallHeader& header) const {
  const Slot& source = slot(rank, seq);
  header.seq = source.seq.load(std::memory_order_acquire);
  FEPLB_CHECK(header.seq == seq, "header of rank ", rank, " must be seq ", seq, ", got ",
              header.seq);
  header.kind = static_cast<CallKind>(source.kind.load(std::memory_order_relaxed));
  header.layer = source.layer.load(std::memory_order_relaxed);
  header.micro_batch = source.micro_batch.load(std::memory_order_relaxed);
  header.config_hash = source.config_hash;
  header.plan_hash = source.plan_hash;
  header.grad_bits = source.grad_bits;
  header.error = source.error;
  header.counts.assign(source.counts(), source.counts() + source.num_counts);
}

std::string CountBoard::last_seen(int rank) const {
  const uint64_t seq = block(rank).last_seq.load(std::memory_order_acquire);
  if (seq == 0) return "no call yet";
  const Slot& source = slot(rank, seq);
  const auto kind = static_cast<CallKind>(source.kind.load(std::memory_order_relaxed));
  if (kind == CallKind::kCheck) return "check()";
  return cat(call_kind_name(kind), " of layer ", source.layer.load(std::memory_order_relaxed),
             ", micro-batch ", source.micro_batch.load(std::memory_order_relaxed));
}

Flag* CountBoard::inbound(int rank, int src_rank, FlagKind kind) const {
  FEPLB_CHECK(src_rank >= 0 && src_rank < num_ranks_, "source rank must be < ", num_ranks_,
              ", got ", src_rank);
  auto* flags = reinterpret_cast<Flag*>(reinterpret_cast<std::byte*>(&block(rank)) +
                                        round_up(sizeof(RankBlock)));
  return flags + src_rank * kNumFlagKinds + kind;
}

Flag* CountBoard::released(int rank, Region region, int half) const {
  return &block(rank).released[region][half];
}

Bell& CountBoard::bell(int rank) const { return block(rank).bell; }

RankState CountBoard::state(int rank) const {
  return static_cast<RankState>(block(rank).state.load(std::memory_order_acquire));
}

void CountBoard::set_state(int rank, RankState state) {
  block(rank).state.store(static_cast<uint32_t>(state), std::memory_order_release);
  if (rank == echo_rank_) echo_->state_set(state);
}

bool CountBoard::abort(int rank, const std::string& text) {
  auto& record = *reinterpret_cast<AbortRecord*>(memory_);
  uint32_t none = 0;
  if (!record.state.compare_exchange_strong(none, 1, std::memory_order_acq_rel)) return false;
  record.rank = rank;
  store_text(record.text, text);
  record.state.store(2, std::memory_order_release);
  if (rank == echo_rank_) echo_->aborted(text);
  return true;
}

bool CountBoard::aborted() const {
  const auto& record = *reinterpret_cast<const AbortRecord*>(memory_);
  return record.state.load(std::memory_order_acquire) == 2;
}

std::string CountBoard::abort_text() const {
  const auto& record = *reinterpret_cast<const AbortRecord*>(memory_);
  return cat("rank ", global_rank(record.rank), ": ", record.text);
}

}  // namespace feplb
