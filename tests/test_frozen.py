"""Frozen features: nothing moves, nothing is mixed up, nothing stale is used again, and what was killed goes on."""
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from musicssl import files
from musicssl.audio import TooManyBadFiles
from musicssl.data.store import CorruptStore, UnfinishedStore
from musicssl.encoders.base import Embedding
from musicssl.encoders.handmade import MFCC
from musicssl.encoders.samplecnn import SampleCNN
from musicssl.probe import frozen

RATE = 1000


class Ear(nn.Module):
    """Two layers of frames, normalised over time as MERT's are, behind a batch normalisation. Counts its windows."""
    sample_rate, hop, dim = RATE, 10, 4

    def __init__(self, seed=0, harm=None, pause=0., give_up=None):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.norm, self.over_time = nn.BatchNorm1d(10), nn.GroupNorm(1, 4)
        self.weight = nn.Parameter(torch.randn(4, 10, generator=generator))
        self.harm, self.pause, self.give_up, self.windows = harm, pause, give_up, 0

    def forward(self, wave):
        self.windows += len(wave)
        time.sleep(self.pause)
        if self.give_up is not None and self.windows > self.give_up: raise KeyboardInterrupt
        if self.harm: self.harm(self)
        frames = self.over_time(self.weight @ self.norm(wave.unfold(-1, 10, 10).transpose(1, 2))) # (B, 4, N)
        layers = torch.stack([frames, frames.square()], 1).transpose(2, 3)
        return Embedding(layers, layers.mean((1, 2)))


class Tracks:
    """Noise, a track of every length asked for."""
    sample_rate = RATE

    def __init__(self, lengths, seed=0): self.lengths, self.seed, self.fingerprint = lengths, seed, f"noise {seed} {lengths}"

    def wave(self, ids):
        i = int(ids[0])
        return torch.randn(len(ids), self.lengths[i], generator=torch.Generator().manual_seed(1000 * self.seed + i))


MIXED = Tracks([3000, 3400, 600, 4999, 1000, 2000, 1001, 12, 4000] * 3)
ALL = list(range(len(MIXED.lengths)))


def equal(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("layers", "clip", "track", "ids"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MUSICSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(frozen, "_TRACKS", 4)
    return tmp_path / "cache"


# Windows

def by_hand(n, size, hop, shortest):
    """Every start, sample by sample: full windows, then at most one rest that reaches beyond them."""
    spans, start, covered = [], 0, 0
    while start < n and covered < n:
        length = min(size, n - start)
        if length < size and spans and length < shortest: break
        spans.append((start, length))
        covered, start = start + length, start + hop
        if length < size: break
    return spans


@pytest.mark.parametrize("size, hop", [(10, 10), (10, 5), (10, 3), (10, 13), (1, 1), (7, 20)])
def test_spans_by_hand(size, hop):
    for n in range(60):
        for shortest in (1, 4, 10):
            assert frozen.window_spans(n, size, hop, shortest) == by_hand(n, size, hop, shortest), (n, shortest)


def test_short_last_window_is_dropped_unless_it_is_all_there_is():
    counts = dict(zip(MIXED.lengths, frozen.read_features(Ear(), MIXED, ALL, window=1., least=.4, progress=False).n_windows))
    assert counts == {3000: 3, 3400: 4, 600: 1, 4999: 5, 1000: 1, 2000: 2, 1001: 1, 12: 1, 4000: 4}
    counts = dict(zip(MIXED.lengths, frozen.read_features(Ear(), MIXED, ALL, window=1., progress=False).n_windows))
    assert counts == {3000: 3, 3400: 3, 600: 1, 4999: 4, 1000: 1, 2000: 2, 1001: 1, 12: 1, 4000: 4}


def one_by_one(encoder, tracks, ids, size, shortest, pad=0):
    rows = []
    encoder.eval()
    for i in ids:
        for start, length in frozen.window_spans(tracks.lengths[i], size, None, shortest):
            piece = tracks.wave([i])[:, start:start + length]
            with torch.no_grad(): rows.append(encoder(nn.functional.pad(piece, (0, max(0, pad - length)))).layers[0].mean(1).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_windows_equal_slices_read_alone(batch, monkeypatch):
    """To 1e-5 absolute, of values of about 1: the rounding of a float32 sum in another order."""
    encoder, expected = Ear(), one_by_one(Ear(), MIXED, ALL, 1000, 400)
    heard = frozen.read_features(encoder, MIXED, ALL, window=1., least=.4, batch=batch, progress=False)
    np.testing.assert_allclose(heard.layers, expected, rtol=0, atol=1e-5)
    assert encoder.windows == len(expected) and heard.layers.shape == (len(expected), 2, 4) and heard.ids.tolist() == ALL
    monkeypatch.setattr(frozen, "_HELD", 1500) # hardly anything may wait
    np.testing.assert_allclose(frozen.read_features(Ear(), MIXED, ALL, window=1., least=.4, batch=batch, progress=False).layers, expected, atol=1e-5)
    # mutation: short windows padded to the length of the others give other numbers, so the comparison above would notice
    assert np.abs(one_by_one(Ear(), MIXED, ALL, 1000, 400, pad=1000) - expected).max() > .01


def test_a_batch_never_mixes_lengths(monkeypatch):
    seen = []
    encoder = Ear()
    encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    frozen.read_features(encoder, MIXED, ALL, window=1., least=.4, batch=5, progress=False)
    assert max(rows for rows, _ in seen) == 5 and {length for _, length in seen} == {1000, 400, 600, 999, 12}
    # mutation: one queue for all lengths; torch itself refuses to stack them
    monkeypatch.setattr(frozen, "defaultdict", lambda kind: OneQueue())
    with pytest.raises(RuntimeError, match="equal size"): frozen.read_features(Ear(), MIXED, ALL, window=1., least=.4, batch=5, progress=False)


class OneQueue(dict):
    def __getitem__(self, length): return self.setdefault(0, [])
    def pop(self, length): return super().pop(0)


def test_read_features_agrees_with_extract():
    torch.manual_seed(0)
    encoder, waves = SampleCNN.preset("toy"), .1 * torch.randn(5, 3 * 1536 + 700)
    corpus = SimpleNamespace(wave=lambda ids: waves[ids], sample_rate=8000)
    heard = frozen.read_features(encoder, corpus, [4, 0, 2], least=0., progress=False)
    assert heard.n_windows.tolist() == [3, 3, 3] # a rest below the encoder's own n_samples is not read
    np.testing.assert_allclose(heard.clip.reshape(3, 3, -1), frozen.extract(encoder, corpus, [4, 0, 2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change, message", [
    (dict(window=0.), "wanted window > 0"), (dict(window=float("nan")), "windows of nan s"), (dict(window=1., hop=float("inf")), "a hop of inf s"), (dict(window=1., hop=0.), "hop > 0"), (dict(window=1., least=-1.), "least >= 0"),
    (dict(hop=1.), "wanted a window as well: Ear has none")])
def test_windows_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message): frozen.read_features(Ear(), MIXED, [0], progress=False, **change)


def test_other_refusals():
    with pytest.raises(ValueError, match="got audio at 500 Hz, Ear expects 1000 Hz"):
        frozen.read_features(Ear(), SimpleNamespace(wave=MIXED.wave, sample_rate=500), [0], progress=False)
    with pytest.raises(ValueError, match="track 1 is empty"): frozen.read_features(Ear(), Tracks([1000, 0]), [0, 1], progress=False)
    deaf = Ear()
    deaf.weight.data *= float("nan")
    with pytest.raises(ValueError, match="Ear said NaN or infinity of 2 tracks, the first is 3"):
        frozen.read_features(deaf, MIXED, [3, 1], progress=False)


# Features

def test_subsets_keep_rows_with_their_tracks():
    heard, rng = frozen.read_features(Ear(), MIXED, ALL, window=1., progress=False), np.random.default_rng(0)
    for _ in range(10):
        ids = rng.permutation(ALL)[:rng.integers(1, 20)]
        part = heard.of(ids)
        assert part.ids.tolist() == ids.tolist() and len(part) == len(ids)
        for k, i in enumerate(ids):
            assert np.array_equal(part.layers[part.track == k], heard.layers[heard.track == i])
            np.testing.assert_allclose(part.mean().clip[k], heard.clip[heard.track == i].mean(0), atol=1e-6)


def test_identical_windows_score_as_one():
    """mulap M21: the mean of equal windows is that window, to the last bit."""
    row = np.random.default_rng(0).normal(size=(1, 3, 50)).astype(np.float32)
    for windows in (1, 3, 7, 10):
        alike = frozen.Features(np.repeat(row, windows, 0), np.repeat(row[:, 0], windows, 0), np.zeros(windows, int), np.array([5]), {})
        assert np.array_equal(alike.mean().layers, row) and np.array_equal(alike.mean().clip, row[:, 0])


# Frozen means frozen

def train_mode(ear): ear.norm.train()

def own_statistics(ear): nn.functional.batch_norm(torch.randn(4, 10), ear.norm.running_mean, ear.norm.running_var, training=True)

def a_weight(ear): ear.weight.data[0, 0] += 1e-6

def a_new_buffer(ear): ear.register_buffer("kept", torch.zeros(1))


READERS = {"extract": lambda ear, out: frozen.extract(ear, Tracks([1000] * 4), [0, 1]),
           "read": lambda ear, out: frozen.read_features(ear, MIXED, [0, 1], window=1., progress=False),
           "stored": lambda ear, out: frozen.stored_features(ear, MIXED, [0, 1], window=1., progress=False, folder=out)}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("harm, name", [(train_mode, "norm.running_mean"), (own_statistics, "norm.running_mean"), (a_weight, "weight"),
                                        (a_new_buffer, "kept")])
def test_an_encoder_that_changes_is_noticed(harm, name, reader, tmp_path):
    """mulap M19, clmr §9: parameters and buffers, BatchNorm's included; nothing of it is kept."""
    with pytest.raises(RuntimeError, match=f"changed while it was read.*{name}"): READERS[reader](Ear(harm=harm), tmp_path / "out")
    assert not list((tmp_path).rglob("*.np?"))


def only_parameters(module, whole=frozen._tensors):
    return {name: value for name, value in whole(module).items() if name in dict(module.named_parameters())}


def test_mutation_buffers_not_compared(monkeypatch, tmp_path):
    """Without buffers in the comparison, moved statistics would go unnoticed."""
    monkeypatch.setattr(frozen, "_tensors", only_parameters)
    READERS["read"](Ear(harm=train_mode), tmp_path)
    with pytest.raises(RuntimeError, match="weight"): READERS["read"](Ear(harm=a_weight), tmp_path)


@pytest.mark.parametrize("reader", READERS)
def test_every_tensor_is_bit_identical_and_every_mode_comes_back(reader, tmp_path):
    ear = Ear().train()
    ear.norm.eval() # a mixed state, as of a network that is partly frozen
    before = {name: value.clone() for name, value in ear.state_dict().items()}
    READERS[reader](ear, tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in ear.state_dict().items())
    assert (ear.training, ear.norm.training, ear.over_time.training) == (True, False, True) and ear.weight.requires_grad
    with pytest.raises(KeyboardInterrupt):
        ear.give_up = 0
        READERS[reader](ear, tmp_path / "again")
    assert (ear.training, ear.norm.training, ear.over_time.training) == (True, False, True) and torch.is_grad_enabled()


# Names

def test_other_weights_data_or_windows_have_other_names(cache):
    """A change of any of them reads anew; the same again reads nothing."""
    def read(ear=None, tracks=MIXED, ids=(0, 1, 2), **windows):
        ear = ear or Ear()
        before = ear.windows
        frozen.stored_features(ear, tracks, list(ids), **{"window": 1., **windows}, progress=False)
        return ear.windows - before
    nudged = Ear()
    nudged.norm.running_var[3] += 1e-6
    others = [lambda: read(), lambda: read(Ear(seed=1)), lambda: read(nudged), lambda: read(tracks=Tracks(MIXED.lengths, seed=1)),
              lambda: read(ids=(0, 2, 1)), lambda: read(window=.5), lambda: read(hop=.5), lambda: read(least=.2)]
    assert all(other() > 0 for other in others) and len(list((cache / "features").iterdir())) == len(others)
    assert all(other() == 0 for other in others) and len(list((cache / "features").iterdir())) == len(others)
    assert read(batch=3) == 0 and read(Ear().train()) == 0 # neither batch nor mode is part of the name


def test_mutation_a_name_without_buffers(cache, monkeypatch):
    """Were buffers left out of the fingerprint, another network's features would be used again."""
    def windows(change):
        ear = Ear()
        ear.norm.running_mean += change
        frozen.stored_features(ear, MIXED, [0], window=1., progress=False)
        return ear.windows
    assert windows(0) and windows(1e-6)
    monkeypatch.setattr(frozen, "_tensors", only_parameters)
    assert windows(2e-6) and not windows(3e-6)


def test_structure_and_settings_are_part_of_the_name():
    same = [nn.Conv1d(1, 1, 3, stride=stride) for stride in (1, 2)]
    same[1].load_state_dict(same[0].state_dict())
    names = [frozen.fingerprint(module) for module in (*same, MFCC.preset("8k"), MFCC.preset("8k", hop=100), Ear(), Ear().double())]
    assert len(set(names)) == 6 and frozen.fingerprint(Ear()) == names[4]


def test_a_folder_keeps_what_it_is(tmp_path):
    frozen.stored_features(Ear(), MIXED, [0], window=1., progress=False, folder=tmp_path / "kept")
    with pytest.raises(ValueError, match="holds other features: window 1000, got 500"):
        frozen.stored_features(Ear(), MIXED, [0], window=.5, least=1., hop=1., progress=False, folder=tmp_path / "kept")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="not empty and was not made by us"):
        frozen.stored_features(Ear(), MIXED, [0], window=1., progress=False, folder=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


# On disk

def test_stored_are_what_is_read(cache):
    stored, read = (reader(Ear(), MIXED, ALL, window=1., progress=False) for reader in (frozen.stored_features, frozen.read_features))
    assert equal(stored, read) and stored.about == read.about
    assert isinstance(stored.layers, np.memmap) and not stored.layers.flags.writeable and isinstance(stored.of([3]).layers, np.ndarray)
    assert not list(cache.rglob("parts"))


WORKER = """
import sys
sys.path.insert(0, "tests")
from test_frozen import ALL, MIXED, Ear, frozen
frozen._TRACKS = 4
frozen.stored_features(Ear(pause=.05), MIXED, ALL, window=1., batch=2, progress=False, folder=sys.argv[1])
"""


def killed(folder):
    """What kill -9 leaves when two of seven parts are written and a third is being read."""
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(folder)], cwd=Path(__file__).parent.parent, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("parts/*.npz"))) < 2 and time.monotonic() < deadline and worker.poll() is None: time.sleep(.01)
    os.kill(worker.pid, signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL
    return sorted(folder.glob("parts/*.npz"))


def go_on(folder):
    ear = Ear()
    return frozen.stored_features(ear, MIXED, ALL, window=1., batch=2, progress=False, folder=folder), ear.windows


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_and_resumed(cache, monkeypatch, tmp_path):
    straight, all_windows = go_on(tmp_path / "straight")
    parts = killed(tmp_path / "killed") # by another process, whose `Ear` has the same name
    shutil.copytree(tmp_path / "killed", tmp_path / "mutant")
    done = sum(int(np.load(part)["counts"].sum()) for part in parts)
    with pytest.raises(UnfinishedStore, match="no features were finished there"): frozen.open_features(tmp_path / "killed")
    resumed, windows = go_on(tmp_path / "killed")
    assert equal(resumed, straight) and 2 <= len(parts) < 7 and windows == all_windows - done
    # mutation: parts that are there are not looked at; the count of windows notices
    load, first = frozen._load, []
    monkeypatch.setattr(frozen, "_load", lambda part: load(part) if part in first or first.append(part) else None)
    assert go_on(tmp_path / "mutant")[1] == all_windows


@pytest.mark.parametrize("name", ["layers.npy", "clip.npy", "track.npy", "index.json"])
def test_killed_while_parts_are_joined(cache, tmp_path, monkeypatch, name):
    """Joining begins again from the parts, which are there until the index is."""
    straight, _ = go_on(tmp_path / "straight")
    replace = os.replace
    def stop(source, target):
        if Path(target).name == name: raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr(files.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt): go_on(tmp_path / "stopped")
    monkeypatch.setattr(files.os, "replace", replace)
    resumed, windows = go_on(tmp_path / "stopped")
    assert equal(resumed, straight) and windows == 0


def flip(file, where):
    content = bytearray(file.read_bytes())
    content[where] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["layers", "clip", "track", "ids"])
def test_a_damaged_array_is_noticed(name, tmp_path, monkeypatch):
    """By its CRC-32 where a bit turned, by its length where the end is gone, by its absence."""
    frozen.stored_features(Ear(), MIXED, ALL, window=1., progress=False, folder=tmp_path)
    file = tmp_path / f"{name}.npy"
    good = file.read_bytes()
    for where in (0, 60, len(good) // 2, len(good) - 1):
        flip(file, where)
        with pytest.raises(CorruptStore, match=f"{name}.npy has changed"): frozen.open_features(tmp_path)
        flip(file, where)
    file.write_bytes(good[:-1])
    with pytest.raises(CorruptStore, match=f"{name}.npy has changed"):
        frozen.stored_features(Ear(), MIXED, ALL, window=1., progress=False, folder=tmp_path)
    file.unlink()
    with pytest.raises(CorruptStore, match="remove"): frozen.open_features(tmp_path)
    # mutation: only the length compared
    file.write_bytes(good)
    flip(file, len(good) - 1)
    index = files.read_json(tmp_path / "index.json")
    monkeypatch.setattr(frozen, "_seal", lambda file: [file.stat().st_size, index[file.stem][1]])
    frozen.open_features(tmp_path)


def test_a_damaged_part_is_read_again(cache, tmp_path, monkeypatch):
    """Whatever bit turns in a part: it is noticed (the zip file's CRC-32), or it did not matter."""
    straight, _ = go_on(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        frozen.stored_features(Ear(give_up=20), MIXED, ALL, window=1., batch=2, progress=False, folder=tmp_path / "begun")
    part = tmp_path / "begun" / "parts" / "000000.npz"
    good, content = frozen._load(part), part.read_bytes()
    outcomes = []
    for where in range(0, len(content), 7):
        flip(part, where)
        found = frozen._load(part)
        outcomes.append(found is None)
        assert found is None or all(np.array_equal(found[name], good[name]) for name in good)
        flip(part, where)
    assert np.mean(outcomes) > .5
    for length in (0, 10, len(content) // 2, len(content) - 1):
        part.write_bytes(content[:length])
        assert frozen._load(part) is None
    resumed, windows = go_on(tmp_path / "begun")
    assert equal(resumed, straight) and windows > 0


# A folder

@pytest.fixture
def music(tmp_path):
    folder = tmp_path / "music"
    (folder / "deep").mkdir(parents=True)
    for name, seconds in {"long.wav": 3.4, "deep/é short.flac": .5, "one.wav": 1., "blip.wav": .05}.items():
        time = np.arange(int(8000 * seconds)) / 8000
        soundfile.write(folder / name, .3 * np.sin(2 * np.pi * 300 * seconds * time), 8000)
    (folder / "broken.wav").write_bytes(b"RIFF, and nothing more")
    return folder


def rows(path):
    with open(path, encoding="utf8", newline="") as file: return list(csv.DictReader(file))


def test_a_folder_with_a_broken_file(cache, music, tmp_path):
    with pytest.raises(TooManyBadFiles): frozen.embed_folder(music, MFCC.preset("8k"), tmp_path / "out", window=1., progress=False)
    out = frozen.embed_folder(music, MFCC.preset("8k"), tmp_path / "out", window=1., bad=.5, progress=False)
    heard = frozen.open_features(out)
    assert [(row["file"], int(row["windows"]), int(row["first_window"])) for row in rows(out / "tracks.csv")] == [
        ("blip.wav", 1, 0), ("deep/é short.flac", 1, 1), ("long.wav", 3, 2), ("one.wav", 1, 5)]
    assert [(row["file"], float(row["start_s"]), float(row["seconds"])) for row in rows(out / "windows.csv")] == [
        ("blip.wav", 0, .05), ("deep/é short.flac", 0, .5), ("long.wav", 0, 1), ("long.wav", 1, 1), ("long.wav", 2, 1), ("one.wav", 0, 1)]
    assert [(row["file"], row["problem"]) for row in rows(out / "left_out.csv")] == [("broken.wav", "UnreadableAudio")]
    assert "broken.wav: UnreadableAudio" in frozen.embedding_summary(out) and list((cache / "folders").glob("*/quarantine.json"))
    wave = torch.from_numpy(soundfile.read(music / "long.wav", dtype="float32")[0])[None, 8000:16000]
    np.testing.assert_allclose(heard.clip[3], MFCC.preset("8k")(wave).clip[0], atol=1e-3) # 16-bit in the store
    np.testing.assert_allclose(np.load(out / "tracks_clip.npy")[2], heard.clip[2:5].mean(0), rtol=1e-5)
    assert np.load(out / "tracks_layers.npy").shape == (4, 1, 20)


def test_files_too_short_for_the_encoder_are_listed(cache, music):
    torch.manual_seed(0)
    out = frozen.embed_folder(music, SampleCNN.preset("toy"), bad=.5, progress=False)
    assert out.parent == cache / "features" and frozen.open_features(out).n_windows.tolist() == [2, 17, 5]
    assert [(row["file"], row["detail"]) for row in rows(out / "left_out.csv")][0] == ("blip.wav", "holds 0.050 s, a window needs 0.192 s")
    with pytest.raises(ValueError, match="no file below .* is long enough for SampleCNN, which needs 59049 samples"):
        for name in ("long.wav", "one.wav"): (music / name).unlink()
        frozen.embed_folder(music, SampleCNN(width=1 / 8), bad=.5, progress=False)


class Wide(Ear):
    """Was trained on five seconds and hears less than that as well, as MERT does."""
    sample_rate, n_samples = 8000, 40_000


def test_a_shorter_window_than_the_encoder_s_own_is_believed(cache, music, tmp_path, monkeypatch):
    """Files shorter than the encoder's own window, asked for in shorter ones. The mutation: the own window, whatever was asked."""
    embed = lambda out, window: frozen.embed_folder(music, Wide(), tmp_path / out, window=window, least=.2, bad=.5, progress=False)
    heard = frozen.open_features(out := embed("out", 1.))
    assert [(row["file"], int(row["windows"])) for row in rows(out / "tracks.csv")] == [("long.wav", 3), ("one.wav", 1)]
    assert {row["file"]: row["detail"] for row in rows(out / "left_out.csv")}["deep/é short.flac"] == "holds 0.500 s, a window needs 1.000 s"
    assert heard.about["shortest"] == 8000 and frozen._plan(Wide(), SimpleNamespace(sample_rate=8000), 9., None, 1.)["shortest"] == 40_000
    with pytest.raises(ValueError, match="is long enough for Wide, which needs 40000 samples"): embed("own", None)
    with pytest.raises(ValueError, match="wanted window > 0"): embed("none", 0.)
    monkeypatch.setattr(frozen, "_needed", lambda encoder, window: encoder.n_samples)
    with pytest.raises(ValueError, match="is long enough for Wide, which needs 40000 samples"): embed("mutation", 1.)


def test_an_interrupted_folder_goes_on(cache, music, monkeypatch):
    class Short(Ear):
        sample_rate = 8000
    monkeypatch.setattr(frozen, "_TRACKS", 1)
    with pytest.raises(KeyboardInterrupt): frozen.embed_folder(music, Short(give_up=3), window=1., batch=1, bad=.5, progress=False)
    again, fresh = Short(), Short()
    out = frozen.embed_folder(music, again, window=1., batch=1, bad=.5, progress=False)
    straight = frozen.embed_folder(music, fresh, out.parent.parent / "straight", window=1., batch=1, bad=.5, progress=False)
    assert (again.windows, fresh.windows) == (4, 6) and equal(frozen.open_features(out), frozen.open_features(straight))
    assert [path.read_text() for path in sorted(out.glob("*.csv"))] == [path.read_text() for path in sorted(straight.glob("*.csv"))]
    (music / "labels.csv").write_text("file,tags\nlong.wav,tone\n") # labels are not sound
    once_more = Short()
    assert frozen.embed_folder(music, once_more, window=1., batch=1, bad=.5, progress=False) == out and once_more.windows == 0
    assert len(frozen.open_features(out)) == 4
