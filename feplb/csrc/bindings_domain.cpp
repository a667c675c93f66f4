// A domain and its memory as Python sees them.
#include <algorithm>
#include <limits>

#include "bindings.h"
#include "domain.h"
#include "lane_door.h"
#include "unmapping.h"

namespace feplb {
namespace {

// This rank's arena as a Python buffer. Tensors made from it keep the mapping alive.
struct ArenaView {
  std::byte* data;
  std::size_t bytes;
  std::shared_ptr<void> owner;
};

// The same for memory of a GPU, in the form that array libraries exchange.
py::dict as_cuda_array(const ArenaView& view) {
  py::dict array;
  array["shape"] = py::make_tuple(view.bytes);
  array["typestr"] = "|u1";
  array["data"] = py::make_tuple(reinterpret_cast<std::uintptr_t>(view.data), false);
  array["version"] = 3;
  return array;
}

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

class HostLane : public LaneDoor {
 public:
  std::unique_ptr<Device> make(const std::string& name, SharedMemory& /*board*/,
                               const std::vector<std::shared_ptr<Mapping>>& /*arenas*/,
                               const std::vector<FlagPlace>& /*flags*/) override {
    return make_host_device(name);
  }
};

// Flags of all ranks begin at `flags_at` of their arenas.
std::vector<FlagPlace> flag_places(const CountBoard& board, const DomainMemory& memory,
                                   std::size_t flags_at) {
  std::vector<FlagPlace> places;
  for (int rank = 0; rank < board.num_ranks(); ++rank) {
    places.push_back({board.inbound(rank, 0, kRowsFlag), CountBoard::num_inbound(board.num_ranks()),
                      memory.arenas[static_cast<std::size_t>(rank)] + flags_at});
  }
  return places;
}

DomainMemory domain_memory(int rank, const std::shared_ptr<SharedMemory>& board,
                           std::vector<std::shared_ptr<Mapping>> arenas) {
  DomainMemory memory;
  memory.board = board->data();
  for (const auto& arena : arenas) memory.arenas.push_back(arena->data());
  std::shared_ptr<Mapping> own = std::move(arenas[static_cast<std::size_t>(rank)]);
  memory.is_freed_last = own->is_freed_last();
  using Owned = std::pair<std::shared_ptr<SharedMemory>, std::shared_ptr<Mapping>>;
  memory.owner = std::make_shared<Owned>(board, std::move(own));
  memory.peers = std::make_shared<std::vector<std::shared_ptr<Mapping>>>(std::move(arenas));
  return memory;
}

// `sockets` [num_ranks], -1 in this rank's place: a domain over several hosts, and the caller's no
// more. Empty: the board is shared memory, and `flags_at` is not looked at.
std::unique_ptr<Domain> make_domain(int rank, uint64_t config_hash, double deadline_s,
                                    const py::list& layers, int num_slots, int num_grad_slots,
                                    std::vector<pid_t> pids, std::vector<int> global_ranks,
                                    std::shared_ptr<SharedMemory> board,
                                    std::vector<std::shared_ptr<Mapping>> arenas, LaneDoor& lane,
                                    const std::vector<int>& sockets, std::size_t flags_at) {
  RelaySockets relay_sockets;
  for (const int socket : sockets) relay_sockets.emplace_back(socket);
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
  CountBoard shared(board->data(), config.num_ranks, max_local_experts(config.layers));
  const auto make = [&] {
    DomainMemory memory = domain_memory(rank, board, arenas);
    std::vector<FlagPlace> flags;
    if (!sockets.empty()) flags = flag_places(shared, memory, flags_at);
    std::unique_ptr<Device> device = lane.make(cat("feplb-", name, "-copy"), *board, arenas, flags);
    return std::make_unique<Domain>(config, std::move(memory), std::move(device),
                                    std::move(relay_sockets));
  };
  try {
    return make();
  } catch (...) {  // peers that could be built close, and this rank maps nothing any more
    tell_unmapped(shared, rank);
    throw;
  }
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
  result["last_accepted_ns"] = stats.last_accepted_ns;
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

}  // namespace

void bind_domain(py::module_& module) {
  py::class_<Mapping, std::shared_ptr<Mapping>>(module, "Mapping");
  py::class_<SharedMemory, Mapping, std::shared_ptr<SharedMemory>>(module, "SharedMemory")
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
  py::class_<LaneDoor>(module, "Lane");
  py::class_<HostLane, LaneDoor>(module, "HostLane").def(py::init<>());
  py::class_<ArenaView>(module, "ArenaView", py::buffer_protocol())
      .def_buffer([](ArenaView& view) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(view.data),
                               static_cast<py::ssize_t>(view.bytes));
      })
      .def_property_readonly("__cuda_array_interface__", &as_cuda_array);
  module.def("board_bytes", &CountBoard::bytes_needed, py::arg("num_ranks"),
             py::arg("max_local_experts"));
  module.def(
      "flag_bytes", [](int num_ranks) { return CountBoard::num_inbound(num_ranks) * sizeof(Flag); },
      py::arg("num_ranks"));
  module.def("arena_parts", &arena_parts, py::arg("layers"), py::arg("num_slots"),
             py::arg("num_grad_slots"));
  py::class_<Domain>(module, "Domain")
      .def(py::init(&make_domain), py::kw_only(), py::arg("rank"), py::arg("config_hash"),
           py::arg("deadline_s"), py::arg("layers"), py::arg("num_slots"),
           py::arg("num_grad_slots"), py::arg("pids"), py::arg("global_ranks"), py::arg("board"),
           py::arg("arenas"), py::arg("lane"), py::arg("sockets") = std::vector<int>{},
           py::arg("flags_at") = 0)
      .def(
          "set_costs",
          [](Domain& domain, int layer, const py::dict& costs) {
            domain.set_costs(layer, *costs_from(costs));
          },
          py::arg("layer"), py::arg("costs"))
      .def("open", &Domain::open, ReleaseGil())
      .def("push_times", &Domain::push_times, py::arg("dst"), py::arg("bytes"), py::arg("times"),
           ReleaseGil())
      .def_readonly_static("copies_at_a_time", &Domain::kCopiesAtATime)
      .def("prove_lane", &Domain::prove_lane, py::arg("bytes"), ReleaseGil())
      .def("close", &Domain::close, ReleaseGil())
      .def("closed", &Domain::closed)
      .def("still_mapped_by", &Domain::still_mapped_by)
      .def("refuse_capture", &Domain::refuse_capture, py::arg("stream"), ReleaseGil())
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

}  // namespace feplb
