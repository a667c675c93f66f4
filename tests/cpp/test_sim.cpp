// The simulated device itself: what stream semantics allow, and no more.
#include <cstring>
#include <set>

#include "../../feplb/csrc/device_sim.h"
#include "check.h"
#include "ranks.h"

namespace feplb_test {
namespace {

using namespace feplb;

constexpr int kRowsIdx = static_cast<int>(StreamKind::kPushes);
constexpr int kReturnsIdx = static_cast<int>(StreamKind::kReturns);
constexpr int kSecondComputeIdx = kNumStreams;

void step(SimStreams& streams, int idx) {
  static SimRandom random(1);
  CHECK(streams.can_step(idx), "stream ", idx, " cannot step");
  streams.step(idx, random, nullptr);
}

TEST(sim_stream_runs_in_order) {
  SimStreams streams(false);
  std::string ran;
  streams.add_kernel([&] { ran += "a"; });
  streams.add_kernel([&] { ran += "b"; });
  step(streams, 0);
  CHECK_EQ(ran, std::string("a"));
  CHECK(!streams.compute_drained(), "b is left");
  step(streams, 0);
  CHECK_EQ(ran, std::string("ab"));
  CHECK(streams.compute_drained() && !streams.can_step(0), "nothing is left");
}

TEST(sim_waits_block_only_their_stream) {
  SimStreams streams(false);
  Flag flag, written;
  streams.add_flag_wait(&flag, 7);
  streams.add_kernel([] {});
  const Event kernel = streams.record(StreamKind::kCompute);
  streams.add_event_wait(StreamKind::kPushes, kernel);
  streams.add_flag_write(StreamKind::kPushes, &written, 3);
  streams.add_flag_write(StreamKind::kReturns, &written, 2);
  CHECK(!streams.can_step(0) && !streams.can_step(kRowsIdx), "both wait");
  step(streams, kReturnsIdx);
  CHECK_EQ(written.epoch.load(), 2u);
  flag.epoch.store(6);
  CHECK(!streams.can_step(0), "6 is not yet 7");
  flag.epoch.store(8);
  step(streams, 0);
  step(streams, 0);
  step(streams, kRowsIdx);
  step(streams, kRowsIdx);
  CHECK_EQ(written.epoch.load(), 3u);
}

TEST(sim_single_queue_runs_only_its_head) {
  SimStreams streams(true);
  Flag flag, written;
  streams.add_flag_wait(&flag, 1);
  streams.add_flag_write(StreamKind::kReturns, &written, 1);
  CHECK(!streams.can_step(kReturnsIdx), "the compute stream's wait was submitted first");
  flag.epoch.store(1);
  CHECK(!streams.can_step(kReturnsIdx), "and has not run yet");
  step(streams, 0);
  step(streams, kReturnsIdx);
  CHECK_EQ(written.epoch.load(), 1u);
}

TEST(sim_compute_streams_are_ordered_by_events_only) {
  SimStreams streams(false);
  Flag flag;
  streams.add_flag_wait(&flag, 1);
  const Event first = streams.record(StreamKind::kCompute);
  streams.bind_compute(1);
  bool has_run = false;
  streams.add_kernel([&] { has_run = true; });
  const Event second = streams.record(StreamKind::kCompute);
  streams.add_event_wait(StreamKind::kPushes, second);
  streams.add_event_wait(StreamKind::kReturns, first);
  step(streams, kSecondComputeIdx);
  CHECK(has_run, "the second stream does not wait for the first");
  CHECK(streams.can_step(kRowsIdx) && !streams.can_step(kReturnsIdx), "events know their stream");
  CHECK(!streams.compute_drained(), "one stream is left");
}

// Every copy can be seen half done, in more than one way.
TEST(sim_copies_tear) {
  std::set<std::string> seen;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    SimRandom random(seed);
    SimStreams streams(false);
    const std::string source = "abcdefgh";
    std::string target(8, '-');
    streams.add_copies(StreamKind::kPushes,
                       {CopyOp{reinterpret_cast<std::byte*>(target.data()),
                               reinterpret_cast<const std::byte*>(source.data()), 8}},
                       random);
    while (streams.can_step(kRowsIdx)) {
      streams.step(kRowsIdx, random, nullptr);
      seen.insert(target);
    }
    CHECK_EQ(target, source);
  }
  CHECK(seen.size() > 8, "only ", seen.size(), " states of a copy were seen");
}

TEST(sim_device_that_vanishes_leaves_torn_copies) {
  SimRandom random(3);
  SimStreams streams(false);
  Memory memory(64);
  streams.add_copies(StreamKind::kPushes, {CopyOp{memory.data(), memory.data() + 32, 32}}, random);
  streams.vanish();
  CHECK(!streams.can_step(kRowsIdx) && streams.compute_drained(), "nothing happens any more");
}

TEST(sim_kernel_that_throws_ends_every_rank) {
  const auto world = std::make_shared<SimWorld>(2, 1);
  std::vector<SimDevice*> devices;
  Ranks ranks(2);
  ranks.make_domains([&](int rank) {
    auto device = std::make_unique<SimDevice>(world, rank);
    devices.push_back(device.get());
    return device;
  });
  const auto errors = ranks.run([&](int rank) {
    const SimWorld::Turn turn(*world, rank);
    if (rank == 0) devices[0]->launch([] { throw std::runtime_error("boom"); });
    CallHeader header;
    header.counts.assign(kNumExperts, 1);
    ranks.domain(rank).begin(header, {});
    ranks.domain(rank).wait_plan();
    Bell bell;
    const std::atomic<bool> never{false};
    devices[static_cast<std::size_t>(rank)]->wait_host(
        bell, [] { return false; }, WaitLimits{TimePoint::max(), &never});
  });
  for (const std::string& error : errors) {
    CHECK_EQ(error, std::string("a kernel of rank 0 failed: boom"));
  }
}

}  // namespace
}  // namespace feplb_test
