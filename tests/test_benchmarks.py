"""The benchmarks of data, training step and probe run, print what the targets ask for, and refuse to time what does not agree. No time is asserted."""
import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))

import data
import paired
import probe
import train
from musicssl.data.store import Store
from musicssl.features.targets import Targets
from musicssl.objectives.multitask import MultiTask
from musicssl.objectives.workers import GROUPS, WORKERS


def command(*arguments):
    return subprocess.run([sys.executable, FOLDER / "data.py", *arguments], capture_output=True, text=True, env=os.environ)


def test_the_whole_benchmark_as_json():
    done = command("--quick", "--size", "test", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["P16", "P17", "R14", "render"]
    for entry in found.values():
        assert entry["min"] <= entry["ratio"] <= entry["max"] and isinstance(entry["met"], bool)
        assert (entry["ratio"], entry["what"]) in {(row["ratio"], row["what"]) for row in entry["rows"]}
    wanted = {f"{dtype}, store : {peer}": least for dtype in ("int16", "float32") for peer, least in {"webdataset": 3., "FLAC, seek": 20.}.items()}
    assert {row["what"]: row["at_least"] for row in found["P16"]["rows"]}.items() >= wanted.items()
    assert {row["at_most"] for row in found["P17"]["rows"]} == {.05, None}


def test_the_table(capsys, monkeypatch):
    monkeypatch.setattr(data, "rendering", lambda folder, size: [paired.row("render", "500 clips", [.5], at_most=1.)])
    data.main(["--size", "test", "--only", "render"])
    printed = capsys.readouterr().out.splitlines()
    assert "1 thread(s)" in printed[0] and f"torch {torch.__version__}" in printed[0] and "soundfile" in printed[0]
    assert printed[1].split() == ["id", "what", "ratio", "min", "max", "n", "target", "remark"] and printed[2].startswith("render  500 clips")


def test_what_needs_a_gpu_is_skipped_aloud(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data.main(["--size", "test", "--only", "P17", "R14", "--device", "cuda", "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out) == {} and "no GPU" in said.err


# Agreement comes before time.

def one_step_off(wave):
    def wrong(*given):
        found = wave(*given)
        found[0, -1] += 2**-15
        return found
    return wrong


def one_sample_late(wave): return lambda store, ids, start, length: wave(store, ids, start + 1, length)


def in_double(wave): return lambda *given: wave(*given).double()


WRONG = {"one sample is one step off": one_step_off, "clips begin one sample late": one_sample_late, "another type": in_double}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    found = data.choose_places(data.note_tables(tmp_path_factory.mktemp("places")), data.SIZES["test"])
    data.write_files(found, "flac")
    return found


def readers(places, dtype="float32"):
    return {"store": lambda: data.from_store(places, dtype), "FLAC, seek": lambda: data.from_file(places, "flac", dtype)}


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_a_store_that_reads_right_agrees_with_flac(places, dtype): data.agree(places, readers(places, dtype), dtype)


def test_integers_that_are_wrong_do_not(places, monkeypatch):
    monkeypatch.setattr(Store, "__getitem__", lambda store, i, right=Store.__getitem__: right(store, i) + np.int16(1))
    with pytest.raises(paired.Disagreement, match="^store: track"): data.agree(places, readers(places, "int16"), "int16")


@pytest.mark.parametrize("fault", WRONG)
def test_a_store_that_reads_wrong_does_not(places, monkeypatch, fault):
    monkeypatch.setattr(Store, "wave", WRONG[fault](Store.wave))
    with pytest.raises(paired.Disagreement, match="^store: track"): data.agree(places, readers(places), "float32")


def test_a_reader_that_leaves_a_clip_out_does_not(places):
    with pytest.raises(paired.Disagreement, match="store: 7 clips, wanted 8"):
        data.agree(places, {"store": lambda: list(data.from_store(places, "float32"))[1:]}, "float32")


@pytest.mark.parametrize("agreement", [True, False], ids=["with", "without"])
def test_what_does_not_agree_is_not_timed(monkeypatch, agreement):
    """The mutation: `agree` removed. A wrong store is then timed, which the first case forbids."""
    timed = []
    monkeypatch.setattr(Store, "wave", one_step_off(Store.wave))
    monkeypatch.setattr(data, "PEERS", {"FLAC, seek": data.PEERS["FLAC, seek"]})
    monkeypatch.setattr(data, "paired", lambda *given, **more: timed.append(given) or paired.paired(*given, **more))
    if not agreement: monkeypatch.setattr(data, "agree", lambda places, readers, dtype: None)
    try: data.main(["--size", "test", "--only", "P16"])
    except paired.Disagreement: pass
    assert bool(timed) != agreement


def test_without_a_peer_its_row_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "litdata", None)
    data.main(["--size", "test", "--only", "P16", "--json"])
    said = capsys.readouterr()
    assert "no row for litdata" in said.err and not any("litdata" in row["what"] for row in json.loads(said.out)["P16"]["rows"])


@pytest.mark.parametrize("other", [1, 2], ids=["other clips", "other samples"])
def test_loaders_that_differ_are_not_timed(other):
    from musicssl.audio import Batch
    right = lambda number: Batch(wave=torch.full((2, 4), float(number)), ids=[number, number + 1])
    wrong = (lambda number: right(number + 1)) if other == 1 else (lambda number: Batch(wave=torch.zeros(2, 4), ids=[number, number + 1]))
    data.same_batches({"store, 0 workers": right, "2 workers": right}, range(2))
    with pytest.raises(paired.Disagreement, match="2 workers: batch"): data.same_batches({"store, 0 workers": right, "2 workers": wrong}, range(2))


def test_checksums_that_see_nothing_are_not_timed(tmp_path, monkeypatch):
    """The mutation: nothing is compared at the first read."""
    from musicssl.data.store import StoreWriter
    writer = StoreWriter(tmp_path / "store", 2, 100, 8000)
    writer.write(0, np.ones((2, 100), np.int16))
    store = writer.finish()
    data.notices(store, tmp_path)
    monkeypatch.setattr("musicssl.data.store.zlib.crc32", lambda body, start=0: next(iter(store.index["crc32"])))
    (tmp_path / "again").mkdir()
    with pytest.raises(paired.Disagreement, match="not noticed"): data.notices(store, tmp_path / "again")


# The training step

TRAINING = ["--size", "test", "--json", "--only"]


def test_the_benchmark_of_the_training_step_as_json(capsys, monkeypatch):
    monkeypatch.setattr(train, "in_a_child", lambda which, size: [train.beyond_the_state(which, size.state)])
    train.main([*TRAINING, "P8", "MT", "P13", "P14", "P15", "P22"])
    said = capsys.readouterr()
    found = json.loads(said.out)
    targets = lambda id: sorted(row["at_least"] or row["at_most"] for row in found[id]["rows"] if row["at_least"] or row["at_most"])
    assert list(found) == ["P8", "MT", "P13", "P14", "P15", "P22"] and all(f"{id}: skipped" in said.err for id in ("P9", "P11", "P12"))
    together, each = ([row["what"] for row in found["MT"]["rows"] if ("alone" in row["what"]) == alone] for alone in (False, True))
    measured = [name for name in GROUPS["every"] if WORKERS[name].kind == "regression"]
    assert ["'all'" in together[0], "'every'" in together[1], len(together)] == [True, True, 2] and [what.split()[0] for what in each] == measured
    assert targets("P8") == [.95] and targets("P13") == [.55, .55, .97, .97] and targets("P15") == [1 / 40, 1 / 6, 2.3, 3., 100.]
    assert targets("P14") == [.98, 1.15, 1.3]
    assert targets("P22") == ([.05, .2, 1.5] if sys.platform == "linux" else [.05, 1.5])


def test_the_step_of_the_gpu_runs_on_a_cpu_when_only_that_is_wanted(capsys):
    train.main([*TRAINING, "P9"])
    assert [row["at_least"] for row in json.loads(capsys.readouterr().out)["P9"]["rows"]] == [.25, 2.]


def test_merts_step_of_the_gpu_runs_on_a_cpu_when_only_that_is_wanted(capsys):
    train.main([*TRAINING, "P11", "P12"])
    found = json.loads(capsys.readouterr().out)
    assert [(row["at_least"], " 2 clips of 2.56 s" in row["what"]) for id in ("P11", "P12") for row in found[id]["rows"]] == [(.4, True), (.45, False)]
    assert all(0 < row["ratio"] < 1 for id in found for row in found[id]["rows"])


@pytest.mark.parametrize("arguments", [["--only", "P9", "P11", "P12"], ["--device", "cuda"]], ids=" ".join)
def test_without_a_gpu_its_step_is_skipped_aloud(arguments, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train.main([*arguments, "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out) == {} and all(f"{id}: skipped, it needs a GPU" in said.err for id in ("P9", "P11", "P12"))
    assert ("MT: skipped" in said.err) == ("cuda" in arguments)


def another_temperature(monkeypatch): monkeypatch.setattr(train, "nt_xent", lambda *z, right=train.nt_xent, **more: right(*z, .5001))


def half_the_gradient(monkeypatch): # the loss is right
    monkeypatch.setattr(train, "nt_xent", lambda z_i, z_j, right=train.nt_xent, **more: right(z_i, z_j.detach()))


def heads_that_mix_frames(monkeypatch):
    right, = train.heads()
    monkeypatch.setattr(train, "heads", lambda: [train.Head(right.name, Mixing(), right.masked, right.loss, lambda frames: torch.zeros(frames, 768))])


class Mixing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(768))

    def forward(self, frames): return self.weight * (frames - frames.flatten(0, -2).mean(0))


def rounded_weights(monkeypatch):
    rounded = lambda tensors: {name: (tensor / 3).bfloat16().to(tensor.dtype) * 3 for name, tensor in tensors.items()}
    monkeypatch.setattr(train, "save_checkpoint",
                        lambda folder, weights, *rest, right=train.save_checkpoint, **more: right(folder, rounded(weights), *rest, **more))


def attention_that_hears_less(monkeypatch): # the last frame is never listened to
    last_unheard = lambda q, k, v, mask, right=train.attend: right(q, k, v, torch.arange(k.shape[2]) < k.shape[2] - 1)
    monkeypatch.setattr(train, "attend", last_unheard)


def targets_that_come_late(monkeypatch): # when measured alone; in the step they are right
    monkeypatch.setattr(train, "Targets", Late)


def another_loss_in_bf16(monkeypatch):
    """Half precision that changes what is asked, not only how precisely."""
    def forward(self, batch, right=train.MERTPretext.forward): return {"loss": right(self, batch)["loss"] * (1.2 if torch.is_autocast_enabled("cpu") else 1)}
    monkeypatch.setattr(train.MERTPretext, "forward", forward)


class Late(Targets):
    def forward(self, wave): return super().forward(wave.roll(160, 1))


FAULTS = {"P8": another_temperature, "P11": another_loss_in_bf16, "MT": targets_that_come_late, "P13": heads_that_mix_frames, "P14": attention_that_hears_less,
          "P15": half_the_gradient, "P22": rounded_weights}
WORDS = {"P8": "SimCLR step of SampleCNN: the loss", "P11": "MERT's loss at tiny in bf16: the loss", "MT": "logmel in the step and alone: a number is", "P13": "the head alone: the loss",
         "P14": "128 frames: a number is", "P15": "16 pairs, .*: the gradient", "P22": "the weights read back"}


@pytest.mark.parametrize("id", FAULTS)
def test_a_step_that_disagrees_is_not_timed(id, monkeypatch):
    """The mutation: agreement removed. The wrong one is then timed."""
    class Timed(Exception): pass
    def timed(*given, **more): raise Timed
    FAULTS[id](monkeypatch)
    monkeypatch.setattr(train, "paired", timed)
    with pytest.raises(paired.Disagreement, match=WORDS[id]): train.main([*TRAINING, id])
    for check in ("agree", "near", "same_again"): monkeypatch.setattr(train, check, lambda *given: None)
    with pytest.raises(Timed): train.main([*TRAINING, id])


def test_heads_of_mert_that_mix_frames_are_not_timed(monkeypatch):
    right = train.MERTPretext.__init__
    def mixing(self, *given, **more):
        right(self, *given, **more)
        self.code_head.register_forward_pre_hook(lambda head, inputs: (inputs[0] - inputs[0].mean(0), *inputs[1:]))
    monkeypatch.setattr(train.MERTPretext, "__init__", mixing)
    with pytest.raises(paired.Disagreement, match="MERT's codes and notes: the loss"): train.mert_heads(train.SIZES["test"])


def test_targets_from_elsewhere_are_not_timed(monkeypatch):
    """The step's targets must be measured where the step runs."""
    elsewhere = lambda objective, batch, right=MultiTask.listen: right(objective, batch)._replace(targets={"logmel": torch.empty(1, device="meta")})
    monkeypatch.setattr(MultiTask, "listen", elsewhere)
    with pytest.raises(paired.Disagreement, match="logmel is measured on meta, the step is on cpu"): train.main([*TRAINING, "MT"])


def test_agreement_is_a_matter_of_size():
    right = [torch.tensor(2.), torch.ones(3), torch.zeros(2)]
    near = [torch.tensor(2.000001), torch.ones(3), torch.full((2,), 1e-6)]
    train.agree("it", near, right, 1e-6)
    with pytest.raises(paired.Disagreement, match="it: the loss is 4.8e-07 away, wanted at most 1e-07"): train.agree("it", near, right, 1e-7)
    with pytest.raises(paired.Disagreement, match="it: the gradient is 8.*e-07 away"): train.agree("it", near, right, 1e-6, 1e-7)
    with pytest.raises(paired.Disagreement, match="nan away"): train.agree("it", [torch.tensor(float("nan"))], right[:1], 1.)


def test_the_written_out_losses_are_the_loss():
    z = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for other in (train.written_out, train.masked): assert abs(other(*z) - train.nt_xent(*z, train.TAU)) < 1e-12


def test_the_package_is_the_peer_where_there_is_one(tmp_path, monkeypatch, capsys):
    """Its `__init__`, which imports torchvision, is never run."""
    modules = tmp_path / "simclr" / "modules"
    modules.mkdir(parents=True)
    for folder in (modules, modules.parent): (folder / "__init__.py").write_text("raise RuntimeError")
    (modules / "nt_xent.py").write_text("class NT_Xent:\n    def __init__(self, *given): self.given = given\n")
    monkeypatch.syspath_prepend(tmp_path)
    known = [name for name in sys.modules if name.split(".")[0] == "simclr"]
    with mock.patch.dict(sys.modules):
        for name in known: del sys.modules[name]
        name, loss = train.package_loss(7)
        assert name == "the package simclr" and loss.given == (7, .5, 1) and not capsys.readouterr().err
    with mock.patch.dict(sys.modules, {"simclr": None}):
        for name in known[1:]: del sys.modules[name]
        assert train.package_loss(7) == ("simclr 1.0.2's loss, written out", train.written_out)
    assert "stands in for simclr" in capsys.readouterr().err


def test_the_official_modules_are_clmr_s():
    """Eleven convolutions with batch norm and ReLU, pooling behind the second to the tenth, 2,368,512 weights: the paper's table."""
    ours, official, views = train.both("paper", 1)
    found = [type(layer).__name__ for layer in official.layers]
    block = ["Conv1d", "BatchNorm1d", "ReLU"]
    assert found == block + 9 * [*block, "MaxPool1d"] + block and sum(p.numel() for p in official.layers.parameters()) == 2_368_512
    ours.eval(), official.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours.project(views[0]), official.project(views[0]))
        official.layers[0].weight.mul_(1.1)
        assert not torch.allclose(ours.project(views[0]), official.project(views[0]))


def test_the_memory_bound_limit_is_the_targets():
    limit = 4.3e12 / train.PASSES / train.bytes_per_pair(train.SampleCNN.preset("paper"))
    assert limit == pytest.approx(16_000, rel=.02)


def test_peak_memory_counts_what_is_alive_together():
    one = lambda: torch.ones(1000, 1000)
    def in_turn():
        for _ in range(3): one()
    assert (train.peak_of_tensors(one), train.peak_of_tensors(in_turn), train.peak_of_tensors(lambda: (one(), one()))) == (4e6, 4e6, 8e6)


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def gathered_first() -> float:
    """The mutation: a checkpoint that is first put together in memory. In a process of its own, like what it is compared with."""
    import io
    def gathered(folder, weights, moments):
        def save():
            torch.save((weights, moments), whole := io.BytesIO())
            (folder / "whole").write_bytes(whole.getbuffer())
        return {"gathered": save}
    train.savers = gathered
    return train.beyond_the_state("gathered", 64)


def test_memory_while_writing_is_seen():
    assert train.in_a_child("ours", dataclasses.replace(train.SIZES["test"], state=64))[0] < .2
    with ProcessPoolExecutor(1, get_context("spawn")) as pool: assert pool.submit(gathered_first).result() > .9


# The probe

READING = ["--size", "test", "--json", "--only"]


def test_the_benchmark_of_the_probe_as_json(capsys):
    probe.main([*READING, "P18", "P19"])
    found = json.loads(capsys.readouterr().out)
    targets = lambda id: sorted(row["at_least"] or row["at_most"] for row in found[id]["rows"] if row["at_least"] or row["at_most"])
    assert list(found) == ["P18", "P19"] and targets("P18") == [4., 4.] and targets("P19") == [.2, .2, 5.]
    assert all("agreed" in row["note"] for id in found for row in found[id]["rows"])
    assert all("loop of 4, times 5" in row["what"] for row in found["P19"]["rows"][1:]), "what is extrapolated is said"


def a_hasty_probe(monkeypatch): monkeypatch.setattr(probe, "all_tags", lambda x, y, right=probe.all_tags: right(x, y, tolerance=.1))


def a_probe_that_knows_no_thresholds(monkeypatch):
    monkeypatch.setattr(probe, "ours", lambda x, y, right=probe.ours: (right(x, y)[0], np.zeros(y.shape[1])))


def scores_without_ties(monkeypatch):
    apart = lambda s: s + 1e-9 * np.arange(len(s))[:, None]
    monkeypatch.setattr(probe, "tagging_scores", lambda y, s, right=probe.tagging_scores: right(y, apart(s)))


def other_resamples(monkeypatch):
    monkeypatch.setattr(probe, "bootstrap", lambda *given, right=probe.bootstrap: right(*given, seed=1))


MISREAD = [("P18", a_hasty_probe, "above scikit-learn's"), ("P18", a_probe_that_knows_no_thresholds, "above scikit-learn's"),
           ("P19", scores_without_ties, "^scores: .* away"), ("P19", other_resamples, "^roc_auc, resampled: .* away")]


@pytest.mark.parametrize("id, fault, words", MISREAD)
def test_a_probe_that_disagrees_is_not_timed(id, fault, words, monkeypatch):
    """The mutation: agreement removed. The wrong one is then timed."""
    class Timed(Exception): pass
    def timed(works, rounds):
        if fault is not other_resamples or len(calls) == 1: raise Timed
        calls.append(works)
        return {name: [1.] for name in works}
    calls = []
    fault(monkeypatch)
    monkeypatch.setattr(probe, "paired", timed)
    with pytest.raises(paired.Disagreement, match=words): probe.main([*READING, id])
    calls.clear()
    monkeypatch.setattr(probe, "agree", lambda *given: "")
    monkeypatch.setattr(probe, "equal", lambda *given: None)
    with pytest.raises(Timed): probe.main([*READING, id])


def test_the_minimum_is_found_from_anywhere_near():
    x, y = probe.tagged(*probe.SIZES["test"].probe, "mixed")
    found = probe.ours(x, y)
    near, far = (probe.objectives(x, y, probe.newton(x, y, start)) for start in (found, tuple(.9 * part for part in found)))
    np.testing.assert_allclose(near, far, rtol=1e-9)
    least = near
    with pytest.raises(paired.Disagreement, match="above Newton's, wanted 1e-4"): probe.agree("it", least * 1.001, least * 1.01, least)
    assert probe.agree("it", least, least * 1.01, least).startswith("agreed")


# Rounds

def test_every_candidate_once_a_round_in_changing_order():
    calls = []
    taken = paired.paired({name: name for name in "abc"}, 7, measure=lambda name: calls.append(name) or len(calls))
    rounds = [calls[k:k + 3] for k in range(0, len(calls), 3)]
    assert len(rounds) == 8 and all(sorted(one) == ["a", "b", "c"] for one in rounds) and len(set(map(tuple, rounds[1:]))) > 2
    assert all(min(times) > 3 for times in taken.values()) and [len(times) for times in taken.values()] == [7, 7, 7], "the warm-up does not count"


@pytest.mark.parametrize("warm_up, rounds", [(1., 7), (11., 3)])
def test_number_of_rounds(monkeypatch, warm_up, rounds):
    monkeypatch.setattr(paired, "seconds", lambda work: work() and 0. or warm_up)
    assert len(paired.paired({"a": lambda: None}, measure=lambda work: 1.)["a"]) == rounds


def test_ratios_are_taken_within_a_round():
    """Not the ratio of medians, which a slow spell that meets both would change."""
    line = paired.row("P0", "a : b", [2., 20., 6.], [1., 10., 2.], at_least=2.)
    assert (line.ratio, line.min, line.max, line.rounds, line.margin) == (2., 2., 3., 3, 1.)
    with pytest.raises(ValueError): paired.row("P0", "a : b", [1., 2.], [1.])


def test_the_row_nearest_to_missing_its_target_speaks_for_it():
    rows = [paired.row("P0", "fine", [9.], at_least=3.), paired.row("P0", "missed", [1.9], at_least=2.), paired.row("P0", "free", [.1]),
            paired.row("P1", "low", [.04], at_most=.05)]
    found = json.loads(paired.as_json(rows))
    assert (found["P0"]["what"], found["P0"]["met"], len(found["P0"]["rows"])) == ("missed", False, 3) and found["P1"]["met"]
    printed = paired.table(rows).splitlines()
    assert ["MISSED" in line for line in printed] == [False, False, True, False, False]


def test_a_package_that_is_missing_is_named():
    assert "no-such-package is not installed: its rows are missing" in paired.header("no-such-package")
