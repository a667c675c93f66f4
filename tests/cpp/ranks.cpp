#include "ranks.h"

#include <unistd.h>

#include <thread>

namespace feplb_test {
namespace {

feplb::DomainConfig config_of(int num_ranks, double deadline_s,
                              std::vector<feplb::LayerShape> layers) {
  feplb::DomainConfig config;
  config.num_ranks = num_ranks;
  config.deadline_s = deadline_s;
  config.layers = std::move(layers);
  config.num_slots = kNumSlots;
  config.num_grad_slots = kNumSlots;
  config.pids.assign(static_cast<std::size_t>(num_ranks), getpid());
  return config;
}

}  // namespace

Ranks::Ranks(int num_ranks, double deadline_s, std::vector<feplb::LayerShape> layers)
    : config_(config_of(num_ranks, deadline_s, std::move(layers))),
      board_memory_(feplb::CountBoard::bytes_needed(num_ranks, kNumExperts)),
      board_(board_memory_.data(), num_ranks, kNumExperts) {
  for (int rank = 0; rank < num_ranks; ++rank) arenas_.emplace_back(arena_bytes());
}

// Lanes copy into peers' arenas until they are stopped.
Ranks::~Ranks() { close(); }

void Ranks::close() {
  for (auto& domain : domains_) domain->close();
}

std::size_t Ranks::board_bytes() const {
  return feplb::CountBoard::bytes_needed(size(), kNumExperts);
}

std::size_t Ranks::arena_bytes() const {
  return feplb::ArenaLayout(config_.layers, kNumSlots, kNumSlots).total_bytes();
}

void Ranks::make_domains(const MakeDevice& make_device) {
  feplb::DomainMemory memory;
  memory.board = board_memory_.data();
  for (Memory& arena : arenas_) memory.arenas.push_back(arena.data());
  for (int rank = 0; rank < size(); ++rank) {
    config_.rank = rank;
    config_.caller_submits = !left_to_movers_ && rank % 2 == 0;
    domains_.push_back(std::make_unique<feplb::Domain>(config_, memory, make_device(rank)));
  }
}

std::vector<std::string> Ranks::run(const std::function<void(int rank)>& program) {
  for (auto& domain : domains_) domain->open();
  std::vector<std::string> errors(static_cast<std::size_t>(size()));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size(); ++rank) {
    threads.emplace_back([&, rank] {
      try {
        program(rank);
      } catch (const std::exception& error) {
        errors[static_cast<std::size_t>(rank)] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return errors;
}

}  // namespace feplb_test
