// Builds the lists of program.h: first every rank's jobs and who follows whom in an area, then
// every rank's instructions and compute ops.
#include "program.h"

#include <map>
#include <stdexcept>
#include <utility>

namespace protocol {
namespace {

constexpr Rule kWithholdRules[] = {Rule::kWithholdRows, Rule::kWithholdWeights,
                                   Rule::kWithholdReturns, Rule::kWithholdGrads};
constexpr Rule kAreaRules[] = {Rule::kTwoRowHalves, Rule::kOneWeightSlot, Rule::kTwoReturnHalves,
                               Rule::kOneGradSlot};
constexpr Rule kWaitRules[] = {Rule::kWaitRows, Rule::kWaitWeights, Rule::kWaitReturns,
                               Rule::kWaitGrads};
constexpr Rule kReaderRules[] = {Rule::kReleaseRowsAfterReader, Rule::kReleaseWeightsAfterReader,
                                 Rule::kReleaseReturnsAfterReader, Rule::kReleaseGradsAfterReader};

int level_of(Kind kind) {
  switch (kind) {
    case Kind::kRows:
    case Kind::kWeights:
      return 1;
    case Kind::kReturns:
      return 2;
    default:
      return 3;
  }
}

// Whom rank's rows go to in call seq, kNone if nobody helps it.
int helper_of(const Config& config, int rank, int seq) {
  const int layer = config.layer(seq);
  const int other = 1 + layer % (config.ranks - 1);
  switch (config.shape) {
    case Shape::kRing:
      return (rank + 1) % config.ranks;
    case Shape::kAlternate:
      return rank == layer % 2 ? 1 - rank : kNone;
    case Shape::kFanIn:
      return rank == other ? 0 : kNone;
    case Shape::kFanOut:
      return rank == 0 ? other : kNone;
  }
  return kNone;
}

// Whose rows rank computes in call seq, kNone if it helps nobody.
int owner_of(const Config& config, int rank, int seq) {
  for (int other = 0; other < config.ranks; ++other) {
    if (helper_of(config, other, seq) == rank) return other;
  }
  return kNone;
}

// Where a job of that kind goes, kNone if the rank has no such job in this call.
int destination(const Config& config, int rank, int seq, Kind kind) {
  if (kind == Kind::kGrads && !config.is_backward(seq)) return kNone;
  return level_of(kind) == 1 ? helper_of(config, rank, seq) : owner_of(config, rank, seq);
}

using JobTable =
    std::map<std::pair<int, Kind>, std::vector<JobRef>>;  // by (dst, kind), in use order

// Chains the uses of every area. Rows and returned rows have two halves, taken in turn by use;
// weight slots and grad slots are one. Without the area's rule the memory is one and the mover asks
// for the release of the use before the last.
void link_areas(Protocol* protocol, const JobTable& uses) {
  const Config& config = protocol->config;
  for (const auto& [key, refs] : uses) {
    const int kind = static_cast<int>(key.second);
    const bool is_halved = key.second == Kind::kRows || key.second == Kind::kReturns;
    const bool is_ruled = config.has(kAreaRules[kind]);
    const size_t num_halves = is_halved && is_ruled ? 2 : 1;
    const size_t num_released = is_ruled ? num_halves : 2;
    for (size_t use = 0; use < refs.size(); ++use) {
      Job& job = protocol->job(refs[use]);
      if (use >= num_halves) job.previous = refs[use - num_halves];
      if (use >= num_released && config.has(kWithholdRules[kind])) {
        job.awaits.push_back(refs[use - num_released]);
      }
    }
  }
}

// Rule::kWithholdPerJob taken out: what one job of a call awaits, all of the call await.
void withhold_whole_calls(Protocol* protocol) {
  for (int rank = 0; rank < protocol->config.ranks; ++rank) {
    std::map<int, std::vector<JobRef>> by_call;
    std::vector<Job>& jobs = protocol->ranks[rank].jobs;
    for (const Job& job : jobs) {
      for (const JobRef& ref : job.awaits) by_call[job.seq].push_back(ref);
    }
    for (Job& job : jobs) job.awaits = by_call[job.seq];
  }
}

void add_jobs(Protocol* protocol) {
  const Config& config = protocol->config;
  JobTable uses;
  for (int seq = 1; seq <= config.num_calls(); ++seq) {
    for (int rank = 0; rank < config.ranks; ++rank) {
      std::vector<Job>& jobs = protocol->ranks[rank].jobs;
      for (int index = 0; index < kNumTravelling; ++index) {
        const Kind kind = static_cast<Kind>(index);
        const int dst = destination(config, rank, seq, kind);
        if (dst == kNone) continue;
        Job job;
        job.kind = kind;
        job.seq = seq;
        job.level = level_of(kind);
        job.dst = dst;
        job.flag = index * (config.ranks - 1) + (rank - dst + config.ranks) % config.ranks - 1;
        for (Job& earlier : jobs) {
          if (earlier.flag == job.flag && earlier.dst == dst && earlier.next_same_flag == kNone) {
            earlier.next_same_flag = static_cast<int>(jobs.size());
          }
        }
        uses[{dst, kind}].push_back({rank, static_cast<int>(jobs.size())});
        jobs.push_back(job);
      }
    }
  }
  link_areas(protocol, uses);
  if (!config.has(Rule::kWithholdPerJob)) withhold_whole_calls(protocol);
}

class RankBuilder {
 public:
  RankBuilder(Protocol* protocol, int rank)
      : protocol_(protocol),
        config_(protocol->config),
        rank_(rank),
        program_(protocol->ranks[rank]) {}

  void build() {
    for (int seq = 1; seq <= config_.num_calls(); ++seq) {
      publish(seq);
      if (config_.is_backward(seq)) {
        backward(seq);
      } else {
        forward(seq);
      }
      finish_call(seq);
      if (!config_.is_backward(seq)) continue;
      if (config_.has(Rule::kGradsBeforePublish)) {
        take_grads(seq);
      } else if (seq > 1 && config_.is_backward(seq - 1)) {
        take_grads(seq - 1);
      }
    }
    if (!config_.has(Rule::kGradsBeforePublish)) take_grads(config_.num_calls());
    check();
  }

 private:
  // --- instructions ---

  Instr& instr(const std::string& text) {
    Instr next;
    if (!program_.instrs.empty()) next = program_.instrs.back();
    next.guard = Guard::kNothing;
    next.text = text;
    program_.instrs.push_back(next);
    has_op_ = false;
    return program_.instrs.back();
  }

  // The handshake before a device wait of (seq, level).
  void shake(int seq, int level) {
    if (!config_.has(Rule::kHandshake)) {
      instr("does not shake hands for " + at(seq, level));
      return;
    }
    Instr& step = instr("has shaken hands for " + at(seq, level));
    step.guard = Guard::kSubmitted;
    const int last_level = config_.has(Rule::kHandshakeIncluding) ? level : level - 1;
    step.submitted = jobs_until(seq, last_level);
  }

  uint32_t jobs_until(int seq, int level) const {
    uint32_t mask = 0;
    for (size_t index = 0; index < program_.jobs.size(); ++index) {
      const Job& job = program_.jobs[index];
      if (job.kind == Kind::kRelease) continue;
      if (job.seq < seq || (job.seq == seq && job.level <= level)) mask |= 1u << index;
    }
    return mask;
  }

  // --- compute ops ---

  // Enqueues an op in the current instruction. In the plain model every op is a step of Python's.
  int enqueue(OpKind kind, std::vector<JobRef> jobs, const std::string& text, bool is_glued) {
    if (config_.plain && has_op_) instr("goes on");
    has_op_ = true;
    Op op;
    op.kind = kind;
    op.is_glued = is_glued && !config_.plain;
    op.jobs = std::move(jobs);
    op.text = text;
    program_.ops.push_back(op);
    Instr& step = program_.instrs.back();
    step.num_ops = static_cast<int>(program_.ops.size());
    step.text += ", enqueues " + text;
    return step.num_ops - 1;
  }

  void post(Kind kind, int seq, int source_op) {
    const int index = job_index(rank_, kind, seq);
    if (index == kNone) return;
    program_.jobs[index].source_op = source_op;
    program_.instrs.back().posted |= 1u << index;
    program_.instrs.back().text += ", posts " + std::string(kind_name(kind)) + call(seq);
  }

  void wait(const std::vector<Kind>& kinds, int seq) {
    std::vector<JobRef> jobs;
    std::string names;
    for (Kind kind : kinds) {
      if (!config_.has(kWaitRules[static_cast<int>(kind)])) continue;
      jobs.push_back(inbound(kind, seq));
      names += (names.empty() ? "" : "+") + std::string(kind_name(kind));
      if (config_.plain) enqueue(OpKind::kWait, {jobs.back()}, "wait " + names + call(seq), false);
    }
    if (!jobs.empty() && !config_.plain) {
      enqueue(OpKind::kWait, jobs, "wait " + names + call(seq), false);
    }
    std::vector<std::pair<Kind, int>> late;
    late.swap(late_releases_);
    for (const auto& [kind, of_seq] : late) add_release(kind, of_seq, false);
  }

  // A reader of what arrived in call seq, and the releases that belong directly behind it.
  int read(const std::string& name, const std::vector<Kind>& kinds,
           const std::vector<Kind>& releases, int seq) {
    for (Kind kind : releases) {
      if (!config_.has(kReaderRules[static_cast<int>(kind)])) add_release(kind, seq, false);
    }
    std::vector<JobRef> jobs;
    for (Kind kind : kinds) jobs.push_back(inbound(kind, seq));
    const int reader = enqueue(OpKind::kRead, jobs, name + call(seq), false);
    for (const JobRef& ref : jobs) protocol_->job(ref).last_reader_op = reader;
    for (Kind kind : releases) {
      if (config_.has(kReaderRules[static_cast<int>(kind)])) release(kind, seq, reader);
    }
    return reader;
  }

  void release(Kind kind, int seq, int reader) {
    if (!config_.has(Rule::kReleaseDirectlyAfter)) {
      late_releases_.push_back({kind, seq});
    } else if (!config_.has(Rule::kHandshakeReleases)) {
      post_release(kind, seq, reader);
    } else {
      add_release(kind, seq, true);
    }
  }

  void add_release(Kind kind, int seq, bool is_glued) {
    protocol_->job(inbound(kind, seq)).release_op = enqueue(
        OpKind::kRelease, {}, "release " + std::string(kind_name(kind)) + call(seq), is_glued);
  }

  void post_release(Kind kind, int seq, int reader) {
    Job job;
    job.kind = Kind::kRelease;
    job.seq = seq;
    job.source_op = reader;
    const int index = static_cast<int>(program_.jobs.size());
    protocol_->job(inbound(kind, seq)).release_job = index;
    program_.jobs.push_back(job);
    program_.instrs.back().posted |= 1u << index;
    program_.instrs.back().text += ", posts release " + std::string(kind_name(kind)) + call(seq);
  }

  // --- the parts of a call ---

  void publish(int seq) {
    instr("publishes header " + std::to_string(seq)).header = seq;
    Instr& step = instr("has all headers" + call(seq));
    step.guard = Guard::kHeaders;
    step.seq = seq;
    if (helper_of(config_, rank_, seq) == kNone) return;
    const int event = enqueue(OpKind::kEvent, {}, "event" + call(seq), false);
    post(Kind::kRows, seq, event);
    post(Kind::kWeights, seq, event);
  }

  void forward(int seq) {
    if (owner_of(config_, rank_, seq) != kNone) {
      shake(seq, 1);
      wait({Kind::kRows, Kind::kWeights}, seq);
      instr("goes on");
      const std::vector<Kind> both = {Kind::kRows, Kind::kWeights};
      post(Kind::kReturns, seq, read("received GEMMs", both, both, seq));
    }
    place(seq);
  }

  void backward(int seq) {
    if (owner_of(config_, rank_, seq) != kNone) {
      shake(seq, 1);
      wait({Kind::kRows, Kind::kWeights}, seq);
      const bool is_early = !config_.has(Rule::kReleaseRowsAfterWgrad);
      std::vector<Kind> after_dgrad = {Kind::kWeights};
      if (is_early) after_dgrad.push_back(Kind::kRows);
      instr("goes on");
      const int dgrad = read("dgrad", {Kind::kRows, Kind::kWeights}, after_dgrad, seq);
      post(Kind::kReturns, seq, dgrad);
      instr("goes on");
      const std::vector<Kind> after_wgrad =
          is_early ? std::vector<Kind>{} : std::vector<Kind>{Kind::kRows};
      post(Kind::kGrads, seq, read("wgrad", {Kind::kRows}, after_wgrad, seq));
    }
    place(seq);
  }

  void place(int seq) {
    if (helper_of(config_, rank_, seq) == kNone) return;
    shake(seq, 2);
    wait({Kind::kReturns}, seq);
    instr("goes on");
    read("place", {Kind::kReturns}, {Kind::kReturns}, seq);
  }

  // run_experts returns; its memory may be freed from here on.
  void finish_call(int seq) {
    Instr& step = instr("returns from call " + std::to_string(seq));
    step.returned = seq;
    if (config_.has(Rule::kReturnsAfterSubmission)) {
      step.guard = Guard::kSubmitted;
      step.submitted = jobs_until(seq, 3);
    }
    if (config_.collective) enqueue(OpKind::kCollective, {}, "combine" + call(seq), false);
  }

  void take_grads(int seq) {
    if (helper_of(config_, rank_, seq) == kNone) return;
    shake(seq, 3);
    wait({Kind::kGrads}, seq);
    instr("goes on");
    read("add", {Kind::kGrads}, {Kind::kGrads}, seq);
  }

  void check() {
    Instr& look = instr("check(): sees no mark, publishes that");
    look.has_checked = true;
    look.guard = config_.has(Rule::kCheckDrainsFirst) ? Guard::kDrained : Guard::kNothing;
    Instr& step = instr("check() ends");
    step.guard = config_.has(Rule::kCheckExchanges) ? Guard::kAllChecked : Guard::kNothing;
    enqueue(OpKind::kOptimizer, {}, "optimizer step", false);
  }

  // --- helpers ---

  JobRef inbound(Kind kind, int seq) const {
    const int src =
        level_of(kind) == 1 ? owner_of(config_, rank_, seq) : helper_of(config_, rank_, seq);
    return {src, job_index(src, kind, seq)};
  }

  int job_index(int rank, Kind kind, int seq) const {
    const std::vector<Job>& jobs = protocol_->ranks[rank].jobs;
    for (size_t index = 0; index < jobs.size(); ++index) {
      if (jobs[index].kind == kind && jobs[index].seq == seq) return static_cast<int>(index);
    }
    return kNone;
  }

  static std::string call(int seq) { return "(" + std::to_string(seq) + ")"; }
  static std::string at(int seq, int level) {
    return "(" + std::to_string(seq) + "," + std::to_string(level) + ")";
  }

  Protocol* protocol_;
  const Config& config_;
  const int rank_;
  Program& program_;
  bool has_op_ = false;
  std::vector<std::pair<Kind, int>> late_releases_;
};

// A job without a source or a reader would make the model blind to it.
void check_program(const Program& program) {
  for (const Job& job : program.jobs) {
    const bool is_read = job.kind == Kind::kRelease || job.last_reader_op != kNone;
    if (job.source_op == kNone || !is_read)
      throw std::logic_error("a job without source or reader");
  }
  if (program.jobs.size() > kMaxJobs || program.ops.size() > kMaxOps) {
    throw std::logic_error("too many jobs or ops for the encoding of a state");
  }
}

}  // namespace

const char* kind_name(Kind kind) {
  static const char* const kNames[] = {"rows", "weights", "returns", "grads", "release"};
  return kNames[static_cast<int>(kind)];
}

Protocol build_protocol(const Config& config) {
  Protocol protocol;
  protocol.config = config;
  add_jobs(&protocol);
  for (int rank = 0; rank < config.ranks; ++rank) RankBuilder(&protocol, rank).build();
  for (int rank = 0; rank < config.ranks; ++rank) check_program(protocol.ranks[rank]);
  return protocol;
}

}  // namespace protocol
