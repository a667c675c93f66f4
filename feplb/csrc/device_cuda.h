// The ce lane: one rank's GPU, driven through the driver's host interface alone. No kernel of ours
// runs anywhere: copies go through the copy engines, flags are words of pinned host memory that
// streams write and await.
//
// Threads: that of the caller and that of the mover, as device.h says. No call waits for a peer,
// but any may be held by the driver.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cuda_memory.h"
#include "device.h"

namespace feplb::cuda {

// How a batch of copies is handed to the driver.
enum class CopyCall {
  kBatch,  // cuMemcpyBatchAsync, one call for all (driver 12.8 or newer)
  kPeer,   // cuMemcpyPeerAsync, one call per copy
  kPlain,  // cuMemcpyAsync, which infers both GPUs from the addresses; peers' ordinals may be
           // hidden
};

// How a stream writes a flag.
enum class FlagCall {
  kMemOps,  // cuStreamBatchMemOp, one call for all flags of a submission
  kWrite,   // cuStreamWriteValue32, one call per flag
  kCopy,    // a word of the GPU's memory is written, and copied to the flag
};

CopyCall copy_call_from(const std::string& name, const Driver& driver);  // "auto", "batch", ...
FlagCall flag_call_from(const std::string& name);
const char* copy_call_name(CopyCall call);
const char* flag_call_name(FlagCall call);

// Where a peer's arena is mapped, and on which of the GPUs that this process sees it lies.
struct PeerArena {
  const std::byte* data;
  std::size_t bytes;
  int ordinal;
};

struct LaneOptions {
  CopyCall copies = CopyCall::kBatch;
  FlagCall flags = FlagCall::kMemOps;
  std::vector<PeerArena> peers;  // for CopyCall::kPeer, which must know both GPUs of a copy
  // [num_ranks]; empty: flags lie on the board. Else peers write them by copies of four bytes,
  // since a stream writes no word of another GPU; the rank's own stream awaits them there, and then
  // writes the flag of its board for the host to see.
  std::vector<FlagPlace> flags_in_arenas;
};

// `board` holds every flag that this device writes or awaits; it is pinned here and must outlive
// the device.
std::unique_ptr<feplb::Device> make_cuda_device(std::shared_ptr<DeviceContext> context,
                                                std::byte* board, std::size_t board_bytes,
                                                LaneOptions options);

}  // namespace feplb::cuda
