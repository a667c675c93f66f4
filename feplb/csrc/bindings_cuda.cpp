// The ce lane as Python sees it: one GPU, the memory on it, and what the machine can do.
#include <cstdlib>
#include <cstring>
#include <tuple>

#include "bindings.h"
#include "cuda_memory.h"
#include "cuda_trials.h"
#include "device_cuda.h"
#include "error.h"
#include "lane_door.h"

namespace feplb {
namespace {

using cuda::ArenaWay;
using cuda::DeviceArena;
using cuda::DeviceContext;
using cuda::Driver;

constexpr const char* kDriver = "libcuda.so.1";

// One rank's GPU. `peer_ordinals` [num_ranks]: the GPUs of all ranks as this process numbers them;
// empty where it does not see them.
class CudaLane : public LaneDoor {
 public:
  CudaLane(const std::string& library, int ordinal, const std::string& copy_call,
           const std::string& flag_call)
      : context_(std::make_shared<DeviceContext>(Driver::open(library), ordinal)) {
    options_.copies = cuda::copy_call_from(copy_call, context_->driver());
    options_.flags = cuda::flag_call_from(flag_call);
  }

  std::unique_ptr<Device> make(const std::string& /*name*/, SharedMemory& board,
                               const std::vector<std::shared_ptr<Mapping>>& arenas,
                               const std::vector<FlagPlace>& flags) override {
    cuda::LaneOptions options = options_;
    options.flags_in_arenas = flags;
    if (options.copies == cuda::CopyCall::kPeer) {
      if (peer_ordinals_.size() != arenas.size()) {
        throw Error(
            "copy_call=\"peer\" must know the GPUs of all ranks, and this process does not "
            "see them. Make them visible (CUDA_VISIBLE_DEVICES), or use \"plain\" or "
            "\"batch\".");
      }
      for (std::size_t rank = 0; rank < arenas.size(); ++rank) {
        options.peers.push_back({arenas[rank]->data(), arena_bytes_, peer_ordinals_[rank]});
      }
    }
    return cuda::make_cuda_device(context_, board.data(), board.bytes(), std::move(options));
  }

  std::shared_ptr<DeviceArena> create_arena(std::size_t bytes, const std::string& way) {
    arena_bytes_ = bytes;
    const ArenaWay known = way == "ipc"      ? ArenaWay::kIpc
                           : way == "fabric" ? ArenaWay::kFabric
                                             : ArenaWay::kVmm;
    return DeviceArena::create(context_, bytes, known);
  }
  std::shared_ptr<DeviceArena> open_fd(std::size_t bytes, int fd) {
    return DeviceArena::open_fd(context_, bytes, fd);
  }
  std::shared_ptr<DeviceArena> open_ipc(std::size_t bytes, const py::bytes& handle) {
    return DeviceArena::open_ipc(context_, bytes, std::string(handle));
  }
  std::shared_ptr<DeviceArena> open_fabric(std::size_t bytes, const py::bytes& handle) {
    return DeviceArena::open_fabric(context_, bytes, std::string(handle));
  }
  void set_peer_ordinals(std::vector<int> ordinals) { peer_ordinals_ = std::move(ordinals); }
  bool is_stand_in() const { return context_->driver().is_stand_in(); }
  std::string calls() const {
    return cat(cuda::copy_call_name(options_.copies), " copies, flags by ",
               cuda::flag_call_name(options_.flags));
  }
  bool has_vmm() const {
    return context_->attribute(cuda::kVirtualMemorySupported) != 0 &&
           context_->attribute(cuda::kPosixHandleSupported) != 0;
  }
  bool has_fabric() const {
    return context_->attribute(cuda::kVirtualMemorySupported) != 0 &&
           context_->attribute(cuda::kFabricHandleSupported) != 0;
  }

 private:
  std::shared_ptr<DeviceContext> context_;
  cuda::LaneOptions options_;
  std::vector<int> peer_ordinals_;
  std::size_t arena_bytes_ = 0;
};

// Copies between any memory that one GPU reaches, submitted as the lane submits them: for benches.
class CopyStream {
 public:
  CopyStream(const std::string& library, int ordinal, const std::string& copy_call)
      : page_(static_cast<std::byte*>(std::aligned_alloc(kPageBytes, kPageBytes)), &std::free) {
    if (page_ == nullptr) throw Error("out of memory");
    std::memset(page_.get(), 0, kPageBytes);
    auto context = std::make_shared<DeviceContext>(Driver::open(library), ordinal);
    cuda::LaneOptions options;
    options.copies = cuda::copy_call_from(copy_call, context->driver());
    if (options.copies == cuda::CopyCall::kPeer) {
      throw UserError("CopyStream has no ranks, which copy_call=\"peer\" must know; use \"plain\"");
    }
    calls_ = cuda::copy_call_name(options.copies);
    device_ = cuda::make_cuda_device(std::move(context), page_.get(), kPageBytes, options);
  }
  ~CopyStream() { device_->stop(); }

  const std::string& calls() const { return calls_; }

  void after(std::uintptr_t stream) {
    device_->bind_compute(stream);
    device_->after_event(StreamKind::kPushes, device_->record(StreamKind::kCompute));
  }

  Epoch copy(const std::vector<std::tuple<std::uintptr_t, std::uintptr_t, std::size_t>>& copies) {
    std::vector<CopyOp> ops;
    for (const auto& [dst, src, bytes] : copies) {
      ops.push_back({reinterpret_cast<std::byte*>(dst), reinterpret_cast<std::byte*>(src), bytes});
    }
    device_->copy_batch(StreamKind::kPushes, ops);
    device_->write_flag(StreamKind::kPushes, &flag(), ++submitted_);
    return submitted_;
  }

  bool done(Epoch ticket) { return epoch_reached(flag().epoch.load(), ticket); }

  int64_t wait(Epoch ticket, double timeout_s) {
    const TimePoint deadline = Clock::now() + duration_of(timeout_s);
    while (!done(ticket)) {
      if (Clock::now() > deadline) {
        throw Error(cat("a copy has not arrived within ", timeout_s, " s"));
      }
    }
    return std::chrono::nanoseconds(Clock::now().time_since_epoch()).count();
  }

 private:
  static constexpr std::size_t kPageBytes = 4096;
  Flag& flag() { return *reinterpret_cast<Flag*>(page_.get()); }

  std::unique_ptr<std::byte, void (*)(void*)> page_;
  std::string calls_;
  std::unique_ptr<Device> device_;
  Epoch submitted_ = 0;
};

py::dict facts_of(const std::string& library) {
  const cuda::MachineFacts facts = cuda::read_facts(*Driver::open(library));
  py::list devices, peer_access;
  for (const cuda::GpuFacts& gpu : facts.gpus) {
    py::dict entry;
    entry["name"] = gpu.name;
    entry["uuid"] = gpu.uuid;
    entry["compute_capability"] = py::make_tuple(gpu.capability_major, gpu.capability_minor);
    entry["async_engines"] = gpu.async_engines;
    entry["vmm"] = gpu.has_vmm;
    entry["posix_fd"] = gpu.has_posix_handles;
    entry["fabric"] = gpu.has_fabric_handles;
    devices.append(std::move(entry));
    peer_access.append(gpu.reaches);
  }
  py::dict result;
  result["driver"] = facts.driver_version;
  result["is_stand_in"] = facts.is_stand_in;
  result["batch_copies"] = facts.has_batches;
  result["devices"] = std::move(devices);
  result["peer_access"] = std::move(peer_access);
  return result;
}

py::list trials_on(int ordinal, const std::string& library) {
  std::vector<cuda::Trial> trials;
  {
    const py::gil_scoped_release release;
    trials = cuda::try_out(Driver::open(library), ordinal);
  }
  py::list result;
  for (const cuda::Trial& trial : trials) {
    py::dict entry;
    entry["name"] = trial.name;
    entry["ok"] = trial.ok;
    entry["seen"] = trial.seen;
    result.append(std::move(entry));
  }
  return result;
}

}  // namespace

void bind_cuda(py::module_& module) {
  py::class_<DeviceArena, Mapping, std::shared_ptr<DeviceArena>>(module, "DeviceArena")
      .def("export_fd", [](const DeviceArena& arena) { return arena.export_fd().release(); })
      .def("export_ipc", [](const DeviceArena& arena) { return py::bytes(arena.export_ipc()); })
      .def("export_fabric",
           [](const DeviceArena& arena) { return py::bytes(arena.export_fabric()); });
  py::class_<CudaLane, LaneDoor>(module, "CudaLane")
      .def(py::init<const std::string&, int, const std::string&, const std::string&>(),
           py::kw_only(), py::arg("library"), py::arg("ordinal"), py::arg("copy_call"),
           py::arg("flag_call"))
      .def("create_arena", &CudaLane::create_arena, py::arg("bytes"), py::arg("way"))
      .def("open_fd", &CudaLane::open_fd, py::arg("bytes"), py::arg("fd"))
      .def("open_ipc", &CudaLane::open_ipc, py::arg("bytes"), py::arg("handle"))
      .def("open_fabric", &CudaLane::open_fabric, py::arg("bytes"), py::arg("handle"))
      .def("set_peer_ordinals", &CudaLane::set_peer_ordinals, py::arg("ordinals"))
      .def_property_readonly("is_stand_in", &CudaLane::is_stand_in)
      .def_property_readonly("calls", &CudaLane::calls)
      .def_property_readonly("has_vmm", &CudaLane::has_vmm)
      .def_property_readonly("has_fabric", &CudaLane::has_fabric);
  py::class_<CopyStream>(module, "CopyStream")
      .def(py::init<const std::string&, int, const std::string&>(), py::kw_only(),
           py::arg("library") = kDriver, py::arg("ordinal"), py::arg("copy_call") = "auto")
      .def_property_readonly("calls", &CopyStream::calls)
      .def("after", &CopyStream::after, py::arg("stream"))
      .def("copy", &CopyStream::copy, py::arg("copies"))
      .def("done", &CopyStream::done, py::arg("ticket"))
      .def("wait", &CopyStream::wait, py::arg("ticket"), py::arg("timeout_s"),
           py::call_guard<py::gil_scoped_release>());
  module.def("cuda_facts", &facts_of, py::arg("library") = kDriver);
  module.def("cuda_trials", &trials_on, py::arg("device"), py::arg("library") = kDriver);
}

}  // namespace feplb
