// Compares cuda_abi.h and cuda_driver.h with the toolkit's own headers, line by line: compiling is
// the test. Needs <cuda.h> and <cudaTypedefs.h> of CUDA 12.8 or newer.
#include <cuda.h>
#include <cudaTypedefs.h>

#include <cstddef>
#include <tuple>
#include <type_traits>

#include "../../feplb/csrc/cuda_driver.h"

namespace feplb::cuda {
namespace {

#define SAME_VALUE(ours, theirs)                                                \
  static_assert(static_cast<long long>(ours) == static_cast<long long>(theirs), \
                #ours " is " #theirs)
#define SAME_SIZE(ours, theirs)                                                     \
  static_assert(sizeof(ours) == sizeof(theirs) && alignof(ours) == alignof(theirs), \
                #ours " has the layout of " #theirs)
#define SAME_PLACE(ours, our_member, theirs, their_member)                                        \
  static_assert(                                                                                  \
      offsetof(ours, our_member) == offsetof(theirs, their_member) &&                             \
          sizeof(std::declval<ours>().our_member) == sizeof(std::declval<theirs>().their_member), \
      #ours "::" #our_member " lies where " #theirs "::" #their_member " does")

// --------------------------------------------------------------------------------------- values

SAME_VALUE(kSuccess, CUDA_SUCCESS);
SAME_VALUE(kOutOfMemory, CUDA_ERROR_OUT_OF_MEMORY);
SAME_VALUE(kNoDevice, CUDA_ERROR_NO_DEVICE);
SAME_VALUE(kPeerAccessUnsupported, CUDA_ERROR_PEER_ACCESS_UNSUPPORTED);
SAME_VALUE(kOperatingSystem, CUDA_ERROR_OPERATING_SYSTEM);
SAME_VALUE(kNotReady, CUDA_ERROR_NOT_READY);
SAME_VALUE(kPeerAccessAlreadyEnabled, CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
SAME_VALUE(kNotPermitted, CUDA_ERROR_NOT_PERMITTED);
SAME_VALUE(kNotSupported, CUDA_ERROR_NOT_SUPPORTED);
SAME_VALUE(kCaptureImplicit, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);

SAME_VALUE(kStreamNonBlocking, CU_STREAM_NON_BLOCKING);
SAME_VALUE(kEventDisableTiming, CU_EVENT_DISABLE_TIMING);
SAME_VALUE(kHostRegisterPortable, CU_MEMHOSTREGISTER_PORTABLE);
SAME_VALUE(kHostRegisterDeviceMap, CU_MEMHOSTREGISTER_DEVICEMAP);
SAME_VALUE(kIpcLazyPeerAccess, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);

SAME_VALUE(kAsyncEngineCount, CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT);
SAME_VALUE(kComputeCapabilityMajor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
SAME_VALUE(kComputeCapabilityMinor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
SAME_VALUE(kVirtualMemorySupported, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
SAME_VALUE(kPosixHandleSupported, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);
SAME_VALUE(kFabricHandleSupported, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED);

SAME_VALUE(kWaitValue32, CU_STREAM_MEM_OP_WAIT_VALUE_32);
SAME_VALUE(kWriteValue32, CU_STREAM_MEM_OP_WRITE_VALUE_32);
SAME_VALUE(kWaitAtLeast, CU_STREAM_WAIT_VALUE_GEQ);
SAME_VALUE(kWaitFlush, CU_STREAM_WAIT_VALUE_FLUSH);
SAME_VALUE(kCanFlushRemoteWrites, CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES);
SAME_VALUE(kWriteDefault, CU_STREAM_WRITE_VALUE_DEFAULT);

SAME_VALUE(kSourceInStreamOrder, CU_MEMCPY_SRC_ACCESS_ORDER_STREAM);
SAME_VALUE(kPreferOverlap, CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE);

SAME_VALUE(kLocationDevice, CU_MEM_LOCATION_TYPE_DEVICE);
SAME_VALUE(kAllocationPinned, CU_MEM_ALLOCATION_TYPE_PINNED);
SAME_VALUE(kHandlePosix, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
SAME_VALUE(kHandleFabric, CU_MEM_HANDLE_TYPE_FABRIC);
SAME_VALUE(kAccessReadWrite, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
SAME_VALUE(kGranularityRecommended, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);

// --------------------------------------------------------------------------------------- layouts

SAME_SIZE(Result, CUresult);
SAME_SIZE(Device, CUdevice);
static_assert(std::is_same_v<Address, CUdeviceptr>, "Address is CUdeviceptr");
SAME_SIZE(Context, CUcontext);
SAME_SIZE(Stream, CUstream);
SAME_SIZE(EventHandle, CUevent);
static_assert(std::is_same_v<AllocationHandle, CUmemGenericAllocationHandle>,
              "AllocationHandle is CUmemGenericAllocationHandle");
SAME_SIZE(IpcHandle, CUipcMemHandle);
SAME_PLACE(IpcHandle, reserved, CUipcMemHandle, reserved);
SAME_SIZE(FabricHandle, CUmemFabricHandle);
SAME_PLACE(FabricHandle, data, CUmemFabricHandle, data);
SAME_SIZE(Uuid, CUuuid);
SAME_PLACE(Uuid, bytes, CUuuid, bytes);

SAME_SIZE(MemOp, CUstreamBatchMemOpParams);
SAME_PLACE(MemOp, operation, CUstreamBatchMemOpParams, operation);
SAME_PLACE(MemOp, pad, CUstreamBatchMemOpParams, pad);
#define SAME_IN_BOTH(our_member, their_member)                                           \
  SAME_PLACE(MemOp, value.our_member, CUstreamBatchMemOpParams, waitValue.their_member); \
  SAME_PLACE(MemOp, value.our_member, CUstreamBatchMemOpParams, writeValue.their_member)
SAME_IN_BOTH(operation, operation);
SAME_IN_BOTH(address, address);
SAME_IN_BOTH(value, value);
SAME_IN_BOTH(value64, value64);
SAME_IN_BOTH(flags, flags);
SAME_IN_BOTH(alias, alias);

SAME_SIZE(Location, CUmemLocation);
SAME_PLACE(Location, type, CUmemLocation, type);
SAME_PLACE(Location, id, CUmemLocation, id);

SAME_SIZE(CopyAttributes, CUmemcpyAttributes);
SAME_PLACE(CopyAttributes, source_access_order, CUmemcpyAttributes, srcAccessOrder);
SAME_PLACE(CopyAttributes, source_hint, CUmemcpyAttributes, srcLocHint);
SAME_PLACE(CopyAttributes, destination_hint, CUmemcpyAttributes, dstLocHint);
SAME_PLACE(CopyAttributes, flags, CUmemcpyAttributes, flags);

SAME_SIZE(AllocationProperties, CUmemAllocationProp);
SAME_PLACE(AllocationProperties, type, CUmemAllocationProp, type);
SAME_PLACE(AllocationProperties, requested_handle_types, CUmemAllocationProp, requestedHandleTypes);
SAME_PLACE(AllocationProperties, location, CUmemAllocationProp, location);
SAME_PLACE(AllocationProperties, win32_metadata, CUmemAllocationProp, win32HandleMetaData);
SAME_PLACE(AllocationProperties, flags.compression, CUmemAllocationProp,
           allocFlags.compressionType);
SAME_PLACE(AllocationProperties, flags.gpu_direct_rdma, CUmemAllocationProp,
           allocFlags.gpuDirectRDMACapable);
SAME_PLACE(AllocationProperties, flags.usage, CUmemAllocationProp, allocFlags.usage);
SAME_PLACE(AllocationProperties, flags.reserved, CUmemAllocationProp, allocFlags.reserved);

SAME_SIZE(AccessDescription, CUmemAccessDesc);
SAME_PLACE(AccessDescription, location, CUmemAccessDesc, location);
SAME_PLACE(AccessDescription, flags, CUmemAccessDesc, flags);

// ------------------------------------------------------------------------------------- functions

// Two types that a caller passes alike. Pointers match where what they point to does; that of a
// struct or an opaque handle is compared above, by its size here.
template <typename Ours, typename Theirs, typename = void>
struct Alike : std::is_same<Ours, Theirs> {};
template <typename Ours, typename Theirs>
struct Alike<Ours, Theirs, std::enable_if_t<std::is_enum_v<Theirs>>>
    : std::bool_constant<std::is_integral_v<Ours> && sizeof(Ours) == sizeof(Theirs)> {};
template <typename Ours, typename Theirs>
struct Alike<Ours, Theirs,
             std::enable_if_t<(std::is_class_v<Ours> || std::is_union_v<Ours>) &&
                              (std::is_class_v<Theirs> || std::is_union_v<Theirs>)>>
    : std::true_type {};
template <typename Ours, typename Theirs>
struct Alike<Ours*, Theirs*, void>
    : std::bool_constant<std::is_const_v<Ours> == std::is_const_v<Theirs> &&
                         Alike<std::remove_const_t<Ours>, std::remove_const_t<Theirs>>::value> {};

// Complete structs passed by value, or pointed to, have one size.
template <typename T, typename = void>
struct SizeOf : std::integral_constant<std::size_t, 0> {};
template <typename T>
struct SizeOf<T, std::void_t<decltype(sizeof(T))>>
    : std::integral_constant<std::size_t, sizeof(T)> {};
template <typename Ours, typename Theirs>
constexpr bool alike() {
  using OursTarget = std::remove_const_t<std::remove_pointer_t<Ours>>;
  using TheirsTarget = std::remove_const_t<std::remove_pointer_t<Theirs>>;
  constexpr bool kBothComplete = SizeOf<OursTarget>::value != 0 && SizeOf<TheirsTarget>::value != 0;
  return sizeof(Ours) == sizeof(Theirs) && Alike<Ours, Theirs>::value &&
         (!kBothComplete || SizeOf<OursTarget>::value == SizeOf<TheirsTarget>::value);
}

template <typename Ours, typename Theirs>
struct SameFunction : std::false_type {};
template <typename OurResult, typename... Ours, typename TheirResult, typename... Theirs>
struct SameFunction<OurResult (*)(Ours...), TheirResult (*)(Theirs...)>
    : std::bool_constant<sizeof...(Ours) == sizeof...(Theirs)> {
  static constexpr bool arguments() {
    if constexpr (sizeof...(Ours) == sizeof...(Theirs)) {
      return (alike<Ours, Theirs>() && ...);
    } else {
      return false;
    }
  }
  static constexpr bool result() { return alike<OurResult, TheirResult>(); }
};

#define SAME_FUNCTION(name, symbol, version, arguments) SAME_FUNCTION_OF(name, version, symbol)
#define SAME_FUNCTION_OF(name, version, symbol)                                                \
  static_assert(SameFunction<decltype(Driver::name), FEPLB_TYPEDEF_##name>::value &&           \
                    SameFunction<decltype(Driver::name), FEPLB_TYPEDEF_##name>::arguments() && \
                    SameFunction<decltype(Driver::name), FEPLB_TYPEDEF_##name>::result(),      \
                #name " has the arguments of " symbol " as CUDA " #version " has it");

// Written by tests/test_cuda_abi.py from cuda_driver.h: FEPLB_TYPEDEF_<name> is
// PFN_<symbol>_v<version>.
#include "cuda_typedefs_by_name.h"

FEPLB_CUDA_FUNCTIONS(SAME_FUNCTION)
FEPLB_CUDA_OPTIONAL_FUNCTIONS(SAME_FUNCTION)

}  // namespace
}  // namespace feplb::cuda
