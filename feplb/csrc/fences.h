// The fences of the protocol, by name. In a release build every one is on, at no cost. The test
// build (FEPLB_FENCE_SWITCHES) can take one out, and a named test must then fail: a fence that no
// test misses is a fence nobody knows to be there.
//
// Three of them matter only in special cases, which their tests make:
//   kReleaseReturns, kReleaseGrads   where calls run on compute streams that nothing orders; on one
//       stream an owner's rows leave after it has placed or added what came home before
//   kDrainInputs   after a failure; before, an owner's wait for its returns tells it that its
//       helpers have had all it sent, while a lifted wait tells it nothing
#pragma once

namespace feplb {

enum class Fence {
  kHandshake,        // deadlock rule: own submissions up to and including (seq, level) come first
  kWaitRows,         // received GEMMs wait for the rows flag
  kWaitWeights,      // received GEMMs wait for the weights flag
  kWaitReturns,      // placing waits for the returns flag
  kWaitGrads,        // adding late weight grads waits for the grads flag
  kEventInputs,      // level-1 copies wait for what computes rows and weights
  kEventReturns,     // level-2 copies wait for the received GEMMs
  kEventGrads,       // level-3 copies wait for the received wgrad
  kReleaseRows,      // a push into a peer's rows half waits for its last reader
  kReleaseWeights,   // a push into a peer's weight slots waits for their last reader
  kReleaseReturns,   // a push into a peer's return half waits for its placing
  kReleaseGrads,     // a push into a peer's grad slots waits for the add
  kDrainInputs,      // user tensors are free again only when our copies have read them
  kDrainOutbox,      // the outbox is rewritten only when our copies have read it
  kDrainGradOutbox,  // the same for the weight-grad outbox
  kFlagAfterData,    // the flag follows its data in the stream, never in the same batch
  kEpochCheck,       // flags compare with "at least this epoch", not with "was ever set"
  kCount,
};

const char* fence_name(Fence fence);

#ifdef FEPLB_FENCE_SWITCHES
bool fence_on(Fence fence);
void set_fence(Fence fence, bool on);
#else
constexpr bool fence_on(Fence) { return true; }
#endif

}  // namespace feplb
