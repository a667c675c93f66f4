// A lane written in Python: each method of its device calls the method of that name of a Python
// object (feplb/cupy_lane.py). Everything happens on the caller's thread, GIL taken call by call:
// the mover, which as a thread of its own must never take it, is stepped there whenever the caller
// posts, enqueues or waits. No lock of the core is held while Python runs.
//
// What must not wait for the GIL stays here: the compute stream's marker, which the watchdog reads.
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "bindings.h"
#include "error.h"
#include "lane_door.h"
#include "stream_marker.h"

namespace feplb {
namespace {

// Streams ring no bell.
constexpr std::chrono::microseconds kLongestNap{50};

std::uintptr_t address_of(const void* place) { return reinterpret_cast<std::uintptr_t>(place); }

// The lane's own errors say what failed; of others the method and the type are told too.
std::string text_of(const py::error_already_set& error, const char* method) {
  const std::string text = py::str(error.value());
  if (error.type().is(py::handle(PyExc_RuntimeError))) return text;
  return cat(method, " raised ", error.type().attr("__name__").cast<std::string>(), ": ", text);
}

class PythonDevice final : public Device {
 public:
  PythonDevice(py::object lane, const SharedMemory& board);
  ~PythonDevice() override;

  void bind_compute(std::uintptr_t stream) override;
  bool is_captured(std::uintptr_t stream) override { return call<bool>("is_captured", stream); }
  Event record(StreamKind stream) override;
  WaitResult wait_event(Event event, const WaitLimits& limits) override;
  WaitResult wait_flag(const Flag* flag, Epoch epoch, const WaitLimits& limits) override;
  void after_event(StreamKind stream, Event event) override;
  void copy_batch(StreamKind stream, const std::vector<CopyOp>& copies) override;
  void write_flag(StreamKind stream, Flag* flag, Epoch epoch) override;
  void write_flags(StreamKind stream, const std::vector<Flag*>& flags, Epoch epoch) override;
  bool joins_pushes() const override { return true; }
  void mark_compute() override;
  bool compute_drained() override;
  void put(std::byte* dst, const std::byte* src, std::size_t bytes) override;
  void get(std::byte* dst, const std::byte* src, std::size_t bytes) override;
  WaitResult wait_host(Bell& bell, const std::function<bool()>& done,
                       const WaitLimits& limits) override;
  Drives drive(Crew crew) override;
  bool is_inline() const override { return false; }
  void stop() noexcept override;

 private:
  using Words = std::vector<std::uintptr_t>;

  template <typename Result = void, typename... Arguments>
  Result call(const char* method, const Arguments&... arguments);
  bool has_mover();
  bool step_mover();

  py::object lane_;
  StreamMarker marker_;
  std::uintptr_t compute_ = 0;  // the stream bound last; before that, the default one
  Crew crew_;
  bool is_stepping_ = false;
  bool stopped_ = false;
  pid_t pid_;
};

PythonDevice::PythonDevice(py::object lane, const SharedMemory& board)
    : lane_(std::move(lane)), pid_(getpid()) {
  lane_.attr("start")(address_of(board.data()), board.bytes(), address_of(marker_.data()),
                      StreamMarker::kBytes);
}

PythonDevice::~PythonDevice() {
  stop();
  const py::gil_scoped_acquire gil;
  lane_ = py::object();
}

// Errors of Python become ours while the GIL is held: nothing of Python's leaves this file.
template <typename Result, typename... Arguments>
Result PythonDevice::call(const char* method, const Arguments&... arguments) {
  const py::gil_scoped_acquire gil;
  try {
    const py::object result = lane_.attr(method)(arguments...);
    if constexpr (!std::is_void_v<Result>) return result.template cast<Result>();
  } catch (const py::error_already_set& error) {
    throw Error(text_of(error, method));
  }
}

// Not before drive(), and not in a forked child, which does not have the board.
bool PythonDevice::has_mover() {
  if (getpid() != pid_) crew_ = Crew{};
  return static_cast<bool>(crew_.mover_step);
}

bool PythonDevice::step_mover() {
  if (is_stepping_ || !has_mover()) return false;
  is_stepping_ = true;  // the mover's own calls come back here
  bool did_something = false;
  while (crew_.mover_step()) did_something = true;
  is_stepping_ = false;
  return did_something;
}

// As with the ce lane: the new stream waits for the last mark of the one before.
void PythonDevice::bind_compute(std::uintptr_t stream) {
  if (stream == compute_) return;
  if (marker_.has_open_wait()) mark_compute();
  call("bind_compute", stream);
  compute_ = stream;
  const uint32_t last = marker_.last_mark();
  if (last == 0) return;
  wait_flag(marker_.word(), last, WaitLimits{});
  mark_compute();
}

Event PythonDevice::record(StreamKind stream) {
  if (stream == StreamKind::kCompute) step_mover();
  return Event{stream, call<uint64_t>("record", static_cast<int>(stream))};
}

WaitResult PythonDevice::wait_event(Event event, const WaitLimits& /*limits*/) {
  step_mover();
  after_event(StreamKind::kCompute, event);
  return WaitResult::kEnqueued;
}

void PythonDevice::after_event(StreamKind stream, Event event) {
  if (event.position == 0) return;
  call("after_event", static_cast<int>(stream), static_cast<int>(event.stream), event.position);
}

WaitResult PythonDevice::wait_flag(const Flag* flag, Epoch epoch, const WaitLimits& /*limits*/) {
  step_mover();
  marker_.note_wait();
  call("wait_flag", address_of(flag), epoch);
  return WaitResult::kEnqueued;
}

void PythonDevice::copy_batch(StreamKind stream, const std::vector<CopyOp>& copies) {
  Words destinations, sources, sizes;
  for (const CopyOp& copy : copies) {
    if (copy.bytes == 0) continue;
    destinations.push_back(address_of(copy.dst));
    sources.push_back(address_of(copy.src));
    sizes.push_back(copy.bytes);
  }
  if (!sizes.empty()) call("copy_batch", static_cast<int>(stream), destinations, sources, sizes);
}

void PythonDevice::write_flag(StreamKind stream, Flag* flag, Epoch epoch) {
  write_flags(stream, {flag}, epoch);
}

// A release on the compute stream comes after the waits for what was released: it tells, in the
// same call, that they have passed.
void PythonDevice::write_flags(StreamKind stream, const std::vector<Flag*>& flags, Epoch epoch) {
  Words addresses, values;
  for (const Flag* flag : flags) {
    addresses.push_back(address_of(flag));
    values.push_back(epoch);
  }
  if (stream == StreamKind::kCompute) {
    step_mover();
    addresses.push_back(address_of(marker_.word()));
    values.push_back(marker_.next_mark());
  }
  call("write_flags", static_cast<int>(stream), addresses, values);
}

void PythonDevice::mark_compute() {
  call("write_flags", static_cast<int>(StreamKind::kCompute), Words{address_of(marker_.word())},
       Words{marker_.next_mark()});
}

bool PythonDevice::compute_drained() { return marker_.is_past_all_waits(); }

void PythonDevice::put(std::byte* dst, const std::byte* src, std::size_t bytes) {
  call("put", address_of(dst), address_of(src), bytes);
}

void PythonDevice::get(std::byte* dst, const std::byte* src, std::size_t bytes) {
  call("get", address_of(dst), address_of(src), bytes);
}

WaitResult PythonDevice::wait_host(Bell& bell, const std::function<bool()>& done,
                                   const WaitLimits& limits) {
  Bell& rung = has_mover() ? *crew_.mover_bell : bell;
  while (true) {
    const uint32_t seen = rung.rings();
    step_mover();
    if (done()) return WaitResult::kReached;
    if (limits.poisoned->load(std::memory_order_acquire)) return WaitResult::kPoisoned;
    const TimePoint now = Clock::now();
    if (now >= limits.deadline) return WaitResult::kTimedOut;
    rung.sleep(seen, ~0u, std::min(limits.deadline, now + kLongestNap));
  }
}

Drives PythonDevice::drive(Crew crew) {
  crew_ = std::move(crew);
  return Drives::kMover;
}

// As with the ce lane: a compute stream that has not drained holds on to everything.
void PythonDevice::stop() noexcept {
  if (stopped_) return;
  stopped_ = true;
  crew_ = Crew{};
  const bool is_drained = getpid() == pid_ && compute_drained();
  if (is_drained) {
    try {
      call("stop");
      return;
    } catch (const std::exception&) {
    }
  }
  marker_.abandon();
}

// Memory that Python found; `owner` gives it back when nobody holds it any more.
class PythonMapping final : public Mapping {
 public:
  PythonMapping(std::uintptr_t address, py::object owner)
      : address_(address), owner_(std::move(owner)) {}
  ~PythonMapping() override {
    const py::gil_scoped_acquire gil;
    owner_ = py::object();
  }
  std::byte* data() const override { return reinterpret_cast<std::byte*>(address_); }
  bool is_freed_last() const override { return true; }  // CuPy knows CUDA IPC alone

 private:
  std::uintptr_t address_;
  py::object owner_;
};

class PythonLane final : public LaneDoor {
 public:
  explicit PythonLane(py::object device) : device_(std::move(device)) {}
  std::unique_ptr<Device> make(const std::string& /*name*/, SharedMemory& board,
                               const std::vector<std::shared_ptr<Mapping>>& /*arenas*/,
                               const std::vector<FlagPlace>& /*flags*/) override {
    return std::make_unique<PythonDevice>(device_, board);
  }

 private:
  py::object device_;
};

}  // namespace

void bind_python_lane(py::module_& module) {
  py::class_<PythonMapping, Mapping, std::shared_ptr<PythonMapping>>(module, "PythonMapping")
      .def(py::init<std::uintptr_t, py::object>(), py::kw_only(), py::arg("address"),
           py::arg("owner"));
  py::class_<PythonLane, LaneDoor>(module, "PythonLane")
      .def(py::init<py::object>(), py::arg("device"));
}

}  // namespace feplb
