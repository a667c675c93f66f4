// How a domain gets its lane: what Python chose, made once board and arenas are mapped.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "shared_memory.h"

namespace feplb {

class LaneDoor {
 public:
  virtual ~LaneDoor() = default;
  // `name` is for the lane's threads; board and arenas [num_ranks] outlive the device. `flags`
  // [num_ranks], empty on one host, is for lanes that go to others.
  virtual std::unique_ptr<Device> make(const std::string& name, SharedMemory& board,
                                       const std::vector<std::shared_ptr<Mapping>>& arenas,
                                       const std::vector<FlagPlace>& flags) = 0;
};

}  // namespace feplb
