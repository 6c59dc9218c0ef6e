"""What happens to a run from outside: signals, memory, exploding losses, half precision, compilation, several devices."""
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from torch.testing import assert_close

from musicssl import devices, files, train
from musicssl.checkpoint import checkpoints, read_log

WORKERS = Path(__file__).parent / "workers"
sys.path.insert(0, str(WORKERS))
import curves  # noqa: E402
import engine_ranks  # noqa: E402
import preempted  # noqa: E402
from toy import Toy, batches  # noqa: E402

QUICK = train.TrainConfig(steps=6, lr=1e-2)
SINGLE = {**os.environ, "OMP_NUM_THREADS": "1"}


def fit(folder, toy=None, config=QUICK, **options):
    toy = toy or Toy()
    return toy, train.fit(toy, options.pop("batches", batches()), config, folder, progress=False, **options)


# R21: asked to end

def called_away(folder, number, *mutation):
    """Send a signal when a few dozen steps are done; exit code, and seconds until it came."""
    child = subprocess.Popen([sys.executable, WORKERS / "preempted.py", folder, *mutation], env=SINGLE, stderr=subprocess.PIPE, text=True)
    log, until = folder / "log.jsonl", time.monotonic() + 60
    while time.monotonic() < until and not (log.exists() and log.stat().st_size > 3000): time.sleep(.005)
    time.sleep(random.Random(number).uniform(0, .05))
    sent = time.monotonic()
    child.send_signal(number)
    said = child.communicate(timeout=60)[1]
    return child.returncode, time.monotonic() - sent, said


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_leaves_a_checkpoint_and_a_code_of_its_own(tmp_path, number):
    code, seconds, said = called_away(tmp_path, number)
    assert code == train.PREEMPTED == 85 and seconds < 30 and "Traceback" not in said
    left = checkpoints(tmp_path)[-1]
    step = int(left.name[5:])
    assert step > 10 and [row["step"] for row in read_log(tmp_path)] == list(range(1, step + 1))
    rest, _ = fit(tmp_path, Toy(seed=9), replace(preempted.CONFIG, checkpoint_every=1), until=step + 5)
    whole, _ = fit(tmp_path / "whole", config=preempted.CONFIG, until=step + 5)
    assert_close(rest.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_without_listening_a_signal_kills(tmp_path):
    """The mutation."""
    code, *_ = called_away(tmp_path, signal.SIGTERM, "deaf")
    assert code == -signal.SIGTERM and not checkpoints(tmp_path)


def test_a_signal_in_the_last_step_is_no_interruption(tmp_path):
    def late(number):
        if number == 5: os.kill(os.getpid(), signal.SIGTERM)
        return batches()(number)
    _, result = fit(tmp_path, batches=late)
    assert len(result.history) == 6 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# R17: two runs in one folder

@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kill -9")
def test_a_folder_is_one_run_s_until_it_dies(tmp_path, monkeypatch):
    """The second run is refused at once and told whose the folder is; after `kill -9` it is free, with nothing to clean up."""
    child = subprocess.Popen([sys.executable, WORKERS / "preempted.py", tmp_path], env=SINGLE)
    until = time.monotonic() + 60
    while time.monotonic() < until and not (tmp_path / "log.jsonl").exists(): time.sleep(.01)
    began = time.monotonic()
    with pytest.raises(files.Locked, match=rf"process {child.pid} on \S+ since \d{{4}}-"): fit(tmp_path, config=preempted.CONFIG)
    assert time.monotonic() - began < 5
    with monkeypatch.context() as mutated:                   # the mutation: without the lock the second run takes the folder of the first
        mutated.setattr(files, "lock", lambda path: nullcontext())
        fit(tmp_path, config=preempted.CONFIG, until=1)
    child.kill()
    child.wait()
    assert len(fit(tmp_path, config=preempted.CONFIG, until=3)[1].history) == 3


# R18: loss and gradient

class Wild(Toy):
    """Its loss is a thousand times too high in some calls."""
    def __init__(self, *when, times=1000.):
        super().__init__()
        self.when, self.times, self.calls = when, times, 0

    def forward(self, batch):
        losses = super().forward(batch)
        if self.calls in self.when: losses["loss"] = losses["loss"] * self.times
        self.calls += 1
        return losses


def test_an_exploding_loss_ends_the_run_within_the_step(tmp_path):
    wild, (good, _) = Wild(4), fit(tmp_path / "good", config=replace(QUICK, steps=4))
    with pytest.raises(train.Diverged, match="exploded: step 5"): fit(tmp_path / "bad", wild, replace(QUICK, checkpoint_every=1))
    assert_close(dict(wild.named_parameters()), dict(good.named_parameters()), rtol=0, atol=0)
    told = files.read_json(tmp_path / "bad" / "diverged.json")
    assert told["why"] == "exploded" and told["batches"] == [4] and told["clips"] == batches().ids_of(4).tolist() and told["seed"] == 0
    assert checkpoints(tmp_path / "bad")[-1].name == "step-00000004"


def test_without_a_ceiling_it_goes_unnoticed(tmp_path):
    """The mutation; and clipping is what most loops would have instead."""
    _, result = fit(tmp_path, Wild(4), replace(QUICK, explode=1e9))
    assert result.history[4]["loss"] > 100 * result.history[3]["loss"]


def test_skipped_updates_are_counted_and_limited(tmp_path):
    config = replace(QUICK, steps=12, skip=2, checkpoint_every=1)
    toy, result = fit(tmp_path / "two", Wild(3, 6, times=float("nan")), config)
    assert [row["step"] for row in result.history if "skipped" in row] == [4, 7] and len(result.history) == 12
    assert all(p.isfinite().all() for p in toy.parameters())
    with pytest.raises(train.Diverged, match="step 10"): fit(tmp_path / "three", Wild(3, 6, 9, times=float("nan")), config)


def test_a_skip_survives_a_resume(tmp_path):
    """The count is read from the log: two before the pause and one after it are three."""
    config = replace(QUICK, steps=12, skip=2)
    fit(tmp_path, Wild(1, 2, times=float("inf")), config, until=5)
    with pytest.raises(train.Diverged, match="step 8"): fit(tmp_path, Wild(2, times=float("inf")), config)


# R20: memory

class Small(Toy):
    """A device with room for so many clips at a time."""
    def __init__(self, room): super().__init__(); self.room = room

    def forward(self, batch):
        if len(batch) > self.room: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(batch)


def test_memory_that_runs_out_says_what_would_fit(tmp_path):
    toy = Small(8)
    fit(tmp_path, toy, until=3)
    kept = {name: value.clone() for name, value in toy.state_dict().items()}
    toy.room = 5
    with pytest.raises(devices.OutOfMemory, match="ran out of memory at batch 8") as full: fit(tmp_path, toy)
    assert full.value.batch == 8 and checkpoints(tmp_path)[-1].name == "step-00000003"
    assert_close(toy.state_dict(), kept, rtol=0, atol=0)
    assert train.largest_batch(toy, batches(), QUICK) == 4
    assert_close(toy.state_dict(), kept, rtol=0, atol=0)
    toy.room = 8
    resumed, _ = fit(tmp_path, toy)
    assert_close(resumed.state_dict(), fit(tmp_path / "whole", Small(8))[0].state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("room", [2, 7, 64, 100])
def test_the_largest_batch(room):
    assert train.largest_batch(Small(room), batches(), QUICK, most=64) == min(room // 2 * 2, 64)


def test_two_clips_that_do_not_fit():
    with pytest.raises(devices.OutOfMemory): train.largest_batch(Small(1), batches(), QUICK)


# Precision and compilation

def half(): # float16 with a scale, as a GPU has it
    scaler = torch.amp.GradScaler("cpu", init_scale=2.**24, growth_interval=4)
    return Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", "cpu", scaler))


def test_float16_resumes_with_its_scale(tmp_path):
    config = replace(QUICK, precision="16-mixed", steps=24)
    whole, result = fit(tmp_path / "whole", config=config, fabric=half())
    fit(tmp_path / "paused", config=config, fabric=half(), until=9)
    resumed, again = fit(tmp_path / "paused", Toy(seed=3), config, fabric=half())
    assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    overflows = [row["step"] for row in result.history if "overflow" in row]
    assert overflows and overflows == [row["step"] for row in again.history if "overflow" in row] and result.history[-1]["loss"] < result.history[0]["loss"]


def test_a_scale_that_is_forgotten_is_noticed(tmp_path, monkeypatch):
    """The mutation of the test above."""
    config = replace(QUICK, precision="16-mixed", steps=24)
    whole, _ = fit(tmp_path / "whole", config=config, fabric=half())
    fit(tmp_path / "paused", config=config, fabric=half(), until=9)
    monkeypatch.setattr(torch.amp.GradScaler, "load_state_dict", lambda self, state: None)
    resumed, _ = fit(tmp_path / "paused", config=config, fabric=half())
    assert not all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters()))


def test_compiled_is_the_same_and_leaves_no_trace(tmp_path):
    class Named(Toy):
        def __init__(self): super().__init__(dropout=0.); self.encoder = self.layers
    plain, (compiled, _) = fit(tmp_path / "plain", Named())[0], fit(tmp_path / "compiled", Named(), replace(QUICK, compile=True))
    assert_close(dict(compiled.named_parameters()), dict(plain.named_parameters()), rtol=1e-4, atol=1e-5)
    assert compiled.encoder._compiled_call_impl is None and set(compiled.state_dict()) == set(plain.state_dict())


def test_what_a_gpu_will_be_asked_runs_here(tmp_path):
    """`tests/test_gpu.py` compares precisions at the paper's size; here at toy size, where they are close."""
    precisions, seeds = curves.distances(tmp_path, "toy", 4, 8, seeds=(0, 1), tail=4)
    assert 0 < precisions < .5 and seeds > 0
    assert curves.curve(tmp_path / "timed", "toy", 4, 4)[1] > 0


# Hooks and pictures

def test_an_objective_may_act_after_every_update(tmp_path):
    class Teacher(Toy):
        after = ()
        def after_update(self, step): self.after += (step, int(self.layers[1].num_batches_tracked)),
    toy, _ = fit(tmp_path, Teacher(), replace(QUICK, accumulate=2))
    assert toy.after == tuple((step, 2 * step) for step in range(1, 7))


def test_the_share_of_the_limit_is_in_the_log(tmp_path):
    measured, plain = (fit(tmp_path / name, engine_ranks.clmr(), engine_ranks.SONGS, batches=engine_ranks.songs, measure=asked)[1]
                       for name, asked in (("measured", True), ("plain", None)))
    assert all(0 < row["matrix_share"] < 5 for row in measured.history) and {row["matrix_share"] for row in plain.history} == {None}
    assert all(row["peak_memory_mb"] > 10 and row["clips_per_second"] > 0 for row in plain.history)
    assert [row["loss"] for row in measured.history] == [row["loss"] for row in plain.history]


# Several devices

@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", WORKERS / "engine_ranks.py", folder],
                          capture_output=True, text=True, timeout=300, env=SINGLE)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_clmr_on_two_devices_is_clmr_on_one(tmp_path, ranks):
    """Over k micro-batches, with views, negatives and batch statistics of all; float32, so test_distributed.py is the exact one."""
    objective = engine_ranks.clmr()
    _, alone = fit(tmp_path, objective, engine_ranks.SONGS, batches=engine_ranks.songs)
    losses, norms = ([row[name] for row in alone.history] for name in ("loss", "grad_norm"))
    for found in ranks[1]:
        assert_close(found["clmr"]["loss"], losses, rtol=1e-4, atol=0)
        assert_close(found["clmr"]["grad_norm"], norms, rtol=1e-2, atol=0)
        theirs, ours, before = (torch.cat([network[name].flatten() for name, _ in objective.named_parameters()])
                                for network in (found["clmr"]["weights"], objective.state_dict(), engine_ranks.clmr().state_dict()))
        assert (theirs - ours).norm() < .05 * (ours - before).norm()
        assert abs(found["statistics apart"]["loss"][0] / losses[0] - 1) > 1e-2, "the mutation"


def test_a_lock_is_reported_by_every_process(ranks):
    assert [found["locked"].split(":")[0] for found in ranks[1]] == ["Locked", "Locked"]


def test_a_signal_to_one_process_ends_all_at_the_same_step(ranks):
    folder, found = ranks
    assert [one["called away"] for one in found] == ["Preempted: 85"] * 2
    assert checkpoints(folder / "away")[-1].name == "step-00000003" and len(read_log(folder / "away")) == 3


def test_a_sharded_run_resumes_and_its_checkpoint_loads_on_one_device(tmp_path, ranks):
    folder, found = ranks
    whole, alone = fit(tmp_path, engine_ranks.toy(), engine_ranks.SHARDED, batches=batches(16))
    assert all(one["sharded"]["resumed"] == 3 for one in found)
    assert_close(found[0]["sharded"]["loss"], [row["loss"] for row in alone.history], rtol=1e-5, atol=1e-6)
    assert_close(found[0]["sharded"]["grad_norm"], [row["grad_norm"] for row in alone.history], rtol=1e-4, atol=1e-6)
    assert any(piece != tuple(p.shape) for piece, p in zip(found[0]["pieces"], whole.parameters())), "nothing was sharded"
    one_device, result = fit(folder / "sharded", Toy(noise=0., dropout=0., norm=False, seed=7), engine_ranks.SHARDED, batches=batches(16))
    assert result.resumed == 6
    assert_close(one_device.state_dict(), whole.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("paper", ["clmr", "musicoder", "multitask", "mulap", "mert"])
def test_the_command_says_how_many_clips_fit(paper, monkeypatch, capsys):
    """Updates of the chapter's own network on its own first batch, with room for not quite eight rows."""
    from musicssl import reproduce
    search, step, tried = train.largest_batch, train.update, []
    def with_little_room(fabric, objective, optimizer, batches, *rest):
        tried.append(len(batches(0)))
        if tried[-1] > 7: raise MemoryError
        return step(fabric, objective, optimizer, batches, *rest)
    monkeypatch.setattr(train, "update", with_little_room)
    monkeypatch.setattr(train, "largest_batch", lambda *given: search(*given, most=12))
    assert reproduce.main(["train", "--paper", paper, "--profile", "test", "--find-batch"]) == 0
    assert f"{paper} at test: a batch may hold 6 clips here" in capsys.readouterr().out and {6, 8} <= set(tried)


@pytest.mark.parametrize("asked, told", [(["--paper", "floors"], "nothing to try for floors; it has for clmr, musicoder, multitask, mulap, mert"),
                                         (["--paper", "mulap", "--arm", "random"], "arms that pre-train, of mulap true, permuted, apart, words alone, sound alone; got random")])
def test_the_command_says_where_no_batch_is_looked_for(asked, told, capsys):
    from musicssl import reproduce
    assert reproduce.main(["train", *asked, "--profile", "test", "--find-batch"]) == 1 and told in capsys.readouterr().err
