#include "shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>

#include "error.h"

namespace feplb {
namespace {

std::byte* map(const Fd& fd, const std::string& name, std::size_t bytes) {
  void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (address == MAP_FAILED)
    throw Error(errno_text(cat("mmap of ", bytes, " bytes ", name), errno));
  // A forked DataLoader worker must neither reach into a peer nor keep the pages alive.
  madvise(address, bytes, MADV_DONTFORK);
  return static_cast<std::byte*>(address);
}

std::string free_shared_memory() {
  struct statvfs fs;
  if (statvfs("/dev/shm", &fs) != 0) return "an unknown number of";
  return cat(static_cast<unsigned long long>(fs.f_bavail) * fs.f_frsize);
}

}  // namespace

void FdTraits::destroy(int fd) noexcept { ::close(fd); }

SharedMemory SharedMemory::create(const std::string& name, std::size_t bytes) {
  const Fd fd(shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600));
  if (!fd) throw Error(errno_text(cat("shm_open (create) ", name), errno));
  const int failure = posix_fallocate(fd.get(), 0, static_cast<off_t>(bytes));
  if (failure != 0) {
    shm_unlink(name.c_str());
    throw Error(cat(errno_text(cat("reserving ", bytes, " bytes of shared memory ", name), failure),
                    "; /dev/shm has ", free_shared_memory(),
                    " bytes free. Give the container more (--shm-size), or lower max_rows, "
                    "num_slots or num_grad_slots."));
  }
  try {
    return SharedMemory(name, map(fd, name, bytes), bytes, true);
  } catch (...) {
    shm_unlink(name.c_str());
    throw;
  }
}

SharedMemory SharedMemory::open(const std::string& name, std::size_t bytes) {
  const Fd fd(shm_open(name.c_str(), O_RDWR | O_CLOEXEC, 0));
  if (!fd) {
    throw Error(cat(errno_text(cat("shm_open ", name), errno),
                    "; ranks of one domain must share /dev/shm (one container, or --ipc=host)"));
  }
  struct stat info;
  if (fstat(fd.get(), &info) != 0) throw Error(errno_text(cat("fstat ", name), errno));
  if (static_cast<std::size_t>(info.st_size) != bytes) {
    throw Error(cat("shared memory ", name, " has ", info.st_size, " bytes, expected ", bytes,
                    ": the ranks disagree about the arena's size"));
  }
  return SharedMemory(name, map(fd, name, bytes), bytes, false);
}

SharedMemory::SharedMemory(std::string name, std::byte* data, std::size_t bytes, bool linked)
    : name_(std::move(name)), data_(data), bytes_(bytes), linked_(linked), pid_(getpid()) {}

SharedMemory::SharedMemory(SharedMemory&& other) noexcept { *this = std::move(other); }

SharedMemory& SharedMemory::operator=(SharedMemory&& other) noexcept {
  std::swap(name_, other.name_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(linked_, other.linked_);
  std::swap(pid_, other.pid_);
  return *this;
}

SharedMemory::~SharedMemory() {
  if (getpid() != pid_) return;  // a forked child has no such mapping, and the name is not its own
  unlink();
  if (data_ != nullptr) munmap(data_, bytes_);
}

void SharedMemory::remove(const std::string& name) noexcept { shm_unlink(name.c_str()); }

void SharedMemory::unlink() noexcept {
  if (linked_) shm_unlink(name_.c_str());
  linked_ = false;
}

}  // namespace feplb
