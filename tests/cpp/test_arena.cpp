// Where bytes go: arena layout, routes and pushes, by hand.
#include <algorithm>

#include "../../feplb/csrc/copier.h"
#include "check.h"
#include "memory.h"

namespace feplb_test {
namespace {

using namespace feplb;

// 2 ranks x 2 experts; a row is 16 bytes, its side data 8, an expert 32 + 16 bytes.
LayerShape small_layer() {
  LayerShape shape;
  shape.num_local_experts = 2;
  shape.row_bytes = 16;
  shape.side_row_bytes = {8};
  shape.weight_bytes = {32, 16};
  shape.max_rows = 10;
  return shape;
}

Move move_of(int expert_idx, int owner, int helper, int rows) {
  return Move{expert_idx, owner, helper, 0, rows};
}

// The worked example of arena.h: expert 1 of rank 0, 6 rows -> rank 1.
TEST(route_of_the_worked_example) {
  Route owner, helper;
  make_route({move_of(1, 0, 1, 6)}, 0, 2, owner);
  make_route({move_of(1, 0, 1, 6)}, 1, 2, helper);
  CHECK(owner.sent.size() == 1 && owner.received.empty(), "the owner sends");
  CHECK(helper.received.size() == 1 && helper.sent.empty(), "the helper receives");
  CHECK_EQ(owner.sent_rows, 6);
  CHECK_EQ(helper.received_rows, 6);
  const RoutedMove& move = helper.received[0];
  CHECK(move.recv_row == 0 && move.slot == 0 && move.return_row == 0 && move.grad_slot == 0,
        "all places are the first");
}

// Rank 0 sends 3 rows of expert 0 to rank 1 and 4 of expert 1 to rank 2; rank 3 sends 5 to rank 2.
TEST(route_gives_every_move_its_own_places) {
  const std::vector<Move> moves = {move_of(0, 0, 1, 3), move_of(1, 0, 2, 4), move_of(0, 3, 2, 5)};
  Route owner, helper;
  make_route(moves, 0, 4, owner);
  make_route(moves, 2, 4, helper);
  CHECK_EQ(owner.sent[1].return_row, 3);
  CHECK_EQ(owner.sent[1].grad_slot, 1);
  CHECK_EQ(owner.sent[1].recv_row, 0);
  CHECK_EQ(helper.received[1].recv_row, 4);
  CHECK_EQ(helper.received[1].slot, 1);
  CHECK_EQ(helper.received[1].grad_slot, 0);
  CHECK_EQ(helper.received_rows, 9);
}

TEST(layout_of_a_small_layer) {
  const ArenaLayout layout({small_layer()}, 2, 3);
  // Backward rows half: grad rows 160 -> 192, rows 192, side data 80 -> 128; returns: 192 + 128.
  CHECK_EQ(layout.rows_half(1), 512u);
  CHECK_EQ(layout.returns_half(0), 1024u);
  CHECK_EQ(layout.returns_half(1), 1344u);
  CHECK_EQ(layout.outbox_half(0), 1664u);
  CHECK_EQ(layout.weight_slot(0, 0, 0), 2304u);
  CHECK_EQ(layout.weight_slot(0, 1, 1), 2304u + 128 + 64);
  CHECK_EQ(layout.grad_slot(0, 2, 0), 2304u + 2 * 128 + 2 * 128);
  CHECK_EQ(layout.grad_outbox_slot(0, 0, 0), 2304u + 5 * 128);
  CHECK_EQ(layout.total_bytes(), 2304u + 7 * 128);
  std::size_t sum = 0;
  for (const auto& part : layout.parts()) sum += part.second;
  CHECK_EQ(sum, layout.total_bytes());
  check_throws<Error>([&] { layout.weight_slot(0, 2, 0); }, "weight slot must be < 2, got 2");
  check_throws<Error>([&] { layout.grad_slot(0, 3, 0); }, "grad slot must be < 3, got 3");
}

TEST(layers_share_the_arena) {
  LayerShape large = small_layer();
  large.row_bytes = 48;
  large.weight_bytes = {8};
  const ArenaLayout both({small_layer(), large}, 1, 1);
  const ArenaLayout alone({large}, 1, 1);
  CHECK_EQ(both.rows_half(1), alone.rows_half(1));
  CHECK_EQ(both.weight_slot(0, 0, 0), both.weight_slot(1, 0, 0));
  CHECK(both.total_bytes() > alone.total_bytes(), "slots are as large as the small layer needs");
  for (const int layer : {0, 1}) {
    for (const std::size_t offset : both.rows_pieces(layer, CallKind::kBackward).offset) {
      CHECK_EQ(offset % 64, 0u);
    }
  }
}

struct TwoArenas {
  explicit TwoArenas(const ArenaLayout& layout)
      : first(layout.total_bytes()),
        second(layout.total_bytes()),
        bases{first.data(), second.data()} {}
  Memory first, second;
  std::vector<std::byte*> bases;
};

CallGeometry geometry_of(const ArenaLayout& layout, const std::vector<std::byte*>& arenas, int rank,
                         uint64_t seq) {
  CallGeometry call;
  call.layout = &layout;
  call.arenas = &arenas;
  call.rank = rank;
  call.seq = seq;
  return call;
}

TEST(pushes_of_the_worked_example) {
  const ArenaLayout layout({small_layer()}, 2, 3);
  const TwoArenas arenas(layout);
  const std::vector<std::byte*>& bases = arenas.bases;
  Memory user(4096);
  CallSources sources;
  sources.rows = {user.data(), user.data() + 1024};
  sources.weights = {{user.data() + 2048, user.data() + 2080},
                     {user.data() + 3072, user.data() + 3088}};
  Route owner, helper;
  make_route({move_of(1, 0, 1, 6)}, 0, 2, owner);
  make_route({move_of(1, 0, 1, 6)}, 1, 2, helper);
  // Expert 1's rows begin at row 4; seq 3 uses the second halves.
  const auto pushes = push_rows(geometry_of(layout, bases, 0, 3), owner, sources, {0, 4});
  CHECK_EQ(pushes.size(), 2u);
  CHECK(pushes[0].flag == kRowsFlag && pushes[1].flag == kWeightsFlag, "rows first");
  CHECK(pushes[0].dst_rank == 1 && pushes[0].copies.size() == 2, "rows and side data");
  CHECK(pushes[0].copies[0].src == user.data() + 4 * 16, "first row of expert 1");
  CHECK(pushes[0].copies[0].dst == bases[1] + layout.rows_half(1), "second half");
  CHECK_EQ(pushes[0].copies[0].bytes, 6u * 16);
  CHECK(pushes[1].copies[1].src == user.data() + 3088, "second tensor of expert 1");
  CHECK(pushes[1].copies[1].dst == bases[1] + layout.weight_slot(0, 0, 1), "slot 0");

  const auto returns = push_returns(geometry_of(layout, bases, 1, 3), helper);
  CHECK_EQ(returns.size(), 1u);
  CHECK(returns[0].dst_rank == 0 && returns[0].flag == kReturnsFlag, "to the owner");
  CHECK(returns[0].copies[0].src == bases[1] + layout.outbox_half(1), "from the outbox");
  CHECK(returns[0].copies[0].dst == bases[0] + layout.returns_half(1), "to its return half");

  const auto grads = push_grads(geometry_of(layout, bases, 1, 3), helper, {1});
  CHECK(grads.size() == 1 && grads[0].copies.size() == 1, "only the tensor asked for");
  CHECK(grads[0].copies[0].dst == bases[0] + layout.grad_slot(0, 0, 1), "grad slot");
  CHECK(push_grads(geometry_of(layout, bases, 1, 3), helper, {}).empty(), "no tensor, no push");
  CHECK(push_returns(geometry_of(layout, bases, 0, 3), owner).empty(), "the owner helps nobody");
}

TEST(one_push_per_peer_and_flag) {
  const ArenaLayout layout({small_layer()}, 2, 3);
  const TwoArenas arenas(layout);
  Memory user(4096);
  CallSources sources;
  sources.rows = {user.data(), user.data()};
  sources.weights = {{user.data(), user.data()}, {user.data(), user.data()}};
  Route owner;
  make_route({move_of(0, 0, 1, 2), move_of(1, 0, 1, 3)}, 0, 2, owner);
  const auto pushes = push_rows(geometry_of(layout, arenas.bases, 0, 2), owner, sources, {0, 2});
  CHECK_EQ(pushes.size(), 2u);
  CHECK_EQ(pushes[0].copies.size(), 4u);
  CHECK(pushes[0].copies[2].dst == arenas.bases[1] + layout.rows_half(0) + 2 * 16,
        "the second move's rows follow the first's");
}

}  // namespace
}  // namespace feplb_test
