// The table of rules.h.
#include "rules.h"

namespace protocol {

const std::vector<RuleText>& all_rules() {
  static const std::vector<RuleText> kRules = {
      {Rule::kHandshake, "handshake", "device waits are enqueued without asking the mover"},
      {Rule::kHandshakeIncluding, "handshake_including",
       "a wait of level k asks only for this rank's submissions of lower levels"},
      {Rule::kHandshakeReleases, "handshake_releases",
       "releases are posted to the mover and no handshake covers them"},
      {Rule::kMoverBlocksOnNone, "mover_blocks_on_none",
       "the mover takes jobs in order and sits in a withheld one until it can submit it"},
      {Rule::kNoSpinningKernel, "no_spinning_kernel",
       "a wait is a kernel that may start early and then keeps the compute units until it passes"},
      {Rule::kReturnsAfterSubmission, "returns_after_submission",
       "run_experts returns without asking whether its copies are submitted"},
      {Rule::kReleaseRowsAfterReader, "release_rows_after_reader",
       "rows are released before the received GEMMs"},
      {Rule::kReleaseRowsAfterWgrad, "release_rows_after_wgrad",
       "in backward, rows are released after dgrad, before wgrad"},
      {Rule::kReleaseWeightsAfterReader, "release_weights_after_reader",
       "weight slots are released before the received GEMMs"},
      {Rule::kReleaseReturnsAfterReader, "release_returns_after_reader",
       "returned rows are released before they are placed"},
      {Rule::kReleaseGradsAfterReader, "release_grads_after_reader",
       "grad slots are released before the add"},
      {Rule::kReleaseDirectlyAfter, "release_directly_after",
       "a release is enqueued after the next device wait"},
      {Rule::kWithholdRows, "withhold_rows", "rows are submitted whatever the release says"},
      {Rule::kWithholdWeights, "withhold_weights", "weights are submitted whatever it says"},
      {Rule::kWithholdReturns, "withhold_returns", "returned rows are submitted whatever it says"},
      {Rule::kWithholdGrads, "withhold_grads", "weight grads are submitted whatever it says"},
      {Rule::kWithholdPerJob, "withhold_per_job",
       "every job of a call is withheld until the releases of all jobs of the call are visible"},
      {Rule::kWithholdOnHost, "withhold_on_host",
       "a job is submitted at once, behind a device wait for its release"},
      {Rule::kTwoRowHalves, "two_row_halves", "the rows area is one, releases count as for two"},
      {Rule::kOneWeightSlot, "one_weight_slot", "weight slots are one, releases count as for two"},
      {Rule::kTwoReturnHalves, "two_return_halves",
       "the return area is one, releases count as for two"},
      {Rule::kOneGradSlot, "one_grad_slot", "grad slots are one, releases count as for two"},
      {Rule::kWaitRows, "wait_rows", "no device wait for the rows flag"},
      {Rule::kWaitWeights, "wait_weights", "no device wait for the weights flag"},
      {Rule::kWaitReturns, "wait_returns", "no device wait for the returns flag"},
      {Rule::kWaitGrads, "wait_grads", "no device wait for the grads flag"},
      {Rule::kGradsBeforePublish, "grads_before_publish",
       "late grads of a call are taken after the next call, not before it publishes"},
      {Rule::kCopyAfterEvent, "copy_after_event", "a copy does not wait for the compute stream"},
      {Rule::kFlagAfterData, "flag_after_data", "the flag may be seen before the data is complete"},
      {Rule::kEpochAtLeast, "epoch_at_least", "flags are compared as equal"},
      {Rule::kHostWaitsEnd, "host_waits_end", "host waits of the Python thread ignore the mark"},
      {Rule::kLift, "lift", "the watchdog marks the call and lifts nothing"},
      {Rule::kMarkBeforeLift, "mark_before_lift", "the watchdog lifts first and marks after"},
      {Rule::kLiftRepeated, "lift_repeated", "the watchdog lifts once"},
      {Rule::kLiftUntilCallEnds, "lift_until_call_ends",
       "the watchdog stops lifting when the streams are empty although the call goes on"},
      {Rule::kLiftByPlainStore, "lift_by_plain_store", "lifting needs the driver's lock"},
      {Rule::kErrorStopsMover, "error_stops_mover",
       "an error leaves run_experts while the mover goes on submitting"},
      {Rule::kCheckDrainsFirst, "check_drains_first",
       "check() looks at the mark without waiting for the compute stream"},
      {Rule::kCheckExchanges, "check_exchanges", "check() asks no other rank"},
  };
  return kRules;
}

Rule find_rule(const std::string& name) {
  for (const RuleText& entry : all_rules()) {
    if (name == entry.name) return entry.rule;
  }
  return Rule::kNone;
}

}  // namespace protocol
