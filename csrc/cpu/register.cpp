// The CPU implementations of ssp_fused::*. The schemas are declared in Python (_ops.py), before
// this library is loaded.

#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(ssp_fused, CPU, m) {
  m.impl("stage_combine", TORCH_BOX(&ssp::stage_combine));
  m.impl("stage_moments", TORCH_BOX(&ssp::stage_moments));
  m.impl("stage_norm_act", TORCH_BOX(&ssp::stage_norm_act));
  m.impl("stage_batch_norm_act", TORCH_BOX(&ssp::stage_batch_norm_act));
  m.impl("stage_group_norm_act", TORCH_BOX(&ssp::stage_group_norm_act));
  m.impl("update_running_stats_", TORCH_BOX(&ssp::update_running_stats_));
  m.impl("norm_act_backward_reduce", TORCH_BOX(&ssp::norm_act_backward_reduce));
  m.impl("norm_act_backward", TORCH_BOX(&ssp::norm_act_backward));
  m.impl("batch_norm_act_backward", TORCH_BOX(&ssp::batch_norm_act_backward));
  m.impl("group_norm_act_backward", TORCH_BOX(&ssp::group_norm_act_backward));
  m.impl("channel_sum", TORCH_BOX(&ssp::channel_sum));
  m.impl("stage_dots", TORCH_BOX(&ssp::stage_dots));
  m.impl("linf_step", TORCH_BOX(&ssp::linf_step));
  m.impl("l2_step", TORCH_BOX(&ssp::l2_step));
}
