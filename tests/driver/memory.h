// Memory of the stand-in driver: "device memory" is shared memory of the host behind a descriptor,
// so that other processes can map it, and pinned host memory has a second address, as on machines
// where the GPU sees it elsewhere.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <map>
#include <mutex>

namespace stand_in {

constexpr std::size_t kPage = std::size_t{2} << 20;  // of shareable memory, as on today's GPUs

struct Block {
  std::size_t bytes = 0;
  int fd = -1;       // of plain allocations
  bool open = true;  // may be read and written
  bool of_peer = false;
};

class Memory {
 public:
  static Memory& the() {
    static Memory* memory = new Memory;
    return *memory;
  }

  static int make_fd(std::size_t bytes) {
    const int fd = memfd_create("stand-in device memory", MFD_CLOEXEC);
    if (fd >= 0 && ftruncate(fd, static_cast<off_t>(bytes)) != 0) {
      close(fd);
      return -1;
    }
    return fd;
  }

  void add(uint64_t address, Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_[address] = block;
  }
  void set_open(uint64_t address, bool open) {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_[address].open = open;
  }
  // False if nothing begins there.
  bool take(uint64_t address, Block& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = blocks_.find(address);
    if (found == blocks_.end()) return false;
    block = found->second;
    blocks_.erase(found);
    return true;
  }
  int fd_of(uint64_t address) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = blocks_.find(address);
    return found == blocks_.end() ? -1 : found->second.fd;
  }
  // Streams write words of their own GPU and of the host only.
  bool is_of_peer(uint64_t address) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto after = blocks_.upper_bound(address);
    return after != blocks_.begin() && (--after)->second.of_peer;
  }
  // Does all of it lie in memory that was allocated, mapped or pinned, and opened?
  bool holds(uint64_t address, std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto after = blocks_.upper_bound(address);
    if (after == blocks_.begin()) return false;
    const auto& [begin, block] = *--after;
    return block.open && address + bytes <= begin + block.bytes;
  }

 private:
  std::mutex mutex_;
  std::map<uint64_t, Block> blocks_;
};

}  // namespace stand_in
