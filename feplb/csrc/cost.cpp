#include "cost.h"

#include <algorithm>

namespace feplb {
namespace {

class Call {
 public:
  Call(const PlanInput& input, const UnitCosts& costs, const std::vector<Move>& moves,
       CostScratch& scratch, bool backward)
      : input_(input),
        c_(costs),
        moves_(moves),
        s_(scratch),
        backward_(backward),
        n_(size_t(input.num_ranks)) {
    s_.engine.assign(n_, costs.start);
  }

  int64_t slowest() {
    push();
    keep();
    receive();
    steal();
    compute();
    bring_home();
    for (size_t r = 0; r < n_; ++r)
      s_.ends[r] = std::max(s_.ends[r], s_.home[r]) + s_.sent[r] * c_.row_place;
    if (backward_) add_late();
    return n_ > 0 ? *std::max_element(s_.ends.begin(), s_.ends.end()) : 0;
  }

 private:
  static int64_t rows_of(const Move& move) { return int64_t{move.row_end} - move.row_start; }
  int64_t per_row_push() const { return backward_ ? c_.row_push_backward : c_.row_push; }
  int64_t per_row_back() const { return backward_ ? c_.row_return_backward : c_.row_return; }

  // How long a destination takes to take in what its sources send in `duration`.
  int64_t inbound(int64_t duration) const { return duration * c_.inbound_permille / 1000; }

  // Queues a copy that may start at `ready`; when it has arrived.
  int64_t copy(int32_t source, int64_t ready, int64_t duration) {
    int64_t& engine = s_.engine[size_t(source)];
    engine = std::max(engine, ready) + (duration + c_.copy) * (1 + c_.shares_core);
    return engine;
  }

  // Level 1, rows first.
  void push() {
    const int64_t per_row = per_row_push();
    s_.arrived.assign(n_, 0);
    s_.inbound.assign(n_, 0);
    for (const Move& move : moves_) {
      copy(move.owner_rank, c_.start, rows_of(move) * per_row);
      s_.inbound[size_t(move.dst_rank)] += rows_of(move) * per_row;
    }
    for (const Move& move : moves_) {
      int64_t& arrived = s_.arrived[size_t(move.dst_rank)];
      arrived = std::max(arrived, copy(move.owner_rank, c_.start, c_.weight_push));
      s_.inbound[size_t(move.dst_rank)] += c_.weight_push;
    }
    for (size_t r = 0; r < n_; ++r)
      s_.arrived[r] =
          s_.inbound[r] > 0 ? std::max(s_.arrived[r], c_.start + inbound(s_.inbound[r])) : 0;
  }

  int64_t gemm(int64_t rows, int64_t row_time) const {
    if (rows == 0) return 0;
    const int64_t tiles = (rows + c_.tile_rows - 1) / c_.tile_rows;
    return std::max(tiles * c_.tile_rows * row_time, c_.weight_read) + c_.gemm;
  }

  int64_t segment(int64_t rows) const {
    return backward_ ? gemm(rows, c_.row_dgrad) + gemm(rows, c_.row_wgrad)
                     : gemm(rows, c_.row_forward);
  }

  void keep() {
    const size_t width = size_t(input_.num_local_experts);
    s_.left.assign(input_.counts, input_.counts + n_ * width);
    for (const Move& move : moves_)
      s_.left[size_t(move.owner_rank) * width + size_t(move.expert_idx)] -= int32_t(rows_of(move));
    s_.kept.assign(n_, 0);
    for (size_t r = 0; r < n_; ++r)
      for (size_t e = 0; e < width; ++e) s_.kept[r] += segment(s_.left[r * width + e]);
  }

  void receive() {
    s_.first.assign(n_, 0);
    s_.second.assign(n_, 0);
    s_.sent.assign(n_, 0);
    s_.got.assign(n_, 0);
    for (const Move& move : moves_) {
      const size_t dst = size_t(move.dst_rank);
      s_.first[dst] += gemm(rows_of(move), backward_ ? c_.row_dgrad : c_.row_forward);
      s_.second[dst] += backward_ ? gemm(rows_of(move), c_.row_wgrad) : 0;
      s_.sent[size_t(move.owner_rank)] += rows_of(move);
      s_.got[dst] += rows_of(move);
    }
    s_.back_out = s_.got;
    s_.back_in = s_.sent;
    for (const Move& move : moves_) {
      const size_t owner = size_t(move.owner_rank), dst = size_t(move.dst_rank);
      s_.back_out[owner] = std::max(s_.back_out[owner], std::min(s_.got[dst], s_.sent[owner]));
      s_.back_in[dst] = std::max(s_.back_in[dst], s_.sent[owner]);
    }
  }

  // Of each rank's core, by its copies of level 1, and by those of levels 2 and 3.
  void steal() {
    s_.stolen.assign(n_, 0);
    s_.stolen_later.assign(n_, 0);
    for (const Move& move : moves_) {
      const int64_t push = rows_of(move) * per_row_push() + c_.weight_push + 2 * c_.copy;
      const int64_t back = rows_of(move) * per_row_back() + c_.copy;
      const int64_t grads = backward_ ? c_.grad_push + c_.copy : 0;
      s_.stolen[size_t(move.owner_rank)] += push * c_.shares_core;
      s_.stolen_later[size_t(move.dst_rank)] += (back + grads) * c_.shares_core;
    }
  }

  void compute() {
    s_.computed.resize(n_);
    s_.ends.resize(n_);
    for (size_t r = 0; r < n_; ++r) {
      const int64_t way_back =
          std::max(s_.back_out[r] * per_row_back(), inbound(s_.back_in[r] * per_row_back()));
      const int64_t kept_b = std::min(s_.kept[r], way_back);
      const int64_t kept_a = s_.kept[r] - kept_b + std::min(s_.kept[r], s_.stolen[r]);
      const int64_t lost = std::min(s_.kept[r] + s_.second[r], s_.stolen_later[r]);
      s_.computed[r] = std::max(kept_a, s_.arrived[r]) + s_.first[r];
      s_.ends[r] = s_.computed[r] + s_.second[r] + kept_b + lost;
    }
  }

  // Level 2; an owner takes in no faster than its link, from the first output that is ready.
  void bring_home() {
    s_.home.assign(n_, 0);
    s_.inbound.assign(n_, 0);
    s_.arrived.assign(n_, 0);  // from here on: when the first output for an owner is ready
    for (const Move& move : moves_) {
      const size_t owner = size_t(move.owner_rank);
      const int64_t ready = s_.computed[size_t(move.dst_rank)];
      const int64_t width = rows_of(move) * per_row_back();
      s_.home[owner] = std::max(s_.home[owner], copy(move.dst_rank, ready, width));
      s_.arrived[owner] = s_.inbound[owner] > 0 ? std::min(s_.arrived[owner], ready) : ready;
      s_.inbound[owner] += width;
    }
    for (size_t r = 0; r < n_; ++r)
      s_.home[r] = std::max(s_.home[r], s_.arrived[r] + inbound(s_.inbound[r]));
  }

  // Level 3: weight grads arrive in the late window; behind it an owner adds all that it has got.
  void add_late() {
    s_.arrived.assign(n_, 0);
    s_.home.assign(n_, 0);  // from here on: how long the adds take
    for (const Move& move : moves_) {
      const size_t dst = size_t(move.dst_rank), owner = size_t(move.owner_rank);
      const int64_t ready = s_.computed[dst] + s_.second[dst];
      s_.arrived[owner] = std::max(s_.arrived[owner], copy(move.dst_rank, ready, c_.grad_push));
      s_.home[owner] += c_.grad_add;
    }
    for (size_t r = 0; r < n_; ++r)
      s_.ends[r] = std::max(s_.ends[r], s_.arrived[r] - c_.late_window) + s_.home[r];
  }

  const PlanInput& input_;
  const UnitCosts& c_;
  const std::vector<Move>& moves_;
  CostScratch& s_;
  const bool backward_;
  const size_t n_;
};

}  // namespace

int64_t predict(const PlanInput& input, const UnitCosts& costs, const std::vector<Move>& moves,
                CostScratch& scratch) {
  return Call(input, costs, moves, scratch, false).slowest() +
         Call(input, costs, moves, scratch, true).slowest();
}

}  // namespace feplb
