// The search of explore.h: an arena of encoded states in the order found (so it is also the queue),
// and an open-addressing table of their numbers.
#include "explore.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <vector>

namespace protocol {
namespace {

constexpr uint32_t kNobody = 0xffffffffu;
constexpr uint64_t kFree = ~uint64_t{0};
constexpr size_t kBlockBytes = 1 << 22;
constexpr size_t kMaxStateBytes = 512;

uint32_t hash_bytes(const std::string& bytes) {
  uint64_t hash = 0x9e3779b97f4a7c15u ^ bytes.size();
  size_t at = 0;
  for (; at + 8 <= bytes.size(); at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes.data() + at, 8);
    hash = (hash ^ word) * 0xff51afd7ed558ccdu;
    hash ^= hash >> 32;
  }
  uint64_t rest = 0;
  std::memcpy(&rest, bytes.data() + at, bytes.size() - at);
  hash = (hash ^ rest) * 0xff51afd7ed558ccdu;
  return static_cast<uint32_t>(hash >> 32);
}

// How a state was first reached. Its bytes are those of the successor seen from rank `rotation`.
struct Origin {
  uint32_t parent = kNobody;
  Step step;
  uint8_t rotation = 0;
};

// The visited states, numbered in the order found.
class Visited {
 public:
  Visited() : slots_(1 << 16, kFree) {}

  // Adds the state unless it is there.
  void add(const std::string& bytes, const Origin& origin) {
    if (2 * (origins_.size() + 1) > slots_.size()) grow();
    const uint32_t hash = hash_bytes(bytes);
    size_t at = hash & (slots_.size() - 1);
    for (; slots_[at] != kFree; at = (at + 1) & (slots_.size() - 1)) {
      if (slots_[at] >> 32 == hash && is_equal(static_cast<uint32_t>(slots_[at]), bytes)) return;
    }
    slots_[at] = uint64_t{hash} << 32 | origins_.size();
    store(bytes);
    origins_.push_back(origin);
  }

  const char* bytes(uint32_t number) const {
    return blocks_[starts_[number] / kBlockBytes].data() + starts_[number] % kBlockBytes + 2;
  }
  const Origin& origin(uint32_t number) const { return origins_[number]; }
  uint32_t size() const { return static_cast<uint32_t>(origins_.size()); }
  uint64_t num_bytes() const {
    return blocks_.size() * kBlockBytes + slots_.size() * sizeof(uint64_t) +
           origins_.size() * (sizeof(Origin) + sizeof(uint64_t));
  }

 private:
  bool is_equal(uint32_t number, const std::string& other) const {
    const char* own = bytes(number);
    uint16_t length = 0;
    std::memcpy(&length, own - 2, sizeof(length));
    return length == other.size() && std::memcmp(own, other.data(), length) == 0;
  }

  void store(const std::string& bytes) {
    if (blocks_.empty() || blocks_.back().size() + kMaxStateBytes > kBlockBytes) {
      blocks_.emplace_back();
      blocks_.back().reserve(kBlockBytes);
    }
    std::vector<char>& block = blocks_.back();
    starts_.push_back((blocks_.size() - 1) * kBlockBytes + block.size());
    const uint16_t length = static_cast<uint16_t>(bytes.size());
    const char* raw = reinterpret_cast<const char*>(&length);
    block.insert(block.end(), raw, raw + sizeof(length));
    block.insert(block.end(), bytes.begin(), bytes.end());
  }

  void grow() {
    std::vector<uint64_t> larger(slots_.size() * 2, kFree);
    for (uint64_t slot : slots_) {
      if (slot == kFree) continue;
      size_t at = slot >> 32 & (larger.size() - 1);
      while (larger[at] != kFree) at = (at + 1) & (larger.size() - 1);
      larger[at] = slot;
    }
    slots_.swap(larger);
  }

  std::vector<std::vector<char>> blocks_;  // 2 bytes length, state, 2 bytes length, state, ...
  std::deque<uint64_t> starts_;
  std::deque<Origin> origins_;
  std::vector<uint64_t> slots_;  // hash and number
};

class Search {
 public:
  explicit Search(const Model& model) : model_(model) {}

  Result run(uint64_t max_states) {
    add(model_.initial(), Origin());
    std::vector<Step> steps;
    for (uint32_t number = 0; number < visited_.size(); ++number) {
      if (visited_.size() > max_states) {
        result_.is_exhaustive = false;
        break;
      }
      const State state = model_.deserialize(visited_.bytes(number));
      bool is_stuck = false;
      model_.steps(state, &steps, &is_stuck);
      if (is_stuck) return fail({Violation::kDeadlock, 0, 0}, number, nullptr);
      for (const Step& step : steps) {
        State next = state;
        const Finding finding = model_.apply(step, &next);
        if (!finding.is_ok()) return fail(finding, number, &step);
        add(next, {number, step, 0});
      }
    }
    return finish();
  }

 private:
  // Of the states that differ by a rotation of the ranks, the one with the smallest bytes stands
  // for all.
  void add(const State& state, Origin origin) {
    const Config& config = model_.config();
    model_.serialize(state, 0, &bytes_);
    if (config.shape == Shape::kRing && !config.plain) {
      for (int rotation = 1; rotation < config.ranks; ++rotation) {
        model_.serialize(state, rotation, &rotated_);
        if (rotated_ >= bytes_) continue;
        bytes_.swap(rotated_);
        origin.rotation = static_cast<uint8_t>(rotation);
      }
    }
    visited_.add(bytes_, origin);
  }

  Result fail(const Finding& finding, uint32_t number, const Step* last) {
    result_.finding = finding;
    std::vector<Origin> path;
    for (uint32_t at = number; at != kNobody; at = visited_.origin(at).parent) {
      path.push_back(visited_.origin(at));
    }
    std::reverse(path.begin(), path.end());
    if (last != nullptr) path.push_back({number, *last, 0});
    result_.trace = tell(path);
    return finish();
  }

  // Runs the path again from the start, with the ranks' own numbers: rank r of a visited state is
  // rank (r + turned) of the run.
  std::string tell(const std::vector<Origin>& path) const {
    State state = model_.initial();
    std::string text;
    int turned = path.front().rotation;
    for (size_t at = 1; at < path.size(); ++at) {
      Step step = path[at].step;
      step.rank = static_cast<uint8_t>((step.rank + turned) % model_.config().ranks);
      text += "  " + std::to_string(at) + ". " + model_.describe(state, step) + "\n";
      model_.apply(step, &state);
      turned += path[at].rotation;
    }
    return text + "Then:\n" + model_.describe(state);
  }

  Result finish() {
    result_.num_states = visited_.size();
    result_.num_bytes = visited_.num_bytes();
    return result_;
  }

  const Model& model_;
  Visited visited_;
  Result result_;
  std::string bytes_;
  std::string rotated_;
};

}  // namespace

Result explore(const Model& model, uint64_t max_states) { return Search(model).run(max_states); }

}  // namespace protocol
