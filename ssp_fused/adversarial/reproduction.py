"""Running a comparison: cell after cell, by one process or several, going on after any stop."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from .._allocator import keep_freed_memory
from ..data import ImageSplits, load
from .checkpoint import LAST
from .comparison import Cell, Comparison, differences
from .comparison_table import (
    GROWTH,
    LIMIT,
    REPORTS,
    image_limit,
    is_complete,
    is_made,
    wanted_reports,
    write_tables,
)
from .config import TrainConfig
from .evaluation import evaluate_checkpoint
from .files import write_json
from .growth import checkpoint_growth
from .interrupts import TrainingInterrupted
from .locks import file_lock
from .named import named_attack
from .run import CONFIG, fit, resume

SETTINGS, _LOCK = "settings.json", ".lock"


def reproduce(comparison: Comparison, *, jobs: int = 1) -> dict[str, Any]:
    """Train and measure the cells of a comparison that are not complete, and write its table.

    Stopped at any time, the same call goes on; at most the work since a run's last saved epoch, or
    one report, is done again. Several calls can work in the same folder at once: a cell is worked
    on by one process, which lets go of it when it dies. Models, methods and seeds can be added to a
    folder later, and reports can be made again on another number of images.

    Files in the folder: settings.json; seedS/METHOD-MODEL-BLOCKS/ for each cell, with its training
    run (as `fit`), evaluation.json, autoattack.json and growth.json; table.md, table.json and
    table.csv, of the cells complete so far.

    Args:
        comparison: what to compare.
        jobs: processes, which share torch's threads among them.

    Returns:
        The table, as `comparison_table.summary`.

    Raises:
        ValueError: a bad setting; a folder of runs trained otherwise, or of something else.
        ImportError: AutoAttack is wanted and not installed.
        FloatingPointError: a run diverged.
        TrainingInterrupted: after Ctrl-C.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    for report in wanted_reports(comparison):
        # An attack that cannot be made is found out before the training.
        named_attack(REPORTS[report], eps=1.0, step_size=1.0)
    _claim(comparison)
    if jobs == 1:
        _work(comparison, progress=True)
    else:
        _work_in_processes(comparison, jobs)
    return _locked_tables(comparison)


def _claim(comparison: Comparison) -> None:
    """Make the folder this comparison's, or find that it is.

    Raises:
        ValueError: it is another one's.
    """
    folder = comparison.folder
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder / _LOCK, wait=True):
        found = folder / SETTINGS
        if not found.exists():
            if any(path.name != _LOCK for path in folder.iterdir()):
                raise ValueError(f"out: {folder} holds something else than a comparison")
            write_json(found, comparison.training_settings())
            return
        try:
            # A setting that came later had its default before.
            theirs = {**TrainConfig().to_dict(), **json.loads(found.read_text())}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{found}: not the settings of a comparison ({error})") from error
    mine = comparison.training_settings()
    different = differences(mine, {name: theirs.get(name) for name in mine})
    if different:
        told = "; ".join(f"{name} {old}, not {new}" for name, (new, old) in different.items())
        raise ValueError(f"out: {folder} holds a comparison with other settings: {told}")


def _work(comparison: Comparison, *, progress: bool) -> None:
    """Do every cell that is not complete and that no other process works on."""
    splits = None
    for cell in comparison.cells():
        cell.folder.mkdir(parents=True, exist_ok=True)
        with file_lock(cell.folder / _LOCK, wait=False) as held:
            if not held or is_complete(comparison, cell):
                continue
            if splits is None:
                config = comparison.training(cell)
                splits = load(config.data, config.data_dir, download=config.download)
            _do(comparison, cell, splits, progress)
        _locked_tables(comparison)


def _locked_tables(comparison: Comparison) -> dict[str, Any]:
    # Reading and writing under one lock: no older table comes after a newer one.
    with file_lock(comparison.folder / _LOCK, wait=True):
        return write_tables(comparison)


def _do(comparison: Comparison, cell: Cell, splits: ImageSplits, progress: bool) -> None:
    """Train a cell's network, as far as that is not done, and make the reports that it lacks."""
    name = cell.folder.relative_to(comparison.folder)
    print(f"{name}: training", flush=True)
    try:
        if (cell.folder / LAST).is_file():
            resume(
                cell.folder,
                splits,
                device=comparison.device,
                backend=comparison.backend,
                progress=progress,
            )
        else:
            # Of a run that was stopped before its first save.
            (cell.folder / CONFIG).unlink(missing_ok=True)
            fit(comparison.training(cell), splits, progress=progress)
    except TrainingInterrupted as interrupt:
        raise TrainingInterrupted(
            f"stopped in {name}, state saved; the same command goes on"
        ) from interrupt
    for report in wanted_reports(comparison):
        if not is_made(comparison, cell, report):
            print(f"{name}: {Path(report).stem}", flush=True)
            write_json(cell.folder / report, _made(report, comparison, cell.folder))


def _made(report: str, comparison: Comparison, folder: Path) -> dict[str, Any]:
    attack, limit = REPORTS[report], image_limit(comparison, report)
    settings = comparison.evaluation(limit)
    if report == GROWTH:
        found = checkpoint_growth(folder, attack, settings)
    else:
        found = evaluate_checkpoint(folder, (attack,), settings, masking_images=0)
    return {**found, LIMIT: limit}


def _work_in_processes(comparison: Comparison, jobs: int) -> None:
    """`_work` in several processes, which stop when this one does, or when one of them fails."""
    context = get_context("spawn")
    threads = max(torch.get_num_threads() // jobs, 1)
    processes, connections = [], []
    try:
        for _ in range(jobs):
            here, there = context.Pipe()
            connections.append(here)
            process = context.Process(target=_job, args=(comparison, threads, there))
            process.start()
            processes.append(process)
            # Else the end of the process would not be seen.
            there.close()
        _wait_for(connections)
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join()


def _wait_for(connections: Sequence[Connection]) -> None:
    """Wait for the word of every job, and raise what one of them has raised."""
    silent = list(connections)
    while silent:
        for connection in wait(silent):
            silent.remove(connection)
            try:
                error = connection.recv()
            except EOFError:
                raise RuntimeError("a job was killed; the same command goes on") from None
            if error is not None:
                raise error


def _job(comparison: Comparison, threads: int, parent: Connection) -> None:
    keep_freed_memory()
    torch.set_num_threads(threads)
    threading.Thread(target=_stop_with_parent, args=(parent,), daemon=True).start()
    error = None
    try:
        _work(comparison, progress=False)
    except BaseException as raised:  # it is raised where the job was begun
        error = raised
    with suppress(BrokenPipeError):
        parent.send(error)


def _stop_with_parent(parent: Connection) -> None:
    """Stop, as after Ctrl-C, when the other end is closed, be it by the end of its process."""
    try:
        parent.recv()
    except (EOFError, ConnectionError):
        os.kill(os.getpid(), signal.SIGTERM)
