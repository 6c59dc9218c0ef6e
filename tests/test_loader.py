"""What the loader promises: one order for everybody, no clip lost, and every fault with the name of the clip."""
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from musicssl import train
from musicssl.checkpoint import Mismatch
from musicssl.data import loader as library
from musicssl.data.loader import Loader, Order, SongOrder, WorkerLost, seed_of
from musicssl.data.store import StoreWriter

WORKERS = Path(__file__).parent / "workers"
sys.path.insert(0, str(WORKERS))
import faulty  # noqa: E402
import two_loaders  # noqa: E402
from toy import Toy, batches  # noqa: E402


def heard(loader, numbers, rank=0, world=1):
    """Clips and samples of some batches."""
    return [(batch.ids.tolist(), batch.wave.tolist()) for batch in (loader(number, rank, world) for number in numbers)]


# ------------------------------------------------------------------------------------------------------------- order


def test_the_default_order_is_the_one_committed_results_were_made_with():
    order = Order(range(3, 20), 5, 7)
    assert [order.ids_of(number).tolist() for number in (0, 2, 3, 1000)] == [
        [8, 11, 13, 4, 18], [7, 10, 5, 9, 19], [12, 17, 9, 11, 10], [18, 10, 5, 15, 12]]
    assert seed_of("epoch", 7, 0) == 3049453307466719223


@pytest.mark.parametrize("options", [{}, {"window": 1}, {"window": 3}], ids=str)
def test_every_clip_once_per_epoch(options):
    shard_of = np.sort(np.random.default_rng(0).integers(0, 10, 60))
    order = Order(range(100, 160), 4, seed=5, shard_of=shard_of, **options)
    epochs = [[int(i) for number in range(15 * epoch, 15 * epoch + 15) for i in order.ids_of(number)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(100, 160)) for epoch in epochs) and len(set(map(tuple, epochs))) == 4


def shards_open(order, shard_of, batches=5):
    """The most shards that any five batches in a row are read from."""
    found = [shard_of[np.concatenate([order.ids_of(n) for n in range(first, first + batches)])] for first in range(30 - batches)]
    return max(len(set(shards.tolist())) for shards in found)


def test_a_window_keeps_reads_together():
    shard_of = np.arange(240) // 8
    assert shards_open(Order(range(240), 8, shard_of=shard_of, window=2), shard_of) <= 8
    assert shards_open(Order(range(240), 8, shard_of=shard_of), shard_of) > 16 # mutation: shuffled over everything


@pytest.fixture(scope="module")
def alone():
    return heard(Loader(faulty.Slow(), batch_size=6, crop=300), range(16))


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_and_any_jump(alone, workers):
    loader, rows = Loader(faulty.Slow(), batch_size=6, crop=300, workers=workers), {}
    for number in (0, 1, 2, 3, 9, 10, 4, 4, 15): rows[number] = heard(loader, [number])[0]
    shares = [heard(loader, [5], rank, 2)[0] for rank in (0, 1)]
    loader.close()
    assert all(rows[number] == alone[number] for number in rows)
    assert shares == [(alone[5][0][rank::2], alone[5][1][rank::2]) for rank in (0, 1)]


def test_batches_taken_as_they_arrive_would_be_noticed(alone, monkeypatch):
    """Mutation: whichever worker answers first delivers, as in a queue without numbers."""
    monkeypatch.setattr(library._Worker, "batch", lambda worker, number, place, timeout: library._Worker.answer(worker, number, timeout) or
                        worker.shelf[1 - place].clone())
    loader = Loader(faulty.Slow(), batch_size=6, crop=300, workers=1)
    found = heard(loader, range(8))
    loader.close()
    assert found != alone[:8]


def splits_agree():
    """Whether batches of 4 and of 8, and two ranks, hear the same pieces, whatever else has been drawn meanwhile."""
    waves = np.arange(48 * 500, dtype=np.float32).reshape(48, 500) / 2**16
    def pieces(batch_size, numbers, **share):
        rows = []
        for number in numbers:
            torch.rand(number + 1), np.random.rand(3)
            rows += Loader(waves, batch_size=batch_size, crop=100, seed=9)(number, **share).wave[:, 0].tolist()
        return rows
    whole = pieces(8, range(12))
    shares = [pieces(8, range(12), rank=rank, world=2) for rank in (0, 1)]
    return whole == pieces(4, range(24)) and whole == [x for pair in zip(*shares) for x in pair] and len(set(whole)) == 96


def test_pieces_do_not_depend_on_how_batches_are_cut(monkeypatch):
    assert splits_agree()
    by_batch = lambda order, number, what, below, rank=0, world=1: [
        seed_of(what, order.seed, number, row) * int(n) >> 63 for row, n in enumerate(below)]
    with monkeypatch.context() as patch: # mutation: by batch and row
        patch.setattr(Order, "draw", by_batch)
        assert not splits_agree()
    with monkeypatch.context() as patch: # mutation: from NumPy's stream
        patch.setattr(Order, "draw", lambda order, number, what, below, rank=0, world=1: [np.random.randint(n) for n in below])
        assert not splits_agree()


def test_pieces_begin_everywhere():
    waves = np.tile(np.arange(110, dtype=np.float32) / 128, (2000, 1))
    first = torch.cat([batch.wave[:, 0] for batch in Loader(waves, batch_size=100, crop=100).epoch(0)]) * 128
    counts = torch.bincount(first.long(), minlength=11)
    assert len(counts) == 11 and float(((counts - 2000 / 11).square() / (2000 / 11)).sum()) < 29.6 # chi-square, 10 degrees, p = .001


def test_two_processes_hear_what_one_hears(tmp_path):
    """Each paused half-way and resumed with other workers: one sequence, every clip once per epoch."""
    fabric = train.Fabric(accelerator="cpu", devices=1)
    one, three = [two_loaders.heard(fabric, tmp_path / str(workers), workers) for workers in ((0, 0), (1, 3))]
    assert one == three and all(sorted(int(clip) for clip, *_ in one[epoch:epoch + 48]) == list(range(48)) for epoch in (0, 48))
    done = subprocess.run([sys.executable, WORKERS / "two_loaders.py", tmp_path], capture_output=True, text=True, timeout=180,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    def together(name): return [row for pair in zip(*(rank[name] for rank in ranks)) for row in pair]
    assert together("whole") == one
    assert together("rank ignored") != one # mutation


# -------------------------------------------------------------------------------------------------------------- songs


SONG_OF = np.random.default_rng(0).permutation(np.repeat(np.arange(100, 116), 3)) # 16 songs of three clips, scattered
CLIPS = np.arange(10, 58) # their ids
SAMPLES = np.random.default_rng(1).integers(100, 1000, 48)


def pairs_of_one_song(order, batches=120):
    """Batches in which a song occurs twice."""
    return sum(len({SONG_OF[i - 10] for i in order.ids_of(number)}) < 8 for number in range(batches))


def test_no_batch_holds_two_clips_of_a_song():
    assert pairs_of_one_song(SongOrder(CLIPS, SONG_OF, SAMPLES, 8)) == 0
    assert pairs_of_one_song(Order(CLIPS, 8)) > 60 # mutation: clips are drawn, as in the default


def test_every_song_once_per_epoch_and_every_clip_by_its_length():
    order = SongOrder(CLIPS, SONG_OF, SAMPLES, 8, seed=3)
    assert order.per_epoch == 2
    heard = np.array([order.ids_of(number) for number in range(2000)]).reshape(1000, 16)
    assert all(sorted(SONG_OF[epoch - 10]) == list(range(100, 116)) for epoch in heard)
    counts, share = np.bincount(heard.ravel() - 10, minlength=48), SAMPLES / np.bincount(SONG_OF, SAMPLES)[SONG_OF]
    def distance(share): return float(((counts - 1000 * share) ** 2 / (1000 * share)).sum())
    assert distance(share) < 62.5 and counts.min() > 0 # chi-square, 32 degrees, p = .001
    assert distance(np.full(48, 1 / 3)) > 1000 # mutation: every clip of a song as often


@pytest.mark.parametrize("changed", [{"seed": 4}, {"lengths": SAMPLES[::-1]}, {"song_of": SONG_OF[::-1]}], ids=lambda changed: [*changed][0])
def test_songs_are_a_function_of_what_was_given(changed):
    given = {"ids": CLIPS, "song_of": SONG_OF, "lengths": SAMPLES, "batch_size": 8, "seed": 3}
    def ids(**given): return [SongOrder(**given).ids_of(number).tolist() for number in (7, 0, 300)]
    assert ids(**given) == ids(**given) != ids(**{**given, **changed})


def test_songs_do_not_depend_on_readers_ranks_or_the_size_of_a_batch():
    groups = np.arange(48) // 3
    options = dict(crop=300, groups=groups)
    whole = heard(Loader(faulty.clips(), batch_size=8, **options), range(8))
    working = Loader(faulty.Slow(), batch_size=8, **options, workers=2)
    for others in (working, Loader(faulty.clips(), batch_size=8, resident="cpu", **options)):
        assert [ids for ids, _ in heard(others, range(8))] == [ids for ids, _ in whole]
    working.close()
    shares = [heard(Loader(faulty.clips(), batch_size=8, **options), range(8), rank, 2) for rank in (0, 1)]
    assert all((ids[rank::2], waves[rank::2]) == share for rank in (0, 1) for (ids, waves), share in zip(whole, shares[rank]))
    halves = [ids for ids, _ in heard(Loader(faulty.clips(), batch_size=4, **options), range(16))]
    assert [a + b for a, b in zip(halves[::2], halves[1::2])] == [ids for ids, _ in whole]
    assert all(len(set(groups[ids])) == 8 for ids, _ in whole)


def test_groups_that_cannot_be_are_refused():
    groups = np.arange(48) // 8
    with pytest.raises(ValueError, match="6 songs cannot fill a batch of 8"): Loader(faulty.clips(), batch_size=8, groups=groups)
    assert len(Loader(faulty.clips(), batch_size=8, groups=groups, smaller_ok=True)(0)) == 8
    with pytest.raises(ValueError, match="got groups and a window of 2 shards"): Loader(faulty.clips(), batch_size=4, groups=groups, window=2)
    with pytest.raises(IndexError): Loader(faulty.clips(), batch_size=4, groups=groups[:40])


def test_without_codes_and_groups_the_state_is_what_older_runs_wrote():
    facts = {"seed", "batch_size", "crop", "short", "smaller_ok", "window", "ids", "source"}
    assert set(Loader(faulty.clips(), batch_size=8).state()) == facts
    assert set(Loader(faulty.clips(), batch_size=8, groups=np.arange(48)).state()) == {*facts, "groups"}


# -------------------------------------------------------------------------------------------------------- short clips


def ragged(*lengths): return [np.full(length, .5, np.float32) for length in lengths]


@pytest.mark.parametrize("lengths", [[500, 0, 400], [400, 500, 90], [500, *[0] * 2000, 300], [500, *[90] * 2000, 300]],
                         ids=["empty", "last", "2000 empty", "2000 short"])
def test_short_clips_are_left_out_or_padded(lengths):
    dropped, padded = [Loader(ragged(*lengths), batch_size=1, crop=300, short=short) for short in ("drop", "pad")]
    assert len(dropped) == 2 and dropped.left_out == len(lengths) - 2
    assert len(padded) == sum(length > 0 for length in lengths)
    for batch in padded.epoch(0): assert int((batch.wave != 0).sum()) == min(300, lengths[int(batch.ids)]) and batch.wave[0, 0] != 0
    assert dropped(0).lengths is None and all(batch.lengths.tolist() == [min(300, lengths[int(batch.ids)])] for batch in map(padded, range(len(padded))))
    resident = Loader(ragged(*lengths), batch_size=1, crop=300, short="pad", resident="cpu")
    assert heard(resident, range(len(resident))) == heard(padded, range(len(padded)))


@pytest.mark.parametrize("short", ["drop", "pad"])
def test_all_too_short_says_so(short):
    with pytest.raises(ValueError, match="all 2000 clips are too short: the longest has 90 samples, wanted 300"):
        Loader(ragged(*[90] * 2000), batch_size=1, crop=300, short=short)
    with pytest.raises(ValueError, match="all 3 clips are too short: the longest has 0 samples, wanted 1"): Loader(ragged(0, 0, 0), batch_size=1)
    with pytest.raises(ValueError, match="the clips have 90 to 300 samples: say how long a `crop`"): Loader(ragged(90, 300), batch_size=1)


# ------------------------------------------------------------------------------------------------------------- faults


def with_nan():
    clips = [np.full(400, .1, np.float32) for _ in range(24)]
    clips[13][7] = np.nan
    return clips


@pytest.mark.parametrize("options", [{}, {"workers": 1}, {"resident": "cpu"}], ids=str)
def test_nan_is_refused_with_the_clips_name(options):
    with pytest.raises(ValueError, match="clip 13 has NaN or infinite samples"):
        loader = Loader(with_nan(), batch_size=8, **options)
        list(loader.epoch(0))


def test_unchecked_nan_would_get_through(monkeypatch):
    monkeypatch.setattr(library.math, "isfinite", lambda value: True) # mutation
    assert any(batch.wave.isnan().any() for batch in Loader(with_nan(), batch_size=8).epoch(0))


def batch_of(clip, batch_size=8):
    order = Order(range(48), batch_size)
    return next(number for number in range(order.per_epoch) if clip in order.ids_of(number))


def epoch_of(source, **options):
    """Ids of an epoch as its user sees them; the error that ended it; how long it took."""
    loader, ids, began = Loader(source, batch_size=8, **options), [], time.perf_counter()
    try:
        for batch in loader.epoch(0): ids += batch.ids.tolist()
        error = None
    except Exception as lost: error = lost
    finally: loader.close()
    return ids, error, time.perf_counter() - began


def names_the_clip(error): return f"reading clip {faulty.BAD} of batch {batch_of(faulty.BAD)}" in f"{error} {getattr(error, '__notes__', '')}"


def complete(ids, error): return error is not None or sorted(ids) == list(range(48))


@pytest.mark.parametrize("source, what", [(faulty.Killed, "died (exit code -9)"), (faulty.Hanging, "has not answered for 2 s"),
                                          (faulty.Stopped, "has not answered for 2 s")])
def test_a_lost_worker_is_an_error_that_names_the_clip(source, what, monkeypatch):
    ids, error, seconds = epoch_of(source(), workers=2, timeout=2.)
    assert isinstance(error, WorkerLost) and what in str(error) and names_the_clip(error) and complete(ids, error)
    assert ids == Order(range(48), 8)._order(0)[:8 * batch_of(faulty.BAD)].tolist() and seconds < 60


def test_a_lost_name_or_a_short_epoch_would_be_noticed(monkeypatch):
    with monkeypatch.context() as patch: # mutation: what every library says
        patch.setattr(library, "_lost", lambda worker, number, what: WorkerLost(f"worker {worker.process.pid} {what}"))
        _, error, _ = epoch_of(faulty.Killed(), workers=1)
        assert not names_the_clip(error)
    def until_it_breaks(loader, number):
        try: yield from (loader(batch) for batch in range(number * len(loader), (number + 1) * len(loader)))
        except WorkerLost: return
    monkeypatch.setattr(Loader, "epoch", until_it_breaks) # mutation: the epoch ends early
    assert not complete(*epoch_of(faulty.Killed(), workers=1)[:2])


def test_without_a_timeout_it_would_wait_for_ever(monkeypatch):
    answer = library._Worker.answer
    monkeypatch.setattr(library._Worker, "answer", lambda worker, number, timeout: answer(worker, number, None)) # mutation
    loader, lost = Loader(faulty.Hanging(), batch_size=48, workers=1, timeout=1.), []
    def ask():
        try: loader(0)
        except WorkerLost as error: lost.append(error)
    waiting = threading.Thread(target=ask, daemon=True)
    waiting.start()
    waiting.join(4)
    assert waiting.is_alive()
    os.kill(loader._reader.workers[0].process.pid, signal.SIGKILL)
    waiting.join(10)
    assert not waiting.is_alive() and f"while reading clip {faulty.BAD} of batch 0" in str(lost[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_keeps_its_type_and_names_the_clip(workers):
    ids, error, _ = epoch_of(faulty.Raising(), workers=workers)
    assert isinstance(error, LookupError) and str(error).startswith("the disk says no") and names_the_clip(error) and complete(ids, error)


def test_after_a_loss_the_next_batch_starts_new_workers():
    loader = Loader(faulty.Slow(), batch_size=8, workers=1)
    before = heard(loader, [3])
    os.kill(loader._reader.workers[0].process.pid, signal.SIGKILL)
    with pytest.raises(WorkerLost, match=r"died \(exit code -9\)"):
        for number in range(4, 8): loader(number)
    assert heard(loader, [3]) == before
    loader.close()


def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError: return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks into /proc")
def test_workers_leave_when_the_trainer_is_killed():
    trainer = subprocess.Popen([sys.executable, WORKERS / "orphan.py"], stdout=subprocess.PIPE, text=True)
    pids = list(map(int, trainer.stdout.readline().split()))
    assert len(pids) == 2 and all(map(alive, pids))
    trainer.kill()
    trainer.communicate()
    until = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < until: time.sleep(.05)
    assert not any(map(alive, pids))


# ------------------------------------------------------------------------------------------------------- paths, resume


def test_all_paths_give_the_same_bits(tmp_path):
    writer = StoreWriter(tmp_path, n=48, n_samples=400, sample_rate=8000, chunk=7)
    for chunk in writer.missing(): writer.write(chunk, faulty.clips()[writer.rows(chunk)])
    store, ids = writer.finish(), np.arange(5, 45)
    paths = [Loader(source, ids, 8, crop=crop, **options) for crop in (None, 333) for source in (store, faulty.clips())
             for options in ({}, {"resident": "cpu"}, {"resident": "auto"})]
    for crop, same in ((None, paths[:6]), (333, paths[6:])):
        rows = [heard(path, range(10)) for path in same]
        assert all(row == rows[0] for row in rows) and same[0].state() == same[1].state()
    whole = paths[0](2)
    assert torch.equal(whole.wave, store.wave(whole.ids))


def test_a_gpu_that_is_too_small_is_refused_and_auto_reads_instead(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(library, "_free", lambda device: 38_000)
        with pytest.raises(MemoryError, match="48 clips take 38,400 bytes, 38,000 are free on cpu"): Loader(faulty.clips(), batch_size=8, resident="cpu")
    Loader(faulty.clips(), batch_size=8, resident="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(library, "_free", lambda device: 70_000)
    assert isinstance(Loader(faulty.clips(), batch_size=8, resident="auto")._reader, library._Now)


def test_a_run_refuses_other_batches_by_name(tmp_path, monkeypatch):
    config = train.TrainConfig(steps=4, lr=1e-2)
    def go(**options): train.fit(Toy(), batches(**options), config, tmp_path, progress=False)
    go()
    go(resident="cpu")
    refused = {"seed": {"seed": 1}, "batch_size": {"size": 16}, "crop": {"crop": 30}, "short": {"short": "pad"}, "smaller_ok": {"smaller_ok": True},
               "ids": {"ids": range(63)}, "groups": {"groups": np.arange(64) // 2}}
    for field, options in refused.items():
        with pytest.raises(Mismatch, match=rf"(?s)is of another run\s+batches.{field}: got [^\n]*, wanted [^\n]*$"): go(**options)
    monkeypatch.setattr(Loader, "state", lambda loader: {}) # mutation: nothing is remembered
    with pytest.raises(Mismatch, match="batches"): go()
    train.fit(Toy(), batches(), config, tmp_path / "forgetful", progress=False)
    train.fit(Toy(), batches(seed=1), config, tmp_path / "forgetful", progress=False)


def test_captions_are_chosen_by_place():
    said = [[f"{i}{letter}" for letter in "abc"[:1 + i % 3]] for i in range(48)]
    listed, called = [Loader(faulty.clips(), batch_size=8, captions=captions) for captions in (said, said.__getitem__)]
    rows = [batch.caption for batch in listed.epoch(0)]
    assert rows == [batch.caption for batch in called.epoch(0)]
    assert all(int(re.match(r"\d+", text)[0]) == i for row, batch in zip(rows, listed.epoch(0)) for text, i in zip(row, batch.ids.tolist()))
    assert {text[-1] for row in rows for text in row} == set("abc") and rows != [batch.caption for batch in listed.epoch(1)]
    assert [batch.caption for batch in Loader(faulty.clips(), batch_size=8, captions=["one"] * 48).epoch(0)] == [["one"] * 8] * 6
