"""The arguments of the command line."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, available_backends, data, models, schemes
from .adversarial.ascent import BN_MODES
from .adversarial.ascent import NORMS as ATTACK_NORMS
from .adversarial.averaging import AVERAGES
from .adversarial.comparison import COMPARED_METHODS, MODELS, TABLES
from .adversarial.conversion import DATASETS
from .adversarial.evaluation import DEFAULT_ATTACKS
from .adversarial.growth import DEFAULT_ATTACK
from .adversarial.masking import MASKING_IMAGES
from .adversarial.methods import METHODS
from .adversarial.named import GRAMMAR
from .adversarial.networks import NETWORKS
from .adversarial.precision import PRECISIONS
from .adversarial.schedules import SCHEDULES
from .nn import NORMS

_CHECKPOINT = {
    "metavar": "RUN_DIR_OR_CHECKPOINT",
    "help": "a run, for its best epoch, or a checkpoint file",
}


class Parser(argparse.ArgumentParser):
    """Raises what is wrong with the arguments, in place of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _number(text: str) -> float:
    """A float; fractions like 8/255 too."""
    try:
        return float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError):
        return float(text)


def _numbers(text: str) -> list[float]:
    return [_number(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _selected(text: str) -> tuple[str, ...]:
    return tuple(_names(text))


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def make_parser() -> argparse.ArgumentParser:
    """The parser of `ssp-fused`: its result names the command, and holds what was given with it."""
    parser = Parser(prog="ssp-fused", description="Robust training of SSP networks.")
    parser.add_argument("--version", action="version", version=f"ssp-fused {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    info = commands.add_parser("info", help="versions, backends, how the binaries were built")
    info.set_defaults(command="info")
    _add_train(commands)
    _add_evaluate(commands)
    _add_growth(commands)
    _add_curve(commands)
    _add_history(commands)
    _add_convert(commands)
    _add_reproduce(commands)
    return parser


def _add_train(commands: Any) -> None:
    # Only what was given reaches TrainConfig, which has the defaults.
    train = commands.add_parser(
        "train",
        help="train a network, or go on with a run that was stopped",
        description="Train a network. Ctrl-C stops after the batch at hand; --resume goes on. With "
        "several processes: torchrun ... -m ssp_fused.cli train ...",
        argument_default=argparse.SUPPRESS,
    )
    train.set_defaults(command="train")
    add = train.add_argument
    add(
        "--resume",
        metavar="RUN_DIR",
        help="go on with this run, with its settings; only --data-dir, --device and --backend may "
        "differ",
    )
    known = f"{', '.join(data.names())}, or folder:PATH with images in class folders"
    add("--data", help=f"{known} (default: digits)")
    _add_data(train)
    add("--augment", help=f"{', '.join(data.AUGMENTATIONS)} (default: by data set)")
    add("--network", help=f"{', '.join(NETWORKS)} (default: by data set)")
    add(
        "--model",
        "--scheme",
        help=f"a published network ({', '.join(models.PUBLISHED_SCHEMES)}; default: ssp2), a "
        f"scheme ({', '.join((*schemes.names(), models.ADAPTIVE))}), or schemes separated by "
        "commas, one per group of blocks",
    )
    add("--blocks", type=int, help="SSP blocks per group (default: by data set)")
    add("--width", type=int, help="channels of the first group (default: by data set)")
    add("--norm", help=f"{', '.join(NORMS)} (default: batch)")
    _add_method(train)
    _add_optimization(train)
    _add_computation(train)
    add("--seed", type=int, help="of initialization, order and attacks (default: 0)")
    add("--limit", type=int, metavar="N", help="train on N images only")
    add("--out", metavar="DIR", help="run folder (default: runs/DATA-MODEL-METHOD-seedSEED)")
    add("--save-every", type=int, metavar="N", help="save every N steps too, not only epochs")
    add("--tensorboard", action="store_true", help="write each epoch's scalars for TensorBoard")
    _add_place(train)


def _add_method(train: argparse.ArgumentParser) -> None:
    add = train.add_argument
    add("--method", help=f"{', '.join(METHODS)} (default: pgd)")
    add("--eps", type=_number, help="radius of the l-infinity attack, pixels in [0, 1]")
    add("--step-size", type=_number, help="length of a PGD step")
    add("--steps", type=int, help="PGD steps")
    add(
        "--alpha",
        type=_number,
        help="the step of fgsm-rs (default: 1.25 eps), n-fgsm and free (default: eps)",
    )
    add("--beta", type=_number, help="weight of the divergence (default: trades 6, mart 5)")
    add("--noise", type=_number, help="radius of n-fgsm's noise over eps (default: 2)")
    add("--replays", type=int, help="times that free trains on a batch (default: 8)")
    add("--label-smoothing", type=_number, help="of the cross-entropy (default: 0)")
    add("--bn-mode", help=f"of the network in the attack: {', '.join(BN_MODES)} (default: eval)")
    add("--early-stop", action="store_true", help="pgd: attack no further than misclassification")
    add("--graph", action="store_true", help="run the attack as a CUDA graph")


def _add_optimization(train: argparse.ArgumentParser) -> None:
    add = train.add_argument
    add("--epochs", type=int, help="passes over the training images (default: 10)")
    add("--batch-size", type=int, help="images per step, of all processes (default: 128)")
    add("--accumulate", type=int, metavar="K", help="take each process's share in K parts")
    add("--lr", type=_number, help="largest learning rate (default: 0.1)")
    add("--schedule", help=f"{', '.join(SCHEDULES)} (default: cosine)")
    add(
        "--milestones",
        type=_integers,
        metavar="EPOCHS",
        help="of multistep, separated by commas (default: 40, 70 and 90%% of the epochs)",
    )
    add("--average", help=f"of the weights: {', '.join(AVERAGES)} (default: none)")
    add("--ema-decay", type=_number, help="a step (default: 0.999)")
    add("--swa-start", type=int, metavar="EPOCH", help="(default: after 75%% of the epochs)")


def _add_computation(train: argparse.ArgumentParser) -> None:
    add = train.add_argument
    add("--amp", help=f"autocast: {', '.join(PRECISIONS)} (default: none)")
    add("--channels-last", action="store_true", help="lay images and weights out channels last")
    add("--compile", action="store_true", help="torch.compile what surrounds the stacks of blocks")
    add("--sync-bn", action="store_true", help="batch statistics over all processes")


def _add_evaluate(commands: Any) -> None:
    evaluation = commands.add_parser(
        "evaluate",
        help="accuracy on test images, clean and under attacks",
        description="Accuracy of a network on test images: clean, under each attack, and the share "
        "of images that withstand every one (worst); 95%% intervals; signs of gradient masking. "
        "On several processes: torchrun ... -m ssp_fused.cli evaluate ...",
        argument_default=argparse.SUPPRESS,
    )
    evaluation.set_defaults(command="evaluate")
    evaluation.add_argument("checkpoint", type=Path, **_CHECKPOINT)
    _add_radius(evaluation)
    evaluation.add_argument(
        "--attack",
        type=_names,
        default=list(DEFAULT_ATTACKS),
        metavar="NAMES",
        help=f"separated by commas: {GRAMMAR} (default: {','.join(DEFAULT_ATTACKS)})",
    )
    evaluation.add_argument(
        "--transfer",
        action="store_true",
        help="also classify images attacked on the reference backend by the run's, and back",
    )
    evaluation.add_argument(
        "--masking-images",
        type=int,
        metavar="N",
        help=f"look for gradient masking on the first N images (default: {MASKING_IMAGES}; 0: no)",
    )
    _add_test(evaluation)


def _add_growth(commands: Any) -> None:
    growth = commands.add_parser(
        "growth",
        help="how much each group of blocks amplifies an attack's perturbation",
        description="Mean over test images of the perturbation's norm behind a group of blocks, "
        "over that before it, and the largest such ratio, a lower bound of the group's Lipschitz "
        "constant; p = 1 and 2.",
        argument_default=argparse.SUPPRESS,
    )
    growth.set_defaults(command="growth")
    growth.add_argument("runs", type=Path, nargs="+", **_CHECKPOINT)
    _add_attack(growth)
    growth.add_argument(
        "--lipschitz",
        action="store_true",
        help="also the norm of each group's Jacobian at the images, by power iteration",
    )
    _add_figure(growth)
    _add_radius(growth)
    _add_test(growth)


def _add_curve(commands: Any) -> None:
    curve = commands.add_parser(
        "curve",
        help="accuracy over the radius of an attack",
        description="Accuracy on test images, clean and under one attack at several radii.",
        argument_default=argparse.SUPPRESS,
    )
    curve.set_defaults(command="curve")
    curve.add_argument("runs", type=Path, nargs="+", **_CHECKPOINT)
    curve.add_argument(
        "--radii",
        type=_numbers,
        required=True,
        help="of the attack, increasing, separated by commas, e.g. 2/255,4/255,8/255",
    )
    _add_attack(curve)
    _add_norm(curve)
    curve.add_argument(
        "--step-size",
        type=_number,
        help="length of a PGD step at every radius (default: the run's share of the radius)",
    )
    _add_figure(curve)
    _add_test(curve)


def _add_history(commands: Any) -> None:
    history = commands.add_parser(
        "history",
        help="loss and accuracies of training runs over their epochs",
        description="Loss, learning rate and validation accuracies of training runs, an epoch a "
        "line.",
        argument_default=argparse.SUPPRESS,
    )
    history.set_defaults(command="history")
    history.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="a training run")
    _add_figure(history)
    _add_report(history)


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="checkpoints of the published code into ours, and back",
        description="Write a published checkpoint as one of ssp_fused, or a run's as a published "
        "one: which, is read off IN. Checked before OUT is written.",
        argument_default=argparse.SUPPRESS,
    )
    convert.set_defaults(command="convert")
    add = convert.add_argument
    add("source", metavar="IN", type=Path, help="published checkpoint, or RUN_DIR_OR_CHECKPOINT")
    add("target", metavar="OUT", type=Path, help="the file to write")
    add("--dataset", help=f"of a published IN: {', '.join(DATASETS)} (default: cifar10)")
    add(
        "--model",
        help=f"of a published IN: {', '.join(models.PUBLISHED_SCHEMES)}, or one per group, "
        "separated by commas (default: as the file says, else ssp2)",
    )
    add("--norm", help=f"of a published IN: {', '.join(NORMS)} (default: as the file says)")
    add("--num-groups", type=int, help="of group norms (default: min(32, channels))")
    add("--force", action="store_true", help="replace OUT if it exists")
    _add_place(convert)


def _add_reproduce(commands: Any) -> None:
    # Only what was given reaches Comparison, which has the defaults: the whole protocol.
    reproduce = commands.add_parser(
        "reproduce",
        help="the paper's comparison of SSP networks with ResNets",
        description="Train and attack every network by every method from every seed; end in one "
        "table. Stopped at any time, the same command goes on; several can work in one folder. "
        "What departs from the protocol is listed in the table's caption.",
        argument_default=argparse.SUPPRESS,
    )
    reproduce.set_defaults(command="reproduce")
    add = reproduce.add_argument
    add("--table", choices=TABLES, required=True, help="of which data set")
    add("--data", metavar="folder:PATH", help="its images in class folders, if not its own files")
    add("--data-dir", metavar="DIR", help="folder of the data's files")
    add("--download", action="store_true", help="fetch the data if it is not there")
    add("--models", type=_selected, metavar="NAMES", help=f"(default: {','.join(MODELS)})")
    add(
        "--methods",
        type=_selected,
        metavar="NAMES",
        help=f"of training (default: {','.join(COMPARED_METHODS)})",
    )
    add("--seeds", type=_integers, metavar="NUMBERS", help="(default: 0,1,2)")
    add(
        "--equal-evaluations",
        action="store_true",
        help="also ResNets that evaluate F as often as the SSP networks",
    )
    add("--blocks", type=int, help="per group (default: the published number)")
    add("--width", type=int, help="channels of the first group (default: the published number)")
    add("--steps", type=int, help="of the training attack (default: 7)")
    add("--epochs", type=int, help="(default: 200)")
    add("--limit", type=int, metavar="N", help="train on N images only")
    add("--test-images", type=int, metavar="N", help="clean and PGD-20: the first N only")
    add("--autoattack-images", type=int, metavar="N", help="the same; 0: no AutoAttack")
    add("--growth-images", type=int, metavar="N", help="the same")
    add("--jobs", type=int, metavar="N", help="processes that share the threads (default: 1)")
    add("--out", metavar="DIR", help="folder of the results (default: runs/reproduce-TABLE)")
    _add_place(reproduce)


def _add_test(parser: argparse.ArgumentParser) -> None:
    """Options of `EvaluationSettings`, which has the defaults, and where results go."""
    add = parser.add_argument
    add("--last", action="store_true", help="a run's last state, not the best on validation")
    add("--data", help="test images of another data set (default: the run's)")
    _add_data(parser)
    add("--batch-size", type=int, help="images at once (default: 500)")
    add("--seed", type=int, help="of the attacks' random numbers (default: 0)")
    add("--limit", type=int, metavar="N", help="the first N test images only")
    _add_place(parser)
    _add_report(parser)


def _add_norm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--norm", choices=ATTACK_NORMS, help="of the attacks (default: linf)")


def _add_radius(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_norm(parser)
    add("--eps", type=_number, help="radius of the attacks (default: the run's; l2: none)")
    add(
        "--step-size", type=_number, help="length of a PGD step (default: the run's; l2: its share)"
    )


def _add_attack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--attack", default=DEFAULT_ATTACK, help=f"{GRAMMAR} (default: {DEFAULT_ATTACK})"
    )


def _add_figure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw it; png, pdf or svg")


def _add_report(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--out", type=Path, metavar="FILE", help="write the JSON to a file")


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data-dir", metavar="DIR", help="folder of the data's files")
    add("--download", action="store_true", help="fetch the data if it is not there")
    add("--image-size", type=int, metavar="N", help="scale images to N x N (folder, tiny-imagenet)")


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    names = ("auto", *available_backends())
    parser.add_argument("--backend", choices=names, help="implementation of the layers")
