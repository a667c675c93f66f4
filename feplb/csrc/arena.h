// Where every byte of a call goes. Pure arithmetic over the layers' shapes and a plan.
//
// A rank's arena, in order (each part 64-byte aligned):
//   rows     two halves   peers push rows and side data here (backward: grad rows, rows, side data)
//   returns  two halves   helpers push outputs here (backward: grad rows, grads of side data)
//   outbox   two halves   this rank's results for owners, before they are pushed
//   slots    num_slots    received expert weights
//   grads    num_grad_slots   weight grads that helpers push home
//   grad outbox  num_slots    weight grads this rank computed for owners, before they are pushed
// All layers share it: each part is as large as the layer that needs most.
//
// Worked example, 2 ranks, 2 experts each, plan = [expert 1 of rank 0, 6 rows -> rank 1]:
//   rank 1 receives: rows [0, 6) of its rows half, weight slot 0; its outputs lie in outbox rows
//   [0, 6) and go to rows [0, 6) of rank 0's return half; the weight grads go from rank 1's grad
//   outbox slot 0 to rank 0's grad slot 0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "count_board.h"
#include "plan.h"

namespace feplb {

// One layer's experts, as the arena sees them.
struct LayerShape {
  int32_t num_local_experts = 0;
  std::size_t row_bytes = 0;
  std::vector<std::size_t> side_row_bytes;  // per row_data tensor
  std::vector<std::size_t> weight_bytes;    // per tensor of one expert
  int64_t max_rows = 0;                     // most rows moved into or out of a rank in one call
  Policy policy = Policy::kNone;
  PlanLimits limits;
};

// Offsets, in bytes from the start of a half, of the row-major pieces that travel together.
struct RowPieces {
  std::vector<std::size_t> offset;
  std::vector<std::size_t> row_bytes;
};

// One move as one of its two ranks sees it.
struct RoutedMove {
  Move move;
  int64_t recv_row = 0;    // first row in the helper's rows half and outbox
  int64_t return_row = 0;  // first row in the owner's return half
  int32_t slot = 0;        // weight slot and grad-outbox slot on the helper
  int32_t grad_slot = 0;   // grad slot on the owner
  int64_t rows() const { return move.row_end - move.row_start; }
};

// A plan from one rank's point of view. Both lists keep the plan's order.
struct Route {
  std::vector<RoutedMove> sent;      // this rank owns the expert
  std::vector<RoutedMove> received;  // this rank helps
  int64_t sent_rows = 0;
  int64_t received_rows = 0;
};

int max_local_experts(const std::vector<LayerShape>& layers);

void make_route(const std::vector<Move>& moves, int rank, int num_ranks, Route& route);

class ArenaLayout {
 public:
  ArenaLayout(std::vector<LayerShape> layers, int num_slots, int num_grad_slots);

  std::size_t total_bytes() const { return total_bytes_; }
  // {"rows", bytes}, ... in the order above, for the memory report.
  std::vector<std::pair<std::string, std::size_t>> parts() const;

  const LayerShape& layer(int layer) const { return layers_[static_cast<std::size_t>(layer)]; }

  // What a push at level 1 (rows region) and level 2 (returns region, outbox) consists of.
  const RowPieces& rows_pieces(int layer, CallKind kind) const;
  const RowPieces& return_pieces(int layer, CallKind kind) const;

  std::size_t rows_half(int half) const {
    return rows_ + static_cast<std::size_t>(half) * rows_bytes_;
  }
  std::size_t returns_half(int half) const {
    return returns_ + static_cast<std::size_t>(half) * returns_bytes_;
  }
  std::size_t outbox_half(int half) const {
    return outbox_ + static_cast<std::size_t>(half) * returns_bytes_;
  }
  // Tensor `tensor` of the expert in `slot`.
  std::size_t weight_slot(int layer, int slot, int tensor) const;
  std::size_t grad_slot(int layer, int slot, int tensor) const;
  std::size_t grad_outbox_slot(int layer, int slot, int tensor) const;

 private:
  struct LayerPieces {
    RowPieces forward_rows, backward_rows, forward_returns, backward_returns;
    std::vector<std::size_t> weight_offset;
  };
  std::size_t in_slot(std::size_t base, int layer, int slot, int tensor) const;

  std::vector<LayerShape> layers_;
  std::vector<LayerPieces> pieces_;
  int num_slots_, num_grad_slots_;
  std::size_t rows_bytes_ = 0, returns_bytes_ = 0, slot_bytes_ = 0;
  std::size_t rows_ = 0, returns_ = 0, outbox_ = 0, slots_ = 0, grads_ = 0, grad_outbox_ = 0;
  std::size_t total_bytes_ = 0;
};

}  // namespace feplb
