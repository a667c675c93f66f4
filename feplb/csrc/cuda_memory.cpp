#include "cuda_memory.h"

#include <unistd.h>

#include <cstring>

#include "error.h"

namespace feplb::cuda {
namespace {

int handle_type(ArenaWay way) { return way == ArenaWay::kFabric ? kHandleFabric : kHandlePosix; }

AllocationProperties shareable_on(int ordinal, ArenaWay way) {
  AllocationProperties properties;
  std::memset(&properties, 0, sizeof(properties));
  properties.type = kAllocationPinned;
  properties.requested_handle_types = handle_type(way);
  properties.location = Location{kLocationDevice, ordinal};
  return properties;
}

void require_memory(const Driver& driver, Result result, std::size_t bytes, int ordinal) {
  if (result == kOutOfMemory) {
    throw Error(cat("GPU ", ordinal, " has not the ", bytes,
                    " bytes that feplb's arena takes: ", driver.text(result),
                    ". Lower max_rows, num_slots or num_grad_slots, or leave more memory free."));
  }
  driver.check(result, cat("allocating an arena of ", bytes, " bytes on GPU ", ordinal));
}

void refuse_peer(const Driver& driver, Result result, int ordinal) {
  if (result != kPeerAccessUnsupported && result != kNotSupported) return;
  throw Error(cat("GPU ", ordinal, " cannot reach a peer's memory: ", driver.text(result),
                  ". The ce lane needs NVLink between all GPUs of a domain; give each NVLink "
                  "domain a FEPLB_DOMAIN of its own, or use lane=\"host\"."));
}

// What the driver says where memory may not be shared in this way.
void refuse_sharing(const Driver& driver, Result result, ArenaWay way, const char* what) {
  if (result != kNotPermitted && result != kNotSupported) return;
  const bool is_fabric = way == ArenaWay::kFabric;
  throw Error(cat(
      what, is_fabric ? " by a fabric handle" : " as a file descriptor",
      " was refused: ", driver.text(result),
      is_fabric ? ". Memory that GPUs of several hosts share needs one NVLink fabric, nvidia-imex "
                  "running on every host, and a channel of it in this container "
                  "(/dev/nvidia-caps-imex-channels). `feplb doctor` shows what is there; or give "
                  "each host a FEPLB_DOMAIN of its own."
                : ". This GPU or this container shares no memory that way: give all ranks one "
                  "container and whole GPUs (no MIG), or use arena_handle=\"ipc\"."));
}

}  // namespace

DeviceContext::DeviceContext(std::shared_ptr<const Driver> driver, int ordinal)
    : driver_(std::move(driver)), ordinal_(ordinal), pid_(getpid()) {
  int count = 0;
  driver_->check(driver_->device_count(&count), "counting GPUs");
  if (ordinal < 0 || ordinal >= count) {
    throw Error(cat("GPU ", ordinal, " is not among the ", count,
                    " this process sees; look at CUDA_VISIBLE_DEVICES"));
  }
  driver_->check(driver_->device_get(&device_, ordinal), cat("opening GPU ", ordinal));
  driver_->check(driver_->retain_primary_context(&handle_, device_),
                 cat("taking the primary context of GPU ", ordinal));
}

DeviceContext::~DeviceContext() {
  if (getpid() == pid_) driver_->release_primary_context(device_);
}

int DeviceContext::attribute(int which) const {
  int value = 0;
  driver_->check(driver_->device_attribute(&value, which, device_),
                 cat("reading attribute ", which, " of GPU ", ordinal_));
  return value;
}

bool DeviceContext::has(int which) const noexcept {
  int value = 0;
  return driver_->device_attribute(&value, which, device_) == kSuccess && value != 0;
}

CurrentContext::CurrentContext(const DeviceContext& context) : driver_(context.driver()) {
  Context current = nullptr;
  driver_.check(driver_.get_current(&current), "asking for the current context");
  if (current == context.handle()) return;
  if (current == nullptr) {
    driver_.check(driver_.set_current(context.handle()), "making a context current");
    return;
  }
  driver_.check(driver_.push_current(context.handle()), "making a context current");
  pushed_ = true;
}

CurrentContext::~CurrentContext() {
  Context ours = nullptr;
  if (pushed_) driver_.pop_current(&ours);
}

// ----------------------------------------------------------------------------------------- arena

DeviceArena::DeviceArena(std::shared_ptr<DeviceContext> context, std::size_t bytes, ArenaWay way)
    : context_(std::move(context)), bytes_(bytes), way_(way), pid_(getpid()) {}

std::unique_ptr<DeviceArena> DeviceArena::create(std::shared_ptr<DeviceContext> context,
                                                 std::size_t bytes, ArenaWay way) {
  std::unique_ptr<DeviceArena> arena(new DeviceArena(std::move(context), bytes, way));
  const DeviceContext& device = *arena->context_;
  const Driver& driver = device.driver();
  const CurrentContext current(device);
  arena->is_own_ = true;
  if (way == ArenaWay::kIpc) {
    require_memory(driver, driver.allocate(&arena->address_, bytes), bytes, device.ordinal());
  } else {
    const AllocationProperties properties = shareable_on(device.ordinal(), way);
    arena->mapped_ = arena->in_whole_pages();
    AllocationHandle handle = 0;
    const Result made = driver.create_allocation(&handle, arena->mapped_, &properties, 0);
    if (way == ArenaWay::kFabric) refuse_sharing(driver, made, way, "an arena that is shared");
    require_memory(driver, made, arena->mapped_, device.ordinal());
    arena->allocation_ = handle;
    arena->map(handle);
  }
  const std::string zeros(std::min<std::size_t>(bytes, std::size_t{1} << 24), '\0');
  for (std::size_t at = 0; at < bytes; at += zeros.size()) {
    driver.check(driver.copy_to_device(arena->address_ + at, zeros.data(),
                                       std::min(zeros.size(), bytes - at)),
                 "clearing the arena");
  }
  return arena;
}

void DeviceArena::map(AllocationHandle handle) {
  const Driver& driver = context_->driver();
  driver.check(driver.reserve_address(&address_, mapped_, 0, 0, 0), "reserving addresses");
  const Result result = driver.map(address_, mapped_, 0, handle, 0);
  if (result != kSuccess) {
    driver.free_address(address_, mapped_);
    address_ = 0;
    driver.check(result, "mapping an arena");
  }
  const AccessDescription access{Location{kLocationDevice, context_->ordinal()}, kAccessReadWrite};
  const Result granted = driver.set_access(address_, mapped_, &access, 1);
  refuse_peer(driver, granted, context_->ordinal());
  driver.check(granted, "opening an arena for this GPU");
}

std::size_t DeviceArena::in_whole_pages() const {
  const AllocationProperties properties = shareable_on(context_->ordinal(), way_);
  std::size_t page = 0;
  context_->driver().check(
      context_->driver().granularity(&page, &properties, kGranularityRecommended),
      "asking for the page size of shareable memory");
  return (bytes_ + page - 1) / page * page;
}

void DeviceArena::import(void* shareable) {
  const Driver& driver = context_->driver();
  const CurrentContext current(*context_);
  mapped_ = in_whole_pages();
  const Result result = driver.import_allocation(&allocation_, shareable, handle_type(way_));
  refuse_sharing(driver, result, way_, "opening a peer's arena");
  driver.check(result, "importing a peer's arena");
  map(allocation_);
}

std::unique_ptr<DeviceArena> DeviceArena::open_fd(std::shared_ptr<DeviceContext> context,
                                                  std::size_t bytes, int fd) {
  std::unique_ptr<DeviceArena> arena(new DeviceArena(std::move(context), bytes, ArenaWay::kVmm));
  arena->import(reinterpret_cast<void*>(static_cast<std::intptr_t>(fd)));
  return arena;
}

std::unique_ptr<DeviceArena> DeviceArena::open_fabric(std::shared_ptr<DeviceContext> context,
                                                      std::size_t bytes,
                                                      const std::string& handle) {
  std::unique_ptr<DeviceArena> arena(new DeviceArena(std::move(context), bytes, ArenaWay::kFabric));
  FabricHandle shareable;
  FEPLB_CHECK(handle.size() == sizeof(shareable), "a fabric handle has ", sizeof(shareable),
              " bytes, got ", handle.size());
  std::memcpy(&shareable, handle.data(), sizeof(shareable));
  arena->import(&shareable);
  return arena;
}

std::unique_ptr<DeviceArena> DeviceArena::open_ipc(std::shared_ptr<DeviceContext> context,
                                                   std::size_t bytes,
                                                   const std::string& ipc_handle) {
  std::unique_ptr<DeviceArena> arena(new DeviceArena(std::move(context), bytes, ArenaWay::kIpc));
  const DeviceContext& device = *arena->context_;
  const CurrentContext current(device);
  IpcHandle handle;
  FEPLB_CHECK(ipc_handle.size() == sizeof(handle), "an IPC handle has ", sizeof(handle),
              " bytes, got ", ipc_handle.size());
  std::memcpy(&handle, ipc_handle.data(), sizeof(handle));
  const Result result = device.driver().ipc_open(&arena->address_, handle, kIpcLazyPeerAccess);
  if (result != kSuccess) {
    arena->address_ = 0;
    refuse_peer(device.driver(), result, device.ordinal());
    throw Error(cat("CUDA IPC of a peer's arena was refused: ", device.driver().text(result),
                    ". Containers need --ipc=host (or one container for all ranks) and the GPUs "
                    "of all ranks; or use arena_handle=\"vmm\"."));
  }
  return arena;
}

Fd DeviceArena::export_fd() const {
  const CurrentContext current(*context_);
  int fd = -1;
  const Driver& driver = context_->driver();
  const Result result = driver.export_allocation(&fd, allocation_, kHandlePosix, 0);
  refuse_sharing(driver, result, way_, "exporting the arena");
  driver.check(result, "exporting the arena as a file descriptor");
  return Fd(fd);
}

std::string DeviceArena::export_ipc() const {
  const CurrentContext current(*context_);
  IpcHandle handle;
  context_->driver().check(context_->driver().ipc_export(&handle, address_),
                           "exporting the arena by CUDA IPC");
  return std::string(reinterpret_cast<const char*>(&handle), sizeof(handle));
}

std::string DeviceArena::export_fabric() const {
  const CurrentContext current(*context_);
  FabricHandle handle;
  const Result result =
      context_->driver().export_allocation(&handle, allocation_, kHandleFabric, 0);
  refuse_sharing(context_->driver(), result, way_, "sharing the arena");
  context_->driver().check(result, "exporting the arena as a fabric handle");
  return std::string(reinterpret_cast<const char*>(&handle), sizeof(handle));
}

// Nobody is told of errors here, and at the process's end the driver may be gone already.
DeviceArena::~DeviceArena() {
  if (getpid() != pid_) return;
  try {
    const Driver& driver = context_->driver();
    const CurrentContext current(*context_);
    if (way_ == ArenaWay::kIpc) {
      if (address_ != 0 && is_own_) driver.free(address_);
      if (address_ != 0 && !is_own_) driver.ipc_close(address_);
      return;
    }
    if (address_ != 0) {
      driver.unmap(address_, mapped_);
      driver.free_address(address_, mapped_);
    }
    if (allocation_ != 0) driver.release_allocation(allocation_);
  } catch (const Error&) {
  }
}

// ---------------------------------------------------------------------------------------- pinned

PinnedMemory::PinnedMemory(std::shared_ptr<DeviceContext> context, std::byte* data,
                           std::size_t bytes)
    : context_(std::move(context)), data_(data), bytes_(bytes), pid_(getpid()) {
  const Driver& driver = context_->driver();
  const CurrentContext current(*context_);
  const Result result =
      driver.host_register(data, bytes, kHostRegisterPortable | kHostRegisterDeviceMap);
  const std::string what = cat("pinning ", bytes, " bytes of the count board");
  if (result == kOutOfMemory || result == kOperatingSystem) {
    throw Error(cat(what, " failed: ", driver.text(result),
                    ". Raise the memlock limit (ulimit -l, or --ulimit memlock=-1)."));
  }
  driver.check(result, what);
  const Result mapped = driver.host_device_pointer(&address_, data, 0);
  if (mapped != kSuccess) driver.host_unregister(data);
  driver.check(mapped, "asking where the GPU sees the count board");
}

PinnedMemory::~PinnedMemory() {
  if (getpid() != pid_) return;
  try {
    const CurrentContext current(*context_);
    context_->driver().host_unregister(data_);
  } catch (const Error&) {
  }
}

Address PinnedMemory::at(const void* host) const {
  const auto* word = static_cast<const std::byte*>(host);
  FEPLB_CHECK(word >= data_ && word < data_ + bytes_, "a flag lies outside the count board");
  return address_ + static_cast<Address>(word - data_);
}

}  // namespace feplb::cuda
