// The linf_step kernel against its functor, for vector and scalar accesses and every tail. Buffers
// end where the operands end, so that a sanitizer sees an access behind them.

#include "cuda/linf_step.cuh"

#include <cstdio>
#include <cstring>
#include <vector>

namespace {

template <class T>
struct Buffer {
  // Elements `offset` to `offset + n`; what is before them must never change.
  Buffer(int64_t n, int offset, unsigned seed) : elements(n + offset), begin(offset) {
    for (T& element : elements) {
      seed = seed * 1664525u + 1013904223u;
      element = static_cast<T>(static_cast<float>(seed >> 24) / 128.0f - 1.0f);
    }
  }
  T* data() { return elements.data() + begin; }

  std::vector<T> elements;
  int begin;
};

template <class T, class A>
int failures(const char* name) {
  const A step_size = A(0.1), eps = A(0.3), low = A(-0.5), high = A(0.75);
  int failed = 0;
  for (const int64_t n : {1, 2, 7, 8, 9, 255, 256, 257, 2048, 2049, 4099}) {
    for (int offset = 0; offset < 4; ++offset) {
      Buffer<T> x_adv(n, 0, 1), grad(n, offset, 2), x(n, 0, 3), out(n, 0, 4);
      const ssp::LinfStepParams params{x_adv.data(), grad.data(), x.data(), out.data(), n,
                                       step_size,    eps,         low,      high};
      ssp::run_linf_step<T>(params, nullptr);
      for (int64_t i = 0; i < n; ++i) {
        const T expected = static_cast<T>(
            ssp::linf_step<A>(static_cast<A>(x_adv.data()[i]), static_cast<A>(grad.data()[i]),
                              static_cast<A>(x.data()[i]), step_size, eps, low, high));
        if (std::memcmp(&out.data()[i], &expected, sizeof(T)) == 0) continue;
        std::printf("%s: n %lld, offset %d: element %lld differs\n", name,
                    static_cast<long long>(n), offset, static_cast<long long>(i));
        ++failed;
        break;
      }
    }
  }
  return failed;
}

}  // namespace

int main() {
  return failures<float, float>("float") + failures<double, double>("double") +
         failures<__half, float>("half") + failures<__nv_bfloat16, float>("bfloat16");
}
