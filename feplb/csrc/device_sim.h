// The sim lane: one rank's device in a simulated world (sim_world.h). The compute stream is
// asynchronous: a wait is enqueued, and kernels are functions that run when the adversary likes.
// Threads: that of its rank and that of its mover, as device.h says. Memory is plain memory.
#pragma once

#include <functional>
#include <memory>

#include "sim_world.h"

namespace feplb {

class SimDevice : public Device {
 public:
  SimDevice(std::shared_ptr<SimWorld> world, int rank) : world_(std::move(world)), rank_(rank) {}
  ~SimDevice() override { stop(); }

  // Enqueues a kernel on the compute stream. With a blocking driver, some launches first hold the
  // driver until everything queued on this device has run, as a lazy module load or a free does.
  void launch(std::function<void()> kernel);

  void bind_compute(std::uintptr_t stream) override;  // 0 or 1
  Event record(StreamKind stream) override;
  WaitResult wait_event(Event event, const WaitLimits& limits) override;
  WaitResult wait_flag(const Flag* flag, Epoch epoch, const WaitLimits& limits) override;
  void after_event(StreamKind stream, Event event) override;
  void copy_batch(StreamKind stream, const std::vector<CopyOp>& copies) override;
  void write_flag(StreamKind stream, Flag* flag, Epoch epoch) override;
  bool compute_drained() override;
  WaitResult wait_host(Bell& bell, const std::function<bool()>& done,
                       const WaitLimits& limits) override;
  Drives drive(Crew crew) override;
  bool is_inline() const override { return false; }
  bool joins_pushes() const override { return world_->joins_pushes(); }
  void stop() noexcept override { world_->stop_crew(rank_); }

 private:
  SimStreams& streams() { return world_->ranks_[static_cast<std::size_t>(rank_)].streams; }

  std::shared_ptr<SimWorld> world_;
  const int rank_;
};

}  // namespace feplb
