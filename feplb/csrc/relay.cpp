#include "relay.h"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "error.h"

namespace feplb {
namespace {

constexpr std::size_t kMostBytes = std::size_t{1} << 20;  // no message is nearly as long
constexpr timespec kReleasePoll{0, 20'000};               // a device writes, and rings no bell
constexpr timespec kNap{0, 500'000'000};
constexpr int kSendPollMs = 100;

// A forked child (a data loader's worker) would keep the sockets open, and a peer would not hear of
// this process's end: they are closed there.
class ForkedSockets {
 public:
  static ForkedSockets& the() {
    static auto* sockets = new ForkedSockets;  // never destroyed: a child may be forked at any time
    return *sockets;
  }
  void add(int fd) {
    const std::lock_guard<std::mutex> lock(mutex_);
    fds_.push_back(fd);
  }
  void remove(int fd) {
    const std::lock_guard<std::mutex> lock(mutex_);
    fds_.erase(std::remove(fds_.begin(), fds_.end(), fd), fds_.end());
  }

 private:
  ForkedSockets() {
    pthread_atfork([] { the().mutex_.lock(); }, [] { the().mutex_.unlock(); },
                   [] {
                     for (const int fd : the().fds_) close(fd);
                     the().fds_.clear();
                     the().mutex_.unlock();
                   });
  }
  std::mutex mutex_;
  std::vector<int> fds_;
};

// Both ends are one build: what a message is made of may lie in it as it lies in memory.
struct Prefix {
  uint32_t what;
  uint32_t bytes;
};

template <typename Value>
void put(std::string& body, const Value& value) {
  body.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

class Reader {
 public:
  explicit Reader(const std::string& body) : body_(body) {}

  template <typename Value>
  Value get() {
    Value value;
    std::memcpy(&value, bytes(sizeof(value)), sizeof(value));
    return value;
  }
  const char* bytes(std::size_t count) {
    FEPLB_CHECK(count <= body_.size() - at_, "a message of ", body_.size(), " bytes ends early");
    at_ += count;
    return body_.data() + at_ - count;
  }

 private:
  const std::string& body_;
  std::size_t at_ = 0;
};

std::string packed(const CallHeader& header) {
  std::string body;
  put(body, header.seq);
  put(body, header.kind);
  put(body, header.layer);
  put(body, header.micro_batch);
  put(body, header.config_hash);
  put(body, header.plan_hash);
  put(body, header.grad_bits);
  put(body, static_cast<uint32_t>(header.error.size()));
  put(body, static_cast<uint32_t>(header.counts.size()));
  body += header.error;
  body.append(reinterpret_cast<const char*>(header.counts.data()),
              header.counts.size() * sizeof(int32_t));
  return body;
}

CallHeader unpacked(const std::string& body) {
  Reader reader(body);
  CallHeader header;
  header.seq = reader.get<uint64_t>();
  header.kind = reader.get<CallKind>();
  header.layer = reader.get<int32_t>();
  header.micro_batch = reader.get<int64_t>();
  header.config_hash = reader.get<uint64_t>();
  header.plan_hash = reader.get<uint64_t>();
  header.grad_bits = reader.get<uint32_t>();
  const auto num_chars = reader.get<uint32_t>();
  const auto num_counts = reader.get<uint32_t>();
  header.error.assign(reader.bytes(num_chars), num_chars);
  const std::size_t bytes = num_counts * sizeof(int32_t);
  const char* counts = reader.bytes(bytes);
  header.counts.resize(num_counts);
  if (bytes != 0) std::memcpy(header.counts.data(), counts, bytes);
  return header;
}

}  // namespace

Relay::Relay(int rank, CountBoard& board, Failure& failure, std::vector<Fd> sockets,
             double deadline_s, std::function<void(int rank)> peer_died)
    : rank_(rank),
      board_(board),
      failure_(failure),
      deadline_s_(deadline_s),
      peer_died_(std::move(peer_died)),
      peers_(sockets.size()),
      wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (!wake_) throw Error(errno_text("eventfd", errno));
  for (std::size_t peer = 0; peer < sockets.size(); ++peer) {
    if (sockets[peer]) ForkedSockets::the().add(sockets[peer].get());
    peers_[peer].socket = std::move(sockets[peer]);
  }
}

Relay::~Relay() {
  for (int rank = 0; rank < static_cast<int>(peers_.size()); ++rank) lose(rank);
}

// ----------------------------------------------------------------------------------- to the peers

void Relay::published(const CallHeader& header) {
  const std::string lost = tell(What::kHeader, packed(header));
  if (!lost.empty()) failure_.poison(lost);
}

void Relay::state_set(RankState state) {
  std::string body;
  put(body, state);
  static_cast<void>(tell(What::kState, body));  // who does not hear it sees the socket end
}

void Relay::aborted(const std::string& text) {
  static_cast<void>(tell(What::kAbort, text));  // this rank has failed already
}

std::string Relay::tell(What what, const std::string& body) {
  std::string message;
  put(message, Prefix{static_cast<uint32_t>(what), static_cast<uint32_t>(body.size())});
  message += body;
  std::string lost;
  const TimePoint deadline = Clock::now() + duration_of(deadline_s_);
  const std::lock_guard<std::mutex> lock(send_mutex_);
  for (std::size_t peer = 0; peer < peers_.size(); ++peer) {
    const std::string why = send_all(peers_[peer].socket, message, deadline);
    if (!why.empty() && lost.empty()) {
      lost = cat("rank ", board_.global_rank(static_cast<int>(peer)), " takes no messages: ", why);
    }
  }
  return lost;
}

// Where only a part is taken, nothing more is sent there: the peer, should it go on, hears an end
// and takes no other message for the rest.
std::string Relay::send_all(const Fd& socket, const std::string& message, TimePoint deadline) {
  std::size_t sent = 0;
  while (socket && sent < message.size()) {
    const ssize_t count = send(socket.get(), message.data() + sent, message.size() - sent,
                               MSG_NOSIGNAL | MSG_DONTWAIT);
    if (count > 0) {
      sent += static_cast<std::size_t>(count);
    } else if (errno != EAGAIN && errno != EINTR) {
      return "";  // the peer is gone, which the relay's thread hears and tells
    } else if (Clock::now() > deadline || stopping_.load()) {
      shutdown(socket.get(), SHUT_WR);
      return cat("nothing was taken for ", deadline_s_, " s (deadline_s)");
    } else {
      pollfd fd{socket.get(), POLLOUT, 0};
      poll(&fd, 1, kSendPollMs);
    }
  }
  return "";
}

void Relay::expect_release(Region region, int half, Epoch epoch) {
  const std::size_t word =
      static_cast<std::size_t>(region) * kNumHalves + static_cast<std::size_t>(half);
  expected_[word].store(epoch);
  const uint64_t one = 1;
  static_cast<void>(!write(wake_.get(), &one, sizeof(one)));
}

bool Relay::awaits_release() const {
  for (std::size_t word = 0; word < kNumWords; ++word) {
    if (expected_[word].load() != told_[word]) return true;
  }
  return false;
}

// Every value that the stream writes, and not the last expected one alone: the caller runs ahead of
// its stream, which may wait for the very rows that a peer pushes once it hears of an earlier one.
void Relay::tell_releases() {
  bool is_new = false;
  for (std::size_t word = 0; word < kNumWords; ++word) {
    const Flag* flag = board_.released(rank_, static_cast<Region>(word / kNumHalves),
                                       static_cast<int>(word % kNumHalves));
    const Epoch written = flag->epoch.load();
    if (expected_[word].load() == told_[word] || written == told_[word]) continue;
    told_[word] = written;
    is_new = true;
  }
  if (!is_new) return;
  std::string body;
  for (const Epoch epoch : told_) put(body, epoch);
  const std::string lost = tell(What::kReleased, body);
  if (!lost.empty()) failure_.poison(lost);
}

// --------------------------------------------------------------------------------- from the peers

void Relay::run() noexcept {
  while (!stopping_.load()) {
    nap();
    for (int rank = 0; rank < static_cast<int>(peers_.size()); ++rank) {
      try {
        hear(rank);
      } catch (const std::exception& error) {
        failure_.poison(
            cat("rank ", board_.global_rank(rank), " sent what is no message: ", error.what()));
        lose(rank);
      }
    }
    tell_releases();
  }
}

void Relay::nap() {
  std::vector<pollfd> fds{pollfd{wake_.get(), POLLIN, 0}};
  for (const Peer& peer : peers_) {
    if (peer.socket) fds.push_back(pollfd{peer.socket.get(), POLLIN, 0});
  }
  ppoll(fds.data(), fds.size(), awaits_release() ? &kReleasePoll : &kNap, nullptr);
  uint64_t rings = 0;
  static_cast<void>(!read(wake_.get(), &rings, sizeof(rings)));
}

void Relay::hear(int rank) {
  Peer& peer = peers_[static_cast<std::size_t>(rank)];
  std::array<char, 16384> buffer;
  while (peer.socket) {
    const ssize_t count = recv(peer.socket.get(), buffer.data(), buffer.size(), MSG_DONTWAIT);
    if (count > 0) {
      peer.heard.append(buffer.data(), static_cast<std::size_t>(count));
      read_messages(rank);
    } else if (count < 0 && (errno == EAGAIN || errno == EINTR)) {
      return;
    } else {
      lose(rank);
      peer_died_(rank);
    }
  }
}

void Relay::read_messages(int rank) {
  std::string& heard = peers_[static_cast<std::size_t>(rank)].heard;
  while (heard.size() >= sizeof(Prefix)) {
    Prefix prefix;
    std::memcpy(&prefix, heard.data(), sizeof(prefix));
    FEPLB_CHECK(prefix.bytes <= kMostBytes, "it would have ", prefix.bytes, " bytes");
    if (heard.size() < sizeof(prefix) + prefix.bytes) return;
    const std::string body = heard.substr(sizeof(prefix), prefix.bytes);
    heard.erase(0, sizeof(prefix) + prefix.bytes);
    take(rank, static_cast<What>(prefix.what), body);
  }
}

void Relay::take(int rank, What what, const std::string& body) {
  Bell& own_bell = board_.bell(rank_);
  if (what == What::kHeader) {
    board_.publish(rank, unpacked(body));
    own_bell.ring(kHeaderRing);
  } else if (what == What::kReleased) {
    Reader reader(body);
    for (std::size_t word = 0; word < kNumWords; ++word) {
      board_
          .released(rank, static_cast<Region>(word / kNumHalves),
                    static_cast<int>(word % kNumHalves))
          ->epoch.store(reader.get<Epoch>(), std::memory_order_release);
    }
    own_bell.ring(kReleaseRing);
  } else if (what == What::kState) {
    board_.set_state(rank, Reader(body).get<RankState>());
  } else {
    FEPLB_CHECK(what == What::kAbort, "it is of kind ", static_cast<uint32_t>(what));
    board_.abort(rank, body);
    failure_.poison(board_.abort_text());
  }
}

void Relay::lose(int rank) noexcept {
  Fd& socket = peers_[static_cast<std::size_t>(rank)].socket;
  const std::lock_guard<std::mutex> lock(send_mutex_);
  if (socket) ForkedSockets::the().remove(socket.get());
  socket.reset();
}

void Relay::stop() noexcept {
  stopping_.store(true);
  const uint64_t one = 1;
  static_cast<void>(!write(wake_.get(), &one, sizeof(one)));
}

}  // namespace feplb
