// A driver without a GPU: the functions of libcuda that feplb calls, over host memory and threads,
// strict where the real one is. It writes down what it is asked, fails and blocks where it is told
// to (ledger.h), and costs what a call costs. A shared library of its own, opened in libcuda's
// place.
#include <fcntl.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "../../feplb/csrc/cuda_abi.h"
#include "ledger.h"
#include "memory.h"
#include "streams.h"

namespace stand_in {
namespace {

using namespace feplb::cuda;

constexpr Result kInvalidValue = 1;
constexpr Result kInvalidContext = 201;
constexpr Result kInvalidHandle = 400;
constexpr Result kNotFound = 500;
constexpr Result kIllegalAddress = 700;
constexpr Result kAlreadyRegistered = 712;

struct ContextRecord {
  int device;
};
thread_local std::vector<Context> current;

bool has_context() { return !current.empty() && current.back() != nullptr; }

int current_device() { return reinterpret_cast<ContextRecord*>(current.back())->device; }

StreamRecord* record_of(Stream stream) { return reinterpret_cast<StreamRecord*>(stream); }

// The lock of the current context, where there is one lock.
class DriverLock {
 public:
  DriverLock() {
    if (!Ledger::the().one_lock) return;
    lock_ = std::unique_lock<std::mutex>(Gpu::of(current_device()).driver_lock());
  }

 private:
  std::unique_lock<std::mutex> lock_;
};

void enqueue(Stream stream, Operation operation) {
  if (stream == nullptr && !Ledger::the().queued_default) {
    operation();
    return;
  }
  const std::shared_ptr<Queue> kept =
      stream == nullptr ? Gpu::of(current_device()).default_queue() : record_of(stream)->queue;
  Queue& queue = *kept;
  queue.add(std::move(operation));
  const int64_t depth = Ledger::the().queue_depth.load();
  if (depth > 0) queue.wait_for(static_cast<std::size_t>(depth));
}

// Plain memory of the process stands for tensors: it may be read from anywhere, and the caller's
// own results may be written by kernels alone, never by a copy of ours.
bool may_write(Address address, std::size_t bytes) { return Memory::the().holds(address, bytes); }

std::atomic<uint32_t>* word_at(Address address) {
  return reinterpret_cast<std::atomic<uint32_t>*>(address);
}

// An aligned word arrives whole.
void copy_now(Address destination, Address source, std::size_t bytes) {
  if (bytes == sizeof(uint32_t) && destination % bytes == 0 && source % bytes == 0) {
    word_at(destination)->store(word_at(source)->load(), std::memory_order_release);
    return;
  }
  std::memcpy(reinterpret_cast<void*>(destination), reinterpret_cast<const void*>(source), bytes);
}

void wait_for(Address address, uint32_t value) {
  while (static_cast<int32_t>(word_at(address)->load(std::memory_order_acquire) - value) < 0) {
    pause_briefly();
  }
}

Result enqueue_mem_op(Stream stream, int operation, Address address, uint32_t value) {
  if (!may_write(address, sizeof(value)) || address % sizeof(value) != 0) return kInvalidValue;
  if (Memory::the().is_of_peer(address)) return kNotSupported;
  if (operation == kWaitValue32) {
    enqueue(stream, [address, value] { wait_for(address, value); });
  } else if (operation == kWriteValue32) {
    enqueue(stream,
            [address, value] { word_at(address)->store(value, std::memory_order_release); });
  } else {
    return kInvalidValue;
  }
  return kSuccess;
}

}  // namespace
}  // namespace stand_in

using namespace stand_in;

// The beginning of every function: written down, told to fail, and refused without a context.
#define STAND_IN_ENTER(symbol, submits) \
  if (const int code = Ledger::the().enter(symbol, submits); code != 0) return code
#define STAND_IN_NEEDS_CONTEXT() \
  if (!has_context()) return kInvalidContext
#define STAND_IN_SUBMITS(symbol, stream)                  \
  STAND_IN_ENTER(symbol, true);                           \
  STAND_IN_NEEDS_CONTEXT();                               \
  if (!Streams::the().has(stream)) return kInvalidHandle; \
  const DriverLock driver_lock

extern "C" {

int feplb_driver_stand_in = 1;

// --------------------------------------------------------------------------- for tests, benches

int64_t stand_in_calls(const char* symbol) { return Ledger::the().calls(symbol); }
// Moves at most `most` submissions into `out`, oldest first; returns how many.
int64_t stand_in_take_log(Submission* out, int64_t most) {
  const std::vector<Submission> log = Ledger::the().take_log();
  const auto count = std::min(most, static_cast<int64_t>(log.size()));
  std::copy_n(log.begin(), count, out);
  return count;
}
void stand_in_fail(const char* symbol, int code, int64_t after) {
  Ledger::the().fail(symbol, code, after, false);
}
void stand_in_fail_once(const char* symbol, int code, int64_t after) {
  Ledger::the().fail(symbol, code, after, true);
}
void stand_in_block(const char* symbol, int64_t ms) { Ledger::the().block(symbol, ms); }
void stand_in_set_call_ns(int64_t ns) { Ledger::the().call_ns = ns; }
void stand_in_set_gpus(int count) { Ledger::the().num_gpus = count; }
void stand_in_set_capturing(int status) { Ledger::the().capturing = status; }
void stand_in_set_jitter_us(int64_t us) { Ledger::the().jitter_us = us; }
// For streams to come.
void stand_in_set_one_queue(int on) { Ledger::the().one_queue = on != 0; }
void stand_in_set_queued_default(int on) {
  Ledger::the().queued_default = on != 0;
  if (on != 0) return;
  for (int device = 0; device < Ledger::the().num_gpus; ++device) {
    Gpu::of(device).drop_default_queue();
  }
}
void stand_in_set_one_lock(int on) { Ledger::the().one_lock = on != 0; }
void stand_in_set_queue_depth(int64_t depth) { Ledger::the().queue_depth = depth; }
int64_t stand_in_failures() { return Ledger::the().failures(); }
int64_t stand_in_alive(const char* kind) { return Ledger::the().alive(kind); }

// Ranks that are threads of one process pin one board, each for itself. (The real driver refuses
// the second.)
void stand_in_share_pins(int on) { Ledger::the().shares_pins = on != 0; }

// Host memory that is a GPU's from here on, and that is none any more.
void stand_in_adopt(void* memory, std::size_t bytes) {
  Memory::the().add(reinterpret_cast<Address>(memory), Block{bytes, -1, true});
}
void stand_in_disown(void* memory) {
  Block block;
  Memory::the().take(reinterpret_cast<Address>(memory), block);
}

// A kernel: runs in its place in the stream. Launching is a call of the driver.
Result stand_in_launch(Stream stream, void (*kernel)(void*), void* argument) {
  STAND_IN_SUBMITS("launch", stream);
  enqueue(stream, [kernel, argument] { kernel(argument); });
  return kSuccess;
}

// ------------------------------------------------------------------------------ driver, devices

Result cuInit(unsigned) {
  STAND_IN_ENTER("cuInit", false);
  return Ledger::the().num_gpus > 0 ? kSuccess : kNoDevice;
}

Result cuDriverGetVersion(int* version) {
  STAND_IN_ENTER("cuDriverGetVersion", false);
  *version = Ledger::the().version;
  return kSuccess;
}

Result cuGetErrorName(Result error, const char** text) {
  *text = error == kOutOfMemory             ? "CUDA_ERROR_OUT_OF_MEMORY"
          : error == kPeerAccessUnsupported ? "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED"
          : error == kNotPermitted          ? "CUDA_ERROR_NOT_PERMITTED"
          : error == kNoDevice              ? "CUDA_ERROR_NO_DEVICE"
          : error == kIllegalAddress        ? "CUDA_ERROR_ILLEGAL_ADDRESS"
                                            : "CUDA_ERROR_OF_THE_STAND_IN";
  return kSuccess;
}

Result cuGetErrorString(Result, const char** text) {
  *text = "as the test asked for";
  return kSuccess;
}

Result cuDeviceGetCount(int* count) {
  STAND_IN_ENTER("cuDeviceGetCount", false);
  *count = Ledger::the().num_gpus;
  return kSuccess;
}

Result cuDeviceGet(Device* device, int ordinal) {
  STAND_IN_ENTER("cuDeviceGet", false);
  if (ordinal < 0 || ordinal >= Ledger::the().num_gpus) return 101;
  *device = ordinal;
  return kSuccess;
}

Result cuDeviceGetName(char* name, int length, Device) {
  STAND_IN_ENTER("cuDeviceGetName", false);
  std::strncpy(name, "Stand-in GPU", static_cast<std::size_t>(length));
  return kSuccess;
}

Result cuDeviceGetUuid(Uuid* uuid, Device device) {
  STAND_IN_ENTER("cuDeviceGetUuid", false);
  std::memset(uuid, Ledger::the().uuids_from + device, sizeof(*uuid));
  return kSuccess;
}

Result cuDeviceGetAttribute(int* value, int attribute, Device) {
  STAND_IN_ENTER("cuDeviceGetAttribute", false);
  *value = attribute == kComputeCapabilityMajor   ? 9
           : attribute == kComputeCapabilityMinor ? 0
           : attribute == kAsyncEngineCount       ? 3
           : attribute == kFabricHandleSupported  ? static_cast<int>(Ledger::the().has_fabric)
           : attribute == kPosixHandleSupported   ? static_cast<int>(Ledger::the().has_vmm)
                                                  : 1;
  return kSuccess;
}

Result cuDeviceCanAccessPeer(int* can, Device, Device) {
  STAND_IN_ENTER("cuDeviceCanAccessPeer", false);
  *can = 1;
  return kSuccess;
}

Result cuDevicePrimaryCtxRetain(Context* context, Device device) {
  STAND_IN_ENTER("cuDevicePrimaryCtxRetain", false);
  static ContextRecord records[64];
  records[device].device = device;
  *context = reinterpret_cast<Context>(&records[device]);
  Ledger::the().made("context");
  return kSuccess;
}

Result cuDevicePrimaryCtxRelease(Device) {
  STAND_IN_ENTER("cuDevicePrimaryCtxRelease", false);
  Ledger::the().gone("context");
  return kSuccess;
}

Result cuCtxGetCurrent(Context* context) {
  STAND_IN_ENTER("cuCtxGetCurrent", false);
  *context = has_context() ? current.back() : nullptr;
  return kSuccess;
}

Result cuCtxSetCurrent(Context context) {
  STAND_IN_ENTER("cuCtxSetCurrent", false);
  if (current.empty()) current.push_back(nullptr);
  current.back() = context;
  return kSuccess;
}

Result cuCtxPushCurrent(Context context) {
  STAND_IN_ENTER("cuCtxPushCurrent", false);
  current.push_back(context);
  return kSuccess;
}

Result cuCtxPopCurrent(Context* context) {
  STAND_IN_ENTER("cuCtxPopCurrent", false);
  if (current.empty()) return kInvalidContext;
  *context = current.back();
  current.pop_back();
  return kSuccess;
}

Result cuCtxEnablePeerAccess(Context, unsigned) { return kSuccess; }

// ---------------------------------------------------------------------------- streams and events

Result cuStreamCreate(Stream* stream, unsigned flags) {
  STAND_IN_ENTER("cuStreamCreate", false);
  STAND_IN_NEEDS_CONTEXT();
  if (flags != kStreamNonBlocking) return kInvalidValue;
  *stream = reinterpret_cast<Stream>(new StreamRecord{Gpu::of(current_device()).make_queue()});
  Streams::the().add(*stream);
  Ledger::the().made("stream");
  return kSuccess;
}

Result cuStreamDestroy(Stream stream) {
  STAND_IN_ENTER("cuStreamDestroy", false);
  if (!Streams::the().remove(stream)) return kInvalidHandle;
  delete record_of(stream);
  Ledger::the().gone("stream");
  return kSuccess;
}

Result cuStreamSynchronize(Stream stream) {
  STAND_IN_ENTER("cuStreamSynchronize", false);
  if (!Streams::the().has(stream)) return kInvalidHandle;
  if (stream != nullptr) record_of(stream)->queue->wait_for(0);
  if (stream == nullptr && Ledger::the().queued_default) {
    if (!has_context()) return kInvalidContext;
    Gpu::of(current_device()).default_queue()->wait_for(0);
  }
  return kSuccess;
}

Result cuStreamIsCapturing(Stream, int* status) {
  STAND_IN_ENTER("cuStreamIsCapturing", false);
  *status = Ledger::the().capturing;
  return kSuccess;
}

Result cuEventCreate(EventHandle* event, unsigned) {
  STAND_IN_ENTER("cuEventCreate", false);
  STAND_IN_NEEDS_CONTEXT();
  *event = reinterpret_cast<EventHandle>(new EventRecord);
  Ledger::the().made("event");
  return kSuccess;
}

Result cuEventDestroy(EventHandle event) {
  STAND_IN_ENTER("cuEventDestroy", false);
  delete reinterpret_cast<EventRecord*>(event);
  Ledger::the().gone("event");
  return kSuccess;
}

Result cuEventRecord(EventHandle event, Stream stream) {
  STAND_IN_SUBMITS("cuEventRecord", stream);
  auto* record = reinterpret_cast<EventRecord*>(event);
  const auto point = std::make_shared<Point>();
  {
    const std::lock_guard<std::mutex> lock(record->mutex);
    record->point = point;
  }
  enqueue(stream, [point] { point->reached.store(true); });
  return kSuccess;
}

Result cuStreamWaitEvent(Stream stream, EventHandle event, unsigned) {
  STAND_IN_SUBMITS("cuStreamWaitEvent", stream);
  const auto point = reinterpret_cast<EventRecord*>(event)->latest();
  if (point == nullptr) return kSuccess;
  enqueue(stream, [point] {
    while (!point->reached.load()) pause_briefly();
  });
  return kSuccess;
}

Result cuStreamBatchMemOp(Stream stream, unsigned count, MemOp* ops, unsigned flags) {
  STAND_IN_SUBMITS("cuStreamBatchMemOp", stream);
  if (count >= 256 || flags != 0) return kInvalidValue;
  for (unsigned i = 0; i < count; ++i) {
    const Result result =
        enqueue_mem_op(stream, ops[i].value.operation, ops[i].value.address, ops[i].value.value);
    if (result != kSuccess) return result;
  }
  return kSuccess;
}

Result cuStreamWaitValue32(Stream stream, Address address, uint32_t value, unsigned flags) {
  STAND_IN_SUBMITS("cuStreamWaitValue32", stream);
  return (flags & ~kWaitFlush) != kWaitAtLeast
             ? kInvalidValue
             : enqueue_mem_op(stream, kWaitValue32, address, value);
}

Result cuStreamWriteValue32(Stream stream, Address address, uint32_t value, unsigned) {
  STAND_IN_SUBMITS("cuStreamWriteValue32", stream);
  return enqueue_mem_op(stream, kWriteValue32, address, value);
}

// ---------------------------------------------------------------------------------------- copies

Result cuMemcpyBatchAsync(Address* destinations, Address* sources, std::size_t* sizes,
                          std::size_t count, CopyAttributes* attributes, std::size_t* first,
                          std::size_t num_attributes, std::size_t* failed, Stream stream) {
  STAND_IN_SUBMITS("cuMemcpyBatchAsync", stream);
  if (stream == nullptr || count == 0 || num_attributes != 1 || first[0] != 0 ||
      attributes->source_access_order != kSourceInStreamOrder) {
    return kInvalidValue;
  }
  for (std::size_t i = 0; i < count; ++i) {
    *failed = i;
    if (sizes[i] == 0 || !may_write(destinations[i], sizes[i])) return kInvalidValue;
  }
  // No order inside a batch: the last comes first.
  std::vector<Address> to(destinations, destinations + count), from(sources, sources + count);
  std::vector<std::size_t> bytes(sizes, sizes + count);
  enqueue(stream, [to, from, bytes] {
    for (std::size_t i = bytes.size(); i-- > 0;) copy_now(to[i], from[i], bytes[i]);
  });
  return kSuccess;
}

static Result copy_in_stream(Address destination, Address source, std::size_t bytes,
                             Stream stream) {
  if (!may_write(destination, bytes)) return kInvalidValue;
  enqueue(stream, [=] { copy_now(destination, source, bytes); });
  return kSuccess;
}

Result cuMemcpyAsync(Address destination, Address source, std::size_t bytes, Stream stream) {
  STAND_IN_SUBMITS("cuMemcpyAsync", stream);
  return copy_in_stream(destination, source, bytes, stream);
}

Result cuMemcpyPeerAsync(Address destination, Context destination_context, Address source,
                         Context source_context, std::size_t bytes, Stream stream) {
  STAND_IN_SUBMITS("cuMemcpyPeerAsync", stream);
  if (destination_context == nullptr || source_context == nullptr) return kInvalidContext;
  return copy_in_stream(destination, source, bytes, stream);
}

Result cuMemcpyHtoD(Address destination, const void* source, std::size_t bytes) {
  STAND_IN_ENTER("cuMemcpyHtoD", false);
  STAND_IN_NEEDS_CONTEXT();
  if (!may_write(destination, bytes)) return kInvalidValue;
  copy_now(destination, reinterpret_cast<Address>(source), bytes);
  return kSuccess;
}

Result cuMemcpyDtoH(void* destination, Address source, std::size_t bytes) {
  STAND_IN_ENTER("cuMemcpyDtoH", false);
  STAND_IN_NEEDS_CONTEXT();
  if (!may_write(source, bytes)) return kInvalidValue;
  copy_now(reinterpret_cast<Address>(destination), source, bytes);
  return kSuccess;
}

// ---------------------------------------------------------------------------------------- memory

Result cuMemAlloc(Address* address, std::size_t bytes) {
  STAND_IN_ENTER("cuMemAlloc", false);
  STAND_IN_NEEDS_CONTEXT();
  const DriverLock driver_lock;
  if (Ledger::the().one_lock) Gpu::of(current_device()).drain();
  const int fd = Memory::make_fd(Openers::offset(bytes) + Openers::kBytes);
  void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (fd < 0 || mapped == MAP_FAILED) return kOutOfMemory;
  *address = reinterpret_cast<Address>(mapped);
  Memory::the().add(*address, Block{bytes, fd, true});
  Ledger::the().made("allocation");
  return kSuccess;
}

Result cuMemFree(Address address) {
  STAND_IN_ENTER("cuMemFree", false);
  STAND_IN_NEEDS_CONTEXT();
  const DriverLock driver_lock;
  if (Ledger::the().one_lock) Gpu::of(current_device()).drain();
  Block block;
  if (!Memory::the().take(address, block)) return kInvalidValue;
  if (Openers(block.fd, block.bytes).has_living()) Ledger::the().made("use after free");
  munmap(reinterpret_cast<void*>(address), block.bytes);
  close(block.fd);
  Ledger::the().gone("allocation");
  return kSuccess;
}

struct IpcContent {
  int pid;
  int fd;
  std::size_t bytes;
};

Result cuIpcGetMemHandle(IpcHandle* handle, Address address) {
  STAND_IN_ENTER("cuIpcGetMemHandle", false);
  const Block block = Memory::the().block_at(address);
  if (block.fd < 0) return kInvalidValue;
  std::memset(handle, 0, sizeof(*handle));
  const IpcContent content{getpid(), block.fd, block.bytes};
  std::memcpy(handle, &content, sizeof(content));
  return kSuccess;
}

Result cuIpcOpenMemHandle(Address* address, IpcHandle handle, unsigned flags) {
  STAND_IN_ENTER("cuIpcOpenMemHandle", false);
  STAND_IN_NEEDS_CONTEXT();
  IpcContent content;
  std::memcpy(&content, &handle, sizeof(content));
  if (flags != kIpcLazyPeerAccess || content.pid == getpid()) return kInvalidContext;
  const std::string path =
      "/proc/" + std::to_string(content.pid) + "/fd/" + std::to_string(content.fd);
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return kNotPermitted;
  void* mapped = mmap(nullptr, content.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (mapped == MAP_FAILED) {
    close(fd);
    return kOutOfMemory;
  }
  Openers(fd, content.bytes).add();
  *address = reinterpret_cast<Address>(mapped);
  Memory::the().add(*address, Block{content.bytes, fd, true});
  Ledger::the().made("ipc mapping");
  return kSuccess;
}

Result cuIpcCloseMemHandle(Address address) {
  STAND_IN_ENTER("cuIpcCloseMemHandle", false);
  Block block;
  if (!Memory::the().take(address, block)) return kInvalidValue;
  munmap(reinterpret_cast<void*>(address), block.bytes);
  Openers(block.fd, block.bytes).remove();
  close(block.fd);
  Ledger::the().gone("ipc mapping");
  return kSuccess;
}

struct Pin {
  void* alias = nullptr;  // where the GPU sees it
  std::size_t bytes = 0;
  int count = 0;
};
static std::mutex pins_mutex;
static std::map<void*, Pin> pins;

// Shared pages get a second address; private ones keep theirs.
Result cuMemHostRegister(void* address, std::size_t bytes, unsigned flags) {
  STAND_IN_ENTER("cuMemHostRegister", false);
  STAND_IN_NEEDS_CONTEXT();
  if (flags != (kHostRegisterPortable | kHostRegisterDeviceMap)) return kInvalidValue;
  const std::lock_guard<std::mutex> lock(pins_mutex);
  Pin& pin = pins[address];
  if (pin.count > 0 && !Ledger::the().shares_pins) return kAlreadyRegistered;
  Ledger::the().made("pin");
  if (pin.count++ > 0) return kSuccess;
  pin.bytes = bytes;
  pin.alias = mremap(address, 0, bytes, MREMAP_MAYMOVE);
  if (pin.alias == MAP_FAILED) pin.alias = address;
  Memory::the().add(reinterpret_cast<Address>(pin.alias), Block{bytes, -1, true});
  return kSuccess;
}

Result cuMemHostGetDevicePointer(Address* device, void* host, unsigned) {
  STAND_IN_ENTER("cuMemHostGetDevicePointer", false);
  const std::lock_guard<std::mutex> lock(pins_mutex);
  const auto found = pins.find(host);
  if (found == pins.end()) return kInvalidValue;
  *device = reinterpret_cast<Address>(found->second.alias);
  return kSuccess;
}

Result cuMemHostUnregister(void* host) {
  STAND_IN_ENTER("cuMemHostUnregister", false);
  const std::lock_guard<std::mutex> lock(pins_mutex);
  const auto found = pins.find(host);
  if (found == pins.end()) return kInvalidValue;
  Ledger::the().gone("pin");
  if (--found->second.count > 0) return kSuccess;
  Block block;
  Memory::the().take(reinterpret_cast<Address>(found->second.alias), block);
  if (found->second.alias != host) munmap(found->second.alias, found->second.bytes);
  pins.erase(found);
  return kSuccess;
}

Result cuMemGetAllocationGranularity(std::size_t* bytes, const AllocationProperties*, int) {
  STAND_IN_ENTER("cuMemGetAllocationGranularity", false);
  *bytes = kPage;
  return kSuccess;
}

Result cuMemCreate(AllocationHandle* handle, std::size_t bytes,
                   const AllocationProperties* properties, unsigned long long) {
  STAND_IN_ENTER("cuMemCreate", false);
  if (bytes % kPage != 0 || properties->location.type != kLocationDevice) return kInvalidValue;
  const int fd = Memory::make_fd(bytes);
  if (fd < 0) return kOutOfMemory;
  *handle = static_cast<AllocationHandle>(fd) + 1;
  Ledger::the().made("physical memory");
  return kSuccess;
}

// In the handle of a peer's memory, beside its descriptor.
constexpr AllocationHandle kImported = AllocationHandle{1} << 32;
int fd_of(AllocationHandle handle) { return static_cast<int>(handle & ~kImported) - 1; }

Result cuMemRelease(AllocationHandle handle) {
  STAND_IN_ENTER("cuMemRelease", false);
  Ledger::the().gone("physical memory");
  close(fd_of(handle));
  return kSuccess;
}

// What a fabric handle says, as far as one host is a fabric.
struct FabricContent {
  pid_t pid;
  int fd;
};

Result cuMemExportToShareableHandle(void* shareable, AllocationHandle handle, int type,
                                    unsigned long long) {
  STAND_IN_ENTER("cuMemExportToShareableHandle", false);
  const int fd = fd_of(handle);
  if (type == kHandlePosix) {
    *static_cast<int*>(shareable) = dup(fd);
    return kSuccess;
  }
  if (type != kHandleFabric) return kNotSupported;
  FabricContent content{getpid(), fd};
  std::memcpy(shareable, &content, sizeof(content));
  return kSuccess;
}

Result cuMemImportFromShareableHandle(AllocationHandle* handle, void* shareable, int type) {
  STAND_IN_ENTER("cuMemImportFromShareableHandle", false);
  int fd = -1;
  if (type == kHandlePosix) fd = dup(static_cast<int>(reinterpret_cast<std::intptr_t>(shareable)));
  if (type == kHandleFabric) {
    FabricContent content;
    std::memcpy(&content, shareable, sizeof(content));
    const std::string path =
        "/proc/" + std::to_string(content.pid) + "/fd/" + std::to_string(content.fd);
    fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  }
  if (fd < 0) return kInvalidHandle;
  *handle = (static_cast<AllocationHandle>(fd) + 1) | kImported;
  Ledger::the().made("physical memory");
  return kSuccess;
}

Result cuMemAddressReserve(Address* address, std::size_t bytes, std::size_t, Address,
                           unsigned long long) {
  STAND_IN_ENTER("cuMemAddressReserve", false);
  void* reserved = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (reserved == MAP_FAILED) return kOutOfMemory;
  *address = reinterpret_cast<Address>(reserved);
  Ledger::the().made("reservation");
  return kSuccess;
}

Result cuMemAddressFree(Address address, std::size_t bytes) {
  STAND_IN_ENTER("cuMemAddressFree", false);
  Ledger::the().gone("reservation");
  munmap(reinterpret_cast<void*>(address), bytes);
  return kSuccess;
}

Result cuMemMap(Address address, std::size_t bytes, std::size_t, AllocationHandle handle,
                unsigned long long) {
  STAND_IN_ENTER("cuMemMap", false);
  void* mapped = mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED,
                      fd_of(handle), 0);
  if (mapped == MAP_FAILED) return kInvalidValue;
  Memory::the().add(address, Block{bytes, -1, false, (handle & kImported) != 0});
  Ledger::the().made("mapping");
  return kSuccess;
}

Result cuMemUnmap(Address address, std::size_t bytes) {
  STAND_IN_ENTER("cuMemUnmap", false);
  Block block;
  if (!Memory::the().take(address, block)) return kInvalidValue;
  Ledger::the().gone("mapping");
  mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
       -1, 0);
  return kSuccess;
}

Result cuMemSetAccess(Address address, std::size_t bytes, const AccessDescription* access,
                      std::size_t) {
  STAND_IN_ENTER("cuMemSetAccess", false);
  if (access->flags != kAccessReadWrite) return kInvalidValue;
  if (mprotect(reinterpret_cast<void*>(address), bytes, PROT_READ | PROT_WRITE) != 0) {
    return kInvalidValue;
  }
  Memory::the().set_open(address, true);
  return kSuccess;
}

Result cuGetProcAddress(const char* symbol, void** function, int version, unsigned long long);

}  // extern "C"

namespace {

struct Export {
  const char* symbol;
  void* function;
  int since;  // the CUDA version that brought it
};

#define STAND_IN_EXPORT(symbol, since) \
  Export { #symbol, reinterpret_cast<void*>(&symbol), since }

const Export kExports[] = {
    STAND_IN_EXPORT(cuInit, 2000),
    STAND_IN_EXPORT(cuDriverGetVersion, 2020),
    STAND_IN_EXPORT(cuGetErrorName, 6000),
    STAND_IN_EXPORT(cuGetErrorString, 6000),
    STAND_IN_EXPORT(cuDeviceGetCount, 2000),
    STAND_IN_EXPORT(cuDeviceGet, 2000),
    STAND_IN_EXPORT(cuDeviceGetName, 2000),
    STAND_IN_EXPORT(cuDeviceGetUuid, 9020),
    STAND_IN_EXPORT(cuDeviceGetAttribute, 2000),
    STAND_IN_EXPORT(cuDeviceCanAccessPeer, 4000),
    STAND_IN_EXPORT(cuDevicePrimaryCtxRetain, 7000),
    STAND_IN_EXPORT(cuDevicePrimaryCtxRelease, 7000),
    STAND_IN_EXPORT(cuCtxGetCurrent, 4000),
    STAND_IN_EXPORT(cuCtxSetCurrent, 4000),
    STAND_IN_EXPORT(cuCtxPushCurrent, 4000),
    STAND_IN_EXPORT(cuCtxPopCurrent, 4000),
    STAND_IN_EXPORT(cuCtxEnablePeerAccess, 4000),
    STAND_IN_EXPORT(cuStreamCreate, 2000),
    STAND_IN_EXPORT(cuStreamDestroy, 4000),
    STAND_IN_EXPORT(cuStreamSynchronize, 2000),
    STAND_IN_EXPORT(cuStreamIsCapturing, 10000),
    STAND_IN_EXPORT(cuStreamWaitEvent, 3020),
    STAND_IN_EXPORT(cuEventCreate, 2000),
    STAND_IN_EXPORT(cuEventDestroy, 4000),
    STAND_IN_EXPORT(cuEventRecord, 2000),
    STAND_IN_EXPORT(cuStreamBatchMemOp, 11070),
    STAND_IN_EXPORT(cuStreamWaitValue32, 11070),
    STAND_IN_EXPORT(cuStreamWriteValue32, 11070),
    STAND_IN_EXPORT(cuMemcpyBatchAsync, 12080),
    STAND_IN_EXPORT(cuMemcpyAsync, 4000),
    STAND_IN_EXPORT(cuMemcpyPeerAsync, 4000),
    STAND_IN_EXPORT(cuMemcpyHtoD, 3020),
    STAND_IN_EXPORT(cuMemcpyDtoH, 3020),
    STAND_IN_EXPORT(cuMemAlloc, 3020),
    STAND_IN_EXPORT(cuMemFree, 3020),
    STAND_IN_EXPORT(cuIpcGetMemHandle, 4010),
    STAND_IN_EXPORT(cuIpcOpenMemHandle, 4010),
    STAND_IN_EXPORT(cuIpcCloseMemHandle, 4010),
    STAND_IN_EXPORT(cuMemHostRegister, 4000),
    STAND_IN_EXPORT(cuMemHostUnregister, 4000),
    STAND_IN_EXPORT(cuMemHostGetDevicePointer, 3020),
    STAND_IN_EXPORT(cuMemGetAllocationGranularity, 10020),
    STAND_IN_EXPORT(cuMemCreate, 10020),
    STAND_IN_EXPORT(cuMemRelease, 10020),
    STAND_IN_EXPORT(cuMemExportToShareableHandle, 10020),
    STAND_IN_EXPORT(cuMemImportFromShareableHandle, 10020),
    STAND_IN_EXPORT(cuMemAddressReserve, 10020),
    STAND_IN_EXPORT(cuMemAddressFree, 10020),
    STAND_IN_EXPORT(cuMemMap, 10020),
    STAND_IN_EXPORT(cuMemUnmap, 10020),
    STAND_IN_EXPORT(cuMemSetAccess, 10020),
};

}  // namespace

extern "C" Result cuGetProcAddress(const char* symbol, void** function, int version,
                                   unsigned long long) {
  for (const Export& known : kExports) {
    if (std::strcmp(known.symbol, symbol) != 0) continue;
    if (known.since > version || known.since > Ledger::the().version) break;
    *function = known.function;
    return kSuccess;
  }
  *function = nullptr;
  return kNotFound;
}
