// The part of the CUDA driver's binary interface that feplb uses, declared here so that one build,
// made without any toolkit, runs wherever a driver is. tests/cpp/cuda_abi_check.cpp compares every
// line with the toolkit's own header, where there is one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace feplb::cuda {

using Result = int;
using Device = int;
using Address = unsigned long long;  // of device memory, in the unified address space
using Context = struct ContextTag*;
using Stream = struct StreamTag*;  // nullptr: the legacy default stream
using EventHandle = struct EventTag*;
using AllocationHandle = unsigned long long;

constexpr Result kSuccess = 0;
constexpr Result kOutOfMemory = 2;
constexpr Result kNoDevice = 100;
constexpr Result kPeerAccessUnsupported = 217;
constexpr Result kOperatingSystem = 304;
constexpr Result kNotReady = 600;
constexpr Result kPeerAccessAlreadyEnabled = 704;
constexpr Result kNotPermitted = 800;
constexpr Result kNotSupported = 801;
constexpr Result kCaptureImplicit = 906;

constexpr unsigned kStreamNonBlocking = 1;
constexpr unsigned kEventDisableTiming = 2;
constexpr unsigned kHostRegisterPortable = 1;
constexpr unsigned kHostRegisterDeviceMap = 2;
constexpr unsigned kIpcLazyPeerAccess = 1;

// Device attributes.
constexpr int kAsyncEngineCount = 40;
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;
constexpr int kCanFlushRemoteWrites = 98;
constexpr int kVirtualMemorySupported = 102;
constexpr int kPosixHandleSupported = 103;
constexpr int kFabricHandleSupported = 128;

// ------------------------------------------------------------------------ stream memory operations

constexpr int kWaitValue32 = 1;
constexpr int kWriteValue32 = 2;
constexpr unsigned kWaitAtLeast = 0;       // cyclic: (int32)(*address - value) >= 0
constexpr unsigned kWaitFlush = 1u << 30;  // what came over a bus before the flag is seen behind it
constexpr unsigned kWriteDefault = 0;

union MemOp {
  int operation;
  struct {
    int operation;
    Address address;
    union {
      uint32_t value;
      uint64_t value64;
    };
    unsigned flags;
    Address alias;
  } value;  // waiting and writing have one layout
  uint64_t pad[6];
};

// -------------------------------------------------------------------------------- batches of
// copies

constexpr int kSourceInStreamOrder = 1;
constexpr unsigned kPreferOverlap = 1;

struct Location {
  int type;
  int id;
};

struct CopyAttributes {
  int source_access_order;
  Location source_hint;
  Location destination_hint;
  unsigned flags;
};

// ----------------------------------------------------------------------------------------- memory

constexpr int kLocationDevice = 1;
constexpr int kAllocationPinned = 1;
constexpr int kHandlePosix = 1;
constexpr int kHandleFabric = 8;
constexpr int kAccessReadWrite = 3;
constexpr int kGranularityRecommended = 1;

struct AllocationProperties {
  int type;
  int requested_handle_types;
  Location location;
  void* win32_metadata;
  struct {
    unsigned char compression;
    unsigned char gpu_direct_rdma;
    unsigned short usage;
    unsigned char reserved[4];
  } flags;
};

struct AccessDescription {
  Location location;
  int flags;
};

struct IpcHandle {
  char reserved[64];
};

struct FabricHandle {
  unsigned char data[64];
};

struct Uuid {
  char bytes[16];
};

}  // namespace feplb::cuda
