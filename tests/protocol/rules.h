// The sentences of design.md that the protocol model can be run without: one Rule each, with its
// name on the command line and what is done instead when it is taken out. tests/
// test_protocol_model.py maps the sentences to these names and demands a violation for each.
#pragma once

#include <string>
#include <vector>

namespace protocol {

enum class Rule {
  kNone,
  kHandshake,
  kHandshakeIncluding,
  kHandshakeReleases,
  kMoverBlocksOnNone,
  kNoSpinningKernel,
  kReturnsAfterSubmission,
  kReleaseRowsAfterReader,
  kReleaseRowsAfterWgrad,
  kReleaseWeightsAfterReader,
  kReleaseReturnsAfterReader,
  kReleaseGradsAfterReader,
  kReleaseDirectlyAfter,
  kWithholdRows,
  kWithholdWeights,
  kWithholdReturns,
  kWithholdGrads,
  kWithholdPerJob,
  kWithholdOnHost,
  kTwoRowHalves,
  kOneWeightSlot,
  kTwoReturnHalves,
  kOneGradSlot,
  kWaitRows,
  kWaitWeights,
  kWaitReturns,
  kWaitGrads,
  kGradsBeforePublish,
  kCopyAfterEvent,
  kFlagAfterData,
  kEpochAtLeast,
  kHostWaitsEnd,
  kLift,
  kMarkBeforeLift,
  kLiftRepeated,
  kLiftUntilCallEnds,
  kLiftByPlainStore,
  kErrorStopsMover,
  kCheckDrainsFirst,
  kCheckExchanges,
};

struct RuleText {
  Rule rule;
  const char* name;
  const char* instead;  // what the protocol does when the rule is taken out
};

const std::vector<RuleText>& all_rules();

// The rule of that name, kNone if there is none.
Rule find_rule(const std::string& name);

}  // namespace protocol
