"""What tar shards promise: readable by anybody, resumable, every fault noticed, every clip at hand in any order."""
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from musicssl.data import shards as library
from musicssl.data.loader import Arrays, Loader
from musicssl.data.shards import Shards, write_shards
from musicssl.data.store import CorruptStore, StoreWriter, UnfinishedStore

WRITER = """
import sys, time
import numpy as np
from musicssl.data.shards import write_shards
class Slow(list):
    sample_rate = 8000
    def __getitem__(self, i): time.sleep(float(sys.argv[2])); return super().__getitem__(i)
write_shards(Slow(np.random.default_rng(i).integers(-9000, 9000, 300 + 10 * i, dtype=np.int16) for i in range(23)), sys.argv[1], per_shard=4, progress=False)
"""


def clips(n=23): return [np.random.default_rng(i).integers(-9000, 9000, 300 + 10 * i, dtype=np.int16) for i in range(n)]


def write(folder, format="flac", **options):
    return write_shards(Arrays(clips(), 8000), folder, per_shard=4, format=format, progress=False, **options)


def contents(folder): return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix == ".tar"}


@pytest.mark.parametrize("format", ["flac", "int16"])
def test_they_answer_like_a_store(tmp_path, format):
    made, shards = clips(), write(tmp_path / "shards", format)
    writer = StoreWriter(tmp_path / "store", n=23, n_samples=None, sample_rate=8000, chunk=5)
    for chunk in writer.missing(): writer.write(chunk, [made[i] for i in writer.rows(chunk)])
    store = writer.finish()
    assert len(shards) == len(store) and shards.sample_rate == 8000 and shards.n_samples is None and (shards.lengths == store.lengths).all()
    assert all(np.array_equal(shards[i], store[i]) and shards[i].dtype == np.int16 for i in (22, 0, 11))
    assert torch.equal(shards.wave([22, 3, 3], [9, 0, 30], 290), store.wave([22, 3, 3], [9, 0, 30], 290))
    for call in (lambda s: s[23], lambda s: s.wave([0], 11, 290), lambda s: s.wave([0], -1, 290)):
        for source in (shards, store):
            with pytest.raises(IndexError): call(source)
    loaders = [Loader(source, batch_size=5, crop=250) for source in (shards, store)]
    for number in range(9): assert torch.equal(loaders[0](number).wave, loaders[1](number).wave)


def test_float_sources_labels_and_the_same_bytes_twice(tmp_path):
    facts = [{"tags": ["a", "ü"], "caption": f"clip {i}"} for i in range(23)]
    first, again = write(tmp_path / "a", facts=facts, meta={"name": "noise"}), write(tmp_path / "b", facts=facts)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and first.meta == {"name": "noise"} and again.meta == {}
    assert first.facts(22)["caption"] == "clip 22" and first.facts(3)["tags"] == ["a", "ü"] and first.facts(3)["samples"] == 330
    floats = write_shards(Arrays([clip / np.float32(32768) for clip in clips()], 8000), tmp_path / "c", per_shard=4, progress=False)
    assert contents(tmp_path / "c") == contents(write(tmp_path / "d").folder) and np.array_equal(floats[7], clips()[7])
    with pytest.raises(ValueError, match="got facts about 2 clips, wanted 23"): write(tmp_path / "e", facts=facts[:2])
    with pytest.raises(ValueError, match="clip 1 has no samples"): write_shards(Arrays([np.ones(3), np.ones(0)], 8000), tmp_path / "f", progress=False)


def test_webdataset_and_tar_read_them(tmp_path):
    import webdataset
    write(tmp_path, "int16", facts=[{"tag": i % 3} for i in range(23)])
    stream = webdataset.WebDataset(sorted(map(str, tmp_path.glob("*.tar"))), shardshuffle=False).decode()
    for i, sample in enumerate(stream):
        assert np.array_equal(np.frombuffer(sample["int16"], "<i2"), clips()[i]) and sample["json"]["tag"] == i % 3
    assert i == 22
    with tarfile.open(tmp_path / "shard-000005.tar") as tar: assert len(tar.getnames()) == 6


def test_a_killed_writer_resumes_to_identical_bytes(tmp_path):
    write(tmp_path / "whole")
    killed = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "killed"), ".03"])
    until = time.monotonic() + 60
    while not (tmp_path / "killed" / "shard-000002.tar").exists() and time.monotonic() < until: time.sleep(.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert 0 < len(contents(tmp_path / "killed")) < 6
    with pytest.raises(UnfinishedStore, match="has no shards.json"): Shards(tmp_path / "killed")
    kept = (tmp_path / "killed" / "shard-000000.tar").stat().st_mtime_ns
    write(tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole") and (tmp_path / "killed" / "shard-000000.tar").stat().st_mtime_ns == kept


def flip(shards, i):
    """Turn one bit in the sound of a clip, behind the reader's back."""
    path, place = shards.folder / f"shard-{shards.shard_of[i]:06d}.tar", int(shards._at["offset"][i] + shards._at["size"][i] // 2)
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("format", ["flac", "int16"])
def test_a_flipped_bit_is_noticed_at_the_first_read(tmp_path, format):
    flip(write(tmp_path, format), 13)
    shards = Shards(tmp_path)
    for read in (lambda: shards[13], lambda: shards.wave([13], 5, 10), lambda: Loader(shards, [13], 1)(0)):
        with pytest.raises(CorruptStore, match="clip 13 has changed since it was written: .*shard-000003.tar has CRC-32"): read()
    assert np.array_equal(shards[12], clips()[12])


def test_without_checksums_the_bit_would_be_music(tmp_path, monkeypatch):
    flip(write(tmp_path, "int16"), 13)
    shards = Shards(tmp_path)
    monkeypatch.setattr(shards, "_unread", np.zeros(23, bool)) # mutation
    assert not np.array_equal(shards[13], clips()[13])


def test_a_checksum_is_compared_once(tmp_path, monkeypatch):
    shards, count = write(tmp_path, "int16"), []
    crc32 = library.zlib.crc32
    monkeypatch.setattr(library.zlib, "crc32", lambda body: count.append(len(body)) or crc32(body))
    for _ in range(5): shards.wave([3, 4], 0, 10)
    assert count == [660, 680]


def test_the_index_is_made_again_when_shards_have_changed(tmp_path, monkeypatch):
    shards, other = write(tmp_path / "a", "int16"), [clip[:-2] for clip in clips()]
    assert all(np.array_equal(a, b) for a, b in zip(shards, clips()))
    rewritten = write_shards(Arrays(other, 8000), tmp_path / "b", per_shard=4, format="int16", progress=False)
    for file in contents(tmp_path / "b"): shutil.copy(tmp_path / "b" / file, tmp_path / "a" / file)
    with open(tmp_path / "a" / "shard-000002.tar", "ab") as file: file.write(bytes(10_240)) # another size, the same members
    assert all(np.array_equal(a, b) for a, b in zip(Shards(tmp_path / "a"), other)) and rewritten.lengths[0] == 298
    index = tmp_path / "a" / "index.npz"
    index.unlink()
    assert np.array_equal(Shards(tmp_path / "a")[22], other[22]) and index.exists()
    index.write_bytes(index.read_bytes()[:100])
    assert np.array_equal(Shards(tmp_path / "a")[22], other[22]) # a torn index is no index
    index.unlink()
    def refuse(path): raise PermissionError(path)
    monkeypatch.setattr(library, "atomic", refuse) # a folder one may only read
    assert np.array_equal(Shards(tmp_path / "a")[22], other[22]) and not index.exists()


def test_cut_and_missing_shards_are_named(tmp_path):
    shards = write(tmp_path)
    whole = (tmp_path / "shard-000001.tar").read_bytes()
    for left in (6000, 1000, 0): # the clips end before byte 10,240, zeros follow
        (tmp_path / "shard-000001.tar").write_bytes(whole[:left])
        with pytest.raises(CorruptStore, match="shard-000001.tar cannot be read|hold [0-9]+ clips, wanted 23"): Shards(tmp_path)
    os.unlink(tmp_path / "shard-000001.tar")
    with pytest.raises(CorruptStore, match="1 shards are missing: shard-000001.tar"): Shards(tmp_path)
    assert len(shards) == 23


def test_without_webdataset_the_cure_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "musicssl\[shards\]"'): write(tmp_path)


def test_reading_needs_no_webdataset(tmp_path):
    write(tmp_path)
    code = "import sys; sys.modules['webdataset'] = None; from musicssl.data.shards import Shards; print(len(Shards(sys.argv[1])[5]))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "350\n", done.stderr


def test_windows_with_workers_read_every_clip_once(tmp_path):
    shards = write(tmp_path)
    loaders = [Loader(shards, batch_size=2, crop=300, window=2, workers=workers) for workers in (0, 2)]
    rows = [[(batch.ids.tolist(), batch.wave.tolist()) for batch in loader.epoch(3)] for loader in loaders]
    loaders[1].close()
    assert rows[0] == rows[1] and len({i for ids, _ in rows[0] for i in ids}) == 22 and loaders[0].state()["window"] == 2
    assert Path(tmp_path / "index.npz").exists()
