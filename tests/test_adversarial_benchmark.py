"""The benchmark of adversarial training: who is refused, what is measured and written."""

import pytest
import torch

import ssp_fused
from benchmarks import adversarial, results, training_steps
from benchmarks.peak import peak_cpu_bytes
from ssp_fused.adversarial import pgd_loss

pytestmark = pytest.mark.skipif(
    ssp_fused.available_backends()["cpu"] is not None,
    reason=f"cpu backend: {ssp_fused.available_backends()['cpu']}",
)
ON_CPU = ["published", "eager", "eager (control)", "fused-cpu"]


def rows(folder, *options):
    code = adversarial.main(["--quick", "--device", "cpu", "--out", str(folder), *options])
    return code, {row.contender: row for row, _ in results.read(folder / "adversarial.csv")}


def test_from_end_to_end(tmp_path, capsys):
    code, found = rows(tmp_path)
    assert code == 0
    assert list(found) == list(adversarial.NAMES)
    for name, row in found.items():
        if name not in ON_CPU:
            assert row.status.startswith(results.CANNOT_RUN) and row.median_ms is None
            continue
        assert (row.status, row.checked, row.repeats) == (results.OK, "logits, fp64 step", 3)
        assert row.direction == "pgd-2 training" and row.peak_bytes > row.kept_bytes > 0
    # The published loop keeps what the parameters' gradients need, the fused one masks.
    assert found["fused-cpu"].kept_bytes < found["eager"].kept_bytes / 10
    assert found["fused-cpu"].peak_bytes < found["published"].peak_bytes
    told = [line for line in capsys.readouterr().out.splitlines() if "images/s" in line]
    assert len(told) == len(ON_CPU) and "1.00 times published" in told[0]


@pytest.mark.parametrize("fault", ["mode", "steps"])
def test_a_loop_that_does_something_else_is_refused(tmp_path, monkeypatch, fault):
    def other(network, x, y, attack, *, graph=False):
        settings = {"eps": attack.eps, "step_size": attack.step_size}
        settings["steps"] = attack.steps - (fault == "steps")
        mode = "train" if fault == "mode" else "eval"
        return pgd_loss(network.train(), x, y, **settings, bn_mode=mode, graph=graph).loss

    monkeypatch.setattr(adversarial, "fused_loss", other)
    code, found = rows(tmp_path, "--contenders", "eager", "fused-cpu")
    assert code == 2 and found["eager"].status == results.OK
    assert found["fused-cpu"].status.startswith(results.WRONG)


def test_networks_have_the_same_keys_and_logits():
    plain = training_steps.PlainNet("ssp33", 2)
    fused = ssp_fused.models.sspnet_cifar("ssp33", 2)
    plain.load_state_dict(fused.state_dict())
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(plain(x), fused(x))


def test_peak_by_hand():
    kept = []

    def call():
        a = torch.ones(1 << 20)
        b = a + 1
        del a
        kept.append(b * 2)

    # a and b, then b and the product, of 4 MiB each; a little for the profiler's own tensors.
    assert peak_cpu_bytes(call) == pytest.approx(8 << 20, rel=0.01)
