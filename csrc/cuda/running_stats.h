#pragma once

#include <cuda_runtime_api.h>

#include "operand.h"

namespace ssp {

// reference.update_running_stats_ of [uses, channels] means and variances, in one block.
struct RunningStatsParams {
  Operand running_mean;
  Operand running_var;
  int64_t* tracked;  // may be null
  Operand means;
  Operand variances;
  int64_t uses;
  int64_t channels;
  double count;
  Operand count_tensor;
  bool cumulative;  // the factor is 1 / tracked instead of the momentum
  double momentum;
};

cudaError_t launch_running_stats(const RunningStatsParams& params, cudaStream_t stream);

}  // namespace ssp
