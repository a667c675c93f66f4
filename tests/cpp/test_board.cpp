// The count board, the bell and the failure state, by hand.
#include <set>
#include <thread>

#include "../../feplb/csrc/count_board.h"
#include "../../feplb/csrc/failure.h"
#include "check.h"
#include "memory.h"

namespace feplb_test {
namespace {

using namespace feplb;

struct Board {
  Board(int num_ranks, int max_local_experts)
      : bytes(CountBoard::bytes_needed(num_ranks, max_local_experts)),
        memory(bytes),
        board(memory.data(), num_ranks, max_local_experts) {}
  const std::size_t bytes;
  Memory memory;
  CountBoard board;
};

CallHeader header(uint64_t seq, std::vector<int32_t> counts) {
  CallHeader made;
  made.seq = seq;
  made.counts = std::move(counts);
  return made;
}

TEST(epochs_compare_cyclically) {
  CHECK(epoch_reached(7, 7), "equal");
  CHECK(epoch_reached(8, 7), "later");
  CHECK(!epoch_reached(6, 7), "earlier");
  CHECK(epoch_reached(3, 0xfffffff0u), "after the wrap");
  CHECK(!epoch_reached(0xfffffff0u, 3), "before the wrap");
  CHECK(epoch_reached(7 + kLift, 7), "lifted");
}

// The worked example of count_board.h: 2 ranks, seq 7 is a forward of layer 0.
TEST(board_carries_a_call) {
  Board two(2, 2);
  two.board.publish(0, header(7, {10, 6}));
  CHECK_EQ(two.board.published_seq(0, 7), 7u);
  CHECK_EQ(two.board.published_seq(1, 7), 0u);
  two.board.publish(1, header(7, {2, 0}));
  CallHeader read;
  two.board.read(0, 7, read);
  CHECK(read.counts == std::vector<int32_t>({10, 6}), "counts of rank 0");
  CHECK(read.kind == CallKind::kForward && read.layer == 0 && read.error.empty(), "header");
  CHECK_EQ(two.board.inbound(1, 0, kRowsFlag)->epoch.load(), 0u);
}

TEST(board_keeps_two_headers_of_a_rank) {
  Board two(2, 1);
  two.board.publish(0, header(4, {40}));
  two.board.publish(0, header(5, {50}));
  CallHeader read;
  two.board.read(0, 4, read);
  CHECK_EQ(read.counts[0], 40);
  two.board.publish(0, header(6, {60}));
  two.board.read(0, 5, read);
  CHECK_EQ(read.counts[0], 50);
  check_throws<Error>([&] { two.board.read(0, 4, read); }, "must be seq 4, got 6");
}

TEST(board_carries_a_call_without_counts) {
  Board one(1, 2);
  one.board.publish(0, header(1, {}));
  CallHeader read = header(0, {5});
  one.board.read(0, 1, read);
  CHECK(read.counts.empty(), "there were none");
}

TEST(board_reads_back_every_field) {
  Board one(1, 3);
  CallHeader sent = header(9, {1, 2, 3});
  sent.kind = CallKind::kBackward;
  sent.layer = 5;
  sent.micro_batch = 1234567890123;
  sent.config_hash = 0x1111222233334444;
  sent.plan_hash = 0x5555666677778888;
  sent.grad_bits = kGradMode | kNeedsKnown;
  sent.error = std::string(1000, 'x');
  one.board.publish(0, sent);
  CallHeader read;
  one.board.read(0, 9, read);
  CHECK(read.kind == sent.kind && read.layer == 5 && read.micro_batch == 1234567890123, "call");
  CHECK(read.config_hash == sent.config_hash && read.plan_hash == sent.plan_hash, "hashes");
  CHECK_EQ(read.grad_bits, sent.grad_bits);
  CHECK(read.error.size() > 300 && read.error.size() < 1000, "a long error is cut");
  CHECK_EQ(one.board.last_seen(0), std::string("backward of layer 5, micro-batch 1234567890123"));
  sent.counts.resize(4);
  check_throws<Error>([&] { one.board.publish(0, sent); }, "counts must be <= 3, got 4");
}

TEST(board_places_are_apart_and_inside) {
  constexpr int kRanks = 5;
  Board five(kRanks, 7);
  std::set<const void*> places;
  for (int rank = 0; rank < kRanks; ++rank) {
    places.insert(&five.board.bell(rank));
    for (int src = 0; src < kRanks; ++src) {
      for (int kind = 0; kind < kNumFlagKinds; ++kind) {
        places.insert(five.board.inbound(rank, src, static_cast<FlagKind>(kind)));
      }
    }
    for (int region = 0; region < kNumRegions; ++region) {
      for (int half = 0; half < kNumHalves; ++half) {
        places.insert(five.board.released(rank, static_cast<Region>(region), half));
      }
    }
  }
  CHECK_EQ(places.size(),
           static_cast<std::size_t>(kRanks * (1 + kRanks * kNumFlagKinds + kNumRegions * 2)));
  CHECK(*places.begin() >= five.memory.data(), "first place");
  CHECK(*places.rbegin() < five.memory.data() + five.bytes, "last place");
  check_throws<Error>([&] { five.board.bell(5); }, "rank must be < 5, got 5");
}

TEST(first_abort_wins) {
  Board two(2, 1);
  CHECK(!two.board.aborted(), "nothing yet");
  CHECK(two.board.abort(1, "no memory"), "the first");
  CHECK(!two.board.abort(0, "too late"), "the second");
  CHECK_EQ(two.board.abort_text(), std::string("rank 1: no memory"));
}

TEST(halves_alternate_where_there_are_two) {
  CHECK_EQ(region_half(kRowsRegion, 7), 1);
  CHECK_EQ(region_half(kReturnsRegion, 8), 0);
  CHECK_EQ(region_half(kWeightsRegion, 7), 0);
  CHECK_EQ(region_half(kGradsRegion, 7), 0);
}

// ------------------------------------------------------------------------------------------- bell

constexpr std::chrono::seconds kLong{20};

TEST(ring_before_sleep_is_not_missed) {
  Bell bell;
  const uint32_t seen = bell.rings();
  bell.ring(kJobRing);
  const TimePoint start = Clock::now();
  bell.sleep(seen, kJobRing, start + kLong);
  CHECK(Clock::now() - start < kLong / 2, "slept through a ring");
}

TEST(ring_wakes_who_wants_it) {
  Bell bell;
  const TimePoint start = Clock::now();
  std::thread ringer([&] {
    while (Clock::now() - start < std::chrono::milliseconds(30)) std::this_thread::yield();
    bell.ring(kReleaseRing);
  });
  bell.sleep(bell.rings(), kReleaseRing | kStopRing, start + kLong);
  ringer.join();
  CHECK(Clock::now() - start < kLong / 2, "was not woken");
}

TEST(unwanted_ring_does_not_wake) {
  Bell bell;
  const TimePoint start = Clock::now();
  const auto nap = std::chrono::milliseconds(60);
  std::thread ringer([&] {
    while (Clock::now() - start < nap / 3) std::this_thread::yield();
    bell.ring(kHeaderRing);
  });
  bell.sleep(bell.rings(), kJobRing, start + nap);
  ringer.join();
  CHECK(Clock::now() - start >= nap, "was woken for a reason it did not want");
}

TEST(sleep_ends_at_its_deadline) {
  Bell bell;
  const TimePoint start = Clock::now();
  bell.sleep(bell.rings(), kJobRing, start + std::chrono::milliseconds(10));
  CHECK(Clock::now() - start >= std::chrono::milliseconds(10), "too early");
  bell.sleep(bell.rings(), kJobRing, start);  // already passed
}

// ---------------------------------------------------------------------------------------- failure

TEST(poison_lifts_marks_and_tells) {
  Board two(2, 1);
  Bell caller;
  Failure failure(two.board, 0, caller);
  failure.note_call(41);
  failure.poison("out of luck");
  failure.poison("again");
  CHECK_EQ(failure.text(), std::string("out of luck"));
  CHECK_EQ(two.board.abort_text(), std::string("rank 0: out of luck"));
  CHECK_EQ(two.board.inbound(0, 1, kGradsFlag)->epoch.load(), 41 + kLift);
  CHECK_EQ(two.board.inbound(1, 0, kGradsFlag)->epoch.load(), 0u);
  CHECK(caller.rings() > 0 && two.board.bell(1).rings() > 0, "nobody was woken");
}

// Whoever gets past a lifted wait finds mark, text and abort record.
TEST(mark_comes_before_lift) {
  for (int round = 0; round < 3000; ++round) {
    Board two(2, 1);
    Bell caller;
    Failure failure(two.board, 0, caller);
    const Flag* flag = two.board.inbound(0, 0, kRowsFlag);  // lifted first
    std::atomic<bool> is_there{false};
    bool was_marked = false;
    std::thread waiter([&] {
      is_there.store(true);
      while (flag->epoch.load(std::memory_order_acquire) < kLift) std::this_thread::yield();
      was_marked = failure.poisoned() && failure.text() == "why" && two.board.aborted();
    });
    while (!is_there.load()) std::this_thread::yield();
    failure.poison("why");
    waiter.join();
    CHECK(was_marked, "round ", round, ": a lifted wait passed before the mark was there");
  }
}

}  // namespace
}  // namespace feplb_test
