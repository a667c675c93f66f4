// Is a plan that someone else made a valid one? The invariants of every plan, on the core's side;
// plan_violations in feplb/scheduler/plan.py lists all that a plan breaks, this names the first.
#pragma once

#include <string>
#include <vector>

#include "plan_types.h"

namespace feplb {

// A sentence with what was seen and what was expected; empty for a valid plan.
std::string plan_fault(const PlanInput& input, const std::vector<Move>& moves);

}  // namespace feplb
