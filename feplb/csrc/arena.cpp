#include "arena.h"

#include <algorithm>

#include "error.h"

namespace feplb {
namespace {

constexpr std::size_t kAlignment = 64;

std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Lays `row_bytes[i] * max_rows` bytes one after the other; returns their sum.
std::size_t lay_out(const std::vector<std::size_t>& row_bytes, int64_t max_rows,
                    RowPieces& pieces) {
  std::size_t end = 0;
  pieces.row_bytes = row_bytes;
  for (const std::size_t bytes : row_bytes) {
    pieces.offset.push_back(end);
    end += aligned(bytes * static_cast<std::size_t>(max_rows));
  }
  return end;
}

std::vector<std::size_t> joined(std::vector<std::size_t> head,
                                const std::vector<std::size_t>& tail) {
  head.insert(head.end(), tail.begin(), tail.end());
  return head;
}

}  // namespace

int max_local_experts(const std::vector<LayerShape>& layers) {
  int most = 0;
  for (const LayerShape& shape : layers) most = std::max(most, shape.num_local_experts);
  return most;
}

void make_route(const std::vector<Move>& moves, int rank, int num_ranks, Route& route) {
  std::vector<int64_t> recv_rows(static_cast<std::size_t>(num_ranks), 0);
  std::vector<int64_t> return_rows(recv_rows), slots(recv_rows), grad_slots(recv_rows);
  route.sent.clear();
  route.received.clear();
  for (const Move& move : moves) {
    const auto owner = static_cast<std::size_t>(move.owner_rank);
    const auto helper = static_cast<std::size_t>(move.dst_rank);
    RoutedMove routed;
    routed.move = move;
    routed.recv_row = recv_rows[helper];
    routed.return_row = return_rows[owner];
    routed.slot = static_cast<int32_t>(slots[helper]++);
    routed.grad_slot = static_cast<int32_t>(grad_slots[owner]++);
    recv_rows[helper] += routed.rows();
    return_rows[owner] += routed.rows();
    if (move.owner_rank == rank) route.sent.push_back(routed);
    if (move.dst_rank == rank) route.received.push_back(routed);
  }
  route.sent_rows = return_rows[static_cast<std::size_t>(rank)];
  route.received_rows = recv_rows[static_cast<std::size_t>(rank)];
}

ArenaLayout::ArenaLayout(std::vector<LayerShape> layers, int num_slots, int num_grad_slots)
    : layers_(std::move(layers)), num_slots_(num_slots), num_grad_slots_(num_grad_slots) {
  for (const LayerShape& shape : layers_) {
    LayerPieces pieces;
    const std::vector<std::size_t> rows = joined({shape.row_bytes}, shape.side_row_bytes);
    lay_out(rows, shape.max_rows, pieces.forward_rows);
    const std::size_t backward =
        lay_out(joined({shape.row_bytes}, rows), shape.max_rows, pieces.backward_rows);
    lay_out({shape.row_bytes}, shape.max_rows, pieces.forward_returns);
    const std::size_t returns = lay_out(rows, shape.max_rows, pieces.backward_returns);
    std::size_t slot = 0;
    for (const std::size_t bytes : shape.weight_bytes) {
      pieces.weight_offset.push_back(slot);
      slot += aligned(bytes);
    }
    rows_bytes_ = std::max(rows_bytes_, backward);
    returns_bytes_ = std::max(returns_bytes_, returns);
    slot_bytes_ = std::max(slot_bytes_, slot);
    pieces_.push_back(std::move(pieces));
  }
  returns_ = 2 * rows_bytes_;
  outbox_ = returns_ + 2 * returns_bytes_;
  slots_ = outbox_ + 2 * returns_bytes_;
  grads_ = slots_ + static_cast<std::size_t>(num_slots_) * slot_bytes_;
  grad_outbox_ = grads_ + static_cast<std::size_t>(num_grad_slots_) * slot_bytes_;
  total_bytes_ = grad_outbox_ + static_cast<std::size_t>(num_slots_) * slot_bytes_;
}

std::vector<std::pair<std::string, std::size_t>> ArenaLayout::parts() const {
  return {{"rows", returns_ - rows_},
          {"returns", outbox_ - returns_},
          {"outbox", slots_ - outbox_},
          {"weight slots", grads_ - slots_},
          {"grad slots", grad_outbox_ - grads_},
          {"grad outbox", total_bytes_ - grad_outbox_}};
}

const RowPieces& ArenaLayout::rows_pieces(int layer, CallKind kind) const {
  const LayerPieces& pieces = pieces_[static_cast<std::size_t>(layer)];
  return kind == CallKind::kForward ? pieces.forward_rows : pieces.backward_rows;
}

const RowPieces& ArenaLayout::return_pieces(int layer, CallKind kind) const {
  const LayerPieces& pieces = pieces_[static_cast<std::size_t>(layer)];
  return kind == CallKind::kForward ? pieces.forward_returns : pieces.backward_returns;
}

std::size_t ArenaLayout::in_slot(std::size_t base, int layer, int slot, int tensor) const {
  return base + static_cast<std::size_t>(slot) * slot_bytes_ +
         pieces_[static_cast<std::size_t>(layer)].weight_offset[static_cast<std::size_t>(tensor)];
}

std::size_t ArenaLayout::weight_slot(int layer, int slot, int tensor) const {
  FEPLB_CHECK(slot < num_slots_, "weight slot must be < ", num_slots_, ", got ", slot);
  return in_slot(slots_, layer, slot, tensor);
}

std::size_t ArenaLayout::grad_slot(int layer, int slot, int tensor) const {
  FEPLB_CHECK(slot < num_grad_slots_, "grad slot must be < ", num_grad_slots_, ", got ", slot);
  return in_slot(grads_, layer, slot, tensor);
}

std::size_t ArenaLayout::grad_outbox_slot(int layer, int slot, int tensor) const {
  FEPLB_CHECK(slot < num_slots_, "grad outbox slot must be < ", num_slots_, ", got ", slot);
  return in_slot(grad_outbox_, layer, slot, tensor);
}

}  // namespace feplb
