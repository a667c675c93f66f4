// Ranks that are threads of one process, each with a GPU of the stand-in driver (tests/driver),
// which is linked into the program: compute streams are behind, as a GPU's are.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../../feplb/csrc/device_cuda.h"
#include "rank_program.h"
#include "ranks.h"

// What the stand-in has for tests; ledger.h and stand_in.cpp say what it does.
extern "C" {
int64_t stand_in_calls(const char* symbol);
void stand_in_block(const char* symbol, int64_t ms);
void stand_in_set_gpus(int count);
void stand_in_set_capturing(int status);
void stand_in_set_jitter_us(int64_t us);
void stand_in_set_one_queue(int on);
void stand_in_set_queued_default(int on);
void stand_in_set_one_lock(int on);
void stand_in_set_queue_depth(int64_t depth);
int64_t stand_in_alive(const char* kind);
void stand_in_share_pins(int on);
void stand_in_adopt(void* memory, std::size_t bytes);
void stand_in_disown(void* memory);
int stand_in_launch(feplb::cuda::Stream stream, void (*kernel)(void*), void* argument);
}

namespace feplb_test {

// How the driver behaves while it lives.
struct DriverMood {
  bool queued_default = false;
  bool one_queue = false;
  bool one_lock = false;
  int64_t queue_depth = 0;
  int64_t jitter_us = 0;
  std::string held;  // a function whose every call is held
  int64_t held_ms = 0;
};

DriverMood late(int64_t jitter_us);
DriverMood one_queue(int64_t jitter_us = 0);
DriverMood one_lock(int64_t jitter_us = 0);

// What the ranks of a run threw, a line each.
std::string joined(const std::vector<std::string>& errors);

class GpuRanks {
 public:
  struct Config {
    int num_ranks = 2;
    double deadline_s = 60;
    DriverMood mood = {};
    feplb::cuda::CopyCall copies = feplb::cuda::CopyCall::kBatch;
    feplb::cuda::FlagCall flags = feplb::cuda::FlagCall::kMemOps;
    int num_streams = 1;
    bool has_default = false;  // stream 0 is one of them, and behind as the others are
  };
  explicit GpuRanks(Config config);
  ~GpuRanks();

  Ranks& ranks() { return ranks_; }
  void make_domains();
  // The compute streams that the rank's caller has made.
  const std::vector<std::uintptr_t>& streams(int rank) const;
  // Launches kernels; now and then the caller frees memory before it does.
  RankProgram::Launch launcher(int rank, uint64_t seed, uint32_t frees_one_in = 0);
  void launch(std::uintptr_t stream, std::function<void()> kernel);
  // What an allocator does that returns memory to the driver: holds the lock until all has run.
  void free_memory(int rank);
  void synchronize(int rank);

 private:
  std::unique_ptr<feplb::Device> make_device(int rank);
  const std::shared_ptr<feplb::cuda::DeviceContext>& context(int rank) const;
  const feplb::cuda::Driver& driver() const { return *driver_; }

  Config config_;
  std::shared_ptr<const feplb::cuda::Driver> driver_;
  Ranks ranks_;
  std::vector<std::shared_ptr<feplb::cuda::DeviceContext>> contexts_;
  std::vector<std::vector<std::uintptr_t>> streams_;
};

GpuRanks::Config ranks_of(int num_ranks, DriverMood mood = {});

}  // namespace feplb_test
