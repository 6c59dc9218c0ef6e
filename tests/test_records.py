"""Records that are whole or absent, and grids that several processes share."""
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import musicssl
from musicssl import files, records

WORKERS = Path(__file__).parent / "workers"
from grid import grid, slow
from pair import free_port


def fill_elsewhere(folder, runs, seconds):
    return subprocess.Popen([sys.executable, WORKERS / "grid.py", folder, str(runs), str(seconds)], stderr=subprocess.DEVNULL)


def diary(folder):
    path = folder / "scratch" / "diary.txt"
    return Counter(path.read_text().splitlines()) if path.exists() else Counter()


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(.02)


@pytest.mark.skipif(os.name == "nt", reason="needs kill -9")
def test_a_killed_grid_is_gone_on_with(tmp_path):
    runs = grid(3, .5)
    first = fill_elsewhere(tmp_path, 3, .5)
    wait_for(lambda: diary(tmp_path)["start 1"])
    first.kill()
    first.wait()
    assert records.status(runs, tmp_path / "records") in ({"done": 1, "running": 1, "missing": 1}, {"done": 2, "running": 0, "missing": 1})
    done = records.fill(runs, slow, tmp_path / "records", tmp_path / "scratch", progress=False)
    assert [record.arrays["square"].tolist() for record in done] == [[0], [1], [4]]
    assert diary(tmp_path) == {f"{what} {run}": 1 for what in ("start", "end") for run in range(3)}, "the orphan's run is waited for, not repeated"


def test_two_processes_share_a_grid(tmp_path):
    other = fill_elsewhere(tmp_path, 3, .2)
    done = records.fill(grid(3, .2), slow, tmp_path / "records", tmp_path / "scratch", workers=2, progress=False)
    assert other.wait(60) == 0 and len(done) == 3
    assert set(diary(tmp_path).values()) == {1} and list((tmp_path / "records" / ".locks").iterdir()) == []


@pytest.mark.parametrize("moment", ["before the arrays", "between arrays and JSON"])
def test_half_a_record_is_none(tmp_path, monkeypatch, moment):
    config, write = {"run": 3, "seconds": 0}, files.write_json
    def crash(*_, **__): raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment == "before the arrays": patch.setattr(np, "savez_compressed", crash)
        else: patch.setattr(files, "write_json", lambda path, obj: crash() if "metrics" in obj else write(path, obj))
        records.run(config, slow, tmp_path / "records", tmp_path / "scratch")
    assert len(list((tmp_path / "records").glob("*.npz"))) == (moment != "before the arrays")
    assert records.load_all(tmp_path / "records") == [] and records.find(config, tmp_path / "records") is None
    assert records.run(config, slow, tmp_path / "records", tmp_path / "scratch").arrays["square"] == 9


def test_a_damaged_record_stops_a_table_and_is_run_again(tmp_path):
    config = {"run": 3, "seconds": 0}
    record = records.run(config, slow, tmp_path / "records", tmp_path / "scratch")
    path = tmp_path / "records" / f"{record.key}.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(records.CorruptRecord, match=record.key): records.load_all(tmp_path / "records")
    assert records.run(config, slow, tmp_path / "records", tmp_path / "scratch").metrics == {"run": 3} and diary(tmp_path)["start 3"] == 2


def test_records_can_be_read_elsewhere_and_copied_ones_are_known(tmp_path):
    """Copy the folder to another machine: the run is not repeated there."""
    config = {"run": 2, "seconds": 0}
    records.run(config, slow, tmp_path / "here", tmp_path / "scratch")
    (tmp_path / "here").rename(tmp_path / "there")
    assert records.fill([config, dict(reversed(config.items()))], slow, tmp_path / "there", tmp_path / "scratch", workers=0, progress=False)[1].metrics == {"run": 2}
    assert diary(tmp_path)["start 2"] == 1


def test_nan_survives(tmp_path):
    def work(config, place): return {"auc": np.float32("nan"), "history": [{"step": 1}]}, {"scores": np.array([np.nan, 1.], "float32")}
    record = records.run({"a": (1, 2)}, work, tmp_path, tmp_path / "scratch")
    np.testing.assert_equal(vars(record), vars(records.load_all(tmp_path)[0]))
    assert np.isnan(record.metrics["auc"]) and record.arrays["scores"].dtype == np.float32 and record.config == {"a": [1, 2]}


def test_the_grid_goes_on_around_failures_in_one_process_too(tmp_path):
    def work(config, place):
        if config["run"] == 1: raise FloatingPointError("run 1 diverged")
        return slow(config, place)
    with pytest.raises(records.RunsFailed, match=r"(?s)1 of 3 runs failed:\n\w+ \{\"run\": 1.*FloatingPointError: run 1 diverged; log: ") as failed:
        records.fill(grid(3, 0), work, tmp_path / "records", tmp_path / "scratch", workers=0, progress=False)
    what, = failed.value.failures.values()
    assert what["config"]["run"] == 1 and "Traceback" in Path(what["log"]).read_text()
    assert records.status(grid(3, 0), tmp_path / "records") == {"done": 2, "running": 0, "missing": 1}


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_an_interrupted_fill_takes_its_runs_with_it(tmp_path):
    process = fill_elsewhere(tmp_path, 1, 60)
    wait_for(lambda: diary(tmp_path)["start 0"])
    process.send_signal(signal.SIGINT)
    assert process.wait(90) != 0 # whoever misses the signal sleeps its minute out and ends with 0
    wait_for(lambda: records.status(grid(1, 60), tmp_path / "records")["running"] == 0, 5)


def test_the_commit_is_the_librarys_own(tmp_path, monkeypatch):
    package, git = tmp_path / "musicssl" / "__init__.py", ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@a"]
    package.parent.mkdir()
    package.touch()
    monkeypatch.setattr(musicssl, "__file__", str(package))
    assert records.commit() == (None, None)
    subprocess.run([*git, "init", "-q"], check=True)
    assert records.commit() == (None, None), "inside a repository, but not of it"
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    sha, dirty = records.commit()
    (tmp_path / "elsewhere.txt").touch()
    assert len(sha) == 40 and dirty is False and records.commit() == (sha, False)
    package.write_text("changed = True")
    assert records.commit() == (sha, True)


def test_time_counts_all_attempts_and_a_finished_run_leaves_nothing_to_the_next(tmp_path):
    place, calls = tmp_path / "scratch" / files.fingerprint({"a": 1}), []
    def work(config, folder):
        calls.append((folder / "checkpoint").exists())
        (folder / "checkpoint").touch()
        if len(calls) == 1:
            os.utime(folder / "checkpoint", (time.time() + 100,) * 2)
            raise KeyboardInterrupt
        return {}, {}
    def run(): return records.run({"a": 1}, work, tmp_path / "records", tmp_path / "scratch")
    with pytest.raises(KeyboardInterrupt): run()
    record = run()
    assert calls == [False, True] and 99 < record.provenance["seconds"] < 110, "the interrupted attempt counts"
    (tmp_path / "records" / f"{record.key}.json").unlink()
    assert run().provenance["seconds"] < 50 and calls == [False, True, False], "the finished attempt does not"
    assert place.is_dir()


def two_ranks(folder, case):
    """Two processes as `srun` would start them: nobody ends one when the other has gone."""
    started = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": ""}
    return [subprocess.Popen([sys.executable, WORKERS / "together.py", folder, case], stderr=subprocess.PIPE, text=True,
                             env={**os.environ, **started, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]


def test_two_processes_fill_a_grid_as_one(tmp_path):
    with files.lock(tmp_path / "records" / ".locks" / files.fingerprint({"run": 3})):
        ranks = two_ranks(tmp_path, "good")
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    first, second = (files.read_json(tmp_path / f"{rank}.json") for rank in (0, 1))
    mutated = [found.pop("every process looks after the files") for found in (first, second)]
    assert first == second
    assert first["rest"] == [*({"total": 2 * run + 1, "rank": 0, "array": [[2 * run + 1]], "processes": 2} for run in (0, 2)), None]
    assert "1 of 4 runs failed" in first["failed"] and "FloatingPointError: diverged" in first["failed"]
    assert f"is held by process {os.getpid()} on " in first["locked"] and "use join_in" in first["fill"]
    for run in (0, 2): assert {path.name for path in (tmp_path / "scratch" / files.fingerprint({"run": run})).iterdir()} == {"attempt.json", "rank0", "rank1"}
    assert {record.key for record in records.load_all(tmp_path / "records")} == {files.fingerprint({"run": run}) for run in (0, 2, 9)}
    assert [None] in mutated and mutated != [[None], [None]], "the mutation: a process that is not told finds the lock of its own group"


def test_a_process_that_fails_alone_takes_the_others_along(tmp_path):
    ranks = two_ranks(tmp_path, "alone")
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1] and "FloatingPointError: diverged" in errors[1]
    assert all(f"process {rank} leaves: the others did not follow" in errors[rank] for rank in (0, 1))
    assert records.find({"run": 0}, tmp_path / "records") and records.find({"run": 1}, tmp_path / "records") is None
    with files.lock(tmp_path / "records" / ".locks" / files.fingerprint({"run": 1})): pass


def test_mutation_nobody_asks_how_it_ended_for_the_others(tmp_path):
    """Then the process that failed goes on to the next thing, and the other waits for it, or takes that thing for the one it waits for."""
    ranks = two_ranks(tmp_path, "mutation")
    try:
        wait_for(lambda: records.find({"run": 0}, tmp_path / "records"), 120)
        time.sleep(5)
        assert [rank.poll() for rank in ranks] != [1, 1]
    finally:
        for rank in ranks: rank.kill(), rank.communicate()


def test_join_in_never_waits(tmp_path):
    """One run is another's: the rest is done, a failure is tried once, and the run of the other is done by the next call."""
    tries = []
    def work(config, place):
        tries.append(config["run"])
        if config["run"] == 1: raise FloatingPointError("run 1 diverged")
        return slow(config, place)
    def join(): return records.join_in(grid(4, 0), work, tmp_path / "records", tmp_path / "scratch", progress=False)
    with files.lock(tmp_path / "records" / ".locks" / files.fingerprint(grid(4, 0)[0])), pytest.raises(records.RunsFailed, match="1 of 4 runs failed"): join()
    assert tries == [1, 2, 3] and records.status(grid(4, 0), tmp_path / "records") == {"done": 2, "running": 0, "missing": 2}
    with pytest.raises(records.RunsFailed): join()
    assert tries == [1, 2, 3, 0, 1]


def test_join_in_looks_again_at_what_another_let_go(tmp_path, monkeypatch):
    """The other process dies while we are at the second run: its run is ours then."""
    held, tries = files.lock(tmp_path / "records" / ".locks" / files.fingerprint(grid(2, 0)[0])), []
    held.__enter__()
    def work(config, place):
        tries.append(config["run"])
        if config["run"] == 1: held.__exit__(None, None, None)
        return slow(config, place)
    assert None not in records.join_in(grid(2, 0), work, tmp_path / "records", tmp_path / "scratch", progress=False) and tries == [1, 0]
