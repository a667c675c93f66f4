// Two ranks with boards of their own, joined by a socket: what one writes, the other reads.
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <thread>

#include "../../feplb/csrc/relay.h"
#include "check.h"
#include "memory.h"

namespace feplb_test {
namespace {

using namespace feplb;

constexpr int kNumExperts = 3;
constexpr double kDeadlineS = 20;

// One rank of two.
struct Side {
  Side(int rank, Fd socket, double deadline_s = kDeadlineS)
      : rank(rank),
        memory(CountBoard::bytes_needed(2, kNumExperts)),
        board(memory.data(), 2, kNumExperts, {8, 9}),
        failure(board, rank, caller),
        relay(rank, board, failure, sockets_of(rank, std::move(socket)), deadline_s,
              [this](int dead) { failure.poison(cat("rank ", dead, " is gone")); }),
        thread([this] { relay.run(); }) {
    board.echo_to(rank, &relay);
  }
  ~Side() {
    relay.stop();
    thread.join();
  }
  static std::vector<Fd> sockets_of(int rank, Fd socket) {
    std::vector<Fd> sockets(2);
    sockets[static_cast<std::size_t>(1 - rank)] = std::move(socket);
    return sockets;
  }
  int rank;
  Memory memory;
  CountBoard board;
  Bell caller;
  Failure failure;
  Relay relay;
  std::thread thread;
};

struct Two {
  Two() {
    int ends[2];
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
    first = std::make_unique<Side>(0, Fd(ends[0]));
    second = std::make_unique<Side>(1, Fd(ends[1]));
  }
  std::unique_ptr<Side> first, second;
};

bool comes_true(const std::function<bool()>& done) {
  const TimePoint deadline = Clock::now() + std::chrono::seconds(10);
  while (!done() && Clock::now() < deadline) std::this_thread::yield();
  return done();
}

bool stays_false(const std::function<bool()>& done) {
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  return !done();
}

CallHeader header_of(uint64_t seq) {
  CallHeader header;
  header.seq = seq;
  header.kind = CallKind::kBackward;
  header.layer = 5;
  header.micro_batch = -7;
  header.config_hash = 11;
  header.plan_hash = ~uint64_t{0};
  header.grad_bits = kGradMode | kNeedsRows;
  header.error = "rows must be 4";
  header.counts = {1, 0, 2'000'000'000};
  return header;
}

TEST(relay_brings_headers_as_they_were_published) {
  Two two;
  const uint32_t rings = two.second->board.bell(1).rings();
  two.first->board.publish(0, header_of(8));
  CHECK(comes_true([&] { return two.second->board.published_seq(0, 8) == 8; }), "no header");
  CHECK(comes_true([&] { return two.second->board.bell(1).rings() != rings; }), "no ring");
  CallHeader read;
  two.second->board.read(0, 8, read);
  const CallHeader sent = header_of(8);
  CHECK(read.kind == sent.kind && read.layer == sent.layer, "another call");
  CHECK_EQ(read.micro_batch, sent.micro_batch);
  CHECK_EQ(read.config_hash, sent.config_hash);
  CHECK_EQ(read.plan_hash, sent.plan_hash);
  CHECK_EQ(read.grad_bits, sent.grad_bits);
  CHECK_EQ(read.error, sent.error);
  CHECK(read.counts == sent.counts, "other counts");
  CHECK_EQ(two.second->board.last_seen(0), two.first->board.last_seen(0));
  CHECK_EQ(two.first->board.published_seq(1, 8), uint64_t{0});  // nothing comes back
}

TEST(relay_brings_headers_in_both_directions_at_once) {
  Two two;
  const auto publish = [](Side& side) {
    for (uint64_t seq = 1; seq <= 300; ++seq) {
      side.board.publish(side.rank, header_of(seq));
      const int peer = 1 - side.rank;
      if (!comes_true([&] { return side.board.published_seq(peer, seq) == seq; })) return false;
    }
    return true;
  };
  bool is_there = false;
  std::thread other([&] { is_there = publish(*two.second); });
  CHECK(publish(*two.first), "rank 0 misses a header");
  other.join();
  CHECK(is_there, "rank 1 misses a header");
}

TEST(relay_tells_a_release_once_the_stream_has_written_it) {
  Two two;
  Flag* own = two.first->board.released(0, kReturnsRegion, 1);
  const Flag* there = two.second->board.released(0, kReturnsRegion, 1);
  two.first->relay.expect_release(kReturnsRegion, 1, 7);
  CHECK(stays_false([&] { return there->epoch.load() != 0; }), "told too early");
  const uint32_t rings = two.second->board.bell(1).rings();
  own->epoch.store(7);
  CHECK(comes_true([&] { return there->epoch.load() == 7; }), "not told");
  CHECK(comes_true([&] { return two.second->board.bell(1).rings() != rings; }), "no ring");
  CHECK_EQ(two.second->board.released(0, kReturnsRegion, 0)->epoch.load(), 0u);
  CHECK_EQ(two.second->board.released(1, kReturnsRegion, 1)->epoch.load(), 0u);
}

// The caller runs ahead of its stream: it has handed out the release of a later call before the
// stream has written the one that a peer's mover waits for.
TEST(relay_tells_a_release_though_a_later_one_is_expected) {
  Two two;
  Flag* own = two.first->board.released(0, kWeightsRegion, 0);
  const Flag* there = two.second->board.released(0, kWeightsRegion, 0);
  two.first->relay.expect_release(kWeightsRegion, 0, 7);
  two.first->relay.expect_release(kWeightsRegion, 0, 8);
  own->epoch.store(7);
  CHECK(comes_true([&] { return there->epoch.load() == 7; }), "not told");
  CHECK(stays_false([&] { return there->epoch.load() == 8; }), "told too early");
  own->epoch.store(8);
  CHECK(comes_true([&] { return there->epoch.load() == 8; }), "the later one is not told");
}

// Start-up writes such a word for itself, and puts it back.
TEST(relay_tells_no_word_that_nobody_released) {
  Two two;
  two.first->board.released(0, kRowsRegion, 0)->epoch.store(25);
  two.first->relay.expect_release(kWeightsRegion, 0, 2);
  two.first->board.released(0, kWeightsRegion, 0)->epoch.store(2);
  const CountBoard& there = two.second->board;
  CHECK(comes_true([&] { return there.released(0, kWeightsRegion, 0)->epoch.load() == 2; }), "no");
  CHECK_EQ(there.released(0, kRowsRegion, 0)->epoch.load(), 0u);
}

TEST(relay_tells_of_a_failure_and_nobody_tells_it_back) {
  Two two;
  two.first->failure.poison("out of memory");
  CHECK(comes_true([&] { return two.second->failure.poisoned(); }), "not told");
  CHECK_EQ(two.second->failure.text(), std::string("rank 8: out of memory"));
  CHECK_EQ(two.first->failure.text(), std::string("out of memory"));
}

TEST(relay_tells_a_close_before_the_socket_ends) {
  Two two;
  two.first->board.set_state(0, RankState::kClosed);
  two.first.reset();
  CHECK(comes_true([&] { return two.second->failure.poisoned(); }), "the end was not heard");
  CHECK(two.second->board.state(0) == RankState::kClosed, "the end came first");
}

TEST(relay_hears_the_end_of_a_peer) {
  Two two;
  two.first.reset();
  CHECK(comes_true([&] { return two.second->failure.poisoned(); }), "not heard");
  CHECK_EQ(two.second->failure.text(), std::string("rank 0 is gone"));
  two.second->board.publish(1, header_of(9));  // nobody is there, and nothing happens
}

// What rank 1 says of a peer that sent these bytes.
std::string said_of(const std::string& bytes) {
  int ends[2];
  CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
  const Fd peer(ends[0]);
  Side side(1, Fd(ends[1]));
  CHECK_EQ(write(peer.get(), bytes.data(), bytes.size()), static_cast<ssize_t>(bytes.size()));
  CHECK(comes_true([&] { return side.failure.poisoned(); }), "nothing was said");
  return side.failure.text();
}

std::string words(std::vector<uint32_t> values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * 4);
}

TEST(relay_names_who_sent_what_is_no_message) {
  const std::string start = "rank 8 sent what is no message: ";
  const auto begins = [&](const std::string& text) { return text.rfind(start, 0) == 0; };
  for (const std::string& bytes :
       {words({9, 4, 0}), words({1, 4, 0}), words({1, 0xffffffff}), words({2, 4, 0})}) {
    const std::string said = said_of(bytes);
    CHECK(begins(said), said);
  }
  // A header with more counts than any layer has experts.
  std::string header(48 + 4, '\0');
  const uint32_t count = kNumExperts + 1;
  header.replace(44 + 4, 4, reinterpret_cast<const char*>(&count), 4);
  header += std::string(4 * count, '\0');
  CHECK(begins(said_of(words({1, static_cast<uint32_t>(header.size())}) + header)), "too many");
  // One that says to have 2^32 - 1 of them is not believed first.
  header = std::string(48, '\0') + words({0xffffffff});
  const std::string said = said_of(words({1, static_cast<uint32_t>(header.size())}) + header);
  CHECK(begins(said) && said.find("a message of 52 bytes ends early") != said.npos, said);
}

// A peer that takes nothing: what it was not sent in whole is the last that it is sent.
TEST(relay_sends_nothing_behind_half_a_message) {
  int ends[2];
  CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
  const Fd peer(ends[0]);
  Side side(1, Fd(ends[1]), 0.2);
  uint64_t seq = 0;
  while (!side.failure.poisoned()) side.board.publish(1, header_of(++seq));
  const std::string text = side.failure.text();
  CHECK(text.rfind("rank 8 takes no messages: nothing was taken for 0.2 s", 0) == 0, text);
  side.board.set_state(1, RankState::kClosed);
  std::size_t sent = 0;
  ssize_t count = 0;
  char buffer[4096];
  while ((count = recv(peer.get(), buffer, sizeof(buffer), MSG_DONTWAIT)) > 0) {
    sent += static_cast<std::size_t>(count);
  }
  CHECK_EQ(count, ssize_t{0});  // the end, so that the peer does not wait for the rest
  const std::size_t message = 8 + 52 + header_of(1).error.size() + 4 * kNumExperts;
  CHECK(sent >= (seq - 1) * message && sent < seq * message, cat(sent, " of ", seq, " messages"));
}

TEST(relay_lets_a_forked_child_keep_no_socket) {
  Two two;
  const pid_t child = fork();
  if (child == 0) {
    pause();
    _exit(0);
  }
  two.first.reset();
  const bool is_heard = comes_true([&] { return two.second->failure.poisoned(); });
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  CHECK(is_heard, "the child holds the socket");
}

}  // namespace
}  // namespace feplb_test
