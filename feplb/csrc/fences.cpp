#include "fences.h"

#include <atomic>
#include <cstddef>

namespace feplb {

const char* fence_name(Fence fence) {
  static const char* const kNames[] = {
      "handshake",       "wait_rows",     "wait_weights", "wait_returns", "wait_grads",
      "event_inputs",    "event_returns", "event_grads",  "release_rows", "release_weights",
      "release_returns", "release_grads", "drain_inputs", "drain_outbox", "drain_grad_outbox",
      "flag_after_data", "epoch_check"};
  static_assert(sizeof(kNames) / sizeof(kNames[0]) == static_cast<std::size_t>(Fence::kCount),
                "one name per fence");
  return kNames[static_cast<int>(fence)];
}

#ifdef FEPLB_FENCE_SWITCHES
namespace {
std::atomic<bool> fence_off[static_cast<int>(Fence::kCount)];
}
bool fence_on(Fence fence) { return !fence_off[static_cast<int>(fence)].load(); }
void set_fence(Fence fence, bool on) { fence_off[static_cast<int>(fence)].store(!on); }
#endif

}  // namespace feplb
