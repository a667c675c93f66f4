// The host lane with its real threads: ranks are threads of one process, each with a mover, a
// watchdog and a copy engine. Also run under ThreadSanitizer, and AddressSanitizer with UBSan.
#include <sys/mman.h>

#include <atomic>
#include <thread>

#include "check.h"
#include "rank_program.h"
#include "ranks.h"

namespace feplb_test {
namespace {

using feplb::cat;

Ranks::MakeDevice host_devices() {
  return [](int rank) { return feplb::make_host_device(cat("feplb-", rank, "-copy")); };
}

// Kernels run at once; now and then one takes long. Sleeping disturbs, nobody waits by it.
RankProgram::Launch slow_now_and_then(uint64_t seed) {
  auto random = std::make_shared<feplb::SimRandom>(seed);
  return [random](std::uintptr_t, const std::function<void()>& kernel) {
    if (random->one_in(40)) {
      std::this_thread::sleep_for(std::chrono::microseconds(random->below(300)));
    }
    kernel();
  };
}

std::string joined(const std::vector<std::string>& errors) {
  std::string text;
  for (const std::string& error : errors) text += error.empty() ? "" : error + "\n";
  return text;
}

void run_right(int num_ranks, int num_micro_batches, uint64_t seed) {
  feplb::SimRandom random(seed);
  const Scenario scenario = make_scenario(num_ranks, num_micro_batches, random);
  Verdict verdict;
  Ranks ranks(num_ranks, 60);
  ranks.make_domains(host_devices());
  const auto errors = ranks.run([&](int rank) {
    RankProgram::Config config;
    config.rank = rank;
    config.seed = seed;
    RankProgram(ranks.domain(rank), slow_now_and_then(seed + static_cast<uint64_t>(rank)), scenario,
                config, verdict)
        .run();
  });
  CHECK(joined(errors).empty(), joined(errors));
  CHECK(verdict.wrong().empty(), verdict.wrong());
  CHECK(verdict.num_moves() > num_micro_batches, verdict.moves());
  note(cat(scenario.calls.size(), " calls, ", verdict.moves()));
}

TEST(host_two_ranks_are_right) { run_right(2, 300, 1); }
TEST(host_three_ranks_are_right) { run_right(3, 200, 2); }
TEST(host_four_ranks_are_right) { run_right(4, 150, 3); }

TEST(host_many_short_lives_are_right) {
  for (uint64_t seed = 10; seed < 20; ++seed) run_right(2 + static_cast<int>(seed % 3), 2, seed);
}

// Without moves nothing rings a mover but headers and jobs.
TEST(host_calls_without_moves_take_no_naps) {
  constexpr int kCalls = 20;
  std::vector<feplb::LayerShape> layers = layer_shapes();
  for (feplb::LayerShape& shape : layers) shape.policy = feplb::Policy::kNone;
  feplb::SimRandom random(4);
  Scenario scenario = make_scenario(2, 2, random);
  scenario.calls.assign(kCalls, Call{});
  Verdict verdict;
  Ranks ranks(2, 60, layers);
  ranks.make_domains(host_devices());
  const feplb::TimePoint start = feplb::Clock::now();
  const auto errors = ranks.run([&](int rank) {
    RankProgram::Config config;
    config.rank = rank;
    const auto launch = [](std::uintptr_t, const std::function<void()>& kernel) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));  // long enough to fall asleep
      kernel();
    };
    RankProgram(ranks.domain(rank), launch, scenario, config, verdict).run();
  });
  const std::chrono::duration<double> took = feplb::Clock::now() - start;
  CHECK(joined(errors).empty() && verdict.wrong().empty(), joined(errors), verdict.wrong());
  CHECK(took.count() < kCalls * 0.1, kCalls, " calls took ", took.count(), " s");
}

TEST(host_close_while_idle) {
  feplb::SimRandom random(5);
  const Scenario scenario = make_scenario(3, 1, random);
  Verdict verdict;
  Ranks ranks(3, 60);
  ranks.make_domains(host_devices());
  const auto errors = ranks.run([&](int rank) {
    RankProgram::Config config;
    config.rank = rank;
    RankProgram(ranks.domain(rank), slow_now_and_then(5), scenario, config, verdict).run();
    ranks.domain(rank).close();
    ranks.domain(rank).close();
    ranks.domain(rank).begin(feplb::CallHeader(), {});
  });
  for (const std::string& error : errors) {
    CHECK(error.find("the Balancer is closed (publishing the counts, rank ") == 0, error);
  }
}

// One rank fails in the middle of a call; the others hear of it at once, and why.
TEST(host_failure_of_one_rank_ends_all) {
  feplb::SimRandom random(6);
  const Scenario scenario = make_scenario(4, 20, random);
  Verdict verdict;
  Ranks ranks(4, 60);
  verdict.excuses = [&] { return ranks.board().aborted(); };
  ranks.make_domains(host_devices());
  const auto errors = ranks.run([&](int rank) {
    RankProgram::Config config;
    config.rank = rank;
    int num_kernels = 0;
    const auto launch = [&](std::uintptr_t, const std::function<void()>& kernel) {
      if (rank == 2 && ++num_kernels == 100) throw std::runtime_error("kernel 100 failed");
      kernel();
    };
    RankProgram program(ranks.domain(rank), launch, scenario, config, verdict);
    try {
      program.run();
    } catch (const std::runtime_error& error) {
      if (rank == 2) ranks.domain(rank).fail(error.what());
      throw;
    }
  });
  CHECK_EQ(errors[2], std::string("kernel 100 failed"));
  for (const int rank : {0, 1, 3}) {
    const std::string& error = errors[static_cast<std::size_t>(rank)];
    CHECK(error.find("rank 2: kernel 100 failed") != std::string::npos, "rank ", rank, ": ", error);
  }
  CHECK(verdict.wrong().empty(), verdict.wrong());
}

TEST(host_rank_that_never_calls_is_named) {
  feplb::SimRandom random(7);
  const Scenario scenario = make_scenario(3, 1, random);
  Verdict verdict;
  Ranks ranks(3, 0.2);
  ranks.make_domains(host_devices());
  const feplb::TimePoint start = feplb::Clock::now();
  const auto errors = ranks.run([&](int rank) {
    if (rank == 1) return;
    RankProgram::Config config;
    config.rank = rank;
    RankProgram(ranks.domain(rank), slow_now_and_then(5), scenario, config, verdict).run();
  });
  const std::chrono::duration<double> took = feplb::Clock::now() - start;
  CHECK(took.count() < 5, "took ", took.count(), " s");
  CHECK(errors[1].empty(), errors[1]);
  for (const int rank : {0, 2}) {
    const std::string& error = errors[static_cast<std::size_t>(rank)];
    const std::string part = "no answer from rank 1 (last seen: no call yet) for 0.2 s";
    CHECK(error.find(part) != std::string::npos, "rank ", rank, ": ", error);
  }
}

// Memory that is gone, not only freed, when it is let go.
class MappedRows {
 public:
  explicit MappedRows(std::size_t bytes)
      : bytes_(bytes),
        data_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {}
  ~MappedRows() { munmap(data_, bytes_); }
  const std::byte* data() const { return static_cast<const std::byte*>(data_); }

 private:
  const std::size_t bytes_;
  void* data_;
};

// The owner hears of a failure while its rows are being copied, and unmaps them at once.
TEST(host_failure_lets_go_of_inputs) {
  feplb::LayerShape shape = layer_shapes()[0];
  shape.row_bytes = std::size_t{2} << 20;
  shape.max_rows = 8;
  shape.limits.max_recv_rows = shape.limits.max_return_rows = shape.max_rows;
  shape.side_row_bytes = {};
  shape.weight_bytes = {64};
  for (int round = 0; round < 4; ++round) {
    Ranks ranks(2, 60, {shape});
    ranks.make_domains(host_devices());
    const auto errors = ranks.run([&](int rank) {
      feplb::Domain& domain = ranks.domain(rank);
      feplb::CallHeader header;
      header.counts = rank == 0 ? std::vector<int32_t>{4, 4, 0} : std::vector<int32_t>{0, 0, 0};
      const MappedRows rows(8 * shape.row_bytes);
      domain.begin(header, {});
      CHECK_EQ(domain.wait_plan().plan.moves.size(), 1u);
      feplb::CallSources sources;
      sources.rows = {rows.data()};
      sources.weights = {{rows.data(), rows.data(), rows.data()}};
      domain.post_rows(sources, {0, 4, 8});
      while (rank == 1 && !ranks.domain(0).mover().submitted(feplb::Level::kRows)) {
        std::this_thread::yield();
      }
      if (rank == 1) domain.fail("changed its mind");
      domain.await_rows();
      domain.post_returns();
      domain.await_returns();
    });
    for (const std::string& error : errors) {
      CHECK(error.find("changed its mind") != std::string::npos, error);
    }
  }
}

}  // namespace
}  // namespace feplb_test
