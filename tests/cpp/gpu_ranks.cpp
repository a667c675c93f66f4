#include "gpu_ranks.h"

#include "check.h"

namespace feplb_test {
namespace {

using feplb::cuda::CurrentContext;
using feplb::cuda::DeviceContext;
using feplb::cuda::Driver;
using feplb::cuda::Stream;

// The program itself has the driver's symbols.
std::shared_ptr<const Driver> linked_driver(int num_gpus) {
  stand_in_set_gpus(num_gpus);
  stand_in_share_pins(1);
  return Driver::open("");
}

void set_mood(const DriverMood& mood) {
  stand_in_set_queued_default(mood.queued_default ? 1 : 0);
  stand_in_set_one_queue(mood.one_queue ? 1 : 0);
  stand_in_set_one_lock(mood.one_lock ? 1 : 0);
  stand_in_set_queue_depth(mood.queue_depth);
  stand_in_set_jitter_us(mood.jitter_us);
  if (!mood.held.empty()) stand_in_block(mood.held.c_str(), mood.held_ms);
}

void run_boxed(void* boxed) {
  const std::unique_ptr<std::function<void()>> kernel(static_cast<std::function<void()>*>(boxed));
  (*kernel)();
}

}  // namespace

std::string joined(const std::vector<std::string>& errors) {
  std::string text;
  for (const std::string& error : errors) text += error.empty() ? "" : error + "\n";
  return text;
}

GpuRanks::Config ranks_of(int num_ranks, DriverMood mood) {
  GpuRanks::Config config;
  config.num_ranks = num_ranks;
  config.mood = std::move(mood);
  return config;
}

DriverMood late(int64_t jitter_us) {
  DriverMood mood;
  mood.jitter_us = jitter_us;
  return mood;
}

DriverMood one_queue(int64_t jitter_us) {
  DriverMood mood = late(jitter_us);
  mood.one_queue = true;
  return mood;
}

DriverMood one_lock(int64_t jitter_us) {
  DriverMood mood = late(jitter_us);
  mood.one_lock = true;
  return mood;
}

GpuRanks::GpuRanks(Config config)
    : config_(std::move(config)),
      driver_(linked_driver(config_.num_ranks)),
      ranks_(config_.num_ranks, config_.deadline_s) {
  config_.mood.queued_default = config_.has_default;
  set_mood(config_.mood);
  for (int rank = 0; rank < config_.num_ranks; ++rank) {
    contexts_.push_back(std::make_shared<DeviceContext>(driver_, rank));
    const CurrentContext current(*contexts_.back());
    stand_in_adopt(ranks_.arena(rank), ranks_.arena_bytes());
    std::vector<std::uintptr_t> streams;
    if (config_.has_default) streams.push_back(0);
    while (static_cast<int>(streams.size()) < config_.num_streams) {
      Stream stream = nullptr;
      driver().check(driver().stream_create(&stream, feplb::cuda::kStreamNonBlocking), "a stream");
      streams.push_back(reinterpret_cast<std::uintptr_t>(stream));
    }
    streams_.push_back(std::move(streams));
  }
}

GpuRanks::~GpuRanks() {
  ranks_.close();
  for (int rank = 0; rank < config_.num_ranks; ++rank) {
    const CurrentContext current(*context(rank));
    for (const std::uintptr_t stream : streams(rank)) {
      if (stream != 0) driver().stream_destroy(reinterpret_cast<Stream>(stream));
    }
    stand_in_disown(ranks_.arena(rank));
  }
  const std::string held = config_.mood.held;
  if (!held.empty()) stand_in_block(held.c_str(), 0);
  set_mood(DriverMood{});
}

const std::vector<std::uintptr_t>& GpuRanks::streams(int rank) const {
  return streams_[static_cast<std::size_t>(rank)];
}

const std::shared_ptr<DeviceContext>& GpuRanks::context(int rank) const {
  return contexts_[static_cast<std::size_t>(rank)];
}

void GpuRanks::make_domains() {
  ranks_.make_domains([this](int rank) { return make_device(rank); });
}

std::unique_ptr<feplb::Device> GpuRanks::make_device(int rank) {
  feplb::cuda::LaneOptions options;
  options.copies = config_.copies;
  options.flags = config_.flags;
  for (int peer = 0; peer < config_.num_ranks; ++peer) {
    options.peers.push_back({ranks_.arena(peer), ranks_.arena_bytes(), peer});
  }
  return feplb::cuda::make_cuda_device(context(rank), ranks_.board_data(), ranks_.board_bytes(),
                                       std::move(options));
}

RankProgram::Launch GpuRanks::launcher(int rank, uint64_t seed, uint32_t frees_one_in) {
  auto random = std::make_shared<feplb::SimRandom>(seed * 64 + static_cast<uint64_t>(rank));
  return [this, rank, random, frees_one_in](std::uintptr_t stream, std::function<void()> kernel) {
    if (frees_one_in > 0 && random->one_in(frees_one_in)) free_memory(rank);
    launch(stream, std::move(kernel));
  };
}

void GpuRanks::launch(std::uintptr_t stream, std::function<void()> kernel) {
  auto boxed = std::make_unique<std::function<void()>>(std::move(kernel));
  driver().check(stand_in_launch(reinterpret_cast<Stream>(stream), run_boxed, boxed.get()),
                 "launching a kernel");
  static_cast<void>(boxed.release());
}

void GpuRanks::free_memory(int rank) {
  const CurrentContext current(*context(rank));
  feplb::cuda::Address address = 0;
  driver().check(driver().allocate(&address, 4096), "allocating");
  driver().check(driver().free(address), "freeing");
}

void GpuRanks::synchronize(int rank) {
  const CurrentContext current(*context(rank));
  for (const std::uintptr_t stream : streams(rank)) {
    driver().check(driver().stream_synchronize(reinterpret_cast<Stream>(stream)), "waiting");
  }
}

}  // namespace feplb_test
