#include "emulator.h"

#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <span>
#include <utility>

#include "fiber.h"

namespace emulator {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr int kMaxThreadsOfMultiprocessor = 2048;
constexpr size_t kMaxFibers = 16384;
constexpr std::align_val_t kSharedAlignment{16};

enum class State { kReady, kShuffle, kBlockBarrier, kGridBarrier, kExited };

struct Thread {
  explicit Thread(char* stack) : fiber(stack) {}

  Fiber fiber;
  State state = State::kReady;
  Site where;
  unsigned mask = 0;    // of a shuffle
  int from_lane = 0;    // likewise
  uint64_t value = 0;   // given to a shuffle
  uint64_t result = 0;  // and what comes of it
};

struct FreeShared {
  void operator()(char* memory) const { ::operator delete(memory, kSharedAlignment); }
};

struct Block {
  unsigned index = 0;
  std::vector<Thread> threads;
  std::unique_ptr<char, FreeShared> shared;
};

const char* name(State state) {
  switch (state) {
    case State::kShuffle:
      return "at a shuffle";
    case State::kBlockBarrier:
      return "at __syncthreads";
    case State::kGridBarrier:
      return "at the grid's barrier";
    case State::kExited:
      return "exited";
    default:
      return "ready";
  }
}

std::string text(Site where) {
  const std::string_view path = where.file_name();
  return std::string(path.substr(path.rfind('/') + 1)) + ":" + std::to_string(where.line());
}

bool same(Site a, Site b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

class Runner {
 public:
  Runner(const Launch& launch, const std::function<void()>& body, Stacks& stacks);
  ~Runner() { active = nullptr; }

  void run();
  void wait(State state, Site where);
  Thread& thread() { return block_->threads[thread_]; }
  void* shared() const { return block_->shared.get(); }
  int lane() const { return static_cast<int>(thread_ % kWarp); }
  [[noreturn]] void fail(const std::string& what, Site where) const;

  static Runner* active;

 private:
  static void enter();
  void reset(Block& block, unsigned index);
  void advance(Block& block);
  bool shuffle(Block& block, size_t first);
  bool all_at(const Block& block, State state) const;
  [[noreturn]] void stuck(std::span<const Block> blocks) const;
  const std::vector<unsigned>& ordered(std::vector<unsigned>& order);

  const Launch& launch_;
  const std::function<void()>& body_;
  std::vector<Block> blocks_;  // alive at once
  std::vector<unsigned> block_order_, thread_order_;
  std::mt19937 random_;
  Block* block_ = nullptr;
  unsigned thread_ = 0;
  std::exception_ptr error_;
};

Runner* Runner::active = nullptr;

Runner::Runner(const Launch& launch, const std::function<void()>& body, Stacks& stacks)
    : launch_(launch), body_(body), random_(settings.seed) {
  const auto require = [&](bool holds, const std::string& what) {
    if (!holds) throw Error(launch.kernel + ": " + what);
  };
  const auto count = [](auto number, const char* of) { return std::to_string(number) + of; };
  require(launch.blocks > 0, "a grid without blocks");
  require(launch.threads > 0 && launch.threads <= kMaxThreads,
          count(launch.threads, " threads a block"));
  require(launch.shared_bytes <= static_cast<size_t>(settings.shared_bytes),
          count(launch.shared_bytes, " bytes of shared memory, of ") +
              std::to_string(settings.shared_bytes));
  if (launch.cooperative) {
    const int limit =
        settings.multiprocessors * blocks_per_multiprocessor(launch.threads, launch.shared_bytes);
    require(settings.cooperative, "a cooperative launch on a device without them");
    require(launch.blocks <= static_cast<unsigned>(limit),
            count(launch.blocks, " blocks in a cooperative launch, of ") + std::to_string(limit));
  }
  blocks_.resize(launch.cooperative ? launch.blocks : 1);
  require(blocks_.size() * launch.threads <= kMaxFibers, "more threads alive than are emulated");
  size_t stack = 0;
  for (Block& block : blocks_) {
    block.threads.reserve(launch.threads);
    for (unsigned t = 0; t < launch.threads; ++t) block.threads.emplace_back(stacks.at(stack++));
  }
  block_order_.resize(launch.blocks);
  thread_order_.resize(launch.threads);
  for (auto* order : {&block_order_, &thread_order_}) {
    std::iota(order->begin(), order->end(), 0u);
    if (settings.order == Order::kReverse) std::reverse(order->begin(), order->end());
  }
  gridDim = dim3(launch.blocks);
  blockDim = dim3(launch.threads);
  active = this;
}

const std::vector<unsigned>& Runner::ordered(std::vector<unsigned>& order) {
  if (settings.order == Order::kShuffled) std::shuffle(order.begin(), order.end(), random_);
  return order;
}

void Runner::enter() {
  Runner& self = *active;
  try {
    self.body_();
  } catch (...) {
    self.error_ = std::current_exception();
  }
  self.wait(State::kExited, Site());
}

void Runner::wait(State state, Site where) {
  Thread& self = thread();
  self.state = state;
  self.where = where;
  self.fiber.suspend();
}

// Shared memory is full of NaN at first.
void Runner::reset(Block& block, unsigned index) {
  block.index = index;
  if (launch_.shared_bytes > 0) {
    block.shared.reset(static_cast<char*>(::operator new(launch_.shared_bytes, kSharedAlignment)));
    std::memset(block.shared.get(), 0xff, launch_.shared_bytes);
  }
  for (Thread& thread : block.threads) {
    thread.state = State::kReady;
    thread.fiber.start(enter);
  }
}

bool Runner::all_at(const Block& block, State state) const {
  const Thread& first = block.threads.front();
  return std::all_of(block.threads.begin(), block.threads.end(), [&](const Thread& thread) {
    return thread.state == state && same(thread.where, first.where);
  });
}

// The warp that begins with this thread: hands values over where every lane that a mask names is at
// the same shuffle. Returns whether any went on.
bool Runner::shuffle(Block& block, size_t first) {
  Thread* warp = &block.threads[first];
  const size_t lanes = std::min<size_t>(kWarp, block.threads.size() - first);
  bool any = false;
  for (size_t lane = 0; lane < lanes; ++lane) {
    const Thread& asking = warp[lane];
    if (asking.state != State::kShuffle) continue;
    const unsigned mask = asking.mask;
    const auto named = [&](size_t other) { return mask >> other & 1; };
    bool complete = true;
    for (size_t other = 0; other < kWarp && complete; ++other) {
      complete =
          !named(other) || (other < lanes && warp[other].state == State::kShuffle &&
                            warp[other].mask == mask && same(warp[other].where, asking.where));
    }
    if (!complete) continue;
    for (size_t other = 0; other < lanes; ++other) {
      if (named(other)) warp[other].result = warp[warp[other].from_lane].value;
    }
    for (size_t other = 0; other < lanes; ++other) {
      if (named(other)) warp[other].state = State::kReady;
    }
    any = true;
  }
  return any;
}

// Runs a block until all its threads have exited or are at the grid's barrier.
void Runner::advance(Block& block) {
  block_ = &block;
  blockIdx = {block.index, 0, 0};
  for (;;) {
    for (const unsigned index : ordered(thread_order_)) {
      if (block.threads[index].state != State::kReady) continue;
      thread_ = index;
      threadIdx = {index, 0, 0};
      block.threads[index].fiber.resume();
      if (error_) std::rethrow_exception(error_);
    }
    bool any = false;
    for (size_t warp = 0; warp < block.threads.size(); warp += kWarp) any |= shuffle(block, warp);
    if (!any && all_at(block, State::kBlockBarrier)) {
      for (Thread& thread : block.threads) thread.state = State::kReady;
      any = true;
    }
    if (any) continue;
    if (all_at(block, State::kExited) || all_at(block, State::kGridBarrier)) return;
    stuck({&block, 1});
  }
}

void Runner::run() {
  if (!launch_.cooperative) {
    for (const unsigned index : ordered(block_order_)) {
      reset(blocks_[0], index);
      advance(blocks_[0]);
      if (!all_at(blocks_[0], State::kExited)) stuck(blocks_);
    }
    return;
  }
  for (unsigned index = 0; index < launch_.blocks; ++index) reset(blocks_[index], index);
  const auto all_blocks_at = [&](State state) {
    const Site where = blocks_[0].threads[0].where;
    return std::all_of(blocks_.begin(), blocks_.end(), [&](const Block& block) {
      return all_at(block, state) && same(block.threads[0].where, where);
    });
  };
  for (;;) {
    for (const unsigned index : ordered(block_order_)) advance(blocks_[index]);
    if (all_blocks_at(State::kExited)) return;
    if (!all_blocks_at(State::kGridBarrier)) stuck(blocks_);
    for (Block& block : blocks_) {
      for (Thread& thread : block.threads) thread.state = State::kReady;
    }
  }
}

// Threads wait for each other in vain: says where each of them is.
void Runner::stuck(std::span<const Block> blocks) const {
  std::map<std::string, std::pair<size_t, std::string>> places;
  for (const Block& block : blocks) {
    for (size_t t = 0; t < block.threads.size(); ++t) {
      const Thread& thread = block.threads[t];
      std::string place = name(thread.state);
      if (thread.state != State::kExited) place += " (" + text(thread.where) + ")";
      const std::string first =
          "thread " + std::to_string(t) + " of block " + std::to_string(block.index);
      ++places.try_emplace(place, 0, first).first->second.first;
    }
  }
  std::string message = launch_.kernel + ": threads wait for each other in vain";
  for (const auto& [place, threads] : places) {
    message += "; " + std::to_string(threads.first) + " " + place + ", such as " + threads.second;
  }
  throw Error(message);
}

void Runner::fail(const std::string& what, Site where) const {
  throw Error(launch_.kernel + ", block " + std::to_string(block_->index) + ", thread " +
              std::to_string(thread_) + ", " + text(where) + ": " + what);
}

}  // namespace

void run(const Launch& launch, const std::function<void()>& thread) {
  static Stacks stacks;
  launches.push_back(launch);
  Runner(launch, thread, stacks).run();
}

int blocks_per_multiprocessor(unsigned threads, size_t shared_bytes) {
  int blocks = std::min(settings.blocks_per_multiprocessor,
                        kMaxThreadsOfMultiprocessor / static_cast<int>(threads));
  if (shared_bytes > 0) {
    blocks = std::min(blocks, static_cast<int>(settings.shared_bytes / shared_bytes));
  }
  return blocks;
}

int lane() { return Runner::active->lane(); }

void fail(const std::string& what, Site where) { Runner::active->fail(what, where); }

void* shared_memory(Site where) {
  if (Runner::active->shared() == nullptr) fail("a launch without shared memory", where);
  return Runner::active->shared();
}

void block_barrier(Site where) { Runner::active->wait(State::kBlockBarrier, where); }

void grid_barrier(Site where) { Runner::active->wait(State::kGridBarrier, where); }

uint64_t exchange(unsigned mask, uint64_t value, int from_lane, Site where) {
  const auto named = [&](int other) { return other >= 0 && other < kWarp && mask >> other & 1; };
  if (!named(lane())) fail("a shuffle whose mask leaves out the lane itself", where);
  if (!named(from_lane)) fail("a shuffle from a lane that its mask leaves out", where);
  Thread& self = Runner::active->thread();
  self.mask = mask;
  self.from_lane = from_lane;
  self.value = value;
  Runner::active->wait(State::kShuffle, where);
  return self.result;
}

}  // namespace emulator
