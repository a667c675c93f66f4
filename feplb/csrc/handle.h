// Who owns what: one move-only owner per kind of resource. destroy() is noexcept and never checks:
// a destructor has nobody to tell.
#pragma once

#include <utility>

namespace feplb {

// Traits: `using Value = ...; static constexpr Value kNone; static void destroy(Value) noexcept;`
template <typename Traits>
class Handle {
 public:
  using Value = typename Traits::Value;

  Handle() = default;
  explicit Handle(Value value) : value_(value) {}
  Handle(Handle&& other) noexcept : value_(std::exchange(other.value_, Traits::kNone)) {}
  Handle& operator=(Handle&& other) noexcept {
    if (this != &other) {
      reset();
      value_ = std::exchange(other.value_, Traits::kNone);
    }
    return *this;
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() { reset(); }

  Value get() const { return value_; }
  explicit operator bool() const { return value_ != Traits::kNone; }
  // Nobody here destroys it any more.
  Value release() noexcept { return std::exchange(value_, Traits::kNone); }
  void reset() noexcept {
    if (value_ != Traits::kNone) Traits::destroy(std::exchange(value_, Traits::kNone));
  }

 private:
  Value value_ = Traits::kNone;
};

}  // namespace feplb
