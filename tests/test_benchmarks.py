"""The benchmark harness: who is refused, what is counted, what is written. Times themselves are not judged."""

import csv
import dataclasses
import itertools
import subprocess

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ssp_fused
from benchmarks import (
    blocks,
    contenders,
    hardware,
    harness,
    judge,
    memory,
    results,
    timing,
    traffic,
)
from benchmarks.cases import CONTIGUOUS, DIRECTIONS, DTYPES, INPUT_GRADIENT, TRAIN, Case
from benchmarks.plain import RecordedSigns, plain_stack
from ssp_fused import schemes
from ssp_fused.nn import SSPBlock, SSPStack

CPU = torch.device("cpu")
needs_cpu_kernels = pytest.mark.skipif(
    ssp_fused.available_backends()["cpu"] is not None,
    reason=f"cpu backend: {ssp_fused.available_backends()['cpu']}",
)
FEW = harness.Settings(repeats=2, warmup=0)


def small_case(direction=TRAIN, *, dtype="float64", scheme="ssp22", count=1, shape=(3, 4, 5, 6)):
    return Case(scheme, shape, count, dtype, CONTIGUOUS, direction, CPU)


def measured(case, entrants):
    task = harness.Task("test", case.name, case.direction, CPU, case.logical_bytes(), entrants)
    return {row.contender: row for row in harness.measure(task, FEW)}


# --- who is refused ---------------------------------------------------------------------------------------------


class Faulty(torch.nn.Module):
    """A right network's output, altered."""

    def __init__(self, case, alter):
        super().__init__()
        self.inner = plain_stack(case.shape[1], case.scheme, case.blocks).to(DTYPES[case.dtype])
        self.alter = alter

    def forward(self, x):
        return self.alter(self.inner, x)


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g * (1 + 1e-12)


def moved_statistics(network, x):
    y = network(x)
    network[0].norm2.running_mean.data.add_(1e-12)
    return y


FAULTS = {
    "none": (lambda network, x: network(x), None),
    "y": (lambda network, x: network(x) * (1 + 1e-12), " y: "),
    "NaN": (lambda network, x: network(x) + float("nan"), " y: "),
    "dx": (lambda network, x: network(ScaledGradient.apply(x)), " dx: "),
    "running_mean": (moved_statistics, "norm2.running_mean: "),
}


def entrant(case, alter, *, tells_signs):
    """A contender that alters a right network's work, and its signs are known or not."""

    def build():
        faulty = Faulty(case, alter)
        network = contenders.placed(faulty.inner, case, CONTIGUOUS)
        recorder = RecordedSigns if tells_signs else None
        rule = judge.Judge(case)
        return contenders.network_work("altered", case, rule, network, faulty, CONTIGUOUS, recorder)

    return harness.Contender("altered", build)


@pytest.mark.parametrize("tells_signs", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_wrong_contender_is_refused(direction, fault, tells_signs):
    alter, named = FAULTS[fault]
    case = small_case(direction)
    row = measured(case, [entrant(case, alter, tells_signs=tells_signs)])["altered"]
    if named is None:
        assert row.status == "ok" and row.median_ms > 0
        assert row.checked == (judge.OWN_SIGNS if tells_signs else judge.AWAY_FROM_KINKS)
    else:
        assert row.status.startswith("wrong: altered") and named in row.status
        assert "exceeds" in row.status
        assert row.median_ms is None and row.repeats is None and row.over_eager is None


@needs_cpu_kernels
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_wrong_fused_layer_is_refused_and_the_others_are_timed(direction, monkeypatch):
    wrong = lambda channels, scheme: SSPBlock(channels, scheme, step_size=1 + 1e-5)  # noqa: E731
    monkeypatch.setattr(contenders, "SSPBlock", wrong)
    case = small_case(direction, dtype="float32")
    rows = measured(case, contenders.contenders(case, ["eager", "fused-cpu"]))
    assert rows["fused-cpu"].status.startswith("wrong: fused-cpu y: error")
    assert rows["fused-cpu"].median_ms is None
    assert rows["eager"].status == "ok" and rows["eager"].over_eager == 1


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_fused_layers_are_right_and_tell_their_signs(direction, dtype):
    case = small_case(direction, dtype=dtype, scheme="ssp33", count=2)
    row = measured(case, contenders.contenders(case, ["fused-cpu"]))["fused-cpu"]
    assert (row.status, row.checked) == ("ok", judge.OWN_SIGNS)


@needs_cpu_kernels
def test_an_exact_zero_is_right_though_autograd_finds_noise():
    case = small_case(scheme="ssp54", count=3, shape=(4, 8, 8, 8))
    rule = judge.Judge(case)
    noise = rule._eager_results(0, "planes", False)["d 2.conv1.bias"]
    (truth,) = rule._truth.values()
    assert 0 < noise.abs().max() < 1e-13 and not truth["d 2.conv1.bias"].any()
    assert contenders.contenders(case, ["fused-cpu"])[0].build().check() == judge.OWN_SIGNS


def test_a_missing_tensor_is_an_error():
    case = small_case()
    rule = judge.Judge(case)
    whole = contenders.contenders(case, ["eager"])[0]

    def without_bias(seed, away):
        found = dict(rule._eager_results(seed, "planes", True))
        del found["d 0.conv2.bias"]
        return found

    assert whole.build().check() == judge.OWN_SIGNS
    with pytest.raises(AssertionError, match=r"has no d 0\.conv2\.bias"):
        rule.check("partial", without_bias)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_away_from_kinks_have_the_same_signs_in_every_dtype(dtype, direction):
    case = small_case(direction, dtype=dtype, scheme="ssp33", count=3, shape=(4, 8, 8, 8))
    signs = []
    for used in (dtype, "float64"):
        network = plain_stack(8, "ssp33", 3).to(DTYPES[used])
        case.prepare(network, case.state(1, away_from_kinks=True))
        with RecordedSigns(network) as recorded:
            judge.step(network, *case.inputs(1, DTYPES[used], CONTIGUOUS))
        signs.append(recorded.signs)
    assert len(signs[0]) == case.activations == 18
    assert all(torch.equal(a, b) for a, b in zip(*signs, strict=True))
    assert {bool(s.any()) and not bool(s.all()) for s in signs[0]} == {True}


def test_values_that_come_near_a_kink_are_noticed(monkeypatch):
    case = small_case()
    near = case.state(0)
    monkeypatch.setattr(Case, "state", lambda self, seed, **_: near)
    with pytest.raises(RuntimeError, match="came within"):
        judge.Judge(case)._eager_results(0, "planes", True)


def test_what_cannot_run_is_listed_with_its_reason():
    def broken():
        raise ZeroDivisionError("by nothing\nat all")

    case = small_case()
    rows = measured(
        case,
        [
            *contenders.contenders(case, compiling=False),
            harness.Contender("broken", broken),
        ],
    )
    assert set(rows) == {*contenders.NAMES, "broken"}
    assert rows["broken"].status == "cannot run: ZeroDivisionError: by nothing"
    reason = ssp_fused.available_backends()["triton"] or "it serves cuda tensors, got cpu"
    assert rows["fused-triton"].status == f"cannot run: {reason}"
    assert rows["compile-default"].status == "cannot run: torch.compile was left out"
    assert rows["apex"].status.startswith("cannot run: ")
    for name in ("eager", "eager (control)", "eager-channels-last", "convolutions", "copy"):
        assert rows[name].status == "ok", rows[name]
    assert rows["convolutions"].checked == rows["copy"].checked == ""
    assert {row.bytes for row in rows.values()} == {case.logical_bytes()}
    with pytest.raises(ValueError, match=r"unknown contender egaer; known: eager, .*copy"):
        contenders.contenders(case, ["egaer"])


@pytest.mark.parametrize("scheme", schemes.names())
def test_the_plain_stack_is_the_reference(scheme):
    plain = plain_stack(3, scheme, 2).double()
    stack = SSPStack(*(SSPBlock(3, scheme, dtype=torch.float64) for _ in range(2)))
    assert plain.state_dict().keys() == stack.state_dict().keys()
    stack.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    with ssp_fused.use_backend("reference"):
        torch.testing.assert_close(plain(x), stack(x), rtol=1e-12, atol=1e-12)


def test_the_plain_stack_makes_no_needless_pass():
    """ssp33: x + F; then twice u + F, a product, a sum."""

    class Passes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name().startswith(("aten::add.", "aten::mul.")):
                seen.append(func.name())
            return func(*args, **(kwargs or {}))

    seen = []
    network = plain_stack(3, "ssp33", 1).eval()
    with Passes():
        network(torch.randn(2, 3, 4, 5))
    assert len(seen) == 1 + 3 + 3


@needs_cpu_kernels
def test_signs_that_do_not_fit_are_not_used(monkeypatch):
    """Tiles of a batch tell them one tile after another."""
    monkeypatch.setattr(SSPStack, "tile", 1)
    case = small_case(INPUT_GRADIENT, dtype="float32")
    row = measured(case, contenders.contenders(case, ["fused-cpu"]))["fused-cpu"]
    assert (row.status, row.checked) == ("ok", judge.AWAY_FROM_KINKS)


def test_convolutions_are_the_chains_own():
    """As many calls, of the same shapes, as the plain stack makes, forward and backward."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.name().removeprefix("aten::")
            if name in ("convolution", "convolution_backward"):
                wanted = args[-1][:2] if name == "convolution_backward" else None  # all but bias
                seen.append((name, args[0].shape, args[1].shape, wanted))
            return func(*args, **(kwargs or {}))

    for direction in DIRECTIONS:
        counts = []
        for name in ("convolutions", "eager"):
            case = small_case(direction, scheme="ssp33", count=2)
            work = contenders.contenders(case, [name])[0].build()
            seen = []
            inputs = work.inputs(0)
            with Calls():
                work.run(*inputs)
            counts.append(sorted(map(str, seen)))
        assert counts[0] == counts[1] and len(counts[0]) == 2 * 12


# --- what is counted --------------------------------------------------------------------------------------------


def test_byte_formulas():
    t = traffic.Traffic(activation=1000, itemsize=2)
    assert t.mask() == 62  # a sixteenth, in whole bytes
    assert t.copy() == 2000
    assert t.stage_combine(3) == 4000
    assert [t.stage_moments(2, write_u=w) for w in (False, True)] == [2000, 3000]
    assert [t.stage_norm_act(2, write_u=w) for w in (False, True)] == [3000, 4000]
    assert t.stage_norm_act(1, write_u=False, mask=True) == 2062
    assert t.stage_batch_norm_act(2, write_u=True) == 4000
    assert t.stage_batch_norm_act(2, write_u=True, rereads=1) == 5000
    assert t.stage_group_norm_act(1, write_u=False, rereads=1) == 3000
    assert [t.norm_act_backward_reduce(write_z=w) for w in (False, True)] == [2000, 3000]
    assert [t.norm_act_backward(e) for e in (0, 2)] == [3000, 5000]
    assert t.norm_act_backward(1, mask=True) == 3062
    reduce_then_apply = t.norm_act_backward_reduce(write_z=True) + t.norm_act_backward(1)
    assert t.batch_norm_act_backward(1, write_z=True, rereads=1) == reduce_then_apply
    assert t.batch_norm_act_backward(1, write_z=True) == reduce_then_apply - 2000
    assert t.group_norm_act_backward(0, write_z=False) == 3000
    assert (t.channel_sum(), t.stage_dots(2), t.linf_step()) == (1000, 3000, 4000)
    assert (t.l2_step(), t.l2_step(rereads=1)) == (4000, 7000)


def test_bytes_of_a_chain_by_hand():
    """euler: x -> z | conv -> z | conv, x -> u; then dy; dz, u -> du, z | dz, u, dy -> du, z."""
    t = traffic.Traffic(activation=32, itemsize=4)
    euler = schemes.get("euler")
    assert traffic.train_step(euler, 1, t) == 32 * ((2 + 2 + 3) + 1 + 4 + 5)
    # x -> z, mask | conv -> z, mask | conv, x -> u; dz, mask -> du | dz, mask, dy -> du
    assert traffic.input_gradient_step(euler, 1, t) == 32 * (2 + 2 + 3 + 2 + 3) + 4 * 1


class Observed(TorchDispatchMode):
    """Bytes of the activations and masks that go in and out of the fused ops."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.bytes = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.name().startswith("ssp_fused::"):
            for t in [*tree_leaves(args), *tree_leaves(out)]:
                if isinstance(t, torch.Tensor) and (
                    t.numel() == self.elements or t.dtype == torch.uint8
                ):
                    self.bytes += t.numel() * t.element_size()
        return out


@needs_cpu_kernels
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scheme", ["ssp22", "ssp33", "ssp54", "midpoint"])
def test_bytes_of_a_chain_are_those_its_ops_are_given(scheme, direction):
    case = small_case(direction, dtype="float32", scheme=scheme, count=2, shape=(2, 8, 4, 4))
    work = contenders.contenders(case, ["fused-cpu"])[0].build()
    inputs = work.inputs(0)
    with Observed(2 * 8 * 4 * 4) as seen:
        work.run(*inputs)
    assert seen.bytes == case.logical_bytes()


def test_kept_bytes_by_hand():
    """exp keeps its result, a linear layer its input and weight, a product both factors: each storage once."""
    x = torch.randn(4, 8, requires_grad=True)
    linear = torch.nn.Linear(8, 8)

    def forward():
        e = x.exp()
        return linear(e) * x * e.view(8, 4).view(4, 8)

    kept = memory.kept_for_backward(forward, linear.parameters(), [x])
    # activations: e (once, through its view too), the linear layer's output, and that times x
    assert kept == memory.Kept(3 * 4 * 8 * 4, 8 * 8 * 4, 4 * 8 * 4)


def test_kept_bytes_of_what_is_dropped_are_counted_too():
    """Each call's storage may take the address of the one before."""
    x = torch.randn(64, 64, requires_grad=True)

    def forward():
        for _ in range(3):
            x.exp()

    assert memory.kept_for_backward(forward, [], [x]).activations == 3 * 64 * 64 * 4


@needs_cpu_kernels
def test_kept_bytes_of_an_attack_step_are_masks():
    case = small_case(INPUT_GRADIENT, dtype="float32", shape=(2, 8, 4, 4))
    rows = measured(case, contenders.contenders(case, ["eager", "fused-cpu"]))
    elements = 2 * 8 * 4 * 4
    fused = rows["fused-cpu"].kept_bytes
    # 4 activations of one bit an element, and vectors over channels: fewer than 16.
    assert 4 * elements // 8 <= fused < 4 * elements // 8 + 16 * 8 * 4
    # For each F both norms' inputs and both activations' results; the first norm's input is x.
    assert rows["eager"].kept_bytes == (2 * 4 - 1) * 4 * elements
    assert rows["eager"].kept_input_bytes == 4 * elements


# --- times ------------------------------------------------------------------------------------------------------


def test_quantiles():
    assert timing.quantiles([5.0, 1.0, 2.0, 4.0, 3.0]) == pytest.approx((1.8, 3.0, 4.2))
    assert timing.quantiles(range(101)) == (20, 50, 80)
    assert timing.quantiles([2.0, 1.0]).median == 1.5


def test_every_repeat_has_its_own_order():
    def run(seed):
        log = []
        calls = {
            name: [lambda n=name, b=b: log.append((n, b)) for b in range(2)] for name in "abcd"
        }

        def clock(call):
            call()
            return float(len(log))

        times = timing.interleaved(calls, clock, repeats=6, warmup=2, seed=seed)
        return log, times

    log, times = run(0)
    rounds = [log[i : i + 4] for i in range(0, 32, 4)]
    assert all(sorted(name for name, _ in order) == list("abcd") for order in rounds)
    assert len({tuple(name for name, _ in order) for order in rounds}) > 4
    assert [{b for _, b in order} for order in rounds] == [{0}, {1}] * 4
    assert all(len(own) == 6 for own in times.values())
    assert min(itertools.chain(*times.values())) == 9  # the two rounds of warming up are not in it
    assert run(0)[0] == log and run(1)[0] != log


def test_cold_inputs_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(hardware, "last_level_cache", lambda device: 1 << 20)
    inputs = [torch.zeros(1 << 16), torch.zeros(1 << 16)]
    assert timing.cold_buffers(inputs, CPU) == 5
    seen = []
    work = harness.Work(seen.append, lambda index: [torch.full((1 << 18,), float(index))])
    task = harness.Task("test", "c", "d", CPU, None, [harness.Contender("one", lambda: work)])
    (row,) = harness.measure(task, harness.Settings(repeats=4, warmup=0, cold=True))
    assert [t[0].item() for t in seen] == [0, 1, 2, 0] and row.gb_per_s is None
    seen.clear()
    harness.measure(task, FEW)
    assert [t[0].item() for t in seen] == [0, 0]
    assert hardware.last_level_cache(CPU) > 0


def test_settings_that_cannot_be():
    task = harness.Task("test", "c", "d", CPU, 1, [])
    with pytest.raises(ValueError, match="graph needs a cuda device, got cpu"):
        harness.measure(task, harness.Settings(graph=True))
    twice = [harness.Contender("a", lambda: None)] * 2
    with pytest.raises(ValueError, match=r"different names, got \['a', 'a'\]"):
        harness.measure(dataclasses.replace(task, contenders=twice), FEW)


# --- what is written --------------------------------------------------------------------------------------------


def row(contender, median, *, spread=1.1, **values):
    times = {}
    if median is not None:
        times = {"p20_ms": median / spread, "median_ms": median, "p80_ms": median * spread}
    own = {"benchmark": "b", "case": "c, 1", "direction": "d", "device": "cpu", "status": "ok"}
    return results.Row(contender=contender, **{**own, **times, **values})


def test_csv_round_trip(tmp_path):
    machine = hardware.machine(CPU)
    integers = ("repeats", "bytes", "kept_bytes")
    rows = [
        row(
            "eager",
            2.0,
            repeats=30,
            bytes=10**12,
            gb_per_s=0.125,
            kept_bytes=0,
            checked="own signs",
        ),
        row("x", None, status='wrong: "dx", it says\nso'),
    ]
    path = tmp_path / "new" / "rows.csv"
    results.write(path, rows, machine)
    back = results.read(path)
    assert [own for own, _ in back] == [dataclasses.replace(rows[0], p20_ms=1.81818), rows[1]]
    assert all(isinstance(getattr(back[0][0], name), int) for name in integers)
    assert {where for _, where in back} == {machine}
    with path.open(newline="") as file:
        (first, _) = csv.DictReader(file)
    assert (first["median_ms"], first["kept_bytes"], first["peak_bytes"]) == ("2", "0", "")
    assert first["torch"] == torch.__version__ and first["threads"] and first["date"]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"must have the columns \['benchmark'.*got \['a', 'b'\]"):
        results.read(path)


def test_ratios():
    rows = [row("eager", 2.0), row("convolutions", 1.0), row("x", 3.0), row("y", None)]
    found = {r.contender: (r.over_convolutions, r.over_eager) for r in results.with_ratios(rows)}
    assert found == {"eager": (2, 1), "convolutions": (1, 0.5), "x": (3, 1.5), "y": (None, None)}
    assert results.with_ratios(rows[2:])[0].over_eager is None


def test_comparison_flags_what_is_beyond_the_controls_spread():
    control = "eager (control)"
    old = [row("eager", 1.0), row(control, 1.0), row("a", 1.0), row("b", 1.0), row("c", 1.0)]
    old += [row("gone", 1.0), row("failed", 1.0)]
    new = [row("eager", 1.0), row(control, 1.0), row("a", 1.05), row("b", 1.2), row("c", 0.8)]
    new += [row("failed", None, status="wrong: y"), row("added", 1.0)]

    def verdicts(old, new):
        lines = results.compare(old, new)
        return {
            name: line
            for r in (*old, *new)
            for name, line in ((r.contender, line) for line in lines if f"| {r.contender}:" in line)
        }

    found = verdicts(old, new)
    assert "1.050  within the control's spread of 1.100" in found["a"]
    assert "1.200  SLOWER, beyond" in found["b"] and "0.800  FASTER, beyond" in found["c"]
    assert found["gone"].endswith("only in the old file")
    assert found["added"].endswith("only in the new file")
    assert found["failed"].endswith("ok -> wrong: y")
    # What makes the spread: two entries of one contender, a machine that changes from file to file, the quantiles.
    for slow in ({"eager"}, {control}, {"eager", control}):
        changed = [row(r.contender, 1.3) if r.contender in slow else r for r in new]
        assert "within" in verdicts(old, changed)["b"], slow
    wide = row(control, 1.0, spread=1.3)
    for rows in ((old, new), (new, old)):
        changed = [wide if r.contender == control else r for r in rows[0]]
        assert "within" in verdicts(changed, rows[1])["b"]
        assert "within" in verdicts(rows[1], changed)["b"]
    assert "noise unknown" in verdicts([r for r in old if r.contender != control], new)["b"]


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_the_commit_says_what_was_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert hardware.commit() is None
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    head = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert hardware.commit() == head
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "a.csv").write_text("1\n")
    assert hardware.commit() == head
    (tmp_path / "new.py").write_text("1\n")
    assert hardware.commit() == f"{head}-dirty"


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
