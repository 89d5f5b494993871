#include "simulated_device.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
static void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
#endif

simulated::Index blockIdx;
simulated::Index threadIdx;

namespace simulated {

Schedule schedule;

namespace {

constexpr std::size_t kStack = 256 * 1024;
constexpr int kWarp = 32;

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::kReady;
  std::uint64_t shuffled[2] = {0, 0};
  int shuffles = 0;
  void* fake_stack = nullptr;
};

std::vector<std::unique_ptr<Fiber>> fibers;
ucontext_t scheduler;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_size = 0;
int current = 0;
const std::function<void()>* body = nullptr;

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "simulated kernel, block %u: %s\n", blockIdx.x, message);
  std::abort();
}

void leave(State state) {
  Fiber& fiber = *fibers[current];
  fiber.state = state;
  __sanitizer_start_switch_fiber(state == State::kDone ? nullptr : &fiber.fake_stack, scheduler_stack,
                                 scheduler_stack_size);
  swapcontext(&fiber.context, &scheduler);
  __sanitizer_finish_switch_fiber(fibers[current]->fake_stack, &scheduler_stack, &scheduler_stack_size);
}

void start() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
  (*body)();
  leave(State::kDone);
}

void enter(int index) {
  current = index;
  threadIdx.x = static_cast<unsigned>(index);
  Fiber& fiber = *fibers[index];
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.get(), kStack);
  swapcontext(&scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

int count(int first, int last, State state) {
  return static_cast<int>(std::count_if(fibers.begin() + first, fibers.begin() + last,
                                        [&](const auto& fiber) { return fiber->state == state; }));
}

void release(int first, int last) {
  for (int i = first; i < last; ++i) fibers[i]->state = State::kReady;
}

void run_block(const std::vector<int>& order) {
  const int threads = static_cast<int>(order.size());
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.state = State::kReady;
    fiber.shuffles = 0;
    makecontext(&fiber.context, start, 0);
  }
  while (count(0, threads, State::kDone) < threads) {
    for (int index : order) {
      if (fibers[index]->state == State::kReady) enter(index);
    }
    bool moved = false;
    for (int warp = 0; warp < threads; warp += kWarp) {
      const int end = std::min(warp + kWarp, threads);
      if (count(warp, end, State::kAtShuffle) == end - warp) {
        release(warp, end);
        moved = true;
      }
    }
    if (moved) continue;
    const int waiting = count(0, threads, State::kAtBarrier);
    if (waiting == threads) {
      release(0, threads);
    } else if (count(0, threads, State::kDone) < threads) {
      fail(waiting > 0 ? "a barrier that not every thread reaches" : "a shuffle that not every lane reaches");
    }
  }
}

}  // namespace

void barrier() { leave(State::kAtBarrier); }

std::uint64_t exchange(std::uint64_t bits, int lane_mask) {
  const int index = current;
  // Two slots: a lane may be at the next shuffle before another has read this one's.
  const int slot = fibers[index]->shuffles++ % 2;
  fibers[index]->shuffled[slot] = bits;
  leave(State::kAtShuffle);
  return fibers[index ^ lane_mask]->shuffled[slot];
}

void run_grid(std::int64_t blocks, int threads, const std::function<void()>& kernel) {
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  body = &kernel;
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = schedule.order == 1 ? threads - 1 - i : i;
  std::mt19937 random(7);
  for (std::int64_t i = schedule.first_block; i < blocks; ++i) {
    if (schedule.order == 2) std::shuffle(order.begin(), order.end(), random);
    const std::int64_t block = schedule.order == 1 ? blocks - 1 - (i - schedule.first_block) : i;
    blockIdx.x = static_cast<unsigned>(block);
    run_block(order);
  }
}

}  // namespace simulated
