// Memory that copy engines reach: a rank's arena on its GPU, mapped by its peers, and the count
// board of the host, pinned by every rank.
//
// An arena is shared in one of three ways. vmm: physical memory behind a file descriptor, which a
// peer gets over a Unix socket; works beside any allocator and lives as long as anybody maps it.
// ipc: CUDA IPC of a plain allocation, where descriptors are not to be had; the exporter must free
// it last. fabric: physical memory that GPUs of other hosts can map, too, where one NVLink fabric
// joins them (NVL72).
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <memory>
#include <string>

#include "cuda_driver.h"
#include "shared_memory.h"

namespace feplb::cuda {

// The primary context of one GPU (the one that PyTorch uses too), held while anything here lives.
class DeviceContext {
 public:
  DeviceContext(std::shared_ptr<const Driver> driver, int ordinal);
  ~DeviceContext();
  DeviceContext(const DeviceContext&) = delete;
  DeviceContext& operator=(const DeviceContext&) = delete;

  const Driver& driver() const { return *driver_; }
  const std::shared_ptr<const Driver>& shared_driver() const { return driver_; }
  int ordinal() const { return ordinal_; }
  Context handle() const { return handle_; }
  int attribute(int which) const;
  // What the driver does not say of a GPU is what the GPU does not have.
  bool has(int which) const noexcept;

 private:
  std::shared_ptr<const Driver> driver_;
  int ordinal_;
  Device device_ = 0;
  Context handle_ = nullptr;
  pid_t pid_;
};

// Makes a context current for a scope. A thread that had none keeps it (one of ours); a thread that
// had another gets that back.
class CurrentContext {
 public:
  explicit CurrentContext(const DeviceContext& context);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  const Driver& driver_;
  bool pushed_ = false;
};

enum class ArenaWay { kVmm, kIpc, kFabric };

// A rank's arena, its own or a peer's. Unmapped on destruction; in a forked child nothing happens.
class DeviceArena : public Mapping {
 public:
  // Zero-filled. Throws Error naming the bytes asked for and what to lower.
  static std::unique_ptr<DeviceArena> create(std::shared_ptr<DeviceContext> context,
                                             std::size_t bytes, ArenaWay way);
  // A peer's, from its descriptor (vmm; `fd` stays the caller's) or its handle (ipc, fabric).
  static std::unique_ptr<DeviceArena> open_fd(std::shared_ptr<DeviceContext> context,
                                              std::size_t bytes, int fd);
  static std::unique_ptr<DeviceArena> open_ipc(std::shared_ptr<DeviceContext> context,
                                               std::size_t bytes, const std::string& handle);
  static std::unique_ptr<DeviceArena> open_fabric(std::shared_ptr<DeviceContext> context,
                                                  std::size_t bytes, const std::string& handle);
  ~DeviceArena() override;

  std::byte* data() const override { return reinterpret_cast<std::byte*>(address_); }
  bool is_freed_last() const override { return way_ == ArenaWay::kIpc; }
  // What a peer opens it with.
  Fd export_fd() const;
  std::string export_ipc() const;
  std::string export_fabric() const;

 private:
  DeviceArena(std::shared_ptr<DeviceContext> context, std::size_t bytes, ArenaWay way);
  std::size_t in_whole_pages() const;
  void import(void* shareable);
  void map(AllocationHandle handle);

  std::shared_ptr<DeviceContext> context_;
  std::size_t bytes_;  // as asked for; vmm maps whole pages of the GPU
  std::size_t mapped_ = 0;
  ArenaWay way_;
  bool is_own_ = false;
  AllocationHandle allocation_ = 0;
  Address address_ = 0;
  pid_t pid_;
};

// Host memory that the GPU's streams can write to and wait on. The memory must outlive it.
class PinnedMemory {
 public:
  PinnedMemory(std::shared_ptr<DeviceContext> context, std::byte* data, std::size_t bytes);
  ~PinnedMemory();
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  // Where the GPU sees a word of it.
  Address at(const void* host) const;

 private:
  std::shared_ptr<DeviceContext> context_;
  std::byte* data_;
  std::size_t bytes_;
  Address address_ = 0;
  pid_t pid_;
};

}  // namespace feplb::cuda
