#include "call_tensors.h"

#include <algorithm>

namespace feplb_test {

using feplb::CallKind;
using feplb::cat;
using feplb::RoutedMove;

namespace {

constexpr uint64_t kGarbage = 0xdeaddeaddeaddeadu;

// Row `row` of piece `piece` of what lies at `base`.
uint64_t* piece_row(std::byte* base, const feplb::RowPieces& pieces, int piece, int64_t row) {
  const auto i = static_cast<std::size_t>(piece);
  return reinterpret_cast<uint64_t*>(base + pieces.offset[i] +
                                     static_cast<std::size_t>(row) * pieces.row_bytes[i]);
}

uint64_t* words_at(std::byte* arena, std::size_t offset) {
  return reinterpret_cast<uint64_t*>(arena + offset);
}

}  // namespace

// ---------------------------------------------------------------------------------------- arena

uint64_t* ArenaView::received_row(int piece, int64_t row) const {
  const int half = feplb::region_half(feplb::kRowsRegion, seq);
  return piece_row(arena + layout->rows_half(half), layout->rows_pieces(call.layer, call.kind),
                   piece, row);
}

uint64_t* ArenaView::outbox_row(int piece, int64_t row) const {
  const int half = feplb::region_half(feplb::kReturnsRegion, seq);
  return piece_row(arena + layout->outbox_half(half), layout->return_pieces(call.layer, call.kind),
                   piece, row);
}

uint64_t* ArenaView::returned_row(int piece, int64_t row) const {
  const int half = feplb::region_half(feplb::kReturnsRegion, seq);
  return piece_row(arena + layout->returns_half(half), layout->return_pieces(call.layer, call.kind),
                   piece, row);
}

uint64_t* ArenaView::weight(int slot, int tensor) const {
  return words_at(arena, layout->weight_slot(call.layer, slot, tensor));
}

uint64_t* ArenaView::grad(int slot, int tensor) const {
  return words_at(arena, layout->grad_slot(call.layer, slot, tensor));
}

uint64_t* ArenaView::grad_outbox(int slot, int tensor) const {
  return words_at(arena, layout->grad_outbox_slot(call.layer, slot, tensor));
}

uint64_t ArenaView::folded_weights(int slot) const {
  const Dims& dims = dims_of(call.layer);
  std::vector<const uint64_t*> weights;
  for (std::size_t t = 0; t < dims.weight_words.size(); ++t) {
    weights.push_back(weight(slot, static_cast<int>(t)));
  }
  return fold_weights(dims, weights);
}

RowInputs ArenaView::backward_inputs(int64_t row) const {
  return RowInputs{received_row(0, row), received_row(1, row), received_row(2, row)};
}

void ArenaView::run_forward(const RoutedMove& move) const {
  const uint64_t weights = folded_weights(move.slot);
  for (int64_t row = move.recv_row; row < move.recv_row + move.rows(); ++row) {
    expert_forward(dims_of(call.layer), received_row(0, row), received_row(1, row), weights,
                   outbox_row(0, row));
  }
}

void ArenaView::run_backward_rows(const RoutedMove& move) const {
  const uint64_t weights = folded_weights(move.slot);
  for (int64_t row = move.recv_row; row < move.recv_row + move.rows(); ++row) {
    expert_backward_row(dims_of(call.layer), backward_inputs(row), weights, outbox_row(0, row),
                        outbox_row(1, row));
  }
}

void ArenaView::run_backward_weights(const RoutedMove& move) const {
  const Dims& dims = dims_of(call.layer);
  for (const int t : dims.grad_tensors) {
    const int words = dims.weight_words[static_cast<std::size_t>(t)];
    uint64_t* grad = grad_outbox(move.slot, t);
    std::fill_n(grad, words, 0);
    for (int64_t row = move.recv_row; row < move.recv_row + move.rows(); ++row) {
      add_weight_grad(backward_inputs(row), dims.row_words, words, grad);
    }
  }
}

// -------------------------------------------------------------------------------- caller's tensors

CallTensors::CallTensors(const Call& call, int rank, std::vector<int32_t> counts)
    : call_(call), rank_(rank), dims_(dims_of(call.layer)), counts_(std::move(counts)) {
  std::size_t num_rows = 0;
  for (const int32_t count : counts_) {
    first_row_.push_back(static_cast<int64_t>(num_rows));
    num_rows += static_cast<std::size_t>(count);
  }
  rows_.assign(num_rows * static_cast<std::size_t>(dims_.row_words), kGarbage);
  side_.assign(num_rows * static_cast<std::size_t>(dims_.side_words), kGarbage);
  grads_ = rows_;
  out_ = rows_;
  out_side_ = side_;
  for (const int words : dims_.weight_words) {
    weights_.emplace_back(kNumExperts, Words(static_cast<std::size_t>(words), kGarbage));
    weight_grads_.emplace_back(kNumExperts, Words(static_cast<std::size_t>(words), 0));
  }
}

void CallTensors::fill() {
  const auto fill_rows = [this](Words& words, Stuff stuff, int width) {
    auto word = words.begin();
    for (int expert = 0; expert < kNumExperts; ++expert) {
      for (int idx = 0; idx < counts_[static_cast<std::size_t>(expert)]; ++idx) {
        for (int i = 0; i < width; ++i) *word++ = value_of(stuff, call_, rank_, expert, idx, i);
      }
    }
  };
  fill_rows(rows_, Stuff::kRow, dims_.row_words);
  fill_rows(side_, Stuff::kSide, dims_.side_words);
  if (call_.kind == CallKind::kBackward) fill_rows(grads_, Stuff::kGrad, dims_.row_words);
  for (std::size_t t = 0; t < weights_.size(); ++t) {
    for (int expert = 0; expert < kNumExperts; ++expert) {
      Words& words = weights_[t][static_cast<std::size_t>(expert)];
      for (std::size_t i = 0; i < words.size(); ++i) {
        words[i] = value_of(Stuff::kWeight, call_, rank_, expert, static_cast<int>(t),
                            static_cast<int>(i));
      }
    }
  }
}

void CallTensors::overwrite() {
  for (Words* words : {&rows_, &side_, &grads_}) std::fill(words->begin(), words->end(), kGarbage);
  for (std::vector<Words>& tensor : weights_) {
    for (Words& words : tensor) std::fill(words.begin(), words.end(), kGarbage);
  }
}

std::vector<feplb::CopyOp> CallTensors::inputs_memory() const {
  std::vector<feplb::CopyOp> memory;
  const auto add = [&memory](const Words& words) {
    const auto* begin = reinterpret_cast<const std::byte*>(words.data());
    if (!words.empty()) memory.push_back(feplb::CopyOp{nullptr, begin, 8 * words.size()});
  };
  for (const Words* words : {&rows_, &side_, &grads_}) add(*words);
  for (const std::vector<Words>& tensor : weights_) {
    for (const Words& words : tensor) add(words);
  }
  return memory;
}

feplb::CallSources CallTensors::sources() const {
  const auto bytes = [](const Words& words) {
    return reinterpret_cast<const std::byte*>(words.data());
  };
  feplb::CallSources sources;
  if (call_.kind == CallKind::kBackward) sources.rows.push_back(bytes(grads_));
  sources.rows.push_back(bytes(rows_));
  sources.rows.push_back(bytes(side_));
  for (const std::vector<Words>& tensor : weights_) {
    sources.weights.emplace_back();
    for (const Words& words : tensor) sources.weights.back().push_back(bytes(words));
  }
  return sources;
}

// What no sent move took. A split expert's first rows stay.
std::vector<RowRange> CallTensors::kept(const std::vector<RoutedMove>& sent) const {
  std::vector<RowRange> ranges;
  for (int expert = 0; expert < kNumExperts; ++expert) {
    int end = counts_[static_cast<std::size_t>(expert)];
    for (const RoutedMove& routed : sent) {
      if (routed.move.expert_idx == expert) end = std::min(end, routed.move.row_start);
    }
    if (end > 0) ranges.push_back(RowRange{expert, 0, end});
  }
  return ranges;
}

const uint64_t* CallTensors::row(const Words& words, int width, int expert, int idx) const {
  return words.data() + (first_row_[static_cast<std::size_t>(expert)] + idx) * width;
}

RowInputs CallTensors::inputs(int expert, int idx) const {
  return RowInputs{row(grads_, dims_.row_words, expert, idx),
                   row(rows_, dims_.row_words, expert, idx),
                   row(side_, dims_.side_words, expert, idx)};
}

uint64_t CallTensors::folded_weights(int expert) const {
  std::vector<const uint64_t*> weights;
  for (const std::vector<Words>& tensor : weights_) {
    weights.push_back(tensor[static_cast<std::size_t>(expert)].data());
  }
  return fold_weights(dims_, weights);
}

void CallTensors::run(const RowRange& range) {
  const uint64_t weights = folded_weights(range.expert);
  for (int idx = range.begin; idx < range.end; ++idx) {
    const RowInputs in = inputs(range.expert, idx);
    auto* out = const_cast<uint64_t*>(row(out_, dims_.row_words, range.expert, idx));
    auto* side = const_cast<uint64_t*>(row(out_side_, dims_.side_words, range.expert, idx));
    if (call_.kind == CallKind::kForward) {
      expert_forward(dims_, in.row, in.side, weights, out);
      continue;
    }
    expert_backward_row(dims_, in, weights, out, side);
    for (const int t : dims_.grad_tensors) {
      Words& grad =
          weight_grads_[static_cast<std::size_t>(t)][static_cast<std::size_t>(range.expert)];
      add_weight_grad(in, dims_.row_words, static_cast<int>(grad.size()), grad.data());
    }
  }
}

void CallTensors::place(const RoutedMove& sent, const ArenaView& view) {
  const int64_t first =
      first_row_[static_cast<std::size_t>(sent.move.expert_idx)] + sent.move.row_start;
  std::copy_n(view.returned_row(0, sent.return_row), sent.rows() * dims_.row_words,
              out_.begin() + first * dims_.row_words);
  if (call_.kind == CallKind::kForward) return;
  std::copy_n(view.returned_row(1, sent.return_row), sent.rows() * dims_.side_words,
              out_side_.begin() + first * dims_.side_words);
}

void CallTensors::add_late_grads(const RoutedMove& sent, const ArenaView& view) {
  for (const int t : dims_.grad_tensors) {
    Words& grad =
        weight_grads_[static_cast<std::size_t>(t)][static_cast<std::size_t>(sent.move.expert_idx)];
    const uint64_t* late = view.grad(sent.grad_slot, t);
    for (std::size_t i = 0; i < grad.size(); ++i) grad[i] += late[i];
  }
}

// ------------------------------------------------------------------------------------ what is
// right

struct CallTensors::ExpectedRow {
  Words grad, row, side;  // inputs
  Words out, out_side;
};

CallTensors::ExpectedRow CallTensors::expected(int expert, int idx) const {
  const auto values = [&](Stuff stuff, int width) {
    Words words;
    for (int i = 0; i < width; ++i) words.push_back(value_of(stuff, call_, rank_, expert, idx, i));
    return words;
  };
  ExpectedRow right{values(Stuff::kGrad, dims_.row_words), values(Stuff::kRow, dims_.row_words),
                    values(Stuff::kSide, dims_.side_words),
                    Words(static_cast<std::size_t>(dims_.row_words)),
                    Words(static_cast<std::size_t>(dims_.side_words))};
  std::vector<Words> tensors;
  std::vector<const uint64_t*> weights;
  for (std::size_t t = 0; t < dims_.weight_words.size(); ++t) {
    tensors.emplace_back();
    for (int i = 0; i < dims_.weight_words[t]; ++i) {
      tensors[t].push_back(value_of(Stuff::kWeight, call_, rank_, expert, static_cast<int>(t), i));
    }
  }
  for (const Words& tensor : tensors) weights.push_back(tensor.data());
  const uint64_t folded = fold_weights(dims_, weights);
  const RowInputs in{right.grad.data(), right.row.data(), right.side.data()};
  if (call_.kind == CallKind::kForward) {
    expert_forward(dims_, in.row, in.side, folded, right.out.data());
  } else {
    expert_backward_row(dims_, in, folded, right.out.data(), right.out_side.data());
  }
  return right;
}

std::string CallTensors::wrong_rows() const {
  for (int expert = 0; expert < kNumExperts; ++expert) {
    for (int idx = 0; idx < counts_[static_cast<std::size_t>(expert)]; ++idx) {
      const ExpectedRow right = expected(expert, idx);
      const bool rows_match =
          std::equal(right.out.begin(), right.out.end(), row(out_, dims_.row_words, expert, idx));
      const bool side_matches = call_.kind == CallKind::kForward ||
                                std::equal(right.out_side.begin(), right.out_side.end(),
                                           row(out_side_, dims_.side_words, expert, idx));
      if (rows_match && side_matches) continue;
      return cat("wrong result: rank ", rank_, ", ", feplb::call_kind_name(call_.kind),
                 " of layer ", call_.layer, ", micro-batch ", call_.micro_batch, ", expert ",
                 expert, ", row ", idx, " of ", counts_[static_cast<std::size_t>(expert)]);
    }
  }
  return "";
}

std::string CallTensors::wrong_weight_grads() const {
  for (const int t : dims_.grad_tensors) {
    for (int expert = 0; expert < kNumExperts; ++expert) {
      const auto& grad =
          weight_grads_[static_cast<std::size_t>(t)][static_cast<std::size_t>(expert)];
      Words right(grad.size(), 0);
      for (int idx = 0; idx < counts_[static_cast<std::size_t>(expert)]; ++idx) {
        const ExpectedRow in = expected(expert, idx);
        add_weight_grad(RowInputs{in.grad.data(), in.row.data(), in.side.data()}, dims_.row_words,
                        static_cast<int>(right.size()), right.data());
      }
      if (right == grad) continue;
      return cat("wrong weight grad: rank ", rank_, ", layer ", call_.layer, ", micro-batch ",
                 call_.micro_batch, ", expert ", expert, ", tensor ", t);
    }
  }
  return "";
}

}  // namespace feplb_test
