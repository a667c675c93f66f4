#include "sim_streams.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "error.h"
#include "fences.h"

namespace feplb {
namespace {

constexpr const char* kStreamNames[kNumSimStreams] = {"compute", "rows", "weights", "returns",
                                                      "second compute"};

// An event of the second compute stream has this bit in its position.
constexpr uint64_t kSecondCompute = uint64_t{1} << 62;

// At least two parts, torn at any byte.
void tear(const CopyOp& copy, SimRandom& random, std::vector<CopyOp>& parts) {
  std::size_t begin = 0;
  while (begin < copy.bytes) {
    const std::size_t left = copy.bytes - begin;
    const bool whole = left == 1 || (begin > 0 && random.one_in(2));
    const std::size_t bytes =
        whole ? left
              : 1 + random.below(static_cast<uint32_t>(std::min<std::size_t>(left, 1 << 30)) - 1);
    parts.push_back(CopyOp{copy.dst + begin, copy.src + begin, bytes});
    begin += bytes;
  }
}

}  // namespace

uint64_t SimRandom::next() {
  state_ += 0x9e3779b97f4a7c15u;
  uint64_t mixed = state_;
  mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9u;
  mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebu;
  return mixed ^ (mixed >> 31);
}

void SimStreams::add(StreamKind stream, Op op) {
  const int idx = index_of(stream);
  at(idx).ops.push_back(std::move(op));
  ++at(idx).accepted;
  if (single_queue_) order_.push_back(idx);
}

void SimStreams::add_kernel(std::function<void()> run) {
  Op op;
  op.run = std::move(run);
  add(StreamKind::kCompute, std::move(op));
}

void SimStreams::add_copies(StreamKind stream, const std::vector<CopyOp>& copies,
                            SimRandom& random) {
  Op op;
  op.kind = Kind::kCopies;
  for (const CopyOp& copy : copies) tear(copy, random, op.parts);
  add(stream, std::move(op));
}

void SimStreams::add_flag_write(StreamKind stream, Flag* flag, Epoch epoch) {
  Op op;
  op.kind = Kind::kFlagWrite;
  op.flag = flag;
  op.epoch = epoch;
  add(stream, std::move(op));
}

void SimStreams::add_event_wait(StreamKind stream, Event event) {
  Op op;
  op.kind = Kind::kEventWait;
  op.event = event;
  add(stream, std::move(op));
}

void SimStreams::add_flag_wait(const Flag* flag, Epoch epoch) {
  Op op;
  op.kind = Kind::kFlagWait;
  op.awaited = flag;
  op.epoch = epoch;
  add(StreamKind::kCompute, std::move(op));
}

Event SimStreams::record(StreamKind stream) const {
  const int idx = index_of(stream);
  return Event{stream, at(idx).accepted | (idx < kNumStreams ? 0 : kSecondCompute)};
}

bool SimStreams::has_fired(const Event& event) const {
  const bool is_second = (event.position & kSecondCompute) != 0;
  const int idx = is_second ? kNumStreams : static_cast<int>(event.stream);
  return at(idx).finished >= (event.position & ~kSecondCompute);
}

SimStreams::Positions SimStreams::accepted() const {
  Positions positions;
  for (std::size_t i = 0; i < kNumSimStreams; ++i) positions[i] = streams_[i].accepted;
  return positions;
}

bool SimStreams::has_run(const Positions& positions) const {
  for (std::size_t i = 0; i < kNumSimStreams; ++i) {
    if (streams_[i].finished < positions[i]) return false;
  }
  return true;
}

bool SimStreams::is_satisfied(const Op& op) const {
  if (op.kind == Kind::kEventWait) return has_fired(op.event);
  if (op.kind != Kind::kFlagWait) return true;
  const Epoch seen = op.awaited->epoch.load(std::memory_order_acquire);
  return epoch_reached(seen, op.epoch) || (!fence_on(Fence::kEpochCheck) && seen != 0);
}

bool SimStreams::can_step(int idx) const {
  const std::deque<Op>& ops = at(idx).ops;
  if (ops.empty() || (single_queue_ && order_.front() != idx)) return false;
  return is_satisfied(ops.front());
}

bool SimStreams::step(int idx, SimRandom& random, const SeeCopy& see_copy) {
  Op& op = at(idx).ops.front();
  const bool writes_flag = op.kind == Kind::kFlagWrite;
  if (op.kind == Kind::kKernel) op.run();
  if (writes_flag) op.flag->epoch.store(op.epoch, std::memory_order_release);
  while (!op.parts.empty()) {
    CopyOp& part = op.parts[random.below(static_cast<uint32_t>(op.parts.size()))];
    if (see_copy) see_copy(part);
    std::memcpy(part.dst, part.src, part.bytes);
    part = op.parts.back();
    op.parts.pop_back();
    if (!op.parts.empty() && random.one_in(4)) return false;
  }
  at(idx).ops.pop_front();
  ++at(idx).finished;
  if (single_queue_) order_.pop_front();
  return writes_flag;
}

void SimStreams::vanish() {
  for (Stream& stream : streams_) {
    stream.ops.clear();
    stream.finished = stream.accepted;
  }
  order_.clear();
}

std::string SimStreams::describe(const NameFlag& name_flag) const {
  std::string text;
  for (std::size_t i = 0; i < kNumSimStreams; ++i) {
    if (streams_[i].ops.empty()) continue;
    const Op& op = streams_[i].ops.front();
    std::string head = "could run";
    if (op.kind == Kind::kEventWait) {
      head = cat("waits for an event of ", kStreamNames[static_cast<std::size_t>(op.event.stream)]);
    } else if (op.kind == Kind::kFlagWait) {
      head = cat("waits for flag ", name_flag(op.awaited), " >= ", op.epoch, ", it is ",
                 op.awaited->epoch.load());
    }
    text += cat("; ", kStreamNames[i], ": ", head, " (", streams_[i].ops.size() - 1, " behind)");
  }
  return text;
}

}  // namespace feplb
