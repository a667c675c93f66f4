// Turns a route into pushes: for each peer, the copies of one level and the flag that follows them.
// Pure address arithmetic; submits nothing. Called on the caller's thread, submitted by the mover.
#pragma once

#include <cstddef>
#include <vector>

#include "arena.h"

namespace feplb {

// Everything of one level for one peer and one flag. The mover submits it as a whole, once
// `region` of `dst_rank` has been released by its last reader.
struct Push {
  int dst_rank = 0;
  StreamKind stream = StreamKind::kPushes;
  FlagKind flag = kRowsFlag;
  Region region = kRowsRegion;
  std::vector<CopyOp> copies;
};

// Addresses of the caller's tensors for one call; read until the call is finished.
struct CallSources {
  std::vector<const std::byte*> rows;                  // per piece of ArenaLayout::rows_pieces
  std::vector<std::vector<const std::byte*>> weights;  // [tensor][local expert]
};

// What all pushes of a call have in common.
struct CallGeometry {
  const ArenaLayout* layout = nullptr;
  const std::vector<std::byte*>* arenas = nullptr;  // [num_ranks], as mapped into this process
  int rank = 0;
  int layer = 0;
  CallKind kind = CallKind::kForward;
  uint64_t seq = 0;
};

// Level 1: rows (and side data) of every sent move, then the weights. first_row[e] = first row of
// local expert e in the caller's rows.
std::vector<Push> push_rows(const CallGeometry& call, const Route& route,
                            const CallSources& sources, const std::vector<int64_t>& first_row);

// Level 2: this rank's outbox half to the owners' return halves.
std::vector<Push> push_returns(const CallGeometry& call, const Route& route);

// Level 3: this rank's grad outbox to the owners' grad slots, for the tensors in `tensors`.
std::vector<Push> push_grads(const CallGeometry& call, const Route& route,
                             const std::vector<int>& tensors);

}  // namespace feplb
