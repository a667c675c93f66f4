#include "sim_run.h"

#include "check.h"
#include "ranks.h"

namespace feplb_test {
namespace {

using feplb::cat;

// A device whose watchdog stops lifting after it has lifted once.
class TimidDevice final : public feplb::SimDevice {
 public:
  TimidDevice(std::shared_ptr<feplb::SimWorld> world, int rank, const feplb::CountBoard& board)
      : SimDevice(std::move(world), rank), board_(board) {}
  feplb::Drives drive(feplb::Crew crew) override {
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
  std::unique_ptr<feplb::Device> make_device(int rank);
  void run_rank(int rank);
  void drain_after_failure(RankProgram& program, int rank);
  std::string name_of(const feplb::Flag* flag);

  const uint64_t seed_;
  const SimRunOptions options_;
  feplb::SimRandom random_;
  const Scenario scenario_;
  Verdict verdict_;
  Ranks ranks_;
  std::shared_ptr<feplb::SimWorld> world_;
  std::vector<feplb::SimDevice*> devices_;
  SimRunResult result_;
};

Simulation::Simulation(uint64_t seed, SimRunOptions options)
    : seed_(seed),
      options_(std::move(options)),
      random_(seed ^ 0x5eed),
      scenario_(make_scenario(options_.num_ranks, options_.num_micro_batches, random_)),
      ranks_(options_.num_ranks) {
  feplb::SimOptions world = options_.world;
  world.name_flag = [this](const feplb::Flag* flag) { return name_of(flag); };
  world.see_copy = [this](const feplb::CopyOp& copy) { verdict_.see_copy(copy); };
  world_ = std::make_shared<feplb::SimWorld>(options_.num_ranks, seed, world);
  ranks_.make_domains([this](int rank) { return make_device(rank); });
  verdict_.excuses = [this] { return ranks_.board().aborted(); };
}

std::unique_ptr<feplb::Device> Simulation::make_device(int rank) {
  auto device = options_.lifts_once ? std::make_unique<TimidDevice>(world_, rank, ranks_.board())
                                    : std::make_unique<feplb::SimDevice>(world_, rank);
  devices_.push_back(device.get());
  return device;
}

SimRunResult Simulation::run() {
  result_.errors = ranks_.run([this](int rank) { run_rank(rank); });
  result_.num_steps = world_->num_steps();
  result_.order_hash = world_->order_hash();
  result_.num_moves = verdict_.num_moves();
  if (result_.wrong.empty()) result_.wrong = verdict_.wrong();
  return result_;
}

void Simulation::run_rank(int rank) {
  feplb::SimDevice* device = devices_[static_cast<std::size_t>(rank)];
  const auto launch = [device](std::uintptr_t, std::function<void()> kernel) {
    device->launch(std::move(kernel));
  };
  RankProgram::Config config;
  config.rank = rank;
  config.seed = seed_;
  if (options_.two_streams) config.streams = {0, 1};
  RankProgram program(ranks_.domain(rank), launch, scenario_, config, verdict_);
  const feplb::SimWorld::Turn turn(*world_, rank);
  try {
    if (rank != options_.absent_rank) program.run();
  } catch (const feplb::SimDeadlock& deadlock) {
    result_.wrong = deadlock.what();
  } catch (const feplb::SimKilled&) {
    throw;
  } catch (const std::exception&) {
    drain_after_failure(program, rank);
    throw;
  }
}

// Whatever was enqueued must run: lifted flags let it.
void Simulation::drain_after_failure(RankProgram& program, int rank) {
  static const std::atomic<bool> kNever{false};
  feplb::Bell bell;
  feplb::SimDevice* device = devices_[static_cast<std::size_t>(rank)];
  try {
    program.abandon();
    const auto drained = [device] { return device->compute_drained(); };
    const feplb::WaitLimits limits{feplb::TimePoint::max(), &kNever};
    if (device->wait_host(bell, drained, limits) == feplb::WaitResult::kReached) return;
    result_.wrong = cat("rank ", rank, "'s streams did not drain");
  } catch (const feplb::SimDeadlock& deadlock) {
    result_.wrong = deadlock.what();
  }
}

std::string Simulation::name_of(const feplb::Flag* flag) {
  static const char* const kNames[] = {"rows", "weights", "returns", "grads"};
  for (int rank = 0; rank < options_.num_ranks; ++rank) {
    for (int src = 0; src < options_.num_ranks; ++src) {
      for (int kind = 0; kind < feplb::kNumFlagKinds; ++kind) {
        if (ranks_.board().inbound(rank, src, static_cast<feplb::FlagKind>(kind)) != flag) continue;
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
