// Domains of several ranks in one process, over plain memory: what the simulation and the tests of
// the host lane have in common.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../../feplb/csrc/domain.h"
#include "memory.h"
#include "scenario.h"

namespace feplb_test {

class Ranks {
 public:
  using MakeDevice = std::function<std::unique_ptr<feplb::Device>(int rank)>;

  // The layers are those of scenario.h unless given.
  explicit Ranks(int num_ranks, double deadline_s = 3600,
                 std::vector<feplb::LayerShape> layers = layer_shapes());
  ~Ranks();

  // Of the process that peers take `rank` to be; before make_domains.
  void set_pid(int rank, pid_t pid) { config_.pids[static_cast<std::size_t>(rank)] = pid; }
  // Callers submit nothing themselves, as if every push were withheld; before make_domains. Else
  // every other rank's does.
  void leave_to_movers() { left_to_movers_ = true; }
  void make_domains(const MakeDevice& make_device);
  // Opens all domains, runs `program` for each rank in a thread of its own, returns what it threw
  // ("" where it returned). Domains stay open.
  std::vector<std::string> run(const std::function<void(int rank)>& program);

  int size() const { return config_.num_ranks; }
  feplb::CountBoard& board() { return board_; }
  std::byte* board_data() { return board_memory_.data(); }
  std::size_t board_bytes() const;
  std::byte* arena(int rank) { return arenas_[static_cast<std::size_t>(rank)].data(); }
  std::size_t arena_bytes() const;
  void close();
  feplb::Domain& domain(int rank) { return *domains_[static_cast<std::size_t>(rank)]; }

 private:
  feplb::DomainConfig config_;
  Memory board_memory_;
  feplb::CountBoard board_;
  std::vector<Memory> arenas_;
  std::vector<std::unique_ptr<feplb::Domain>> domains_;
  bool left_to_movers_ = false;
};

}  // namespace feplb_test
