// POSIX shared memory: how ranks of one host see the count board and each other's arenas.
// Created exclusively, for its owner only, with its pages reserved (a container's /dev/shm may be
// smaller than what ftruncate promises; touching the rest would be SIGBUS), and unlinked by the
// creator as soon as every peer has mapped it, so that even SIGKILL leaves nothing behind.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <string>

#include "handle.h"

namespace feplb {

struct FdTraits {
  using Value = int;
  static constexpr int kNone = -1;
  static void destroy(int fd) noexcept;
};
using Fd = Handle<FdTraits>;

// Memory of a domain that this process maps: host memory or a GPU's.
class Mapping {
 public:
  virtual ~Mapping() = default;
  virtual std::byte* data() const = 0;
  // Its exporter must free it last: peers that still map it then would map what is gone.
  virtual bool is_freed_last() const { return false; }
};

class SharedMemory : public Mapping {
 public:
  // Throws Error naming the segment, the size asked for and what /dev/shm has left.
  static SharedMemory create(const std::string& name, std::size_t bytes);
  static SharedMemory open(const std::string& name, std::size_t bytes);
  // The name disappears, whoever created it; nothing happens where there is none.
  static void remove(const std::string& name) noexcept;

  SharedMemory() = default;
  SharedMemory(SharedMemory&& other) noexcept;
  SharedMemory& operator=(SharedMemory&& other) noexcept;
  ~SharedMemory() override;

  std::byte* data() const override { return data_; }
  std::size_t bytes() const { return bytes_; }

  // The name disappears; mappings stay valid. Idempotent, called by the creator.
  void unlink() noexcept;

 private:
  SharedMemory(std::string name, std::byte* data, std::size_t bytes, bool linked);

  std::string name_;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  bool linked_ = false;  // the name still exists and is ours to remove
  pid_t pid_ = -1;       // the process that mapped it
};

}  // namespace feplb
