// Visits every state of a model, nearest first, so that the first violation found has a shortest
// trace. Exact: states are compared by their bytes, not by a hash.
#pragma once

#include <cstdint>
#include <string>

#include "model.h"

namespace protocol {

struct Result {
  Finding finding;
  bool is_exhaustive = true;  // false: max_states were visited first
  uint64_t num_states = 0;
  uint64_t num_bytes = 0;  // memory held by the visited states
  std::string trace;       // one line per step, then where every rank stands
};

Result explore(const Model& model, uint64_t max_states);

}  // namespace protocol
