#pragma once

#include <cstddef>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

// One flow of control with a stack of its own; the caller of resume() is another.
class Fiber {
 public:
  explicit Fiber(char* stack) : stack_(stack) {}

  // The next resume() enters `entry`, which must not return or let an exception out.
  void start(void (*entry)());
  // From outside: runs the fiber until it calls suspend().
  void resume();
  // From inside.
  void suspend();

 private:
  static void enter();

#if defined(__x86_64__)
  void* inside_ = nullptr;
  void* outside_ = nullptr;
#else
  ucontext_t inside_;
  ucontext_t outside_;
#endif
  void (*entry_)() = nullptr;
  char* stack_;
  const void* outer_stack_ = nullptr;
  size_t outer_bytes_ = 0;
};

// Stacks that are kept from launch to launch, each above a page that may not be touched.
class Stacks {
 public:
  static constexpr size_t kBytes = 64 << 10;

  ~Stacks();
  char* at(size_t index);

 private:
  std::vector<char*> mappings_;
};

}  // namespace emulator
