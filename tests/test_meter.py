"""What the meter promises: a count that is right and touches nothing, limits measured once, steps that nobody waits for, logs without floods."""
import dataclasses
import io
import subprocess
import sys
import time
import traceback
import types
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from musicssl import meter
from musicssl.audio import Batch
from musicssl.meter import Board, LiveCurve, Meter, copy_limit, flops, matrix_limit, peak_memory, progress
from musicssl.objectives.clmr import CLMR


class Answer(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, batch): return {"loss": self.layers(batch.wave).square().mean()}


def songs(n, samples=2000): return Batch(wave=torch.zeros(n, samples), generator=torch.Generator().manual_seed(5))


# flops

@pytest.mark.parametrize("layers, expected", [
    ([nn.Linear(7, 5)], 2 * 3 * 7 * 5 * 2),
    ([nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2, bias=False)], 2 * 3 * (7 * 5 * 2 + 5 * 2 * 3)),
    ([nn.Linear(7, 5).requires_grad_(False), nn.Linear(5, 2)], 2 * 3 * (7 * 5 + 5 * 2 * 2)),
    ([nn.Unflatten(1, (1, 7)), nn.Conv1d(1, 4, 3), nn.Conv1d(4, 6, 2, stride=2)], 2 * 3 * (3 * 4 * 5 * 2 + 2 * 4 * 6 * 2 * 3)),
], ids=["linear", "two", "frozen", "convolutions"])
def test_closed_forms(layers, expected):
    with torch.no_grad(): assert flops(Answer(*layers), Batch(wave=torch.zeros(3, 7))) == expected


def test_attention_is_counted():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, batch):
            heads = (self.scale * batch.wave).view(2, 4, 50, 16) # batch, heads, frames, width
            return {"loss": nn.functional.scaled_dot_product_attention(heads, heads, heads).mean()}
    forward = 2 * 2 * 2 * 4 * 50 * 50 * 16 # two products
    assert flops(Attends(), Batch(wave=torch.zeros(2, 3200))) in (3 * forward, 3.5 * forward) # a fused kernel computes the scores again


@pytest.mark.parametrize("chain", ["clmr_paper", "clmr_code_v1", "clmr_code_v2"])
def test_clmr_with_its_augmentations(chain):
    """Convolutions, head and similarity of `toy`, whatever the augmentations draw."""
    objective = CLMR.preset("toy", chain=chain)
    encoder, positions, convolutions = objective.encoder, objective.encoder.n_samples, 0
    for block, pool in zip(encoder.blocks, (1, *encoder.strides, 1)):
        layer = block[0]
        positions = (positions + 2 * layer.padding[0] - layer.kernel_size[0]) // layer.stride[0] + 1
        convolutions += 2 * layer.weight.numel() * positions * (2 if layer.in_channels == 1 else 3)
        positions //= pool
    for n in (4, 8):
        expected = 2 * n * (convolutions + 6 * encoder.dim * (encoder.dim + 64)) + 6 * (2 * n)**2 * 64
        assert flops(objective, songs(n, 8000)) == expected


def test_a_batch_that_fits_nowhere_is_counted():
    """40 TB of waves: nothing of their size is ever allocated."""
    wave = torch.zeros(1, 1).expand(10**7, 10**6)
    assert flops(Answer(nn.Linear(10**6, 10)), Batch(wave=wave)) == 2 * 10**7 * 10**6 * 10 * 2


def untouched(objective, batch):
    """Does counting leave module, gradients, mode, generator and PyTorch's own random state as they were?"""
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    modes = [module.training for module in objective.modules()]
    own, shared = batch.generator.get_state(), torch.get_rng_state()
    counted = flops(objective, batch)
    after = objective.state_dict()
    kept = after.keys() == before.keys() and all(t.device.type == "cpu" and t.equal(before[name]) for name, t in after.items())
    return (counted is not None and kept and all(p.grad is None for p in objective.parameters())
            and modes == [module.training for module in objective.modules()]
            and batch.generator.get_state().equal(own) and torch.get_rng_state().equal(shared) and batch.wave.device.type == "cpu")


class Draws(Answer):
    """Uses both sources of randomness, and buffers that a forward pass changes."""
    def forward(self, batch):
        torch.rand(3, generator=batch.generator), torch.rand(3)
        return super().forward(batch)


def draws(): return Draws(nn.Linear(2000, 8), nn.BatchNorm1d(8), nn.Dropout(.5)).eval()


@pytest.mark.parametrize("new", [draws, lambda: CLMR.preset("toy")], ids=["toy", "clmr"])
def test_counting_touches_nothing(new):
    assert untouched(new(), songs(4, 8000 if new is not draws else 2000))


@pytest.mark.parametrize("where, what, without", [
    (meter, "_on_meta", lambda module: module.to("meta")), # the module itself is used, not a copy
    (meter, "replace", lambda batch, generator: dataclasses.replace(batch)), # the caller's generator is used
    (torch.random, "fork_rng", lambda devices: nullcontext()), # the shared random state is not put back
], ids=["no copy", "no second generator", "no fork"])
def test_each_protection_is_needed(monkeypatch, where, what, without):
    monkeypatch.setattr(where, what, without)
    assert not untouched(draws(), songs(4))


def test_tied_weights_stay_tied():
    tied = Answer(nn.Linear(7, 7), nn.Linear(7, 7))
    tied.layers[1].weight = tied.layers[0].weight
    double = meter._on_meta(tied)
    assert double.layers[1].weight is double.layers[0].weight and double.layers[0].weight.is_meta and not tied.layers[0].weight.is_meta


@pytest.mark.parametrize("what", [lambda x: x.unique(), lambda x: x[x > 0], lambda x: x * x.detach().sum().item(), lambda x: x + torch.ones(3, 2)],
                         ids=["unique", "mask", "item", "drawn on the cpu"])
def test_none_where_meta_cannot_follow(what):
    class Cannot(Answer):
        def forward(self, batch): return {"loss": what(self.layers(batch.wave)).sum()}
    assert flops(Cannot(nn.Linear(7, 2)), Batch(wave=torch.zeros(3, 7))) is None


def test_a_mistake_is_not_taken_for_a_missing_kernel():
    with pytest.raises(RuntimeError, match="99"): flops(Answer(nn.Linear(99, 2)), Batch(wave=torch.zeros(3, 7)))
    with pytest.raises(ValueError, match="needs batch.wave"): flops(CLMR.preset("toy"), Batch(labels=torch.zeros(3, 1)))


def test_autocast_needs_its_stand_in(monkeypatch):
    real = torch.autocast
    assert flops(CLMR.preset("toy"), songs(2, 8000)) > 0 and torch.autocast is real
    monkeypatch.setattr(meter, "_autocast", real)
    with pytest.raises(RuntimeError): flops(CLMR.preset("toy"), songs(2, 8000))


# limits

@pytest.fixture
def stopwatch(monkeypatch):
    """Every measurement runs its work once and takes 0.1 seconds, it says."""
    runs = []
    monkeypatch.setattr(meter, "_shortest", lambda work, device: runs.append(work()) or .1)
    meter._product.cache_clear()
    yield runs
    meter._product.cache_clear()


def test_the_matrix_limit_is_measured_once_for_each_circumstance(stopwatch):
    threads = torch.get_num_threads()
    try:
        assert [matrix_limit("cpu"), matrix_limit(torch.device("cpu"), torch.float32)] == [2 * 1024**3 / .1] * 2 and len(stopwatch) == 1
        matrix_limit("cpu", torch.float64)
        assert len(stopwatch) == 2 and stopwatch[1].dtype == torch.float64
        torch.set_num_threads(threads + 1)
        matrix_limit("cpu")
        assert len(stopwatch) == 3
    finally: torch.set_num_threads(threads)


def test_the_limit_grows_its_product_until_it_takes_long_enough(monkeypatch):
    sizes = []
    def quick(work, device):
        sizes.append(len(work()))
        return .001 if len(sizes) < 2 else .5
    monkeypatch.setattr(meter, "_shortest", quick)
    assert meter._product.__wrapped__(torch.device("cpu"), torch.float32, 1, "highest") == 2 * 1024**3 / .001 and sizes == [1024, 2048]


def test_limits_are_measured_and_draw_nothing():
    before = torch.get_rng_state()
    meter._product.cache_clear()
    assert 1e8 < matrix_limit("cpu") < 1e15 and 1e7 < copy_limit("cpu") < 1e13
    assert torch.get_rng_state().equal(before)


def test_a_copy_counts_both_ways(stopwatch):
    assert copy_limit("cpu") == 2 * 2**27 / .1


# Meter

@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(t=100.)
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now.t)
    monkeypatch.setattr(meter.time, "monotonic", lambda: now.t)
    return now


def test_a_step_in_numbers(monkeypatch, clock):
    monkeypatch.setattr(meter, "matrix_limit", lambda device, dtype: {torch.bfloat16: 4e12}[dtype])
    steps = Meter("cpu", flops_per_step=int(1e12), dtype=torch.bfloat16)
    clock.t += 7 # validation, say
    steps.start()
    clock.t += .5
    row = steps.stop(clips=48)
    assert row == {"seconds": .5, "clips_per_second": 96., "matrix_share": .5, "peak_memory_mb": row["peak_memory_mb"]} and row["peak_memory_mb"] > 10


def test_what_is_unknown_is_none_and_not_measured(monkeypatch):
    monkeypatch.setattr(meter, "matrix_limit", None)
    monkeypatch.setitem(sys.modules, "resource", None) # as on Windows
    monkeypatch.setattr(meter, "STATUS", Path("/there/is/none"))
    steps = Meter("cpu")
    steps.start()
    row = steps.stop(8)
    assert row["matrix_share"] is None and row["peak_memory_mb"] is None and row["seconds"] >= 0


@pytest.mark.skipif(not meter.STATUS.exists(), reason="only Linux lets a process begin its count anew")
def test_a_run_is_not_charged_for_the_one_before():
    """Runs follow each other in one process; without `forget_peak` the second has at least the peak of the first."""
    large = np.ones(32 * 2**20) # 256 MB
    with_it = peak_memory("cpu")
    del large
    assert peak_memory("cpu") > with_it - 5 # the count alone does not go down
    meter.forget_peak()
    assert peak_memory("cpu") < with_it - 200


def test_peak_memory_on_a_gpu_is_what_tensors_took(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    assert peak_memory("cuda") == 3.


def waits(steps, monkeypatch):
    """Does a step ask the device to finish?"""
    asked = []
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
        for name in ("synchronize", "current_stream", "Event"): patched.setattr(torch.cuda, name, lambda *a, **k: asked.append(1))
        steps.start()
        steps.stop(8)
    return bool(asked)


def test_the_meter_never_waits(monkeypatch):
    class Waits(Meter): # the mutation
        def stop(self, clips):
            torch.cuda.synchronize()
            return super().stop(clips)
    assert not waits(Meter("cuda"), monkeypatch) and waits(Waits("cuda"), monkeypatch)


# progress

def loop(pause=0., dies=0):
    """As a worker runs it: what goes wrong is printed last."""
    try:
        with progress(40, 10) as bar:
            for step in range(11, 41):
                bar.set_postfix(loss=1 / step, refresh=False)
                bar.update()
                time.sleep(pause)
                if step == dies: raise ValueError("the disk is full")
    except ValueError: traceback.print_exc()


def in_a_file(path, monkeypatch, **how):
    with open(path, "w") as log, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", log)
        loop(**how)
    return path.read_bytes().decode()


def test_a_log_file_gets_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_MININTERVAL", "0.1")
    text = in_a_file(tmp_path / "run.log", monkeypatch, pause=.01)
    lines = text.splitlines()
    assert "\r" not in text and 2 <= len(lines) <= 30
    assert lines[-1].startswith("step 40 of 40, loss 0.025, ") and lines[-1].endswith("steps/s, 00:00 left")
    assert all(line.startswith("step ") for line in lines)


def test_a_crash_stays_the_last_line(tmp_path, monkeypatch):
    """The grid of runs reads there why a run failed."""
    lines = in_a_file(tmp_path / "run.log", monkeypatch, dies=25).splitlines()
    assert lines[-1] == "ValueError: the disk is full" and lines[0].startswith("step 25 of 40")


class Terminal(io.StringIO):
    def isatty(self): return True


def test_a_terminal_gets_a_bar(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", Terminal())
        loop()
        text = sys.stderr.getvalue()
    assert "\r" in text and "40/40" in text and "loss=0.025" in text


def test_without_the_lines_a_log_would_be_flooded(monkeypatch, capsys):
    """The mutation: whoever takes the file for a terminal leaves carriage returns in it."""
    for redraws, expected in ((False, False), (True, True)):
        monkeypatch.setattr(meter, "_redraws", lambda answer=redraws: answer)
        with progress(3) as bar: bar.update(3)
        assert ("\r" in capsys.readouterr().err) == expected


def test_the_pace_is_the_environments(monkeypatch, clock, capsys):
    def lines(seconds_a_step):
        with progress(100) as bar:
            for _ in range(100):
                clock.t += seconds_a_step
                bar.update()
        return len(capsys.readouterr().err.splitlines())
    monkeypatch.delenv("TQDM_MININTERVAL", raising=False)
    assert lines(1.) == 10 and lines(30.) == 100 and lines(.001) == 1
    monkeypatch.setenv("TQDM_MININTERVAL", "50")
    assert lines(1.) == 2
    monkeypatch.setattr(meter, "_redraws", lambda: True)
    with progress(3) as bar: assert bar.mininterval == 50
    monkeypatch.delenv("TQDM_MININTERVAL")
    with progress(3) as bar: assert bar.mininterval == .5


def test_time_left_is_of_what_this_process_did(clock, capsys):
    with progress(110, initial=50) as bar:
        clock.t += 20
        bar.set_postfix(loss="2.5", clips=3)
        bar.update(20)
    assert capsys.readouterr().err == "step 70 of 110, loss 2.5, clips 3, 1 steps/s, 00:40 left\n"


def test_nothing_when_nothing_is_to_be_shown(capsys):
    with progress(3, shown=False) as bar:
        bar.set_postfix(loss=1.)
        bar.update(3)
    with progress(3, initial=3): pass # there was nothing to do
    assert capsys.readouterr().err == ""


class KernelStream:
    """What stderr is inside a Jupyter kernel, as far as the rule looks."""
    __module__ = "ipykernel.iostream"

    def isatty(self): return False


@pytest.mark.parametrize("cells, redraws", [(["", "import musicssl"], True), (["", "# Parameters\nprofile = 'smoke'"], False)],
                         ids=["by hand", "papermill"])
def test_notebooks_get_a_bar_unless_papermill_runs_them(monkeypatch, cells, redraws):
    shell = types.SimpleNamespace(kernel=1, user_ns={"In": cells})
    monkeypatch.setattr(sys, "stderr", KernelStream())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert meter._redraws() == redraws


# LiveCurve

@contextmanager
def screen(monkeypatch):
    """Stands in for the notebook: what is displayed, and what is overwritten."""
    import IPython.display
    shown = types.SimpleNamespace(displays=0, updates=0)
    def display(picture, display_id):
        shown.displays += 1
        def update(picture): shown.updates += 1
        return types.SimpleNamespace(update=update)
    with monkeypatch.context() as patched:
        patched.setattr(IPython.display, "display", display)
        yield shown


def test_one_place_and_a_slow_pace(monkeypatch, clock):
    with screen(monkeypatch) as shown, LiveCurve("Run", shown=True) as curve:
        for step in range(1, 101):
            clock.t += .1
            curve.add({"step": step, "loss": 1 / step})
    assert shown.displays == 1 and shown.updates == 5 # after 0.1, 2.1, … 8.1 seconds, and at the end


def test_drawing_slows_down_when_it_is_slow(monkeypatch, clock):
    def slow(curve):
        clock.t += 1 # second for one picture
        return types.SimpleNamespace(savefig=lambda file, format: None)
    monkeypatch.setattr(meter, "_figure", slow)
    import IPython.display
    monkeypatch.setattr(IPython.display, "Image", lambda png: png)
    with screen(monkeypatch) as shown, LiveCurve(shown=True) as curve:
        for step in range(1, 101):
            clock.t += 1
            curve.add({"step": step, "loss": 1.})
    assert shown.displays + shown.updates <= 7


def test_what_is_drawn():
    curve = LiveCurve("Run", metric="auc", shown=True, every=1e9)
    curve.due = float("inf")
    for step, loss in enumerate([3., float("nan"), 1.], 1): curve.add({"step": step, "loss": loss})
    for step, auc in ((0, .5), (3, .7)): curve.add({"step": step, "validation": {"loss": 1., "auc": auc}})
    raw, mean = (line.get_xydata().tolist() for line in meter._figure(curve).axes[0].lines)
    assert raw == [[1, 3.], [3, 1.]] and mean[0] == pytest.approx([1, 3.]) and mean[1] == pytest.approx([3, (.95 * 3 + 1) / 1.95])
    left, right = meter._figure(curve).axes
    assert right.lines[0].get_xydata().tolist() == [[0, .5], [3, .7]]
    title = left.get_title() or left.get_title("left")         # as the style of the moment has it
    assert (title, left.get_xlabel(), left.get_ylabel(), right.get_ylabel()) == ("Run", "step", "loss", "validation auc")


def test_a_million_steps_are_thinned():
    curve = LiveCurve(shown=True)
    curve.steps = curve.losses = curve.means = list(range(10**6))
    assert all(len(line.get_xdata()) <= 2000 for line in meter._figure(curve).axes[0].lines)


def test_free_and_silent_outside_a_notebook():
    code = """
import sys
from musicssl.meter import LiveCurve
with LiveCurve() as curve:
    for step in range(9): curve.add({"step": step, "loss": 1.})
assert curve.steps == [] and not {"matplotlib", "IPython"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_executed_notebook_keeps_one_picture():
    import nbformat
    from nbclient import NotebookClient
    cell = "from musicssl.meter import LiveCurve\nwith LiveCurve('Run', every=0) as curve:\n    for step in range(1, 4):\n" \
           "        curve.due = 0\n        curve.add({'step': step, 'loss': 1 / step})"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    NotebookClient(notebook, kernel_name="python3", timeout=60).execute()
    outputs = notebook.cells[0].outputs
    assert [output.output_type for output in outputs] == ["display_data"] and "image/png" in outputs[0].data


# Board

ROWS = [{"step": 3, "loss": 2., "clips": 48, "matrix_share": None, "clock": "now"}, {"step": 3, "validation": {"auc": .7}}]


def test_rows_become_scalars(monkeypatch, tmp_path):
    written = []
    class SummaryWriter:
        def __init__(self, folder, purge_step): written.append((folder, purge_step))
        def add_scalar(self, name, value, step): written.append((name, value, step))
        def close(self): written.append("closed")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    with Board(tmp_path, step=2) as board:
        for row in ROWS: board.add(row)
    assert written == [(str(tmp_path), 3), ("loss", 2., 3), ("clips", 48, 3), ("validation/auc", .7, 3), "closed"]


def test_a_missing_tensorboard_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'musicssl\[tensorboard\]'"): Board(tmp_path)


def test_tensorboard_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator as reader
    with Board(tmp_path) as board:
        for row in ROWS: board.add(row)
    found = reader.EventAccumulator(str(tmp_path))
    found.Reload()
    assert {name: [(e.step, round(e.value, 6)) for e in found.Scalars(name)] for name in found.Tags()["scalars"]} == \
        {"loss": [(3, 2.)], "clips": [(3, 48.)], "validation/auc": [(3, .7)]}


@pytest.mark.gpu
def test_limits_of_a_gpu():
    narrow, wide = matrix_limit("cuda", torch.bfloat16), matrix_limit("cuda", torch.float32)
    assert narrow > wide > 1e12 and copy_limit("cuda") > 1e11
    steps, a = Meter("cuda", 2 * 8192**3, torch.bfloat16), torch.rand(8192, 8192, device="cuda", dtype=torch.bfloat16)
    shares = []
    for _ in range(20):
        steps.start()
        (a @ a).sum().item() # the loop's own look at its loss
        shares.append(steps.stop(1))
    assert .3 < max(row["matrix_share"] for row in shares) < 1.2 and shares[-1]["peak_memory_mb"] >= 2 * 128


