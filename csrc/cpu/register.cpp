#include "register_ops.h"

STABLE_TORCH_LIBRARY_IMPL(ssp_fused, CPU, m) {
  ssp::register_ops(m);
  m.impl("stage_norm_act.out", TORCH_BOX(&ssp::stage_norm_act_out));
  m.impl("norm_act_backward.out", TORCH_BOX(&ssp::norm_act_backward_out));
  m.impl("batch_norm_act_backward.out", TORCH_BOX(&ssp::batch_norm_act_backward_out));
}
