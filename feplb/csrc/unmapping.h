// The end of arenas that must be freed by their exporter last (CUDA IPC): who closes unmaps its
// peers' arenas, says so on the board, and frees its own once every living peer has said the same.
// No collective: whoever does not say so in time keeps nobody, and its peers keep the memory.
#pragma once

#include <functional>
#include <vector>

#include "count_board.h"

namespace feplb {

// This rank maps no arena of a peer any more. Wakes who waits for it.
void tell_unmapped(CountBoard& board, int rank) noexcept;

// Waits until every living peer has unmapped this rank's arena, a second at most, or `deadline_s`
// where that is less. Returns the global ranks that have not. Sleeps on the rank's own bell, whose
// mover must have ended.
std::vector<int> await_unmapped(const CountBoard& board, int rank,
                                const std::function<bool(int rank)>& is_alive, double deadline_s);

}  // namespace feplb
