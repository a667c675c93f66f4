// feplb._core: the C++ core as Python sees it, and the only file that knows pybind11. One bind_*
// function per part of the core; UserError becomes ValueError (pybind11 translates
// std::invalid_argument), Error becomes RuntimeError. Whatever can block releases the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <optional>

#include "domain.h"
#include "plan.h"
#include "plan_check.h"
#include "shared_memory.h"

namespace py = pybind11;

namespace feplb {
namespace {

// ---------------------------------------------------------------------------------------- plan

using CountsArray = py::array_t<int32_t, py::array::c_style>;

// The last two dimensions of counts are [num_ranks, num_local_experts].
PlanInput input_from(const CountsArray& counts, py::ssize_t dims, const PlanLimits& limits) {
  if (counts.ndim() != dims)
    throw UserError(cat("plan: counts has ", counts.ndim(), " dimensions, expected ", dims));
  PlanInput input;
  input.counts = counts.data();
  input.num_ranks = static_cast<int32_t>(counts.shape(dims - 2));
  input.num_local_experts = static_cast<int32_t>(counts.shape(dims - 1));
  input.limits = limits;
  return input;
}

// None, or one integer per name, picoseconds.
std::optional<UnitCosts> costs_from(const py::object& given) {
  if (given.is_none()) return std::nullopt;
  const py::dict values = given.cast<py::dict>();
  const auto value = [&values](const char* name) { return values[name].cast<int64_t>(); };
  UnitCosts costs;
  costs.tile_rows = value("tile_rows");
  costs.row_forward = value("row_forward");
  costs.row_dgrad = value("row_dgrad");
  costs.row_wgrad = value("row_wgrad");
  costs.weight_read = value("weight_read");
  costs.row_push = value("row_push");
  costs.row_push_backward = value("row_push_backward");
  costs.weight_push = value("weight_push");
  costs.row_return = value("row_return");
  costs.row_return_backward = value("row_return_backward");
  costs.grad_push = value("grad_push");
  costs.row_place = value("row_place");
  costs.grad_add = value("grad_add");
  costs.late_window = value("late_window");
  costs.start = value("start");
  costs.copy = value("copy");
  return costs;
}

std::vector<Move> moves_from(const CountsArray& moves) {
  if (moves.ndim() != 2 || moves.shape(1) != 5)
    throw UserError("plan: moves, expected [num_moves, 5] integers");
  const Move* first = reinterpret_cast<const Move*>(moves.data());
  return std::vector<Move>(first, first + moves.shape(0));
}

int64_t predict_for(const CountsArray& counts, const CountsArray& moves, const py::dict& costs) {
  const PlanInput input = input_from(counts, 2, PlanLimits{});
  CostScratch scratch;
  return predict(input, *costs_from(costs), moves_from(moves), scratch);
}

py::tuple plan_for(const std::string& policy, const CountsArray& counts, const PlanLimits& limits,
                   const py::object& costs) {
  PlanInput input = input_from(counts, 2, limits);
  const std::optional<UnitCosts> units = costs_from(costs);
  input.costs = units ? &*units : nullptr;
  PlanScratch scratch;
  Plan plan;
  make_plan(policy_from_name(policy), input, scratch, plan);
  static_assert(sizeof(Move) == 5 * sizeof(int32_t), "a Move is five int32 without padding");
  const py::ssize_t num_moves = static_cast<py::ssize_t>(plan.moves.size());
  py::array_t<int32_t> moves({num_moves, py::ssize_t{5}});
  std::copy_n(reinterpret_cast<const int32_t*>(plan.moves.data()), 5 * num_moves,
              moves.mutable_data());
  return py::make_tuple(moves, plan.hash);
}

double microseconds(std::chrono::steady_clock::duration elapsed) {
  return std::chrono::duration<double, std::micro>(elapsed).count();
}

double median(std::vector<double>& samples) {
  const auto middle = samples.begin() + static_cast<std::ptrdiff_t>(samples.size() / 2);
  std::nth_element(samples.begin(), middle, samples.end());
  return *middle;
}

// What two readings of the clock cost when nothing lies between them.
double clock_cost_us() {
  std::vector<double> samples(10001);
  for (double& sample : samples) {
    const auto start = std::chrono::steady_clock::now();
    sample = microseconds(std::chrono::steady_clock::now() - start);
  }
  return median(samples);
}

// Each call alone between two readings of the clock. One repeat is one pass over all inputs, so the
// branch predictor meets as many other plans between two visits to an input as there are inputs.
// With evicted_bytes that much other memory is written before each call, as a step's GEMMs do.
std::vector<double> time_each(Policy policy, PlanInput input, py::ssize_t num_inputs, int repeats,
                              std::size_t evicted_bytes) {
  const int32_t* first = input.counts;
  const py::ssize_t stride = py::ssize_t{input.num_ranks} * input.num_local_experts;
  PlanScratch scratch;
  Plan plan;
  std::vector<unsigned char> evicting(evicted_bytes);
  std::vector<std::vector<double>> samples(static_cast<size_t>(num_inputs));
  for (auto& of_input : samples) of_input.resize(static_cast<size_t>(repeats));
  make_plan(policy, input, scratch, plan);  // buffers grow here, outside the measurement
  for (int repeat = 0; repeat < repeats; ++repeat) {
    for (py::ssize_t i = 0; i < num_inputs; ++i) {
      input.counts = first + i * stride;
      for (std::size_t at = 0; at < evicting.size(); at += 64) ++evicting[at];
      const auto start = std::chrono::steady_clock::now();
      make_plan(policy, input, scratch, plan);
      samples[static_cast<size_t>(i)][static_cast<size_t>(repeat)] =
          microseconds(std::chrono::steady_clock::now() - start);
    }
  }
  const double clock_cost = clock_cost_us();
  std::vector<double> medians;
  for (auto& of_input : samples) medians.push_back(std::max(0.0, median(of_input) - clock_cost));
  return medians;
}

py::array_t<double> time_plans(const std::string& policy_name, const CountsArray& counts,
                               const PlanLimits& limits, int repeats, const py::object& costs,
                               std::size_t evicted_bytes) {
  PlanInput input = input_from(counts, 3, limits);
  const std::optional<UnitCosts> units = costs_from(costs);
  input.costs = units ? &*units : nullptr;
  if (repeats < 1) throw UserError(cat("time_plans: repeats=", repeats, ", expected at least 1"));
  if (counts.shape(0) < 1) throw UserError("time_plans: counts holds 0 inputs, expected 1 or more");
  const Policy policy = policy_from_name(policy_name);
  std::vector<double> times;
  {
    py::gil_scoped_release release;
    times = time_each(policy, input, counts.shape(0), repeats, evicted_bytes);
  }
  return py::array_t<double>(static_cast<py::ssize_t>(times.size()), times.data());
}

void bind_plan(py::module_& module) {
  py::class_<PlanLimits>(module, "PlanLimits")
      .def(py::init([](int32_t num_dynamic, int32_t num_slots, int32_t num_grad_slots,
                       int32_t min_tokens, int64_t max_recv_rows, int64_t max_return_rows,
                       int32_t max_copies, int32_t target_ppm, int32_t grain_rows,
                       int32_t search_steps) {
             return PlanLimits{num_dynamic,   num_slots,       num_grad_slots, min_tokens,
                               max_recv_rows, max_return_rows, max_copies,     target_ppm,
                               grain_rows,    search_steps};
           }),
           py::kw_only(), py::arg("num_dynamic"), py::arg("num_slots"), py::arg("num_grad_slots"),
           py::arg("min_tokens"), py::arg("max_recv_rows"), py::arg("max_return_rows"),
           py::arg("max_copies"), py::arg("target_ppm"), py::arg("grain_rows"),
           py::arg("search_steps"));
  module.def("make_plan", &plan_for, py::arg("policy"), py::arg("counts").noconvert(),
             py::arg("limits"), py::arg("costs") = py::none());
  module.def(
      "plan_fault",
      [](const CountsArray& counts, const PlanLimits& limits, const CountsArray& moves) {
        return plan_fault(input_from(counts, 2, limits), moves_from(moves));
      },
      py::arg("counts").noconvert(), py::arg("limits"), py::arg("moves").noconvert());
  module.def("predict", &predict_for, py::arg("counts").noconvert(), py::arg("moves").noconvert(),
             py::arg("costs"));
  module.def("time_plans", &time_plans, py::arg("policy"), py::arg("counts").noconvert(),
             py::arg("limits"), py::arg("repeats"), py::arg("costs") = py::none(),
             py::arg("evicted_bytes") = 0);
}

// -------------------------------------------------------------------------------------- domain

using ReleaseGil = py::call_guard<py::gil_scoped_release>;

// This rank's arena as a Python buffer. Tensors made from it keep the mapping alive.
struct ArenaView {
  std::byte* data;
  std::size_t bytes;
  std::shared_ptr<void> owner;
};

LayerShape layer_shape_from(const py::dict& spec) {
  LayerShape shape;
  shape.num_local_experts = spec["num_local_experts"].cast<int32_t>();
  shape.row_bytes = spec["row_bytes"].cast<std::size_t>();
  shape.side_row_bytes = spec["side_row_bytes"].cast<std::vector<std::size_t>>();
  shape.weight_bytes = spec["weight_bytes"].cast<std::vector<std::size_t>>();
  shape.max_rows = spec["max_rows"].cast<int64_t>();
  shape.policy = policy_from_name(spec["policy"].cast<std::string>());
  shape.limits = spec["limits"].cast<PlanLimits>();
  return shape;
}

std::vector<LayerShape> layer_shapes_from(const py::list& specs) {
  std::vector<LayerShape> shapes;
  for (const py::handle& spec : specs) shapes.push_back(layer_shape_from(spec.cast<py::dict>()));
  return shapes;
}

std::unique_ptr<Domain> domain_on_host(int rank, uint64_t config_hash, double deadline_s,
                                       const py::list& layers, int num_slots, int num_grad_slots,
                                       std::vector<pid_t> pids, std::vector<int> global_ranks,
                                       std::shared_ptr<SharedMemory> board,
                                       std::vector<std::shared_ptr<SharedMemory>> arenas) {
  DomainConfig config;
  config.rank = rank;
  config.num_ranks = static_cast<int>(pids.size());
  config.config_hash = config_hash;
  config.deadline_s = deadline_s;
  config.layers = layer_shapes_from(layers);
  config.num_slots = num_slots;
  config.num_grad_slots = num_grad_slots;
  config.pids = std::move(pids);
  config.global_ranks = std::move(global_ranks);
  const int name =
      config.global_ranks.empty() ? rank : config.global_ranks[static_cast<std::size_t>(rank)];
  DomainMemory memory;
  memory.board = board->data();
  for (const auto& arena : arenas) memory.arenas.push_back(arena->data());
  using Owned =
      std::pair<std::shared_ptr<SharedMemory>, std::vector<std::shared_ptr<SharedMemory>>>;
  memory.owner = std::make_shared<Owned>(std::move(board), std::move(arenas));
  return std::make_unique<Domain>(std::move(config), std::move(memory),
                                  make_host_device(cat("feplb-", name, "-copy")));
}

uint64_t begin_call(Domain& domain, int kind, int layer, int64_t micro_batch, uint32_t grad_bits,
                    std::vector<int32_t> counts, std::string error, const CountsArray& moves,
                    uint64_t plan_hash) {
  CallHeader header;
  header.kind = static_cast<CallKind>(kind);
  header.layer = layer;
  header.micro_batch = micro_batch;
  header.grad_bits = grad_bits;
  header.counts = std::move(counts);
  header.error = std::move(error);
  header.plan_hash = plan_hash;
  std::vector<Move> saved(static_cast<std::size_t>(moves.size() / 5));
  std::copy_n(moves.data(), 5 * saved.size(), reinterpret_cast<int32_t*>(saved.data()));
  const py::gil_scoped_release release;
  return domain.begin(std::move(header), std::move(saved));
}

// Plain Python ints that fit, one per local expert; false leaves it to Python to say what is wrong.
bool read_counts(const py::list& list, std::size_t num_local_experts,
                 std::vector<int32_t>& counts) {
  if (list.size() != num_local_experts) return false;
  counts.resize(num_local_experts);
  for (std::size_t expert = 0; expert < num_local_experts; ++expert) {
    PyObject* item = PyList_GET_ITEM(list.ptr(), static_cast<py::ssize_t>(expert));
    if (!PyLong_CheckExact(item)) return false;
    int overflow = 0;
    const long count = PyLong_AsLongAndOverflow(item, &overflow);
    if (overflow != 0 || count < 0 || count > std::numeric_limits<int32_t>::max()) return false;
    counts[expert] = static_cast<int32_t>(count);
  }
  return true;
}

// begin_call of a forward, in as few steps as the way from counts to plan may take. 0: nothing was
// published, the counts are not what read_counts takes.
uint64_t begin_forward(Domain& domain, int layer, int64_t micro_batch, uint32_t grad_bits,
                       const py::list& list) {
  CallHeader header;
  const int32_t num_local_experts = domain.layout().layer(layer).num_local_experts;
  if (!read_counts(list, static_cast<std::size_t>(num_local_experts), header.counts)) return 0;
  header.layer = layer;
  header.micro_batch = micro_batch;
  header.grad_bits = grad_bits;
  const py::gil_scoped_release release;
  return domain.begin(std::move(header), {});
}

// (expert_idx, peer rank, rows in the expert's kept order: start, end, row in the arena, slot)
py::list routed_moves(const std::vector<RoutedMove>& moves, bool sent) {
  py::list list;
  for (const RoutedMove& routed : moves) {
    const Move& move = routed.move;
    list.append(py::make_tuple(
        move.expert_idx, sent ? move.dst_rank : move.owner_rank, move.row_start, move.row_end,
        sent ? routed.return_row : routed.recv_row, sent ? routed.grad_slot : routed.slot));
  }
  return list;
}

py::tuple wait_plan(Domain& domain) {
  const Agreement* agreement = nullptr;
  {
    const py::gil_scoped_release release;
    agreement = &domain.wait_plan();
  }
  const std::vector<Move>& plan = agreement->plan.moves;
  py::array_t<int32_t> moves({static_cast<py::ssize_t>(plan.size()), py::ssize_t{5}});
  std::copy_n(reinterpret_cast<const int32_t*>(plan.data()), 5 * plan.size(), moves.mutable_data());
  py::array_t<int32_t> counts(static_cast<py::ssize_t>(agreement->counts.size()),
                              agreement->counts.data());
  return py::make_tuple(agreement->refused_by, agreement->refusal, moves, agreement->plan.hash,
                        routed_moves(agreement->route.sent, true),
                        routed_moves(agreement->route.received, false), counts, agreement->plan_ns);
}

void post_rows(Domain& domain, const std::vector<std::uintptr_t>& rows,
               const std::vector<std::vector<std::uintptr_t>>& weights,
               const std::vector<int64_t>& first_row) {
  const auto bytes = [](std::uintptr_t address) {
    return reinterpret_cast<const std::byte*>(address);
  };
  CallSources sources;
  for (const std::uintptr_t address : rows) sources.rows.push_back(bytes(address));
  for (const auto& tensor : weights) {
    sources.weights.emplace_back();
    for (const std::uintptr_t address : tensor) sources.weights.back().push_back(bytes(address));
  }
  const py::gil_scoped_release release;
  domain.post_rows(sources, first_row);
}

py::dict lane_stats(const Domain& domain) {
  const PushStats stats = domain.stats();
  py::dict result;
  result["rows_bytes"] = stats.bytes[kRowsRegion];
  result["weights_bytes"] = stats.bytes[kWeightsRegion];
  result["returns_bytes"] = stats.bytes[kReturnsRegion];
  result["grads_bytes"] = stats.bytes[kGradsRegion];
  result["copies"] = stats.copies;
  result["copy_thread_cpu_ns"] = domain.copy_thread_cpu_ns();
  return result;
}

py::dict layer_offsets(const Domain& domain, int layer) {
  const ArenaLayout& layout = domain.layout();
  py::dict result;
  for (const CallKind kind : {CallKind::kForward, CallKind::kBackward}) {
    const std::string name = call_kind_name(kind);
    result[py::str(name + "_rows")] = layout.rows_pieces(layer, kind).offset;
    result[py::str(name + "_returns")] = layout.return_pieces(layer, kind).offset;
  }
  result["rows_half"] = std::vector<std::size_t>{layout.rows_half(0), layout.rows_half(1)};
  result["returns_half"] = std::vector<std::size_t>{layout.returns_half(0), layout.returns_half(1)};
  result["outbox_half"] = std::vector<std::size_t>{layout.outbox_half(0), layout.outbox_half(1)};
  return result;
}

py::dict arena_parts(const py::list& layers, int num_slots, int num_grad_slots) {
  const ArenaLayout layout(layer_shapes_from(layers), num_slots, num_grad_slots);
  py::dict parts;
  for (const auto& [name, bytes] : layout.parts()) parts[py::str(name)] = bytes;
  return parts;
}

void bind_domain(py::module_& module) {
  py::class_<SharedMemory, std::shared_ptr<SharedMemory>>(module, "SharedMemory")
      .def_static("create",
                  [](const std::string& name, std::size_t bytes) {
                    return std::make_shared<SharedMemory>(SharedMemory::create(name, bytes));
                  })
      .def_static("open",
                  [](const std::string& name, std::size_t bytes) {
                    return std::make_shared<SharedMemory>(SharedMemory::open(name, bytes));
                  })
      .def_static("remove", &SharedMemory::remove, py::arg("name"))
      .def("unlink", &SharedMemory::unlink);
  py::class_<ArenaView>(module, "ArenaView", py::buffer_protocol()).def_buffer([](ArenaView& view) {
    return py::buffer_info(reinterpret_cast<uint8_t*>(view.data),
                           static_cast<py::ssize_t>(view.bytes));
  });
  module.def("board_bytes", &CountBoard::bytes_needed, py::arg("num_ranks"),
             py::arg("max_local_experts"));
  module.def("arena_parts", &arena_parts, py::arg("layers"), py::arg("num_slots"),
             py::arg("num_grad_slots"));
  py::class_<Domain>(module, "Domain")
      .def(py::init(&domain_on_host), py::kw_only(), py::arg("rank"), py::arg("config_hash"),
           py::arg("deadline_s"), py::arg("layers"), py::arg("num_slots"),
           py::arg("num_grad_slots"), py::arg("pids"), py::arg("global_ranks"), py::arg("board"),
           py::arg("arenas"))
      .def(
          "set_costs",
          [](Domain& domain, int layer, const py::dict& costs) {
            domain.set_costs(layer, *costs_from(costs));
          },
          py::arg("layer"), py::arg("costs"))
      .def("open", &Domain::open, ReleaseGil())
      .def("prove_lane", &Domain::prove_lane, py::arg("bytes"), ReleaseGil())
      .def("close", &Domain::close, ReleaseGil())
      .def("closed", &Domain::closed)
      .def("bind_compute", &Domain::bind_compute, py::arg("stream"), ReleaseGil())
      .def("begin", &begin_call, py::arg("kind"), py::arg("layer"), py::arg("micro_batch"),
           py::arg("grad_bits"), py::arg("counts"), py::arg("error"), py::arg("moves"),
           py::arg("plan_hash"))
      .def("begin_forward", &begin_forward, py::arg("layer"), py::arg("micro_batch"),
           py::arg("grad_bits"), py::arg("counts"))
      .def("wait_plan", &wait_plan)
      .def("post_rows", &post_rows, py::arg("rows"), py::arg("weights"), py::arg("first_row"))
      .def("await_rows", &Domain::await_rows, ReleaseGil())
      .def("release_weights", &Domain::release_weights, ReleaseGil())
      .def("release_rows", &Domain::release_rows, ReleaseGil())
      .def("post_returns", &Domain::post_returns, ReleaseGil())
      .def("await_grad_outbox", &Domain::await_grad_outbox, ReleaseGil())
      .def("post_grads", &Domain::post_grads, py::arg("tensors"), ReleaseGil())
      .def("await_returns", &Domain::await_returns, ReleaseGil())
      .def("release_returns", &Domain::release_returns, ReleaseGil())
      .def("finish", &Domain::finish, ReleaseGil())
      .def("await_grads", &Domain::await_grads, py::arg("seq"), py::arg("helper_ranks"),
           ReleaseGil())
      .def("release_grads", &Domain::release_grads, py::arg("seq"), ReleaseGil())
      .def("fail", &Domain::fail, py::arg("text"), ReleaseGil())
      .def("failure_text", &Domain::failure_text)
      .def("drain", &Domain::drain, ReleaseGil())
      .def("stats", &lane_stats)
      .def("arena",
           [](const Domain& domain) {
             return ArenaView{domain.arena(), domain.layout().total_bytes(), domain.memory_owner()};
           })
      .def("layer_offsets", &layer_offsets, py::arg("layer"))
      .def("weight_slot", [](const Domain& d, int layer, int slot,
                             int tensor) { return d.layout().weight_slot(layer, slot, tensor); })
      .def("grad_slot", [](const Domain& d, int layer, int slot,
                           int tensor) { return d.layout().grad_slot(layer, slot, tensor); })
      .def("grad_outbox_slot", [](const Domain& d, int layer, int slot, int tensor) {
        return d.layout().grad_outbox_slot(layer, slot, tensor);
      });
}

}  // namespace
}  // namespace feplb

PYBIND11_MODULE(_core, module) {
  feplb::bind_plan(module);
  feplb::bind_domain(module);
}
