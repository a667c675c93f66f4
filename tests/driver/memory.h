// Memory of the stand-in driver: "device memory" is shared memory of the host behind a descriptor,
// so that other processes can map it, and pinned host memory has a second address, as on machines
// where the GPU sees it elsewhere.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <fstream>
#include <map>
#include <mutex>
#include <string>

namespace stand_in {

constexpr std::size_t kPage = std::size_t{2} << 20;  // of shareable memory, as on today's GPUs

struct Block {
  std::size_t bytes = 0;
  int fd = -1;       // of plain allocations, and of those of other processes
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
  // Empty if nothing begins there.
  Block block_at(uint64_t address) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = blocks_.find(address);
    return found == blocks_.end() ? Block{} : found->second;
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

// The processes that have an allocation open by its IPC handle: a page behind its last byte.
class Openers {
 public:
  static constexpr std::size_t kBytes = 4096;
  static std::size_t offset(std::size_t bytes) { return (bytes + kBytes - 1) / kBytes * kBytes; }

  Openers(int fd, std::size_t bytes)
      : pids_(static_cast<Pids*>(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
                                      static_cast<off_t>(offset(bytes))))) {}
  ~Openers() { munmap(pids_, kBytes); }
  Openers(const Openers&) = delete;
  Openers& operator=(const Openers&) = delete;

  void add() { replace(0, getpid()); }
  void remove() { replace(getpid(), 0); }
  bool has_living() const {
    for (const auto& pid : *pids_) {
      if (pid.load() != 0 && is_alive(pid.load())) return true;
    }
    return false;
  }

 private:
  using Pids = std::array<std::atomic<int>, kBytes / sizeof(int)>;

  void replace(int from, int to) {
    for (auto& pid : *pids_) {
      int seen = from;
      if (pid.compare_exchange_strong(seen, to)) return;
    }
  }
  // One that was killed may not have been waited for.
  static bool is_alive(int pid) {
    std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
    std::string text;
    std::getline(file, text);
    const std::size_t name_end = text.rfind(')');
    return name_end != std::string::npos && text[name_end + 2] != 'Z' && text[name_end + 2] != 'X';
  }

  Pids* pids_;
};

}  // namespace stand_in
