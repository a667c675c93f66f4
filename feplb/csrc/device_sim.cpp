#include "device_sim.h"

#include <utility>

namespace feplb {

void SimDevice::launch(std::function<void()> kernel) {
  world_->driver_call(rank_);
  world_->load_module(rank_);
  streams().add_kernel(std::move(kernel));
}

void SimDevice::bind_compute(std::uintptr_t stream) {
  world_->driver_call(rank_);
  streams().bind_compute(static_cast<int>(stream));
}

Event SimDevice::record(StreamKind stream) {
  world_->driver_call(rank_);
  return streams().record(stream);
}

WaitResult SimDevice::wait_event(Event event, const WaitLimits& /*limits*/) {
  world_->driver_call(rank_);
  streams().add_event_wait(StreamKind::kCompute, event);
  return WaitResult::kEnqueued;
}

WaitResult SimDevice::wait_flag(const Flag* flag, Epoch epoch, const WaitLimits& /*limits*/) {
  world_->driver_call(rank_);
  streams().add_flag_wait(flag, epoch);
  return WaitResult::kEnqueued;
}

void SimDevice::after_event(StreamKind stream, Event event) {
  world_->driver_call(rank_);
  streams().add_event_wait(stream, event);
}

void SimDevice::copy_batch(StreamKind stream, const std::vector<CopyOp>& copies) {
  world_->driver_call(rank_);
  streams().add_copies(stream, copies, world_->random_);
}

void SimDevice::write_flag(StreamKind stream, Flag* flag, Epoch epoch) {
  world_->driver_call(rank_);
  streams().add_flag_write(stream, flag, epoch);
}

bool SimDevice::compute_drained() { return streams().compute_drained(); }

WaitResult SimDevice::wait_host(Bell& /*bell*/, const std::function<bool()>& done,
                                const WaitLimits& limits) {
  world_->driver_call(rank_);
  return world_->wait_on_host(done, limits);
}

Drives SimDevice::drive(Crew crew) {
  world_->start_crew(rank_, std::move(crew));
  return Drives::kMoverAndWatchdog;
}

}  // namespace feplb
