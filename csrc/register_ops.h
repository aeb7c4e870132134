#pragma once

#include "ops.h"

namespace ssp {

// Binds the ops to the schemas, which are declared in Python (_ops.py) before a library is loaded.
inline void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("stage_combine", TORCH_BOX(&stage_combine));
  m.impl("stage_moments", TORCH_BOX(&stage_moments));
  m.impl("stage_norm_act", TORCH_BOX(&stage_norm_act));
  m.impl("stage_batch_norm_act", TORCH_BOX(&stage_batch_norm_act));
  m.impl("stage_group_norm_act", TORCH_BOX(&stage_group_norm_act));
  m.impl("update_running_stats_", TORCH_BOX(&update_running_stats_));
  m.impl("norm_act_backward_reduce", TORCH_BOX(&norm_act_backward_reduce));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward));
  m.impl("batch_norm_act_backward", TORCH_BOX(&batch_norm_act_backward));
  m.impl("group_norm_act_backward", TORCH_BOX(&group_norm_act_backward));
  m.impl("channel_sum", TORCH_BOX(&channel_sum));
  m.impl("stage_dots", TORCH_BOX(&stage_dots));
  m.impl("linf_step", TORCH_BOX(&linf_step));
  m.impl("l2_step", TORCH_BOX(&l2_step));
}

}  // namespace ssp
