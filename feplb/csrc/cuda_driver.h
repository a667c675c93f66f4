// The CUDA driver, opened at run time. Nothing here needs a GPU to be compiled, linked or loaded; a
// machine without a driver gets a sentence from open(), and only then.
#pragma once

#include <memory>
#include <string>

#include "cuda_abi.h"

namespace feplb::cuda {

// What feplb calls: name here, symbol, the driver version whose form of it is meant, its arguments.
// The driver hands out the form of that version, whatever version it is itself.
#define FEPLB_CUDA_FUNCTIONS(X)                                                                   \
  X(init, "cuInit", 2000, (unsigned flags))                                                       \
  X(driver_version, "cuDriverGetVersion", 2020, (int* version))                                   \
  X(error_name, "cuGetErrorName", 6000, (Result error, const char** text))                        \
  X(error_string, "cuGetErrorString", 6000, (Result error, const char** text))                    \
  X(device_count, "cuDeviceGetCount", 2000, (int* count))                                         \
  X(device_get, "cuDeviceGet", 2000, (Device * device, int ordinal))                              \
  X(device_name, "cuDeviceGetName", 2000, (char* name, int length, Device device))                \
  X(device_uuid, "cuDeviceGetUuid", 9020, (Uuid * uuid, Device device))                           \
  X(device_attribute, "cuDeviceGetAttribute", 2000, (int* value, int attribute, Device device))   \
  X(can_access_peer, "cuDeviceCanAccessPeer", 4000, (int* can, Device device, Device peer))       \
  X(retain_primary_context, "cuDevicePrimaryCtxRetain", 7000, (Context * context, Device device)) \
  X(release_primary_context, "cuDevicePrimaryCtxRelease", 11000, (Device device))                 \
  X(get_current, "cuCtxGetCurrent", 4000, (Context * context))                                    \
  X(set_current, "cuCtxSetCurrent", 4000, (Context context))                                      \
  X(push_current, "cuCtxPushCurrent", 4000, (Context context))                                    \
  X(pop_current, "cuCtxPopCurrent", 4000, (Context * context))                                    \
  X(enable_peer_access, "cuCtxEnablePeerAccess", 4000, (Context peer, unsigned flags))            \
  X(stream_create, "cuStreamCreate", 2000, (Stream * stream, unsigned flags))                     \
  X(stream_destroy, "cuStreamDestroy", 4000, (Stream stream))                                     \
  X(stream_synchronize, "cuStreamSynchronize", 2000, (Stream stream))                             \
  X(stream_wait_event, "cuStreamWaitEvent", 3020,                                                 \
    (Stream stream, EventHandle event, unsigned flags))                                           \
  X(stream_is_capturing, "cuStreamIsCapturing", 10000, (Stream stream, int* status))              \
  X(event_create, "cuEventCreate", 2000, (EventHandle * event, unsigned flags))                   \
  X(event_record, "cuEventRecord", 2000, (EventHandle event, Stream stream))                      \
  X(event_destroy, "cuEventDestroy", 4000, (EventHandle event))                                   \
  X(stream_mem_ops, "cuStreamBatchMemOp", 11070,                                                  \
    (Stream stream, unsigned count, MemOp* ops, unsigned flags))                                  \
  X(stream_wait_value, "cuStreamWaitValue32", 11070,                                              \
    (Stream stream, Address address, uint32_t value, unsigned flags))                             \
  X(stream_write_value, "cuStreamWriteValue32", 11070,                                            \
    (Stream stream, Address address, uint32_t value, unsigned flags))                             \
  X(copy_async, "cuMemcpyAsync", 4000,                                                            \
    (Address destination, Address source, std::size_t bytes, Stream stream))                      \
  X(copy_peer_async, "cuMemcpyPeerAsync", 4000,                                                   \
    (Address destination, Context destination_context, Address source, Context source_context,    \
     std::size_t bytes, Stream stream))                                                           \
  X(copy_to_device, "cuMemcpyHtoD", 3020,                                                         \
    (Address destination, const void* source, std::size_t bytes))                                 \
  X(copy_to_host, "cuMemcpyDtoH", 3020, (void* destination, Address source, std::size_t bytes))   \
  X(allocate, "cuMemAlloc", 3020, (Address * address, std::size_t bytes))                         \
  X(free, "cuMemFree", 3020, (Address address))                                                   \
  X(ipc_export, "cuIpcGetMemHandle", 4010, (IpcHandle * handle, Address address))                 \
  X(ipc_open, "cuIpcOpenMemHandle", 11000, (Address * address, IpcHandle handle, unsigned flags)) \
  X(ipc_close, "cuIpcCloseMemHandle", 4010, (Address address))                                    \
  X(host_register, "cuMemHostRegister", 6050, (void* address, std::size_t bytes, unsigned flags)) \
  X(host_unregister, "cuMemHostUnregister", 4000, (void* address))                                \
  X(host_device_pointer, "cuMemHostGetDevicePointer", 3020,                                       \
    (Address * address, void* host, unsigned flags))                                              \
  X(granularity, "cuMemGetAllocationGranularity", 10020,                                          \
    (std::size_t* bytes, const AllocationProperties* properties, int option))                     \
  X(create_allocation, "cuMemCreate", 10020,                                                      \
    (AllocationHandle * handle, std::size_t bytes, const AllocationProperties* properties,        \
     unsigned long long flags))                                                                   \
  X(release_allocation, "cuMemRelease", 10020, (AllocationHandle handle))                         \
  X(export_allocation, "cuMemExportToShareableHandle", 10020,                                     \
    (void* shareable, AllocationHandle handle, int type, unsigned long long flags))               \
  X(import_allocation, "cuMemImportFromShareableHandle", 10020,                                   \
    (AllocationHandle * handle, void* shareable, int type))                                       \
  X(reserve_address, "cuMemAddressReserve", 10020,                                                \
    (Address * address, std::size_t bytes, std::size_t alignment, Address wished,                 \
     unsigned long long flags))                                                                   \
  X(free_address, "cuMemAddressFree", 10020, (Address address, std::size_t bytes))                \
  X(map, "cuMemMap", 10020,                                                                       \
    (Address address, std::size_t bytes, std::size_t offset, AllocationHandle handle,             \
     unsigned long long flags))                                                                   \
  X(unmap, "cuMemUnmap", 10020, (Address address, std::size_t bytes))                             \
  X(set_access, "cuMemSetAccess", 10020,                                                          \
    (Address address, std::size_t bytes, const AccessDescription* access, std::size_t count))

// Newer drivers only; null elsewhere.
#define FEPLB_CUDA_OPTIONAL_FUNCTIONS(X)                                                      \
  X(copy_batch, "cuMemcpyBatchAsync", 12080,                                                  \
    (Address * destinations, Address * sources, std::size_t* sizes, std::size_t count,        \
     CopyAttributes* attributes, std::size_t* first_of_attribute, std::size_t num_attributes, \
     std::size_t* failed, Stream stream))

class Driver {
 public:
#define FEPLB_CUDA_DECLARE(name, symbol, version, arguments) Result(*name) arguments = nullptr;
  FEPLB_CUDA_FUNCTIONS(FEPLB_CUDA_DECLARE)
  FEPLB_CUDA_OPTIONAL_FUNCTIONS(FEPLB_CUDA_DECLARE)
#undef FEPLB_CUDA_DECLARE

  // Opens the library at `path` (usually "libcuda.so.1"), once per process and path, and
  // initialises it. Throws Error where there is none, it is too old, or there is no GPU.
  static std::shared_ptr<const Driver> open(const std::string& path);

  int version() const { return version_; }  // 12080 is CUDA 12.8
  // Its "device memory" is the host's: the stand-in of the tests, never a real driver.
  bool is_stand_in() const { return is_stand_in_; }

  // Throws Error naming `what`, the driver's name for the error and its sentence.
  void check(Result result, const std::string& what) const;
  std::string text(Result result) const;

 private:
  explicit Driver(const std::string& path);

  int version_ = 0;
  bool is_stand_in_ = false;
};

}  // namespace feplb::cuda
