// What one rank does with its Domain: the calls of a scenario, in the order in which two_phase.py
// makes them. The same program runs on every lane; only `launch` differs (a kernel on a compute
// stream, or a plain call).
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "../../feplb/csrc/domain.h"
#include "call_tensors.h"

namespace feplb_test {

// What the ranks of one run found; any thread.
class Verdict {
 public:
  // Wrong data is expected from the moment this says so (after a failure was announced).
  std::function<bool()> excuses;

  void expect_right(const std::string& wrong);
  // From now on nobody may copy from this memory, whatever failed.
  void forbid(const std::vector<feplb::CopyOp>& memory);
  void see_copy(const feplb::CopyOp& copy);
  void count_moves(int64_t sent, int64_t received);
  std::string wrong() const;
  std::string moves() const;  // "12 moves sent, 12 received"
  int64_t num_moves() const { return sent_; }

 private:
  mutable std::mutex mutex_;
  std::string wrong_;
  std::map<const std::byte*, std::size_t> forbidden_;
  int64_t sent_ = 0;
  int64_t received_ = 0;
};

class RankProgram {
 public:
  using Launch = std::function<void(std::uintptr_t stream, std::function<void()> kernel)>;

  // Each call binds one of the compute streams, which nothing else orders.
  struct Config {
    int rank = 0;
    uint64_t seed = 0;
    std::vector<std::uintptr_t> streams = {0};
  };
  RankProgram(feplb::Domain& domain, Launch launch, const Scenario& scenario, Config config,
              Verdict& verdict);

  void run();  // all calls; throws what the domain throws
  // After run() threw: the caller lets go of what it still held, and somebody else uses the memory.
  void abandon();

 private:
  using Tensors = std::shared_ptr<CallTensors>;
  struct CallState {
    Call call;
    uint64_t seq = 0;
    Tensors tensors;
    ArenaView view;
    feplb::Route route;
    std::vector<RowRange> kept;
  };

  // Returns false where a rank refused the call.
  bool begin(CallState& state, std::vector<feplb::Move> saved_moves);
  feplb::CallHeader header_of(const Call& call) const;
  void agree(CallState& state, const feplb::Agreement& agreement);
  void run_forward(const Call& call);
  void run_backward(const Call& call);
  void run_kept(const CallState& state, bool is_part_a);
  void run_received_backward(const CallState& state);
  void bring_home(const CallState& state);
  void let_go(const Tensors& tensors, bool check_results);
  void add_late_grads();
  void launch(std::function<void()> kernel) const { launch_(stream_, std::move(kernel)); }
  std::vector<feplb::Move> backward_moves(const Call& call) const;

  feplb::Domain& domain_;
  const Launch launch_;
  const Scenario& scenario_;
  const int rank_;
  const std::vector<std::uintptr_t> streams_;
  std::uintptr_t stream_;  // bound last
  Verdict& verdict_;
  feplb::SimRandom random_;                                        // what ranks may do differently
  std::map<std::pair<int, int>, std::vector<feplb::Move>> plans_;  // (micro-batch, layer)
  std::unique_ptr<CallState> late_;   // backward call whose weight grads are still to be added
  std::vector<Tensors> all_tensors_;  // memory stays readable, whoever still reads it
  std::size_t num_let_go_ = 0;        // of all_tensors_
};

}  // namespace feplb_test
