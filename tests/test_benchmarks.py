"""The benchmarks of the data rooms run, print what the targets ask for, and refuse to time what does not agree. No time is asserted."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))

import data
import paired
from musicssl.data.store import Store


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
