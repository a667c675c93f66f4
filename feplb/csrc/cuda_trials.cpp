#include "cuda_trials.h"

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "device_cuda.h"
#include "error.h"

namespace feplb::cuda {
namespace {

constexpr std::size_t kTrialBytes = std::size_t{1} << 20;
constexpr std::chrono::seconds kTrialTime{10};

std::string uuid_text(const Uuid& uuid) {
  std::string text = "GPU-";
  for (std::size_t i = 0; i < sizeof(uuid.bytes); ++i) {
    std::array<char, 3> hex{};
    std::snprintf(hex.data(), hex.size(), "%02x", static_cast<unsigned char>(uuid.bytes[i]));
    if (i == 4 || i == 6 || i == 8 || i == 10) text += "-";
    text += hex.data();
  }
  return text;
}

GpuFacts read_gpu(const Driver& driver, int ordinal, int count) {
  GpuFacts facts;
  facts.ordinal = ordinal;
  Device device = 0;
  driver.check(driver.device_get(&device, ordinal), cat("opening GPU ", ordinal));
  std::array<char, 256> name{};
  driver.check(driver.device_name(name.data(), static_cast<int>(name.size()), device),
               "reading a GPU's name");
  facts.name = name.data();
  Uuid uuid;
  driver.check(driver.device_uuid(&uuid, device), "reading a GPU's UUID");
  facts.uuid = uuid_text(uuid);
  const auto attribute = [&](int which) {
    int value = 0;  // one that this driver does not know is one that the GPU does not have
    return driver.device_attribute(&value, which, device) == kSuccess ? value : 0;
  };
  facts.capability_major = attribute(kComputeCapabilityMajor);
  facts.capability_minor = attribute(kComputeCapabilityMinor);
  facts.async_engines = attribute(kAsyncEngineCount);
  facts.has_vmm = attribute(kVirtualMemorySupported) != 0;
  facts.has_posix_handles = attribute(kPosixHandleSupported) != 0;
  facts.has_fabric_handles = attribute(kFabricHandleSupported) != 0;
  for (int other = 0; other < count; ++other) {
    Device peer = 0;
    int can = other == ordinal ? 1 : 0;
    if (other != ordinal && driver.device_get(&peer, other) == kSuccess) {
      driver.can_access_peer(&can, device, peer);
    }
    facts.reaches.push_back(can != 0);
  }
  return facts;
}

// A board of its own, and the lane over it.
class TrialLane {
 public:
  TrialLane(const std::shared_ptr<DeviceContext>& context, CopyCall copies)
      : page_(static_cast<std::byte*>(std::aligned_alloc(4096, 4096)), &std::free) {
    FEPLB_CHECK(page_ != nullptr, "out of memory");
    std::memset(page_.get(), 0, 4096);
    LaneOptions options;
    options.copies = copies;
    device_ = make_cuda_device(context, page_.get(), 4096, options);
  }
  ~TrialLane() { device_->stop(); }
  feplb::Device& device() { return *device_; }
  Flag* flag() { return reinterpret_cast<Flag*>(page_.get()); }

  void await_flag(Epoch epoch) {
    static const std::atomic<bool> kNever{false};
    Bell bell;
    const auto done = [&] { return epoch_reached(flag()->epoch.load(), epoch); };
    const WaitResult result =
        device_->wait_host(bell, done, WaitLimits{Clock::now() + kTrialTime, &kNever});
    if (result != WaitResult::kReached) throw Error("the flag was never written");
  }

 private:
  std::unique_ptr<std::byte, void (*)(void*)> page_;
  std::unique_ptr<feplb::Device> device_;
};

std::string try_vmm(const std::shared_ptr<DeviceContext>& context) {
  const auto arena = DeviceArena::create(context, kTrialBytes, ArenaWay::kVmm);
  const Fd fd = arena->export_fd();
  const auto opened = DeviceArena::open_fd(context, kTrialBytes, fd.get());
  const uint32_t written = 0x5eed1234;
  uint32_t seen = 0;
  const Driver& driver = context->driver();
  const CurrentContext current(*context);
  driver.check(driver.copy_to_device(reinterpret_cast<Address>(arena->data()), &written, 4),
               "writing through the first mapping");
  driver.check(driver.copy_to_host(&seen, reinterpret_cast<Address>(opened->data()), 4),
               "reading through the second mapping");
  if (seen != written) throw Error("the two mappings hold different bytes");
  return "made, exported as a file descriptor, opened again, same bytes";
}

std::string try_ipc(const std::shared_ptr<DeviceContext>& context) {
  const auto arena = DeviceArena::create(context, kTrialBytes, ArenaWay::kIpc);
  static_cast<void>(arena->export_ipc());
  return "handle made (only another process can open it)";
}

std::string try_pinning(const std::shared_ptr<DeviceContext>& context) {
  TrialLane lane(context, CopyCall::kPlain);
  return "host memory pinned and seen by the GPU";
}

std::string try_flags(const std::shared_ptr<DeviceContext>& context) {
  TrialLane lane(context, CopyCall::kPlain);
  static const std::atomic<bool> kNever{false};
  lane.device().write_flag(StreamKind::kPushes, lane.flag(), 7);
  lane.device().wait_flag(lane.flag(), 7, WaitLimits{Clock::now() + kTrialTime, &kNever});
  lane.device().mark_compute();
  lane.await_flag(7);
  Bell bell;
  const auto drained = [&] { return lane.device().compute_drained(); };
  if (lane.device().wait_host(bell, drained, WaitLimits{Clock::now() + kTrialTime, &kNever}) !=
      WaitResult::kReached) {
    lane.flag()->epoch.store(7 + kLift);
    throw Error("a stream's wait did not see the flag that another stream wrote");
  }
  return "written by one stream, awaited by another";
}

std::string try_copies(const std::shared_ptr<DeviceContext>& context, CopyCall call) {
  const auto arena = DeviceArena::create(context, 2 * kTrialBytes, ArenaWay::kIpc);
  std::vector<std::byte> bytes(kTrialBytes), seen(kTrialBytes);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 31 & 0xff);
  TrialLane lane(context, call);
  lane.device().put(arena->data(), bytes.data(), kTrialBytes);
  constexpr std::size_t kHalf = kTrialBytes / 2;
  lane.device().copy_batch(StreamKind::kPushes,
                           {{arena->data() + kTrialBytes, arena->data(), kHalf},
                            {arena->data() + kTrialBytes + kHalf, arena->data() + kHalf, kHalf}});
  lane.device().write_flag(StreamKind::kPushes, lane.flag(), 1);
  lane.await_flag(1);
  lane.device().get(seen.data(), arena->data() + kTrialBytes, kTrialBytes);
  if (seen != bytes) throw Error("what arrived is not what was sent");
  return "two copies, flag behind them, same bytes";
}

}  // namespace

MachineFacts read_facts(const Driver& driver) {
  MachineFacts facts;
  facts.driver_version = driver.version();
  facts.is_stand_in = driver.is_stand_in();
  facts.has_batches = driver.copy_batch != nullptr;
  int count = 0;
  driver.check(driver.device_count(&count), "counting GPUs");
  for (int i = 0; i < count; ++i) facts.gpus.push_back(read_gpu(driver, i, count));
  return facts;
}

std::vector<Trial> try_out(const std::shared_ptr<const Driver>& driver, int ordinal) {
  std::vector<Trial> trials;
  std::shared_ptr<DeviceContext> context;
  const auto attempt = [&](const char* name, const std::function<std::string()>& trial) {
    try {
      trials.push_back(Trial{name, true, trial()});
    } catch (const std::exception& error) {
      trials.push_back(Trial{name, false, error.what()});
    }
  };
  attempt("context", [&] {
    context = std::make_shared<DeviceContext>(driver, ordinal);
    return std::string("primary context taken");
  });
  if (context == nullptr) return trials;
  attempt("vmm", [&] { return try_vmm(context); });
  attempt("cuda_ipc", [&] { return try_ipc(context); });
  attempt("pinned_board", [&] { return try_pinning(context); });
  attempt("stream_values", [&] { return try_flags(context); });
  attempt("plain_copy", [&] { return try_copies(context, CopyCall::kPlain); });
  attempt("batch_copy",
          [&] { return try_copies(context, copy_call_from("batch", context->driver())); });
  return trials;
}

}  // namespace feplb::cuda
