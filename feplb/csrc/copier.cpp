#include "copier.h"

namespace feplb {
namespace {

// The push to `rank`, appended on first use; plans keep few peers, so a scan is cheapest.
Push& push_to(std::vector<Push>& pushes, int rank, StreamKind stream, FlagKind flag,
              Region region) {
  for (Push& push : pushes) {
    if (push.dst_rank == rank && push.flag == flag) return push;
  }
  Push push;
  push.dst_rank = rank;
  push.stream = stream;
  push.flag = flag;
  push.region = region;
  pushes.push_back(std::move(push));
  return pushes.back();
}

std::byte* arena_of(const CallGeometry& call, int rank) {
  return (*call.arenas)[static_cast<std::size_t>(rank)];
}

// Rows [src_row, src_row + rows) of a piece at `src` to rows from dst_row of one at `dst`.
void add_rows(Push& push, std::byte* dst, int64_t dst_row, const std::byte* src, int64_t src_row,
              int64_t rows, std::size_t row_bytes) {
  push.copies.push_back(CopyOp{dst + static_cast<std::size_t>(dst_row) * row_bytes,
                               src + static_cast<std::size_t>(src_row) * row_bytes,
                               static_cast<std::size_t>(rows) * row_bytes});
}

}  // namespace

std::vector<Push> push_rows(const CallGeometry& call, const Route& route,
                            const CallSources& sources, const std::vector<int64_t>& first_row) {
  std::vector<Push> pushes;
  const RowPieces& pieces = call.layout->rows_pieces(call.layer, call.kind);
  const std::size_t half = call.layout->rows_half(region_half(kRowsRegion, call.seq));
  for (const RoutedMove& sent : route.sent) {
    const int dst = sent.move.dst_rank;
    Push& push = push_to(pushes, dst, StreamKind::kPushes, kRowsFlag, kRowsRegion);
    const int64_t src_row =
        first_row[static_cast<std::size_t>(sent.move.expert_idx)] + sent.move.row_start;
    for (std::size_t i = 0; i < pieces.offset.size(); ++i) {
      add_rows(push, arena_of(call, dst) + half + pieces.offset[i], sent.recv_row, sources.rows[i],
               src_row, sent.rows(), pieces.row_bytes[i]);
    }
  }
  const LayerShape& shape = call.layout->layer(call.layer);
  for (const RoutedMove& sent : route.sent) {
    const int dst = sent.move.dst_rank;
    Push& push = push_to(pushes, dst, StreamKind::kPushes, kWeightsFlag, kWeightsRegion);
    for (std::size_t t = 0; t < shape.weight_bytes.size(); ++t) {
      push.copies.push_back(
          CopyOp{arena_of(call, dst) +
                     call.layout->weight_slot(call.layer, sent.slot, static_cast<int>(t)),
                 sources.weights[t][static_cast<std::size_t>(sent.move.expert_idx)],
                 shape.weight_bytes[t]});
    }
  }
  return pushes;
}

std::vector<Push> push_returns(const CallGeometry& call, const Route& route) {
  std::vector<Push> pushes;
  const RowPieces& pieces = call.layout->return_pieces(call.layer, call.kind);
  const int half = region_half(kReturnsRegion, call.seq);
  const std::byte* outbox = arena_of(call, call.rank) + call.layout->outbox_half(half);
  for (const RoutedMove& received : route.received) {
    const int dst = received.move.owner_rank;
    Push& push = push_to(pushes, dst, StreamKind::kReturns, kReturnsFlag, kReturnsRegion);
    std::byte* returns = arena_of(call, dst) + call.layout->returns_half(half);
    for (std::size_t i = 0; i < pieces.offset.size(); ++i) {
      add_rows(push, returns + pieces.offset[i], received.return_row, outbox + pieces.offset[i],
               received.recv_row, received.rows(), pieces.row_bytes[i]);
    }
  }
  return pushes;
}

std::vector<Push> push_grads(const CallGeometry& call, const Route& route,
                             const std::vector<int>& tensors) {
  std::vector<Push> pushes;
  const LayerShape& shape = call.layout->layer(call.layer);
  if (tensors.empty()) return pushes;
  for (const RoutedMove& received : route.received) {
    const int dst = received.move.owner_rank;
    Push& push = push_to(pushes, dst, StreamKind::kGrads, kGradsFlag, kGradsRegion);
    for (const int t : tensors) {
      push.copies.push_back(CopyOp{
          arena_of(call, dst) + call.layout->grad_slot(call.layer, received.grad_slot, t),
          arena_of(call, call.rank) + call.layout->grad_outbox_slot(call.layer, received.slot, t),
          shape.weight_bytes[static_cast<std::size_t>(t)]});
    }
  }
  return pushes;
}

}  // namespace feplb
