#include "sim_streams.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "error.h"
#include "fences.h"

namespace feplb {
namespace {

constexpr const char* kStreamNames[kNumStreams] = {"compute", "rows", "weights", "returns"};

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
  at(stream).ops.push_back(std::move(op));
  ++at(stream).accepted;
  if (single_queue_) order_.push_back(stream);
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

Event SimStreams::record(StreamKind stream) const { return Event{stream, at(stream).accepted}; }

SimStreams::Positions SimStreams::accepted() const {
  Positions positions;
  for (std::size_t i = 0; i < kNumStreams; ++i) positions[i] = streams_[i].accepted;
  return positions;
}

bool SimStreams::has_run(const Positions& positions) const {
  for (std::size_t i = 0; i < kNumStreams; ++i) {
    if (streams_[i].finished < positions[i]) return false;
  }
  return true;
}

bool SimStreams::is_satisfied(const Op& op) const {
  if (op.kind == Kind::kEventWait) return at(op.event.stream).finished >= op.event.position;
  if (op.kind != Kind::kFlagWait) return true;
  const Epoch seen = op.awaited->epoch.load(std::memory_order_acquire);
  return epoch_reached(seen, op.epoch) || (!fence_on(Fence::kEpochCheck) && seen != 0);
}

bool SimStreams::can_step(StreamKind stream) const {
  const std::deque<Op>& ops = at(stream).ops;
  if (ops.empty() || (single_queue_ && order_.front() != stream)) return false;
  return is_satisfied(ops.front());
}

bool SimStreams::step(StreamKind stream, SimRandom& random) {
  Op& op = at(stream).ops.front();
  const bool writes_flag = op.kind == Kind::kFlagWrite;
  if (op.kind == Kind::kKernel) op.run();
  if (writes_flag) op.flag->epoch.store(op.epoch, std::memory_order_release);
  while (!op.parts.empty()) {
    CopyOp& part = op.parts[random.below(static_cast<uint32_t>(op.parts.size()))];
    std::memcpy(part.dst, part.src, part.bytes);
    part = op.parts.back();
    op.parts.pop_back();
    if (!op.parts.empty() && random.one_in(4)) return false;
  }
  finish_head(stream);
  return writes_flag;
}

void SimStreams::finish_head(StreamKind stream) {
  at(stream).ops.pop_front();
  ++at(stream).finished;
  if (single_queue_) order_.pop_front();
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
  for (std::size_t i = 0; i < kNumStreams; ++i) {
    if (streams_[i].ops.empty()) continue;
    const Op& op = streams_[i].ops.front();
    std::string head = "could run";
    if (op.kind == Kind::kEventWait) {
      head = cat("waits for ", kStreamNames[static_cast<std::size_t>(op.event.stream)],
                 " to reach ", op.event.position);
    } else if (op.kind == Kind::kFlagWait) {
      head = cat("waits for flag ", name_flag(op.awaited), " >= ", op.epoch, ", it is ",
                 op.awaited->epoch.load());
    }
    text += cat("; ", kStreamNames[i], ": ", head, " (", streams_[i].ops.size() - 1, " behind)");
  }
  return text;
}

}  // namespace feplb
