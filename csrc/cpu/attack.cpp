// reference.linf_step and l2_step.

#include "math/attack.h"

#include <cmath>

#include "ops.h"
#include "partition.h"

namespace ssp {
namespace {

// The operands of a step, dense in the layout of x_adv.
struct StepArguments {
  StepArguments(const char* op, const Tensor& x_adv_tensor, const Tensor& grad_tensor,
                const Tensor& x_tensor)
      : rows(is_rows(x_adv_tensor)) {
    check_activation(op, "x_adv", x_adv_tensor);
    check_like(op, "grad", grad_tensor, x_adv_tensor);
    check_like(op, "x", x_tensor, x_adv_tensor);
    check_mixture(op, "grad", grad_tensor.scalar_type(), "x_adv", x_adv_tensor.scalar_type());
    check_mixture(op, "x", x_tensor.scalar_type(), "x_adv", x_adv_tensor.scalar_type());
    x_adv = dense(x_adv_tensor, rows);
    grad = dense(grad_tensor, rows);
    x = dense(x_tensor, rows);
    result = ssp::empty_like(x_adv, rows);
  }
  bool rows;
  Tensor x_adv;
  Tensor grad;
  Tensor x;
  Tensor result;
};

template <class A>
struct StepOperands {
  explicit StepOperands(const StepArguments& arguments)
      : x_adv(arguments.x_adv), grad(arguments.grad), x(arguments.x), result(arguments.result) {}
  Operand<A> x_adv;
  Operand<A> grad;
  Operand<A> x;
  Operand<A> result;
};

template <class A>
struct StepScratch {
  alignas(64) A x_adv[kTile];
  alignas(64) A grad[kTile];
  alignas(64) A x[kTile];
  alignas(64) A result[kTile];
};

// Calls f(offset, n) for tiles of [begin, end).
template <class F>
void for_each_tile(int64_t begin, int64_t end, const F& f) {
  for (int64_t offset = begin; offset < end; offset += kTile) {
    f(offset, std::min(kTile, end - offset));
  }
}

}  // namespace

Tensor linf_step(const Tensor& x_adv, const Tensor& grad, const Tensor& x, double step_size,
                 double eps, double low, double high) {
  const StepArguments arguments("linf_step", x_adv, grad, x);
  with_arithmetic(x_adv.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const StepOperands<A> step(arguments);
    const int64_t numel = x_adv.numel();
    parallel_ranges((numel + kTile - 1) / kTile, numel, [&](int64_t first, int64_t last) {
      StepScratch<A> scratch;
      for_each_tile(first * kTile, std::min(last * kTile, numel), [&](int64_t offset, int64_t n) {
        A* result = step.result.target(offset, scratch.result);
        tiles<A>().linf_step(
            step.x_adv.load(offset, n, scratch.x_adv), step.grad.load(offset, n, scratch.grad),
            step.x.load(offset, n, scratch.x), static_cast<A>(step_size), static_cast<A>(eps),
            static_cast<A>(low), static_cast<A>(high), result, n);
        step.result.store(offset, result, n);
      });
    });
  });
  return arguments.result;
}

Tensor l2_step(const Tensor& x_adv, const Tensor& grad, const Tensor& x, double step_size,
               double eps, double low, double high) {
  const StepArguments arguments("l2_step", x_adv, grad, x);
  const Extent e = extent_of(arguments.x_adv, arguments.rows);
  with_arithmetic(x_adv.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const StepOperands<A> step(arguments);
    const int64_t elements = e.c * e.s;
    parallel_ranges(e.n, e.numel(), [&](int64_t first, int64_t last) {
      StepScratch<A> scratch;
      std::vector<A> displacement(elements);
      for (int64_t sample = first; sample < last; ++sample) {
        const int64_t begin = sample * elements;
        const int64_t end = begin + elements;
        double square = 0;
        for_each_tile(begin, end, [&](int64_t offset, int64_t n) {
          const A* g = step.grad.load(offset, n, scratch.grad);
          square += tiles<A>().run_dot(g, g, n);
        });
        const A length = static_cast<A>(std::sqrt(square));
        square = 0;
        for_each_tile(begin, end, [&](int64_t offset, int64_t n) {
          A* d = displacement.data() + (offset - begin);
          tiles<A>().l2_displacement(
              step.x_adv.load(offset, n, scratch.x_adv), step.grad.load(offset, n, scratch.grad),
              step.x.load(offset, n, scratch.x), static_cast<A>(step_size), length, d, n);
          square += tiles<A>().run_dot(d, d, n);
        });
        const double distance = std::sqrt(square);
        const A shrink = distance > eps ? static_cast<A>(eps / distance) : A(1);
        for_each_tile(begin, end, [&](int64_t offset, int64_t n) {
          A* result = step.result.target(offset, scratch.result);
          tiles<A>().l2_projection(step.x.load(offset, n, scratch.x),
                                   displacement.data() + (offset - begin), shrink,
                                   static_cast<A>(low), static_cast<A>(high), result, n);
          step.result.store(offset, result, n);
        });
      }
    });
  });
  return arguments.result;
}

}  // namespace ssp
