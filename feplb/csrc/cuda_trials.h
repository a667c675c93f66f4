// What a machine's driver and GPUs can do: read, and tried. For feplb doctor.
#pragma once

#include <string>
#include <vector>

#include "cuda_memory.h"

namespace feplb::cuda {

struct GpuFacts {
  int ordinal = 0;
  std::string name;
  std::string uuid;  // as nvidia-smi writes it: "GPU-..."
  int capability_major = 0, capability_minor = 0;
  int async_engines = 0;
  bool has_vmm = false;
  bool has_posix_handles = false;
  bool has_fabric_handles = false;
  std::vector<bool> reaches;  // [num_gpus]: peer access, as the driver says
};

struct MachineFacts {
  int driver_version = 0;  // 13000 is CUDA 13.0
  bool is_stand_in = false;
  bool has_batches = false;
  std::vector<GpuFacts> gpus;
};

MachineFacts read_facts(const Driver& driver);

// One thing that the lane needs, tried on one GPU; `seen` is the driver's answer.
struct Trial {
  std::string name;
  bool ok = false;
  std::string seen;
};

// Arenas made, exported and opened again (a handle of CUDA IPC cannot be opened by the process that
// made it: made only), a board pinned, a flag written and awaited, a batch copied and compared.
// Takes a few MiB of the GPU's memory for a moment.
std::vector<Trial> try_out(const std::shared_ptr<const Driver>& driver, int ordinal);

}  // namespace feplb::cuda
