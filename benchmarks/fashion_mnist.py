"""README's Fashion-MNIST table: `python -m benchmarks.fashion_mnist [--out DIR]`.

PGD-7-trains SSP networks beside ResNets with as many parameters, and with as many evaluations of F, on part of
Fashion-MNIST; evaluates each on the whole test set. One seed and few epochs, under half an hour on one CPU core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ssp_fused import __version__, _extension
from ssp_fused.adversarial import TrainConfig, evaluate, fit, load_checkpoint, named_attacks
from ssp_fused.adversarial.checkpoint import BEST
from ssp_fused.adversarial.run import EVALUATION_BATCH
from ssp_fused.data import load

from .hardware import commit, processor

# Title, model, blocks, evaluations of F in a forward pass.
NETWORKS = (
    ("ResNet twin", "res", 3, 3),
    ("ResNet, equal F", "res", 6, 6),
    ("SSP-2", "ssp2", 3, 6),
    ("ResNet, equal F", "res", 9, 9),
    ("SSP-3", "ssp3", 3, 9),
)
EPS, STEP, STEPS = 0.1, 0.02, 7
SETTINGS = {"width": 16, "epochs": 4, "limit": 10_000, "seed": 0, "batch_size": 128}


def main() -> None:
    """Train, evaluate, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/fashion-mnist"))
    parser.add_argument("--data-dir", help="folder of the IDX files")
    options = parser.parse_args()
    rows = []
    test = load("fashion-mnist", options.data_dir).test
    for title, model, blocks, evaluations in NETWORKS:
        folder = options.out / f"{model}-{blocks}"
        if not (folder / BEST).exists():
            config = TrainConfig(
                data="fashion-mnist",
                data_dir=options.data_dir,
                model=model,
                blocks=blocks,
                method="pgd",
                eps=EPS,
                step_size=STEP,
                steps=STEPS,
                out=str(folder),
                **SETTINGS,
            )
            fit(config)
        network, _, _ = load_checkpoint(folder / BEST)
        attacks = named_attacks(("fgsm", "pgd-20"), eps=EPS, step_size=STEP)
        accuracy = evaluate(network, test.batches(EVALUATION_BATCH), attacks)
        parameters = sum(p.numel() for p in network.parameters())
        row = {"network": title, "blocks": blocks, "parameters": parameters, "F": evaluations}
        rows.append({**row, **accuracy})
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "settings": {**SETTINGS, "eps": EPS, "step_size": STEP, "steps": STEPS},
        "hardware": f"{processor()}, {torch.get_num_threads()} threads",
        "instruction_set": _extension.cpu_isa(),
        "versions": {"ssp_fused": __version__, "torch": torch.__version__},
        "commit": commit(),
        "test_images": len(test),
        "rows": rows,
    }
    (options.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n| network | blocks | parameters | evaluations of F | clean | FGSM | PGD-20 |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        shares = (f"{row[key]:.1%}" for key in ("clean", "fgsm", "pgd-20"))
        cells = (row["network"], row["blocks"], f"{row['parameters']:,}", row["F"], *shares)
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
