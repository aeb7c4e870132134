"""The command line of the block benchmark, from end to end."""

import pytest
import torch

from benchmarks import blocks, contenders, results
from benchmarks.cases import DIRECTIONS
from benchmarks.plain import plain_stack


def test_blocks_from_end_to_end(tmp_path, capsys):
    arguments = [
        "--quick",
        "--schemes",
        "ssp22",
        "--device",
        "cpu",
        "--figure",
        "--out",
        str(tmp_path),
    ]
    assert blocks.main(arguments) == 0
    rows = [own for own, _ in results.read(tmp_path / "blocks.csv")]
    assert {r.direction for r in rows} == set(DIRECTIONS)
    printed = capsys.readouterr().out
    for direction in DIRECTIONS:
        own = {r.contender: r for r in rows if r.direction == direction}
        assert list(own) == list(contenders.NAMES)
        assert own["eager (control)"].status == own["copy"].status == "ok"
        assert own["convolutions"].over_convolutions == own["eager"].over_eager == 1
        timed = [r for r in own.values() if r.status == "ok"]
        assert all(r.p20_ms <= r.median_ms <= r.p80_ms and r.repeats == 3 for r in timed)
        assert all(r.gb_per_s > 0 and r.over_eager > 0 for r in timed)
        assert f"ssp22 x1 4x8x8x8 float32 contiguous, {direction}, cpu" in printed
        assert "eager (control)" in printed
        for r in own.values():
            assert r.status == "ok" or r.status.startswith("cannot run: "), r
            assert r.status == "ok" or r.status in printed
    assert (tmp_path / "blocks.svg").read_text().startswith("<svg ")
    file = str(tmp_path / "blocks.csv")
    assert blocks.main(["--compare", file, file]) == 0
    assert capsys.readouterr().out.count("1.000  within") == sum(r.status == "ok" for r in rows)


def test_a_wrong_contender_shows_in_the_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(
        contenders, "plain_stack", lambda *chain: plain_stack(*chain).apply(shifted_epsilon)
    )
    arguments = ["--quick", "--schemes", "euler", "--contenders", "eager", "--device", "cpu"]
    assert blocks.main([*arguments, "--out", str(tmp_path)]) == 2


def shifted_epsilon(module):
    if isinstance(module, torch.nn.BatchNorm2d):
        module.eps = 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "5"], "--repeats must be at least 30 here, got 5"),
        (["--shapes", "4x4"], "must be NxCxHxW, such as 128x16x32x32; got '4x4'"),
        (["--blocks", "0"], "must be a whole number from 1, got '0'"),
        (["--device", "cpu", "--graph"], "--graph needs a cuda device, got cpu"),
        (["--contenders", "nobody"], "invalid choice: 'nobody'"),
        (["--figure", "--contenders", "copy"], "--figure needs the contender 'eager'"),
        (["--compare", "no-such.csv", "no-such.csv"], "no-such.csv"),
    ],
)
def test_options_that_cannot_be(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        blocks.main([*arguments, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
