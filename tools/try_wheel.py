"""Is the installed package whole? Its CPU kernels against the specification, without a compiler or the source tree."""

import importlib.metadata
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

import ssp_fused
from ssp_fused.adversarial import pgd
from ssp_fused.data import load
from ssp_fused.models import sspnet_cifar


def outcome(backend: str) -> list[torch.Tensor]:
    """Logits, an attacked image and gradients of one network, in fp64."""
    torch.manual_seed(0)
    network = sspnet_cifar("ssp33", 1, width=8).double()
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(4)
    with ssp_fused.use_backend(backend):
        logits = network(x)
        wanted = [x, *network.parameters()]
        gradients = torch.autograd.grad(logits.square().sum(), wanted)
        attacked = pgd(
            network, x.detach(), labels, eps=0.1, step_size=0.1, steps=1, random_start=False
        )
    return [logits, attacked, *gradients, *(b for b in network.buffers() if b.is_floating_point())]


def main() -> None:
    """Check, and say what was checked."""
    packages = Path(sysconfig.get_path("purelib")).resolve()
    where = Path(ssp_fused.__file__).resolve()
    if packages not in where.parents:
        sys.exit(f"ssp_fused must come from {packages}, but is {where}")
    compilers = [name for name in ("c++", "g++", "clang++", "nvcc") if shutil.which(name)]
    if compilers:
        sys.exit(f"no compiler may be on the path, but there is {', '.join(compilers)}")
    if importlib.metadata.version("ssp_fused") != ssp_fused.__version__:
        sys.exit(f"the metadata must have version {ssp_fused.__version__}")
    reason = ssp_fused.available_backends()["cpu"]
    if reason is not None:
        sys.exit(f"the CPU kernels must load: {reason}")
    torch.testing.assert_close(outcome("cpu"), outcome("reference"), rtol=1e-9, atol=1e-12)
    load("digits")
    print(
        f"ssp_fused {ssp_fused.__version__} at {where.parent}: CPU kernels agree with the specification"
    )


if __name__ == "__main__":
    main()
