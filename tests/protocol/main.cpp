// Explores one configuration of the protocol model and prints what was found.
//
//   model [--ranks 2..4] [--layers 1..3] [--shape ring|alternate|fan-in|fan-out]
//         [--backward-only 0|1] [--queue separate|single] [--blocking 0|1] [--death 0|1]
//         [--deadline 0|1] [--collective 0|1] [--plain 0|1] [--without RULE] [--max-states N]
//   model --rules     prints every rule's name and what is done without it
//
// Exit status: 0 no violation, 1 violation, 2 usage.
#include <cstdio>
#include <ctime>
#include <stdexcept>
#include <string>

#include "explore.h"

namespace {

using protocol::Config;
using protocol::Model;
using protocol::Result;
using protocol::Rule;
using protocol::Shape;

struct Options {
  Config config;
  uint64_t max_states = 40000000;
};

int number(const std::string& value, int low, int high) {
  size_t used = 0;
  const int parsed = std::stoi(value, &used);
  if (used != value.size() || parsed < low || parsed > high) throw std::invalid_argument(value);
  return parsed;
}

bool choice(const std::string& value, const std::string& off, const std::string& on) {
  if (value != off && value != on) throw std::invalid_argument(value);
  return value == on;
}

Shape shape(const std::string& value) {
  if (value == "ring") return Shape::kRing;
  if (value == "alternate") return Shape::kAlternate;
  if (value == "fan-in") return Shape::kFanIn;
  if (value == "fan-out") return Shape::kFanOut;
  throw std::invalid_argument(value);
}

void set_option(const std::string& name, const std::string& value, Options* options) {
  Config& config = options->config;
  if (name == "--ranks") {
    config.ranks = number(value, 2, protocol::kMaxRanks);
  } else if (name == "--layers") {
    config.layers = number(value, 1, 3);
  } else if (name == "--backward-only") {
    config.backward_only = choice(value, "0", "1");
  } else if (name == "--shape") {
    config.shape = shape(value);
  } else if (name == "--queue") {
    config.single_queue = choice(value, "separate", "single");
  } else if (name == "--blocking") {
    config.blocking = choice(value, "0", "1");
  } else if (name == "--death") {
    config.death = choice(value, "0", "1");
  } else if (name == "--deadline") {
    config.deadline = choice(value, "0", "1");
  } else if (name == "--collective") {
    config.collective = choice(value, "0", "1");
  } else if (name == "--plain") {
    config.plain = choice(value, "0", "1");
  } else if (name == "--max-states") {
    options->max_states = static_cast<uint64_t>(number(value, 1, 2000000000));
  } else if (name == "--without") {
    config.without = protocol::find_rule(value);
    if (config.without == Rule::kNone) throw std::invalid_argument(value);
  } else {
    throw std::invalid_argument(name);
  }
}

Options parse(int argc, char** argv) {
  Options options;
  for (int at = 1; at < argc; at += 2) {
    if (at + 1 == argc) throw std::invalid_argument(argv[at]);
    set_option(argv[at], argv[at + 1], &options);
  }
  const Config& config = options.config;
  if (config.shape == Shape::kAlternate && config.ranks != 2) {
    throw std::invalid_argument("--shape alternate is for 2 ranks");
  }
  if (config.collective && config.shape != Shape::kRing) {
    throw std::invalid_argument("--collective is for --shape ring");
  }
  if (config.collective && (config.death || config.deadline)) {
    throw std::invalid_argument("--collective cannot end after a fault; lifting it is not ours");
  }
  return options;
}

int list_rules() {
  for (const protocol::RuleText& entry : protocol::all_rules()) {
    std::printf("%s\t%s\n", entry.name, entry.instead);
  }
  return 0;
}

int run(const Options& options) {
  const Model model(options.config);
  const Result result = protocol::explore(model, options.max_states);
  const double cpu_seconds = static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
  const bool is_ok = result.finding.is_ok();
  const std::string extent = !is_ok ? "stopped at the violation"
                             : result.is_exhaustive
                                 ? "exhaustive"
                                 : "bounded: " + std::to_string(options.max_states) + " states";
  std::printf("states=%llu cpu_seconds=%.2f MiB=%llu %s\n",
              static_cast<unsigned long long>(result.num_states), cpu_seconds,
              static_cast<unsigned long long>(result.num_bytes >> 20), extent.c_str());
  std::printf("result: %s\n", is_ok ? "ok" : model.describe(result.finding).c_str());
  std::printf("%s", result.trace.c_str());
  return is_ok ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "--rules") return list_rules();
  try {
    return run(parse(argc, argv));
  } catch (const std::logic_error& error) {
    std::fprintf(stderr, "usage: see main.cpp; not understood: %s\n", error.what());
    return 2;
  }
}
