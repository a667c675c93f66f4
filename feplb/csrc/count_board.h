// The count board: host memory shared by all ranks of a domain, where a call begins (level 0) and
// where its flags lie. One board per domain; each rank writes only its own block, but for the
// inbound flags (written by the sender's stream) and the abort record (first writer wins).
//
//   word                     written by                     read by              order
//   header.seq               its rank, after the header     every mover          seq_cst, see
//   mover.cpp inbound flag [src][kind] src's copy stream, after data  its rank's stream    release
//   / acquire released [region][half]  its rank's compute stream,     pushers' movers      release
//   / acquire
//                            after the last reader
//   bell                     ringers                        its rank's mover     see bell.h
//   state                    its rank                       peers' waits, close  release / acquire
//   abort.state              first rank to fail             everyone             acq_rel
//
// Headers have two slots, by parity of seq: a rank publishes seq + 2 only after it has planned
// seq + 1, hence after every rank has published seq + 1, hence after every rank has read seq.
//
// Worked example, 2 ranks: seq 7 is a forward of layer 0. Rank 0 writes its counts into its slot 1
// (7 & 1) and then seq = 7; rank 1 does the same. Each mover sees both, plans alike, and rank 0
// pushes rows to rank 1; its copy stream then sets flags(1).inbound[0][kRowsFlag] = 7.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "device.h"

namespace feplb {

// kCheck ends a step: it moves nothing, only meets every rank at level 0.
enum class CallKind : int32_t { kForward = 1, kBackward = 2, kCheck = 3 };
const char* call_kind_name(CallKind kind);

enum FlagKind : int { kRowsFlag = 0, kWeightsFlag, kReturnsFlag, kGradsFlag, kNumFlagKinds };

// Parts of an arena that peers push into. Rows and returned rows have two halves, by parity of seq.
enum Region : int { kRowsRegion = 0, kWeightsRegion, kReturnsRegion, kGradsRegion, kNumRegions };
constexpr int kNumHalves = 2;
int region_half(Region region, uint64_t seq);  // 0 where the region has one half only

// Why a mover may want to be woken.
enum RingReason : uint32_t { kHeaderRing = 1, kReleaseRing = 2, kJobRing = 4, kStopRing = 8 };

// Bits of a header that ranks must agree on.
enum GradBits : uint32_t {
  kGradMode = 1,    // the forward ran in grad mode, so a backward will follow on every rank
  kNeedsKnown = 2,  // the bits below are meant (begin() is called before they are known)
  kNeedsRows = 4,
  kNeedsSideFirst = 8,          // one bit per row_data tensor, eight of them
  kNeedsWeightFirst = 1 << 11,  // one bit per weight tensor of an expert, twenty of them
};

// What a rank tells the others about the call it is about to make.
struct CallHeader {
  uint64_t seq = 0;
  CallKind kind = CallKind::kForward;
  int32_t layer = 0;
  int64_t micro_batch = 0;
  uint64_t config_hash = 0;
  uint64_t plan_hash = 0;  // backward: of the plan saved by the forward
  uint32_t grad_bits = 0;
  std::string error;  // not empty: this rank cannot make the call, and says why
  std::vector<int32_t> counts;
};

// kUnmapped: closed, and no arena of a peer is mapped there any more.
enum class RankState : uint32_t { kJoining = 0, kOpen = 1, kClosed = 2, kUnmapped = 3 };

// Hears what this rank writes on its board, where peers have boards of their own (relay.h).
class BoardEcho {
 public:
  virtual ~BoardEcho() = default;
  virtual void published(const CallHeader& header) = 0;
  virtual void state_set(RankState state) = 0;
  virtual void aborted(const std::string& text) = 0;
};

class CountBoard {
 public:
  static std::size_t bytes_needed(int num_ranks, int max_local_experts);

  // `memory` is zero-filled, 64-byte aligned, shared by all ranks, and outlives the board. Messages
  // call the ranks by `global_ranks` [num_ranks] (a domain's rank 1 may be the job's rank 13);
  // empty: by their index.
  CountBoard(std::byte* memory, int num_ranks, int max_local_experts,
             std::vector<int> global_ranks = {});

  // What `rank` publishes, its state and its abort go to `echo` as well, which outlives all use.
  void echo_to(int rank, BoardEcho* echo) {
    echo_rank_ = rank;
    echo_ = echo;
  }

  int num_ranks() const { return num_ranks_; }
  int global_rank(int rank) const;

  void publish(int rank, const CallHeader& header);
  uint64_t published_seq(int rank, uint64_t seq) const;  // of the slot that `seq` would lie in
  void read(int rank, uint64_t seq, CallHeader& header) const;
  // What a rank published last, for messages: "forward of layer 3, micro-batch 1" or "nothing yet".
  std::string last_seen(int rank) const;

  // [src_rank][kind], side by side.
  Flag* inbound(int rank, int src_rank, FlagKind kind) const;
  static std::size_t num_inbound(int num_ranks) {
    return static_cast<std::size_t>(num_ranks) * kNumFlagKinds;
  }
  Flag* released(int rank, Region region, int half) const;
  Bell& bell(int rank) const;

  RankState state(int rank) const;
  bool has_closed(int rank) const { return state(rank) >= RankState::kClosed; }
  void set_state(int rank, RankState state);

  // The first failure of the domain, told to every rank. Returns false if another came first.
  bool abort(int rank, const std::string& text);
  bool aborted() const;
  std::string abort_text() const;  // "rank 2: ..." once aborted() is true

 private:
  struct Slot;
  struct RankBlock;
  struct AbortRecord;

  RankBlock& block(int rank) const;
  Slot& slot(int rank, uint64_t seq) const;

  std::byte* memory_;
  int num_ranks_;
  int max_local_experts_;
  std::vector<int> global_ranks_;
  int echo_rank_ = -1;
  BoardEcho* echo_ = nullptr;
};

}  // namespace feplb
