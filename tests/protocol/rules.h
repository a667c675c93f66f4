// What the protocol model can be run without: a Rule each, with its name on the command line and
// what is done instead. tests/test_protocol_model.py maps the sentences of design.md to these names
// and demands a violation without each (kWithholdPerJob, which only saves time, excepted).
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
