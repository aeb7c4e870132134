#include "register_ops.h"

STABLE_TORCH_LIBRARY_IMPL(ssp_fused, CPU, m) { ssp::register_ops(m); }
