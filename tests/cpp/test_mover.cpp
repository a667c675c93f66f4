// The mover, step by step, over a device that only writes down what it is asked.
#include "../../feplb/csrc/mover.h"
#include "check.h"
#include "memory.h"
#include "paper_device.h"

namespace feplb_test {
namespace {

using namespace feplb;

LayerShape greedy_layer() {
  LayerShape shape;
  shape.num_local_experts = 2;
  shape.row_bytes = 16;
  shape.weight_bytes = {32};
  shape.max_rows = 100;
  shape.policy = Policy::kGreedy;
  shape.limits.num_dynamic = 2;
  shape.limits.num_slots = 2;
  shape.limits.num_grad_slots = 2;
  shape.limits.max_recv_rows = 100;
  shape.limits.max_return_rows = 100;
  return shape;
}

struct OneRank {
  OneRank(int rank, const ArenaLayout& layout, CountBoard& board)
      : failure(board, rank, bell), mover(rank, layout, board, device, failure, bell) {}
  Bell bell;
  PaperDevice device;
  Failure failure;
  Mover mover;
};

struct TwoRanks {
  TwoRanks()
      : layout({greedy_layer()}, 2, 2),
        memory(CountBoard::bytes_needed(2, 2)),
        board(memory.data(), 2, 2),
        first(0, layout, board),
        second(1, layout, board) {}
  // Both ranks begin, and step until they have planned (or failed).
  void begin(CallHeader a, CallHeader b) {
    first.mover.begin(std::move(a), {});
    second.mover.begin(std::move(b), {});
    while (first.mover.step() || second.mover.step()) {
    }
  }
  const ArenaLayout layout;
  Memory memory;
  CountBoard board;
  OneRank first, second;
};

CallHeader forward(uint64_t seq, std::vector<int32_t> counts) {
  CallHeader header;
  header.seq = seq;
  header.counts = std::move(counts);
  return header;
}

Push push_to_second() {
  static Memory memory(256);
  Push push;
  push.dst_rank = 1;
  push.copies = {CopyOp{memory.data(), memory.data() + 64, 16}};
  return push;
}

TEST(mover_plans_once_all_headers_are_there) {
  TwoRanks ranks;
  ranks.first.mover.begin(forward(1, {10, 6}), {});
  CHECK(!ranks.first.mover.step() && !ranks.first.mover.planned(), "rank 1 is missing");
  CHECK_EQ(ranks.first.mover.missing_headers(), std::string("rank 1 (last seen: no call yet)"));
  ranks.second.mover.begin(forward(1, {0, 0}), {});
  CHECK(ranks.first.mover.step() && ranks.first.mover.planned(), "all are there");
  CHECK(ranks.second.mover.step() && ranks.second.mover.planned(), "all are there");
  const Agreement& mine = ranks.first.mover.agreement();
  const Agreement& theirs = ranks.second.mover.agreement();
  CHECK(mine.plan.hash == theirs.plan.hash && mine.plan.moves.size() == 1, "the same plan");
  CHECK(mine.route.sent.size() == 1 && theirs.route.received.size() == 1, "each its own part");
  CHECK(mine.counts == std::vector<int32_t>({10, 6, 0, 0}), "all counts");
}

TEST(refusal_reaches_every_rank_and_the_next_call_works) {
  TwoRanks ranks;
  CallHeader refused = forward(1, {1, 1});
  refused.error = "rows has 3 dimensions";
  ranks.begin(forward(1, {10, 6}), refused);
  for (OneRank* rank : {&ranks.first, &ranks.second}) {
    CHECK(rank->mover.planned() && !rank->failure.poisoned(), "agreed, and still usable");
    CHECK_EQ(rank->mover.agreement().refusal, std::string("rows has 3 dimensions"));
    CHECK_EQ(rank->mover.agreement().refused_by, 1);
    CHECK(rank->mover.agreement().plan.moves.empty(), "nothing moves");
    rank->mover.end();
  }
  ranks.begin(forward(2, {10, 6}), forward(2, {0, 0}));
  CHECK(ranks.second.mover.agreement().refusal.empty(), "the next call is fine");
  CHECK_EQ(ranks.second.mover.agreement().plan.moves.size(), 1u);
}

void expect_disagreement(const CallHeader& a, const CallHeader& b, const std::string& part) {
  TwoRanks ranks;
  ranks.begin(a, b);
  for (OneRank* rank : {&ranks.first, &ranks.second}) {
    CHECK(rank->failure.poisoned() && !rank->mover.planned(), "both fail: ", part);
    CHECK(rank->failure.text().find(part) != std::string::npos, "no \"", part,
          "\" in: ", rank->failure.text());
  }
}

TEST(disagreements_name_both_sides) {
  const CallHeader call = forward(1, {1, 1});
  CallHeader other = call;
  other.layer = 3;
  expect_disagreement(call, other,
                      "rank 0 began the forward of layer 0, micro-batch 0, rank 1 "
                      "the forward of layer 3, micro-batch 0");
  other = call;
  other.kind = CallKind::kBackward;
  expect_disagreement(call, other, "rank 1 the backward of layer 0");
  other = call;
  other.config_hash = 7;
  expect_disagreement(call, other, "differ in their config: rank 0 has hash 0, rank 1 has 7");
  other = call;
  other.grad_bits = kGradMode;
  expect_disagreement(call, other, "rank 0 has grad mode off; rank 1 has grad mode on");
  other = call;
  other.plan_hash = 9;
  expect_disagreement(call, other, "have different plans");
}

TEST(grad_bits_count_only_where_both_know_them) {
  TwoRanks ranks;
  CallHeader early = forward(1, {1, 1});
  early.grad_bits = kGradMode;
  CallHeader late = early;
  late.grad_bits = kGradMode | kNeedsKnown | kNeedsRows;
  ranks.begin(early, late);
  CHECK(ranks.first.mover.planned() && ranks.second.mover.planned(), "no disagreement");
}

TEST(push_is_event_copies_flag) {
  TwoRanks ranks;
  ranks.begin(forward(1, {10, 6}), forward(1, {0, 0}));
  ranks.first.mover.post(Level::kRows, Event{StreamKind::kCompute, 42}, {push_to_second()});
  CHECK(!ranks.first.mover.submitted(Level::kRows), "posted is not submitted");
  CHECK(ranks.first.mover.step(), "a push to submit");
  const std::vector<std::string> expected = {"1 after 42", "1 copies 1", "1 flag 1"};
  CHECK(ranks.first.device.asked == expected, "order");
  CHECK(ranks.first.mover.submitted(Level::kRows), "submitted");
  CHECK(ranks.first.mover.last_push(kRowsRegion, 1).position != 0, "its event is known");
  ranks.first.mover.post(Level::kReturns, Event{}, {});
  CHECK(ranks.first.mover.submitted(Level::kReturns), "nothing to submit is submitted at once");
}

// Seq 1 and seq 3 use the same half of rank 1's rows region.
TEST(push_waits_for_the_release_of_its_half) {
  TwoRanks ranks;
  for (const uint64_t seq : {1, 2, 3}) {
    ranks.begin(forward(seq, {10, 6}), forward(seq, {0, 0}));
    ranks.first.mover.post(Level::kRows, Event{}, {push_to_second()});
    ranks.first.mover.step();
    if (seq == 3) break;
    CHECK(ranks.first.mover.submitted(Level::kRows), "seq ", seq, " finds its half unused");
    ranks.first.mover.end();
    ranks.second.mover.end();
  }
  CHECK(!ranks.first.mover.submitted(Level::kRows), "rank 1 still reads seq 1");
  CHECK(ranks.first.mover.awaits_release(), "the mover knows what it waits for");
  CHECK(ranks.first.mover.withheld().find("rank 1 (last seen: ") == 0, "and can say so");
  ranks.board.released(1, kRowsRegion, 0)->epoch.store(9);  // the other half's does not help
  CHECK(!ranks.first.mover.step(), "still withheld");
  ranks.board.released(1, kRowsRegion, 1)->epoch.store(1);
  CHECK(ranks.first.mover.step() && ranks.first.mover.submitted(Level::kRows), "released");
}

TEST(abort_of_another_rank_stops_the_mover) {
  TwoRanks ranks;
  ranks.begin(forward(1, {10, 6}), forward(1, {0, 0}));
  ranks.board.abort(1, "died in a test");
  ranks.first.mover.post(Level::kRows, Event{}, {push_to_second()});
  CHECK(!ranks.first.mover.step(), "no submission after an abort");
  CHECK_EQ(ranks.first.failure.text(), std::string("rank 1: died in a test"));
  CHECK(ranks.first.mover.cancelled(), "and it is out of the driver");
}

TEST(counts_of_the_wrong_length_are_an_error) {
  TwoRanks ranks;
  ranks.begin(forward(1, {10, 6}), forward(1, {0}));
  const std::string part = "counts must be 2, got 1";
  CHECK(ranks.first.failure.text().find(part) != std::string::npos, ranks.first.failure.text());
}

TEST(waiting_caller_plans_itself) {
  TwoRanks ranks;
  ranks.first.mover.begin(forward(1, {10, 6}), {});
  CHECK(!ranks.first.mover.plan_now(), "rank 1 is missing");
  ranks.second.mover.begin(forward(1, {0, 0}), {});
  CHECK(ranks.first.mover.plan_now() && ranks.first.mover.planned(), "all are there");
  CHECK(!ranks.first.mover.step(), "nothing is left for the mover");
  CHECK_EQ(ranks.first.mover.agreement().plan.moves.size(), 1u);
}

TEST(error_in_the_callers_planning_poisons_the_call) {
  TwoRanks ranks;
  ranks.first.mover.begin(forward(1, {10, -6}), {});
  ranks.second.mover.begin(forward(1, {0, 0}), {});
  CHECK(!ranks.first.mover.plan_now() && ranks.first.failure.poisoned(), "it failed");
  CHECK(ranks.first.failure.text().find("planning failed: plan: counts of rank 0") == 0,
        ranks.first.failure.text());
}

TEST(error_in_a_step_poisons_the_call) {
  TwoRanks ranks;
  ranks.begin(forward(1, {10, -6}), forward(1, {0, 0}));
  CHECK(ranks.first.failure.text().find("the mover failed in the forward of layer 0, micro-batch "
                                        "0: plan: counts of rank 0, local expert 1: "
                                        "-6") == 0,
        "got: ", ranks.first.failure.text());
}

}  // namespace
}  // namespace feplb_test
