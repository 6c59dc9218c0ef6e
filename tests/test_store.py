"""What the store promises across processes: resuming, refusing, and noticing damage."""
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from musicssl import files
from musicssl.data import store as store_room
from musicssl.data.store import CorruptStore, Store, StoreWriter, UnfinishedStore, derive, to_int16

WORKER = """
import sys, time
import numpy as np
from musicssl.data.store import StoreWriter
folder, chunks, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
writer = StoreWriter(folder, 22, 500, 8000, 4)
for chunk in (writer.missing() if chunks == "missing" else map(int, chunks.split(","))):
    clips = np.stack([np.random.default_rng(i).integers(-32768, 32768, 500, dtype=np.int16) for i in writer.rows(chunk)])
    time.sleep(pause)
    writer.write(chunk, clips)
    print(chunk, flush=True)
"""


def work(folder, chunks, pause=0.):
    return subprocess.Popen([sys.executable, "-c", WORKER, str(folder), chunks, str(pause)], stdout=subprocess.PIPE, text=True)


def clip(i): return np.random.default_rng(i).integers(-32768, 32768, 500, dtype=np.int16)


def build(folder):
    writer = StoreWriter(folder, 22, 500, 8000, 4)
    for chunk in writer.missing(): writer.write(chunk, np.stack([clip(i) for i in writer.rows(chunk)]))
    return writer.finish({"name": "noise"})


def contents(folder): return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_killed_build_resumes_to_identical_bytes(tmp_path):
    build(tmp_path / "whole")
    killed = work(tmp_path / "killed", "missing", pause=.2)
    for _ in range(2): killed.stdout.readline()
    time.sleep(.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    left = StoreWriter(tmp_path / "killed", 22, 500, 8000, 4).missing()
    assert 0 < len(left) < 6
    with pytest.raises(UnfinishedStore, match="has no index.json: building stopped after"): Store(tmp_path / "killed")
    build(tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_write_that_dies_half_way_leaves_nothing(tmp_path, monkeypatch):
    writer = StoreWriter(tmp_path / "store", 22, 500, 8000, 4)
    import zlib
    monkeypatch.setattr(zlib, "crc32", lambda *body: 1 / 0) # after the samples, before the checksum
    with pytest.raises(ZeroDivisionError): writer.write(0, np.zeros((4, 500), np.int16))
    assert writer.missing()[0] == 0 and sorted(contents(tmp_path / "store")) == ["plan.json"]


def test_two_writers_share_the_work(tmp_path):
    other = work(tmp_path / "shared", "1,3,5", pause=.02)
    writer = StoreWriter(tmp_path / "shared", 22, 500, 8000, 4)
    assert other.stdout.readline() == "1\n" # it is at work while we are
    for chunk in (0, 2, 4): writer.write(chunk, np.stack([clip(i) for i in writer.rows(chunk)]))
    other.communicate(timeout=60)
    assert other.returncode == 0 and writer.missing() == []
    build(tmp_path / "alone")
    build(tmp_path / "shared") # only the index is written
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


@pytest.mark.parametrize("inside", [True, False])
def test_a_folder_without_an_index_is_refused(tmp_path, inside):
    if inside:
        build(tmp_path / "store")
        (tmp_path / "store" / "index.json").unlink()
    with pytest.raises(UnfinishedStore, match="after 6 chunks, resume" if inside else "no store was built"): Store(tmp_path / "store")


@pytest.mark.parametrize("chunk, at", [(0, 0), (2, 1234), (5, 1999)]) # first byte, somewhere, last byte of samples
def test_every_flipped_bit_is_found_at_the_first_read(tmp_path, chunk, at):
    build(tmp_path / "store")
    file = tmp_path / "store" / f"{chunk:05d}.int16"
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(content)
    store = Store(tmp_path / "store")
    for i in range(22):
        if i // 4 == chunk:
            for _ in range(2): # and again at the second
                with pytest.raises(CorruptStore, match=f"chunk {chunk} has changed .*{file.name}"): store.wave([i])
        else: assert np.array_equal(store[i], clip(i))


def test_a_chunk_that_is_cut_or_gone_is_found_and_made_again(tmp_path):
    build(tmp_path / "store")
    (tmp_path / "store" / "00001.int16").write_bytes(b"short")
    (tmp_path / "store" / "00004.int16").unlink()
    for i in (4, 16):
        with pytest.raises(CorruptStore, match=f"chunk {i // 4} is missing or cut off"): Store(tmp_path / "store")[i]
    assert StoreWriter(tmp_path / "store", 22, 500, 8000, 4).missing() == [1, 4]
    assert np.array_equal(build(tmp_path / "store")[5], clip(5))


def test_wave_is_exactly_the_integer_over_32768(tmp_path):
    writer = StoreWriter(tmp_path / "all", 1, 65536, 8000)
    writer.write(0, np.arange(-32768, 32768, dtype=np.int16)[None])
    wave = writer.finish().wave([0])[0]
    assert wave.dtype == torch.float32 and wave.min() == -1 and wave.max() == 32767 / 32768
    assert torch.equal(wave.double() * 32768, torch.arange(-32768, 32768).double())


def test_pieces_are_those_of_the_clips(tmp_path):
    store = build(tmp_path / "store")
    ids, starts = [21, 0, 7, 7], torch.tensor([0, 17, 400, 3])
    batch = store.wave(torch.tensor(ids), starts, 100)
    for row, i, start in zip(batch, ids, starts.tolist()): assert torch.equal(row, torch.from_numpy(clip(i)[start:start + 100] / np.float32(32768)))
    assert store.wave([3], 100).shape == (1, 400) and store.wave([]).shape == (0, 500)
    for bad in (([22],), ([-1],), ([0], -1, 10), ([0], 491, 10), ([0], 0, 0), ([0], 500)):
        with pytest.raises(IndexError): store.wave(*bad)


def test_a_store_travels_to_another_process(tmp_path):
    store = build(tmp_path / "store")
    store[0]
    assert np.array_equal(pickle.loads(pickle.dumps(store))[9], clip(9))


def test_more_chunks_than_open_files(tmp_path):
    writer = StoreWriter(tmp_path / "many", 300, 10, 8000, 1)
    for chunk in writer.missing():
        (tmp_path / "many" / f"{chunk:05d}.int16").write_bytes((body := np.full(10, chunk, "<i2").tobytes()) + zlib_sum(body))
    store = writer.finish()
    assert [int(store[i][0]) for i in (*range(300), *range(300))] == [*range(300), *range(300)]


def zlib_sum(body):
    import zlib
    return zlib.crc32(body).to_bytes(4, "little")


def test_a_plan_must_be_kept_and_make_sense(tmp_path):
    build(tmp_path / "store")
    with pytest.raises(ValueError, match="was begun with"): StoreWriter(tmp_path / "store", 22, 500, 16000, 4)
    with pytest.raises(ValueError, match="whole numbers above 0"): StoreWriter(tmp_path / "other", 0, 500, 8000)
    with pytest.raises(ValueError, match="of float32, wanted"): StoreWriter(tmp_path / "store", 22, 500, 8000, 4).write(0, np.zeros((4, 500), np.float32))


def test_a_derived_store_resumes_and_keeps_the_tone(tmp_path):
    writer = StoreWriter(tmp_path / "high", 6, 22050, 22050, 4)
    tone = lambda rate: .5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    for chunk in writer.missing(): writer.write(chunk, np.repeat(to_int16(tone(22050))[None], len(writer.rows(chunk)), 0))
    high = writer.finish({"seed": 3})
    low = derive(high, tmp_path / "low", 8000, progress=False)
    assert (len(low), low.n_samples, low.sample_rate, low.meta) == (6, 8000, 8000, {"seed": 3, "derived_from_hz": 22050})
    assert np.abs(low.wave([5])[0].numpy() - tone(8000))[400:-400].max() < 1e-3
    before = contents(tmp_path / "low")
    (tmp_path / "low" / "00001.int16").unlink()
    derive(high, tmp_path / "low", 8000, progress=False)
    assert contents(tmp_path / "low") == before


def test_the_format_of_fixed_stores_stays(tmp_path):
    """Caches of earlier versions must open: names and bytes of a small store are those of the first version."""
    build(tmp_path / "store")
    content = b"".join(file.name.encode() + file.read_bytes() for file in sorted((tmp_path / "store").iterdir()))
    assert hashlib.sha256(content).hexdigest()[:16] == "838da490132988d8"


# Ragged stores

SIZES = [500, 0, 3, 70_000, 1, 0, 0, 0, 0, 12, 800] # chunks of four: mixed, empty but for its end, short


def song(i): return np.random.default_rng(i).integers(-32768, 32768, SIZES[i], dtype=np.int16)


def ragged(folder, chunks=None):
    writer = StoreWriter(folder, len(SIZES), None, 8000, 4)
    for chunk in writer.missing() if chunks is None else chunks: writer.write(chunk, (song(i) for i in writer.rows(chunk)))
    return writer


def test_ragged_clips_come_back(tmp_path):
    store = ragged(tmp_path / "store").finish({"kind": "songs"})
    assert store.n_samples is None and store.lengths.tolist() == SIZES and store.lengths.dtype == np.int64 and store.meta == {"kind": "songs"}
    for i in range(len(SIZES)): assert np.array_equal(store[i], song(i)) and store[i].dtype == np.int16 and not store[i].flags.writeable
    batch = store.wave([10, 3, 3], [300, 69_500, 0], 500)
    for row, i, start in zip(batch, (10, 3, 3), (300, 69_500, 0)): assert torch.equal(row, torch.from_numpy(song(i)[start:start + 500] / np.float32(32768)))
    assert store.wave([9]).shape == (1, 12) and store.wave([0, 0], 100).shape == (2, 400)
    assert np.array_equal(pickle.loads(pickle.dumps(store))[3], song(3))
    assert build(tmp_path / "fixed").lengths.tolist() == [500] * 22


def test_a_ragged_piece_beyond_its_own_clip_is_refused(tmp_path):
    store = ragged(tmp_path / "store").finish()
    assert len(store[0]) < 501 < len(store[3])
    for bad in (([0], 0, 501), ([3, 0], 0, 501), ([0], 1, 500), ([0], -1, 10), ([1], 0, 1), ([1],), ([11],), ([2], 0, 0)):
        with pytest.raises(IndexError): store.wave(*bad)
    with pytest.raises(ValueError, match="differ in length, from 3 to 500 samples: say which `length`"): store.wave([0, 2])
    assert store.wave([0, 2], length=3).shape == (2, 3)


def test_a_ragged_chunk_needs_its_rows(tmp_path):
    writer = ragged(tmp_path / "store", chunks=[])
    with pytest.raises(ValueError, match="chunk 0: got 3 clips, wanted 4"): writer.write(0, [song(i) for i in range(3)])
    with pytest.raises(ValueError, match="of float32, wanted .T,. of int16"): writer.write(0, [np.zeros(4, np.float32)] * 4)
    with pytest.raises(ValueError, match=r"got \(4, 2\) of int16"): writer.write(0, [np.zeros((4, 2), np.int16)] * 4)
    assert writer.missing() == [0, 1, 2] and sorted(contents(tmp_path / "store")) == ["plan.json"]
    with pytest.raises(ValueError, match="was begun with"): StoreWriter(tmp_path / "store", len(SIZES), 500, 8000, 4)


KILLED = """
import os, signal, sys, numpy as np
sys.path.insert(0, {tests!r})
from test_store import ragged, song
from musicssl.data.store import StoreWriter
ragged({folder!r}, chunks=[0, 2])
def dying():
    yield song(4)
    os.kill(os.getpid(), signal.SIGKILL) # between two rows of a chunk
StoreWriter({folder!r}, 11, None, 8000, 4).write(1, dying())
"""


def test_a_killed_ragged_build_resumes_to_identical_bytes(tmp_path):
    """R26: refused before, equal after."""
    ragged(tmp_path / "whole").finish()
    folder = str(tmp_path / "killed")
    killed = subprocess.run([sys.executable, "-c", KILLED.format(folder=folder, tests=os.path.dirname(__file__))])
    assert killed.returncode == -signal.SIGKILL and list(Path(folder).glob(".tmp-*"))
    with pytest.raises(UnfinishedStore, match="building stopped after 2 chunks"): Store(folder)
    assert StoreWriter(folder, 11, None, 8000, 4).missing() == [1]
    with pytest.raises(UnfinishedStore, match="1 chunks are missing, the first is 1"): ragged(folder, chunks=[]).finish()
    ragged(folder).finish()
    assert contents(Path(folder)) == contents(tmp_path / "whole")


@pytest.mark.parametrize("keep", [0, 5, 20, 60, 2000, -9, -1])
def test_a_cut_ragged_chunk_is_missing(tmp_path, keep):
    ragged(tmp_path / "store").finish()
    file = tmp_path / "store" / "00000.int16"
    file.write_bytes(file.read_bytes()[:keep])
    assert StoreWriter(tmp_path / "store", 11, None, 8000, 4).missing() == [0]
    with pytest.raises(CorruptStore, match="chunk 0 is missing or cut off"): Store(tmp_path / "store")[0]


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(content)


@pytest.mark.parametrize("at", [0, 70_000, -37, -30, -5]) # samples; the lengths at the end
def test_a_flipped_bit_of_a_ragged_chunk_is_found_at_the_first_read(tmp_path, at):
    """R14."""
    ragged(tmp_path / "store").finish()
    flip(tmp_path / "store" / "00000.int16", at)
    store = Store(tmp_path / "store")
    assert np.array_equal(store[9], song(9))
    with pytest.raises(CorruptStore, match="chunk 0 has changed .*00000.int16"): store.wave([0])


def test_mutation_without_the_checksum_a_flipped_bit_passes(tmp_path, monkeypatch):
    """The protection of the two tests above taken away: then the damage comes back as sound, so they do test the checksum."""
    for make, good in ((build, clip), (lambda folder: ragged(folder).finish(), song)):
        make(folder := tmp_path / good.__name__)
        flip(folder / "00000.int16", 10)
        with monkeypatch.context() as without:
            without.setattr(store_room.zlib, "crc32", lambda *data: 0)
            index = files.read_json(folder / "index.json")
            files.write_json(folder / "index.json", {**index, "crc32": [0] * len(index["crc32"])})
            assert not np.array_equal(Store(folder)[0], good(0))


def test_mutation_a_reader_that_needs_no_index(tmp_path, monkeypatch):
    """R26 without its rule: a `Store` that guesses the index from the plan opens what was never finished, and the check of refusal notices."""
    ragged(tmp_path / "store", chunks=[0, 2])
    guess = {"n": 11, "n_samples": None, "sample_rate": 8000, "chunk": 4, "crc32": [0] * 3, "lengths": SIZES, "meta": {}}
    monkeypatch.setattr(store_room, "read_json", lambda path: files.read_json(path) if path.exists() else guess)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        with pytest.raises(UnfinishedStore): Store(tmp_path / "store")


def test_mutation_missing_that_only_looks_for_names(tmp_path, monkeypatch):
    """R26 without the lengths in the chunk: whatever lies there counts as written."""
    writer = ragged(tmp_path / "store")
    (tmp_path / "store" / "00000.int16").write_bytes(b"short")
    assert writer.missing() == [0]
    monkeypatch.setattr(store_room, "_lengths", lambda folder, plan, chunk: [] if store_room._file(folder, chunk).exists() else None)
    assert writer.missing() == []


def test_a_ragged_store_derives(tmp_path):
    low = derive(ragged(tmp_path / "high").finish(), tmp_path / "low", 4000, progress=False)
    assert low.n_samples is None and low.lengths.tolist() == [(size + 1) // 2 for size in SIZES] and low.sample_rate == 4000
