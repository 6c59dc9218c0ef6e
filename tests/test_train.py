"""The loop with two processes, at reduced precision, and against its own promises."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from musicssl import files, train
from musicssl.audio import Batch
from musicssl.checkpoint import Mismatch, checkpoints, read_log

WORKERS = Path(__file__).parent / "workers"
sys.path.insert(0, str(WORKERS))
from toy import LABELS, WAVES, Toy, batches  # noqa: E402

QUICK = train.TrainConfig(steps=6, lr=1e-2)


def fit(folder, toy=None, config=QUICK, **options):
    toy = toy or Toy()
    return toy, train.fit(toy, options.pop("batches", batches()), config, folder, progress=False, **options)


def ranks(folder, devices):
    done = subprocess.run([sys.executable, WORKERS / "two_processes.py", folder, str(devices)], capture_output=True, text=True,
                          timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(devices)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return ranks(tmp_path_factory.mktemp("one"), 1)[0]["whole"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return ranks(tmp_path_factory.mktemp("two"), 2)


def differences(one, first, second):
    """Of two ranks from each other, and from one process."""
    far = lambda a, b: max(float((a["weights"][name] - b["weights"][name]).abs().max()) for name in a["weights"])
    return far(first, second), far(first, one)


def test_two_processes_are_one(one, two):
    first, second = [rank["whole"] for rank in two]
    between, from_one = differences(one, first, second)
    assert between == 0 and from_one < 1e-6
    assert_close(first["losses"], one["losses"], rtol=1e-6, atol=1e-6)
    assert first["clips"] == one["clips"] == [32] * 6 and first["resumed"] == 3
    assert sorted(first["seen"] + second["seen"]) == sorted(one["seen"]) and not set(first["seen"][:8]) & set(second["seen"][:8])
    assert first["gather"] and not one["gather"] and not first["kept"]


@pytest.mark.parametrize("mutation", ["never synchronised", "same rows everywhere"])
def test_that_test_notices(one, two, mutation):
    between, from_one = differences(one, *[rank[mutation] for rank in two])
    assert between > 1e-4 or from_one > 1e-4


def test_one_seed_decides_everything(tmp_path):
    (a, first), (b, second) = [fit(tmp_path / name) for name in "ab"]
    torch.randn(5), np.random.rand(5)
    c, _ = fit(tmp_path / "c", config=replace(QUICK, seed=1))
    assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)
    assert [row["loss"] for row in first.history] == [row["loss"] for row in second.history]
    assert not torch.equal(a.layers[0].weight, c.layers[0].weight)


def test_validation_changes_nothing_but_the_log(tmp_path):
    def greedy(objective):
        assert not objective.training and not torch.is_grad_enabled()
        return {"loss": float(torch.rand(())), "other": np.random.rand()}
    plain, _ = fit(tmp_path / "plain")
    watched, result = fit(tmp_path / "watched", config=replace(QUICK, validate_every=2), validate=greedy)
    assert_close(plain.state_dict(), watched.state_dict(), rtol=0, atol=0)
    assert [row["step"] for row in result.validation] == [0, 2, 4, 6] and [row["step"] for row in result.history] == [1, 2, 3, 4, 5, 6]
    assert len({row["loss"] for row in result.validation}) == 4 and watched.training


def test_early_stopping_survives_a_pause(tmp_path):
    values = dict(zip(range(0, 100, 2), [5, 4, 3, 3.5, 2.9, 3, 3, 3, 3, 3, 3]))
    def count_down(objective): return {"loss": values[len(read_log(folder)) and max(row["step"] for row in read_log(folder))]}
    config, options = replace(QUICK, steps=50, validate_every=2, keep=1), {"validate": count_down, "stop": train.EarlyStop("loss", 3)}
    folder = tmp_path / "straight"
    straight, result = fit(folder, config=config, **options)
    folder = tmp_path / "paused"
    fit(folder, config=config, until=11, **options)
    paused, again = fit(folder, Toy(seed=3), config, **options)
    _, finished = fit(folder, Toy(seed=4), config, **options)
    assert result.best_step == again.best_step == finished.best_step == 8 and len(result.history) == len(again.history) == 14
    assert_close(paused.state_dict(), straight.state_dict(), rtol=0, atol=0)
    assert [path.name for path in checkpoints(folder)] == ["step-00000008", "step-00000014"] and finished.resumed == 14


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_plateau_is_what_pytorch_calls_one(mode):
    """Against `ReduceLROnPlateau`; counting from `patience` instead of one more, or without its threshold, differs within these walks."""
    draw = np.random.default_rng(0)
    for _ in range(30):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.)
        theirs, rows = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode, factor=.2, patience=2, eps=0), []
        for value in 1 + np.abs((draw.normal(size=40) * draw.choice([1e-5, .1, 1])).cumsum()):
            theirs.step(value)
            rows.append({"loss": value})
            assert train.EarlyStop("loss", 99, mode, plateau=2, factor=.2).rate(rows) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_the_rate_drops_on_plateaus_and_survives_a_pause(tmp_path):
    values = iter([3., 2, 2, 2, 1, 1, 1, 1, 1, 1, 1])
    def look(objective): return {"loss": next(values)}
    config, stop = replace(QUICK, steps=10, validate_every=1), train.EarlyStop("loss", 9, plateau=1, factor=.5)
    straight, result = fit(tmp_path / "straight", config=config, validate=look, stop=stop)
    assert [row["lr"] for row in result.history] == [1e-2] * 3 + [5e-3] * 3 + [2.5e-3] * 2 + [1.25e-3] * 2
    values = iter([3., 2, 2, 2, 1, 1, 1, 1, 1, 1, 1])
    fit(tmp_path / "paused", config=config, validate=look, stop=stop, until=7)
    paused, again = fit(tmp_path / "paused", Toy(seed=3), config, validate=look, stop=stop)
    assert [row["lr"] for row in again.history] == [row["lr"] for row in result.history] and again.resumed == 7
    assert_close(paused.state_dict(), straight.state_dict(), rtol=0, atol=0)


def test_reduced_precision_keeps_weights_and_loss_in_full(tmp_path):
    inside = []
    class Spy(Toy):
        def forward(self, batch):
            inside.append(self.layers[0](batch.wave).dtype)
            return super().forward(batch)
    toy, result = fit(tmp_path / "bf16", Spy(norm=False), replace(QUICK, precision="bf16-mixed"))
    _, full = fit(tmp_path / "fp32", Toy(norm=False))
    assert set(inside) == {torch.bfloat16} and {p.dtype for p in toy.parameters()} == {torch.float32}
    assert 0 < abs(result.history[-1]["loss"] - full.history[-1]["loss"]) < .05 * full.history[-1]["loss"]
    with pytest.raises(ValueError, match="fabric runs in 32-true, the recipe wants bf16-mixed"):
        fit(tmp_path / "no", config=replace(QUICK, precision="bf16-mixed"), fabric=train.Fabric(accelerator="cpu", devices=1))


def test_clipping_shortens_the_gradient(tmp_path):
    config = train.TrainConfig(steps=1, optimizer="sgd", lr=1.)
    before = nn.utils.parameters_to_vector(Toy().parameters())
    lengths = [(nn.utils.parameters_to_vector(fit(tmp_path / str(clip), config=replace(config, clip_norm=clip))[0].parameters()) - before).norm()
               for clip in (None, .01, 1e6)]
    norm = read_log(tmp_path / "None")[0]["grad_norm"]
    assert_close(lengths[0], torch.tensor(norm)); assert_close(lengths[2], lengths[0]); assert_close(lengths[1], torch.tensor(.01), rtol=1e-3, atol=0)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_what_is_not_finite_never_reaches_the_weights(tmp_path, poison):
    class BackwardOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss): return loss.clone()
        @staticmethod
        def backward(ctx, gradient): return gradient * float("nan")
    class Poisoned(Toy):
        calls = 0
        def forward(self, batch):
            losses = super().forward(batch)
            if self.calls == 4: losses["loss"] = losses["loss"] * float("inf") if poison == "loss" else BackwardOnly.apply(losses["loss"])
            self.calls += 1
            return losses
    toy = Poisoned()
    good, _ = fit(tmp_path / "good", config=replace(QUICK, steps=4))
    with pytest.raises(train.Diverged, match="step 5") as stopped: fit(tmp_path / "bad", toy, replace(QUICK, checkpoint_every=1))
    assert_close(dict(toy.named_parameters()), dict(good.named_parameters()), rtol=0, atol=0)
    assert checkpoints(tmp_path / "bad")[-1].name == "step-00000004"
    assert files.read_json(tmp_path / "bad" / "diverged.json")["clips"] == stopped.value.details["clips"] == batches().ids_of(4).tolist()


def test_one_run_at_a_time_in_a_folder(tmp_path):
    with files.lock(tmp_path / ".lock"), pytest.raises(files.Locked, match=f"process {os.getpid()}"): fit(tmp_path)
    fit(tmp_path)


def test_another_run_is_refused_and_a_longer_one_is_not(tmp_path):
    fit(tmp_path, about={"corpus": "a"})
    with pytest.raises(Mismatch, match=r"(?s)about.corpus: got a, wanted b"): fit(tmp_path, about={"corpus": "b"})
    with pytest.raises(Mismatch, match=r"config.accumulate: got 1, wanted 2"): fit(tmp_path, config=replace(QUICK, accumulate=2), about={"corpus": "a"})
    with pytest.raises(Mismatch, match=r"layers.0.weight: got \(16, 32\)"): fit(tmp_path, Toy(width=4), about={"corpus": "a"})
    longer, result = fit(tmp_path, config=replace(QUICK, steps=9, checkpoint_every=7, keep=5), about={"corpus": "a"})
    straight, _ = fit(tmp_path / "straight", config=replace(QUICK, steps=9), about={"corpus": "a"})
    assert result.resumed == 6
    assert_close(longer.state_dict(), straight.state_dict(), rtol=0, atol=0)
    cosine = replace(QUICK, schedule="cosine")
    fit(tmp_path / "cosine", config=cosine)
    with pytest.raises(Mismatch, match="config.steps: got 6, wanted 9"): fit(tmp_path / "cosine", config=replace(cosine, steps=9))


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    fit(tmp_path, until=3)
    def full(state, file): raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no room to write .*step-00000006: stopped after [1-9]"):
        patch.setattr(torch, "save", full)
        fit(tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003"] and not list(tmp_path.glob(".tmp-*"))
    resumed, _ = fit(tmp_path)
    straight, _ = fit(tmp_path / "straight")
    assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)


def test_any_function_of_a_number_gives_batches(tmp_path):
    def plain(number): return Batch(wave=WAVES[:8], labels=torch.tensor(LABELS[:8]).float(), ids=list(range(8)), caption=["a"] * 8)
    toy, result = fit(tmp_path, batches=plain)
    assert toy.seen == list(range(8)) * 6 and result.history[0]["clips"] == 8
    shares = [train.read_batch(plain, 0, 0, rank, 2) for rank in (0, 1)]
    assert [share.ids for share in shares] == [[0, 2, 4, 6], [1, 3, 5, 7]] and len(shares[0].caption) == 4
    assert_close(torch.stack([share.wave for share in shares], 1).flatten(0, 1), WAVES[:8])
    with pytest.raises(ValueError, match="a batch of 8 clips cannot be shared by 3 processes"): train.read_batch(plain, 0, 0, 0, 3)
    with pytest.raises(ValueError, match="a batch of 8 clips cannot be shared by 3 processes"): batches(8)(0, 0, 3)


def test_frozen_parameters_stay(tmp_path):
    toy = Toy()
    toy.layers[0].weight.requires_grad_(False)
    frozen = toy.layers[0].weight.clone()
    fit(tmp_path, toy)
    assert torch.equal(toy.layers[0].weight, frozen) and not torch.equal(toy.layers[4].weight, Toy().layers[4].weight)


def test_the_untouched_weights_win_when_validation_only_gets_worse(tmp_path):
    looks, untouched = iter(range(100)), Toy().state_dict()
    toy, result = fit(tmp_path, config=replace(QUICK, validate_every=1, keep=1), stop=train.EarlyStop("loss", 3),
                      validate=lambda objective: {"loss": float(next(looks))})
    assert result.best_step == 0 and len(result.history) == 3
    assert_close(toy.state_dict(), untouched, rtol=0, atol=0)
