// A device that only writes down what it is asked, for tests that take single steps.
#pragma once

#include <string>
#include <vector>

#include "../../feplb/csrc/device.h"
#include "../../feplb/csrc/error.h"

namespace feplb_test {

class PaperDevice final : public feplb::Device {
 public:
  std::vector<std::string> asked;  // "1 after 42", "1 copies 2", "1 flag 7": stream, what
  bool is_drained = true;
  bool can_lift = true;

  void bind_compute(std::uintptr_t /*stream*/) override {}
  feplb::Event record(feplb::StreamKind stream) override {
    return feplb::Event{stream, ++position_};
  }
  feplb::WaitResult wait_event(feplb::Event, const feplb::WaitLimits&) override {
    return feplb::WaitResult::kEnqueued;
  }
  feplb::WaitResult wait_flag(const feplb::Flag*, feplb::Epoch, const feplb::WaitLimits&) override {
    return feplb::WaitResult::kEnqueued;
  }
  void after_event(feplb::StreamKind stream, feplb::Event event) override {
    asked.push_back(feplb::cat(static_cast<int>(stream), " after ", event.position));
  }
  void copy_batch(feplb::StreamKind stream, const std::vector<feplb::CopyOp>& copies) override {
    asked.push_back(feplb::cat(static_cast<int>(stream), " copies ", copies.size()));
  }
  void write_flag(feplb::StreamKind stream, feplb::Flag* flag, feplb::Epoch epoch) override {
    asked.push_back(feplb::cat(static_cast<int>(stream), " flag ", epoch));
    flag->epoch.store(epoch);
  }
  bool compute_drained() override { return is_drained; }
  bool lifts_flags() const override { return can_lift; }
  bool is_inline() const override { return false; }
  void stop() noexcept override {}

 private:
  uint64_t position_ = 0;
};

}  // namespace feplb_test
