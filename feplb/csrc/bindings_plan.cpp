// The planner as Python sees it.
#include <algorithm>
#include <chrono>
#include <optional>

#include "bindings.h"
#include "plan.h"
#include "plan_check.h"

namespace feplb {

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
  costs.gemm = value("gemm");
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
  costs.shares_core = value("shares_core");
  costs.inbound_permille = value("inbound_permille");
  return costs;
}

namespace {

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

}  // namespace

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

}  // namespace feplb
