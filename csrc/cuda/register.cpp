#include "../register_ops.h"

STABLE_TORCH_LIBRARY_IMPL(ssp_fused, CUDA, m) { ssp::register_ops(m); }
