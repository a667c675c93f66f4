#include "cuda_driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>

#include "error.h"

namespace feplb::cuda {
namespace {

// Stream memory operations in their present form came with it.
constexpr int kOldestVersion = 11070;

using GetProcAddress = Result (*)(const char* symbol, void** function, int version,
                                  unsigned long long flags);

std::string version_text(int version) { return cat(version / 1000, ".", version % 1000 / 10); }

}  // namespace

std::shared_ptr<const Driver> Driver::open(const std::string& path) {
  static std::mutex mutex;
  static std::map<std::string, std::shared_ptr<const Driver>> opened;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<const Driver>& driver = opened[path];
  if (driver == nullptr) driver.reset(new Driver(path));
  return driver;
}

// The library stays open for the life of the process: the driver has threads and exit handlers.
Driver::Driver(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw Error(cat("the CUDA driver could not be opened (", path, ": ", dlerror(),
                    "). The ce lane needs an NVIDIA driver; on a machine without GPUs use "
                    "lane=\"host\"."));
  }
  is_stand_in_ = dlsym(library, "feplb_driver_stand_in") != nullptr;
  const auto get = reinterpret_cast<GetProcAddress>(dlsym(library, "cuGetProcAddress"));
  if (get == nullptr) {
    throw Error(cat(path,
                    " has no cuGetProcAddress: the driver is older than CUDA 11.3, feplb "
                    "needs 11.7 or newer. Update the NVIDIA driver."));
  }
  std::string missing;
  const auto find = [&](const char* symbol, int version) {
    void* function = nullptr;
    if (get(symbol, &function, version, 0) != kSuccess) function = nullptr;
    return function;
  };
#define FEPLB_CUDA_FIND(name, symbol, version, arguments)              \
  name = reinterpret_cast<Result(*) arguments>(find(symbol, version)); \
  if (name == nullptr) missing += cat(missing.empty() ? "" : ", ", symbol);
  FEPLB_CUDA_FUNCTIONS(FEPLB_CUDA_FIND)
#undef FEPLB_CUDA_FIND
#define FEPLB_CUDA_TRY(name, symbol, version, arguments) \
  name = reinterpret_cast<Result(*) arguments>(find(symbol, version));
  FEPLB_CUDA_OPTIONAL_FUNCTIONS(FEPLB_CUDA_TRY)
#undef FEPLB_CUDA_TRY
  if (driver_version != nullptr) driver_version(&version_);
  if (version_ < kOldestVersion || !missing.empty()) {
    throw Error(cat("the CUDA driver is too old: it supports CUDA ", version_text(version_),
                    ", feplb needs 11.7 or newer", missing.empty() ? "" : " (missing: ", missing,
                    missing.empty() ? "" : ")", ". Update the NVIDIA driver."));
  }
  const Result started = init(0);
  if (started == kNoDevice) {
    throw Error(cat("the CUDA driver sees no GPU: ", text(started),
                    ". Look at CUDA_VISIBLE_DEVICES and at what the container was given (docker: "
                    "--gpus all), or use lane=\"host\"."));
  }
  check(started, "starting the CUDA driver");
}

std::string Driver::text(Result result) const {
  const char* name = nullptr;
  const char* sentence = nullptr;
  if (error_name(result, &name) != kSuccess || name == nullptr) name = "unknown error";
  if (error_string(result, &sentence) != kSuccess || sentence == nullptr) sentence = "";
  return cat(name, " (", result, "): ", sentence);
}

void Driver::check(Result result, const std::string& what) const {
  if (result != kSuccess) throw DeviceError(cat(what, " failed: ", text(result)));
}

}  // namespace feplb::cuda
