// The ce lane with compute streams that really are behind: the programs of the simulation, the
// device by itself, and arenas. test_cuda_waits.cpp has the waits that must not hang, or must be
// lifted. Also run under ThreadSanitizer, and AddressSanitizer with UBSan.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "check.h"
#include "gpu_ranks.h"

namespace feplb_test {
namespace {

using feplb::cat;
using feplb::cuda::CopyCall;
using feplb::cuda::FlagCall;

// ------------------------------------------------------------------------------------ programs

struct AtEnd {
  std::function<void()> act;
  ~AtEnd() { act(); }
};

void run_right(GpuRanks::Config config, int num_micro_batches, uint64_t seed,
               uint32_t frees_one_in = 0) {
  feplb::SimRandom random(seed);
  const Scenario scenario = make_scenario(config.num_ranks, num_micro_batches, random);
  Verdict verdict;
  GpuRanks gpus(config);
  gpus.make_domains();
  const auto errors = gpus.ranks().run([&](int rank) {
    RankProgram::Config program;
    program.rank = rank;
    program.seed = seed;
    program.streams = gpus.streams(rank);
    RankProgram calls(gpus.ranks().domain(rank), gpus.launcher(rank, seed, frees_one_in), scenario,
                      program, verdict);
    const AtEnd kernels_end{[&] { gpus.synchronize(rank); }};
    calls.run();
  });
  CHECK(joined(errors).empty(), joined(errors));
  CHECK(verdict.wrong().empty(), verdict.wrong());
  CHECK(verdict.num_moves() > num_micro_batches, verdict.moves());
  note(cat(scenario.calls.size(), " calls, ", verdict.moves()));
}

TEST(cuda_ranks_are_right) {
  run_right(ranks_of(2), 40, 1);
  run_right(ranks_of(4), 15, 2);
}

TEST(cuda_ranks_are_right_when_streams_are_late) {
  for (uint64_t seed = 3; seed < 6; ++seed) run_right(ranks_of(3, late(400)), 6, seed);
}

TEST(cuda_ranks_are_right_when_the_driver_holds_submissions) {
  DriverMood mood = late(200);
  mood.held = "cuMemcpyBatchAsync";
  mood.held_ms = 3;
  run_right(ranks_of(3, mood), 6, 6);
}

TEST(cuda_ranks_are_right_on_compute_streams_that_change) {
  for (uint64_t seed = 7; seed < 9; ++seed) {
    GpuRanks::Config config = ranks_of(3, late(400));
    config.num_streams = 2;
    run_right(config, 6, seed);
  }
}

// As PyTorch has it where nobody asks for another one.
TEST(cuda_ranks_are_right_on_the_default_stream) {
  GpuRanks::Config config = ranks_of(3, late(400));
  config.has_default = true;
  run_right(config, 6, 9);
  config.mood.one_queue = true;
  run_right(config, 6, 10);
}

TEST(cuda_ranks_are_right_on_the_default_stream_and_another_in_turn) {
  GpuRanks::Config config = ranks_of(3, late(400));
  config.has_default = true;
  config.num_streams = 2;
  run_right(config, 6, 11);
}

TEST(cuda_ranks_are_right_with_every_call) {
  uint64_t seed = 10;
  for (const CopyCall copies : {CopyCall::kBatch, CopyCall::kPeer, CopyCall::kPlain}) {
    for (const FlagCall flags : {FlagCall::kMemOps, FlagCall::kWrite, FlagCall::kCopy}) {
      GpuRanks::Config config = ranks_of(3, late(200));
      config.copies = copies;
      config.flags = flags;
      run_right(config, 2, seed++);
    }
  }
}

TEST(cuda_ranks_are_right_with_one_queue) { run_right(ranks_of(4, one_queue(100)), 10, 20); }

TEST(cuda_ranks_are_right_while_memory_is_freed) {
  run_right(ranks_of(4, one_lock(100)), 8, 21, 4);
}

TEST(cuda_ranks_are_right_with_a_full_launch_queue) {
  DriverMood mood = one_lock(50);
  mood.queue_depth = 3;
  run_right(ranks_of(4, mood), 8, 22, 6);
}

TEST(cuda_ranks_are_right_with_one_queue_one_lock_and_little_depth) {
  DriverMood mood = one_queue(50);
  mood.one_lock = true;
  mood.queue_depth = 12;
  run_right(ranks_of(3, mood), 8, 23, 6);
}

// --------------------------------------------------------------------------- the device by itself

// One rank's device, without a domain.
class Alone {
 public:
  explicit Alone(std::size_t bytes = 4096) : gpus_(config()), memory_(bytes) {
    gpus_.make_domains();
    context_ = std::make_shared<feplb::cuda::DeviceContext>(feplb::cuda::Driver::open(""), 0);
    device_ = feplb::cuda::make_cuda_device(context_, board_.data(), kBoardBytes, {});
    stand_in_adopt(memory_.data(), bytes);
  }
  ~Alone() {
    device_->stop();
    stand_in_disown(memory_.data());
  }
  feplb::Device& device() { return *device_; }
  feplb::Flag* flag(std::size_t idx) { return reinterpret_cast<feplb::Flag*>(board_.data()) + idx; }
  std::byte* memory() { return memory_.data(); }
  std::uintptr_t stream(std::size_t idx) const { return gpus_.streams(0)[idx]; }
  void launch(std::uintptr_t stream, std::function<void()> kernel) {
    const feplb::cuda::CurrentContext current(*context_);
    gpus_.launch(stream, std::move(kernel));
  }
  std::uintptr_t make_stream() {
    const feplb::cuda::CurrentContext current(*context_);
    feplb::cuda::Stream stream = nullptr;
    const auto& driver = context_->driver();
    driver.check(driver.stream_create(&stream, feplb::cuda::kStreamNonBlocking), "a stream");
    return reinterpret_cast<std::uintptr_t>(stream);
  }
  void destroy_stream(std::uintptr_t stream) {
    context_->driver().stream_destroy(reinterpret_cast<feplb::cuda::Stream>(stream));
  }
  void synchronize() { gpus_.synchronize(0); }
  void await_flag(std::size_t idx, feplb::Epoch epoch) {
    const feplb::TimePoint end = feplb::Clock::now() + std::chrono::seconds(10);
    while (!feplb::epoch_reached(flag(idx)->epoch.load(), epoch)) {
      CHECK(feplb::Clock::now() < end, "flag ", idx, " was never written");
      std::this_thread::yield();
    }
  }
  static constexpr std::size_t kBoardBytes = 4096;

 private:
  static GpuRanks::Config config() {
    GpuRanks::Config config = ranks_of(1);
    config.num_streams = 2;
    return config;
  }
  GpuRanks gpus_;
  Memory board_{kBoardBytes}, memory_;
  std::shared_ptr<feplb::cuda::DeviceContext> context_;
  std::unique_ptr<feplb::Device> device_;
};

TEST(cuda_work_of_one_compute_stream_comes_before_that_of_the_next) {
  Alone gpu;
  gpu.device().bind_compute(gpu.stream(0));
  std::atomic<int> step{0};
  int seen = 0;
  gpu.launch(gpu.stream(0), [&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    step = 1;
  });
  gpu.device().write_flag(feplb::StreamKind::kCompute, gpu.flag(0), 1);  // a release
  gpu.device().bind_compute(gpu.stream(1));
  gpu.launch(gpu.stream(1), [&] { seen = step; });
  gpu.device().write_flag(feplb::StreamKind::kCompute, gpu.flag(0), 2);
  gpu.synchronize();
  CHECK_EQ(seen, 1);
  CHECK_EQ(gpu.flag(0)->epoch.load(), 2u);
  CHECK(gpu.device().compute_drained(), "all has run");
}

TEST(cuda_compute_stream_may_be_gone_when_the_next_is_bound) {
  Alone gpu;
  for (int i = 0; i < 3; ++i) {
    const std::uintptr_t stream = gpu.make_stream();
    gpu.device().bind_compute(stream);
    gpu.device().record(feplb::StreamKind::kCompute);
    gpu.device().wait_flag(gpu.flag(0), 0, {});
    gpu.device().write_flag(feplb::StreamKind::kCompute, gpu.flag(1), 1);
    gpu.destroy_stream(stream);
  }
  gpu.device().bind_compute(gpu.stream(0));
  gpu.synchronize();
  CHECK(gpu.device().compute_drained(), "all has run");
}

// A wait that no release has followed: what comes after it must not tell that it is over.
TEST(cuda_wait_in_the_stream_before_is_not_over_for_a_new_one) {
  Alone gpu;
  gpu.device().bind_compute(gpu.stream(0));
  gpu.device().wait_flag(gpu.flag(0), 5, {});
  gpu.device().bind_compute(gpu.stream(1));
  gpu.device().mark_compute();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(!gpu.device().compute_drained(), "the wait is not over");
  gpu.flag(0)->epoch.store(5);
  gpu.synchronize();
  CHECK(gpu.device().compute_drained(), "the wait is over");
}

TEST(cuda_compute_stream_that_stays_costs_no_call) {
  Alone gpu;
  gpu.device().bind_compute(gpu.stream(0));
  gpu.device().write_flag(feplb::StreamKind::kCompute, gpu.flag(0), 1);
  const int64_t before = stand_in_calls("");
  gpu.device().bind_compute(gpu.stream(0));
  CHECK_EQ(stand_in_calls("") - before, 0);
  gpu.synchronize();
}

TEST(cuda_large_copies_go_in_one_call) {
  constexpr std::size_t kBytes = (std::size_t{17} << 20) + 64;
  Alone gpu(2 * kBytes);
  for (std::size_t i = 0; i < kBytes; i += 4093) gpu.memory()[i] = static_cast<std::byte>(i % 251);
  std::byte* there = gpu.memory() + kBytes;
  const int64_t before = stand_in_calls("cuMemcpyBatchAsync");
  gpu.device().copy_batch(feplb::StreamKind::kPushes, {{there, gpu.memory(), kBytes}});
  gpu.device().write_flag(feplb::StreamKind::kPushes, gpu.flag(0), 3);
  gpu.await_flag(0, 3);
  CHECK_EQ(stand_in_calls("cuMemcpyBatchAsync") - before, 1);
  CHECK(std::memcmp(there, gpu.memory(), kBytes) == 0, "other bytes arrived");
}

TEST(cuda_empty_batch_submits_nothing) {
  Alone gpu;
  const int64_t before = stand_in_calls("cuMemcpyBatchAsync");
  gpu.device().copy_batch(feplb::StreamKind::kPushes, {});
  gpu.device().copy_batch(feplb::StreamKind::kPushes, {{gpu.memory(), gpu.memory() + 64, 0}});
  CHECK_EQ(stand_in_calls("cuMemcpyBatchAsync"), before);
}

TEST(cuda_many_flags_take_several_calls) {
  Alone gpu;
  std::vector<feplb::Flag*> flags;
  for (std::size_t i = 0; i < 600; ++i) flags.push_back(gpu.flag(i));
  const int64_t before = stand_in_calls("cuStreamBatchMemOp");
  gpu.device().write_flags(feplb::StreamKind::kReturns, flags, 9);
  CHECK_EQ(stand_in_calls("cuStreamBatchMemOp") - before, 3);
  for (std::size_t i = 0; i < flags.size(); ++i) gpu.await_flag(i, 9);
}

TEST(cuda_flag_outside_the_board_is_refused) {
  Alone gpu;
  feplb::Flag elsewhere;
  check_throws<feplb::Error>(
      [&] { gpu.device().write_flag(feplb::StreamKind::kPushes, &elsewhere, 1); },
      "a flag lies outside the count board");
}

TEST(cuda_capture_is_seen) {
  Alone gpu;
  for (const int status : {1, 2}) {
    stand_in_set_capturing(status);
    CHECK(gpu.device().is_captured(gpu.stream(0)), "status ", status);
  }
  stand_in_set_capturing(0);
  CHECK(!gpu.device().is_captured(gpu.stream(0)), "nothing is captured");
}

TEST(cuda_drained_means_past_the_last_wait) {
  Alone gpu;
  gpu.device().bind_compute(gpu.stream(0));
  CHECK(gpu.device().compute_drained(), "nothing was enqueued");
  gpu.device().wait_flag(gpu.flag(0), 5, {});
  gpu.device().mark_compute();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(!gpu.device().compute_drained(), "the wait is not over");
  gpu.flag(0)->epoch.store(5 + feplb::kLift);
  gpu.synchronize();
  CHECK(gpu.device().compute_drained(), "the wait is over");
}

// --------------------------------------------------------------------------------------- arenas

using feplb::cuda::ArenaWay;
using feplb::cuda::DeviceArena;

std::shared_ptr<feplb::cuda::DeviceContext> first_gpu() {
  stand_in_set_gpus(1);
  return std::make_shared<feplb::cuda::DeviceContext>(feplb::cuda::Driver::open(""), 0);
}

constexpr std::size_t kArenaBytes = 3 << 20;  // not whole pages of the GPU

void check_bytes(std::byte* data, std::byte value) {
  for (std::size_t i = 0; i < kArenaBytes; i += 997) CHECK(data[i] == value, "byte ", i);
  std::memset(data, 0x77, kArenaBytes);
  CHECK(data[kArenaBytes - 1] == std::byte{0x77}, "it cannot be written");
}

TEST(cuda_arena_behind_a_descriptor_outlives_its_exporter) {
  auto own = DeviceArena::create(first_gpu(), kArenaBytes, ArenaWay::kVmm);
  check_bytes(own->data(), std::byte{0});
  std::memset(own->data(), 0x42, kArenaBytes);
  feplb::Fd fd = own->export_fd();
  const auto opened = DeviceArena::open_fd(first_gpu(), kArenaBytes, fd.get());
  fd.reset();
  own.reset();
  check_bytes(opened->data(), std::byte{0x42});
}

// The exporter is another process: a handle cannot be opened where it was made.
TEST(cuda_arena_behind_an_ipc_handle_outlives_its_exporter) {
  int from_child[2], to_child[2];
  CHECK(pipe(from_child) == 0 && pipe(to_child) == 0, "no pipes");
  const pid_t child = fork();
  if (child == 0) {
    auto own = DeviceArena::create(first_gpu(), kArenaBytes, ArenaWay::kIpc);
    std::memset(own->data(), 0x42, kArenaBytes);
    const std::string handle = own->export_ipc();
    char go = 0;
    bool ok = write(from_child[1], handle.data(), handle.size()) == ssize_t(handle.size());
    ok = ok && read(to_child[0], &go, 1) == 1;
    own.reset();
    _exit(ok && write(from_child[1], &go, 1) == 1 ? 0 : 1);
  }
  std::string handle(sizeof(feplb::cuda::IpcHandle), '\0');
  CHECK_EQ(read(from_child[0], handle.data(), handle.size()), ssize_t(handle.size()));
  const auto opened = DeviceArena::open_ipc(first_gpu(), kArenaBytes, handle);
  char go = 'g';
  CHECK(write(to_child[1], &go, 1) == 1 && read(from_child[0], &go, 1) == 1, "the child is gone");
  check_bytes(opened->data(), std::byte{0x42});
  waitpid(child, nullptr, 0);
  for (const int fd : {from_child[0], from_child[1], to_child[0], to_child[1]}) close(fd);
}

TEST(cuda_device_gives_everything_back) {
  const auto alive = [] {
    std::string text;
    for (const char* kind : {"context", "stream", "queue", "event", "allocation", "pin"}) {
      text += cat(kind, " ", stand_in_alive(kind), "\n");
    }
    return text;
  };
  const std::string before = alive();
  run_right(ranks_of(2), 2, 30);
  CHECK_EQ(alive(), before);
}

}  // namespace
}  // namespace feplb_test
