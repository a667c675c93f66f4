#include "sim_run.h"

#include <unistd.h>

#include <thread>

#include "check.h"
#include "memory.h"

namespace feplb_test {
namespace {

using feplb::cat;

// A device whose watchdog stops lifting after it has lifted once.
class TimidDevice final : public feplb::SimDevice {
 public:
  TimidDevice(std::shared_ptr<feplb::SimWorld> world, int rank, const feplb::CountBoard& board)
      : SimDevice(std::move(world), rank), board_(board) {}
  bool drive(feplb::Crew crew) override {
    crew.watchdog_look = [look = crew.watchdog_look, this] {
      if (!has_lifted_) look();
      has_lifted_ = board_.aborted();
    };
    return SimDevice::drive(std::move(crew));
  }

 private:
  const feplb::CountBoard& board_;
  bool has_lifted_ = false;
};

class Simulation {
 public:
  Simulation(uint64_t seed, SimRunOptions options);
  SimRunResult run();

 private:
  void run_rank(int rank);
  void drain_after_failure(RankProgram& program, int rank);
  std::string name_of(const feplb::Flag* flag) const;

  const uint64_t seed_;
  const SimRunOptions options_;
  feplb::SimRandom random_;
  const Scenario scenario_;
  const feplb::ArenaLayout layout_;
  Memory board_memory_;
  feplb::CountBoard board_;
  std::vector<Memory> arenas_;
  std::shared_ptr<feplb::SimWorld> world_;
  std::vector<feplb::SimDevice*> devices_;
  std::vector<std::unique_ptr<feplb::Domain>> domains_;
  Verdict verdict_;
  SimRunResult result_;
};

Simulation::Simulation(uint64_t seed, SimRunOptions options)
    : seed_(seed),
      options_(std::move(options)),
      random_(seed ^ 0x5eed),
      scenario_(make_scenario(options_.num_ranks, options_.num_micro_batches, random_)),
      layout_(layer_shapes(), kNumSlots, kNumSlots),
      board_memory_(feplb::CountBoard::bytes_needed(options_.num_ranks, kNumExperts)),
      board_(board_memory_.data(), options_.num_ranks, kNumExperts) {
  feplb::SimOptions world = options_.world;
  world.name_flag = [this](const feplb::Flag* flag) { return name_of(flag); };
  world.see_copy = [this](const feplb::CopyOp& copy) { verdict_.see_copy(copy); };
  world_ = std::make_shared<feplb::SimWorld>(options_.num_ranks, seed, world);
  feplb::DomainConfig config;
  config.num_ranks = options_.num_ranks;
  config.deadline_s = 3600;
  config.layers = layer_shapes();
  config.num_slots = kNumSlots;
  config.num_grad_slots = kNumSlots;
  config.pids.assign(static_cast<std::size_t>(options_.num_ranks), getpid());
  feplb::DomainMemory memory;
  memory.board = board_memory_.data();
  for (int rank = 0; rank < options_.num_ranks; ++rank) arenas_.emplace_back(layout_.total_bytes());
  for (Memory& arena : arenas_) memory.arenas.push_back(arena.data());
  for (int rank = 0; rank < options_.num_ranks; ++rank) {
    config.rank = rank;
    auto device = options_.lifts_once ? std::make_unique<TimidDevice>(world_, rank, board_)
                                      : std::make_unique<feplb::SimDevice>(world_, rank);
    devices_.push_back(device.get());
    domains_.push_back(std::make_unique<feplb::Domain>(config, memory, std::move(device)));
  }
  verdict_.excuses = [this] { return board_.aborted(); };
  result_.errors.resize(static_cast<std::size_t>(options_.num_ranks));
}

SimRunResult Simulation::run() {
  for (auto& domain : domains_) domain->open();
  std::vector<std::thread> threads;
  for (int rank = 0; rank < options_.num_ranks; ++rank) {
    threads.emplace_back([this, rank] { run_rank(rank); });
  }
  for (std::thread& thread : threads) thread.join();
  for (auto& domain : domains_) domain->close();
  result_.num_steps = world_->num_steps();
  result_.order_hash = world_->order_hash();
  result_.num_moves = verdict_.num_moves();
  if (result_.wrong.empty()) result_.wrong = verdict_.wrong();
  return result_;
}

void Simulation::run_rank(int rank) {
  std::string& error = result_.errors[static_cast<std::size_t>(rank)];
  feplb::SimDevice* device = devices_[static_cast<std::size_t>(rank)];
  const auto launch = [device](std::function<void()> kernel) { device->launch(std::move(kernel)); };
  RankProgram::Config config;
  config.rank = rank;
  config.seed = seed_;
  config.two_streams = options_.two_streams;
  RankProgram program(*domains_[static_cast<std::size_t>(rank)], launch, scenario_, config,
                      verdict_);
  try {
    world_->enter(rank);
    if (rank != options_.absent_rank) program.run();
  } catch (const feplb::SimDeadlock& deadlock) {
    result_.wrong = deadlock.what();
  } catch (const feplb::SimKilled& killed) {
    error = killed.what();
  } catch (const std::exception& failed) {
    error = failed.what();
    drain_after_failure(program, rank);
  }
  world_->leave();
}

// Whatever was enqueued must run: lifted flags let it.
void Simulation::drain_after_failure(RankProgram& program, int rank) {
  static const std::atomic<bool> kNever{false};
  feplb::Bell bell;
  feplb::SimDevice* device = devices_[static_cast<std::size_t>(rank)];
  try {
    program.abandon();
    const auto drained = [device] { return device->compute_drained(); };
    const feplb::WaitResult result =
        device->wait_host(bell, drained, feplb::WaitLimits{feplb::TimePoint::max(), &kNever});
    if (result == feplb::WaitResult::kReached) return;
    result_.wrong =
        cat("rank ", rank,
            "'s streams did not drain after: ", result_.errors[static_cast<std::size_t>(rank)]);
  } catch (const feplb::SimDeadlock& deadlock) {
    result_.wrong = deadlock.what();
  } catch (const feplb::SimKilled&) {
  }
}

std::string Simulation::name_of(const feplb::Flag* flag) const {
  static const char* const kNames[] = {"rows", "weights", "returns", "grads"};
  for (int rank = 0; rank < options_.num_ranks; ++rank) {
    for (int src = 0; src < options_.num_ranks; ++src) {
      for (int kind = 0; kind < feplb::kNumFlagKinds; ++kind) {
        if (board_.inbound(rank, src, static_cast<feplb::FlagKind>(kind)) != flag) continue;
        return cat(kNames[kind], " from rank ", src);
      }
    }
  }
  return "?";
}

}  // namespace

SimRunResult run_simulation(uint64_t seed, SimRunOptions options) {
  return Simulation(seed, std::move(options)).run();
}

SimRunOptions variant(int number) {
  SimRunOptions options;
  options.world.single_queue = (number & 1) != 0;
  options.world.blocking_driver = (number & 2) != 0;
  options.two_streams = (number & 4) != 0;
  return options;
}

std::string variant_name(int number) {
  return cat(number & 1 ? "single queue" : "separate queues", ", ",
             number & 2 ? "blocking driver" : "driver that never blocks",
             number & 4 ? ", two compute streams" : "");
}

}  // namespace feplb_test
