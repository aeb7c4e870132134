#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

// swapcontext asks the kernel for the signal mask: a run of a kernel takes several times as long.
#if defined(__x86_64__)

extern "C" void ssp_emulator_switch(void** save, void* restore);
asm(R"(
.text
.type ssp_emulator_switch, @function
ssp_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ssp_emulator_switch, . - ssp_emulator_switch
)");

static void prepare(void*& context, char* stack, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  // At the entry of a function the stack is 8 bytes off a multiple of 16.
  auto* top = reinterpret_cast<void**>(stack + Stacks::kBytes) - 2;
  *top = reinterpret_cast<void*>(entry);
  for (int k = 1; k <= kSavedRegisters; ++k) top[-k] = nullptr;
  context = top - kSavedRegisters;
}
static void switch_to(void*& from, void*& to) { ssp_emulator_switch(&from, to); }

#else

static void prepare(ucontext_t& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = Stacks::kBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
static void switch_to(ucontext_t& from, ucontext_t& to) { swapcontext(&from, &to); }

#endif

// AddressSanitizer has to know which stack is in use.
#if defined(__SANITIZE_ADDRESS__)
static void leave_for(const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(nullptr, stack, bytes);
}
static void arrive(const void** from, size_t* bytes) {
  __sanitizer_finish_switch_fiber(nullptr, from, bytes);
}
static void forget_frames(char* stack) { __asan_unpoison_memory_region(stack, Stacks::kBytes); }
#else
static void leave_for(const void*, size_t) {}
static void arrive(const void**, size_t*) {}
static void forget_frames(char*) {}
#endif

static Fiber* running;

void Fiber::enter() {
  Fiber& self = *running;
  arrive(&self.outer_stack_, &self.outer_bytes_);
  self.entry_();
}

void Fiber::start(void (*entry)()) {
  entry_ = entry;
  forget_frames(stack_);
  prepare(inside_, stack_, enter);
}

void Fiber::resume() {
  running = this;
  leave_for(stack_, Stacks::kBytes);
  switch_to(outside_, inside_);
  arrive(nullptr, nullptr);
}

void Fiber::suspend() {
  leave_for(outer_stack_, outer_bytes_);
  switch_to(inside_, outside_);
  arrive(&outer_stack_, &outer_bytes_);
}

// A guard page, a page of which a part is left out, and the stack.
static size_t mapping_bytes(size_t page) { return 2 * page + Stacks::kBytes; }

Stacks::~Stacks() {
  for (char* mapping : mappings_) munmap(mapping, mapping_bytes(getpagesize()));
}

char* Stacks::at(size_t index) {
  constexpr size_t kLine = 64;
  const size_t page = getpagesize();
  while (mappings_.size() <= index) {
    void* mapping = mmap(nullptr, mapping_bytes(page), PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapping, page, PROT_NONE);
    mappings_.push_back(static_cast<char*>(mapping));
  }
  // Stacks that all began at the same place in a page would fall on the same lines of the cache.
  return mappings_[index] + page + index * kLine % page;
}

}  // namespace emulator
