// The tensors of one call on one rank and the kernels that run over them: the caller's own, and
// what peers push into the arena. Kernels run when the device likes, so they hold what they need.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../../feplb/csrc/copier.h"
#include "scenario.h"

namespace feplb_test {

// One rank's arena as the kernels of one call see it; pointers are to words.
struct ArenaView {
  std::byte* arena = nullptr;
  const feplb::ArenaLayout* layout = nullptr;
  Call call;
  uint64_t seq = 0;

  uint64_t* received_row(int piece, int64_t row) const;
  uint64_t* outbox_row(int piece, int64_t row) const;
  uint64_t* returned_row(int piece, int64_t row) const;
  uint64_t* weight(int slot, int tensor) const;
  uint64_t* grad(int slot, int tensor) const;
  uint64_t* grad_outbox(int slot, int tensor) const;

  // What a helper computes for one received move.
  void run_forward(const feplb::RoutedMove& move) const;
  void run_backward_rows(const feplb::RoutedMove& move) const;
  void run_backward_weights(const feplb::RoutedMove& move) const;

 private:
  uint64_t folded_weights(int slot) const;
  RowInputs backward_inputs(int64_t row) const;
};

// Rows [begin, end) of one local expert.
struct RowRange {
  int expert;
  int begin;
  int end;
};

class CallTensors {
 public:
  CallTensors(const Call& call, int rank, std::vector<int32_t> counts);

  void fill();       // what the layers before compute
  void overwrite();  // the caller has let go of the inputs, and somebody else uses their memory
  std::vector<feplb::CopyOp> inputs_memory() const;  // as sources, without a destination
  feplb::CallSources sources() const;
  const std::vector<int64_t>& first_row() const { return first_row_; }
  const std::vector<int32_t>& counts() const { return counts_; }
  std::vector<RowRange> kept(const std::vector<feplb::RoutedMove>& sent) const;

  void run(const RowRange& range);  // forward or backward, as the call is
  void place(const feplb::RoutedMove& sent, const ArenaView& view);
  void add_late_grads(const feplb::RoutedMove& sent, const ArenaView& view);

  // Empty, or the first thing that is not what one rank alone would have computed.
  std::string wrong_rows() const;
  std::string wrong_weight_grads() const;

 private:
  using Words = std::vector<uint64_t>;
  struct ExpectedRow;

  const uint64_t* row(const Words& words, int width, int expert, int idx) const;
  uint64_t folded_weights(int expert) const;
  RowInputs inputs(int expert, int idx) const;
  ExpectedRow expected(int expert, int idx) const;

  const Call call_;
  const int rank_;
  const Dims& dims_;
  const std::vector<int32_t> counts_;
  std::vector<int64_t> first_row_;
  Words rows_, side_, grads_;                // inputs; grads_ only in backward
  std::vector<std::vector<Words>> weights_;  // [tensor][expert]
  Words out_, out_side_;                     // out | grad rows, grad side
  std::vector<std::vector<Words>> weight_grads_;
};

}  // namespace feplb_test
