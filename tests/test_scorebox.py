"""ScoreBox across processes, and the hashes that say that its recipe has not changed."""
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from musicssl.data import scorebox
from musicssl.data.arrange import TAGS, arrange
from musicssl.data.scores import Score, load_table
from musicssl.data.store import CorruptStore
from musicssl.settings import cache_dir

needs_data = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("music21", "pretty_midi")), reason='needs pip install "musicssl[data]"')


def digest(arrangements) -> str:
    """One hash for the notes and labels of some arrangements."""
    total = hashlib.sha256()
    for made in arrangements:
        total.update(made.notes.astype("<f8").tobytes())
        total.update(json.dumps(made.labels, sort_keys=True).encode())
    return total.hexdigest()[:16]


def jig(**changes) -> Score:
    pitch = np.array([74, 69, 66, 62, 66, 69, 71, 67, 71, 74, 71, 67, 73, 69, 64, 73, 71, 69, 74, 73, 71, 69, 66, 64] * 4, np.uint8)
    onset, bars = np.arange(96, dtype=np.int32) * 240, np.arange(0, 96 * 240, 1440, dtype=np.int32)
    fields = dict(score_id="test/jig", collection="ryan", title="A Jig", composer=None, metre=(6, 8), tonic=2, mode="major", key_evidence=7,
        tune_type="jig", rhythm="jig", parts=("melody",), voices="one", credit=None, onset_ticks=onset,
        duration_ticks=np.full(96, 240, np.int32), pitch=pitch, part=np.zeros(96, np.uint8), bars=bars, downbeats=bars, end=96 * 240, group=1)
    return Score(**fields | changes)


def duet() -> Score:
    return jig(score_id="test/duet", voices="many", parts=("high", "low"), tune_type=None, metre=(3, 4), part=np.tile([0, 1], 48).astype(np.uint8))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """An empty cache that has the note table, so that nobody reads the scores twice."""
    load_table(progress=False)
    folder = tmp_path_factory.mktemp("cache")
    for table in cache_dir().glob("scorebox-*.npz"): shutil.copy(table, folder)
    return folder


@pytest.fixture(scope="module")
def corpus(cache):
    return scorebox.load(clips=40, seconds=3., cache=cache, workers=1, progress=False)


def test_the_recipe_has_not_changed():
    assert digest(arrange(jig(), take, 6.) for take in range(20)) == "ebe33a20c3be4f0b"
    assert digest(arrange(duet(), take, 6.) for take in range(20)) == "13da078392501300"
    assert TAGS[0] == "accordion" and TAGS[-2:] == ("bass", "drums") and len(TAGS) == 22


@needs_data
def test_the_corpus_has_not_changed(corpus):
    assert digest(corpus.arrangement(i) for i in range(40)) == "792fad64703eaa21"
    assert [corpus.arrangement(i).labels for i in (0, 17, 39)] == [corpus.labels[i] for i in (0, 17, 39)]


@needs_data
def test_a_short_corpus_is_the_beginning_of_a_long_one(corpus):
    scores = load_table(progress=False)
    pairs = scorebox.deal(scores, 300, 3.)
    assert [f"{name}#{take}" for name, take in pairs[:40]] == corpus.clip_id and len(set(pairs)) == 300
    for n in (10, 24, 40, 300):
        many = sum(scores[name].voices == "many" for name, _ in pairs[:n])
        assert abs(many - .3 * n) <= 1


@needs_data
def test_no_composition_is_in_two_splits(corpus):
    scores = load_table(progress=False)
    splits = {}
    for name, _ in scorebox.deal(scores, 400, 3.):
        group = scores[name].group
        splits.setdefault(group, set()).add(scorebox.split_of(group))
    assert all(len(found) == 1 for found in splits.values())
    assert [len(corpus.ids(split)) for split in ("train", "valid", "test")] == [28, 4, 8]
    assert (corpus.tags.sum(1) > 0).all()


@needs_data
def test_processes_make_the_same_corpus(corpus, cache, tmp_path):
    for table in cache.glob("scorebox-*.npz"): shutil.copy(table, tmp_path)
    script = tmp_path / "make.py"
    script.write_text("import sys\nfrom musicssl.data import scorebox\nif __name__ == '__main__':\n"
                      "    print(scorebox.load(40, 3., cache=sys.argv[1], workers=2, progress=False).fingerprint)\n")
    running = [subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in running] == [corpus.fingerprint] * 2
    other = scorebox.Corpus(tmp_path / "scorebox" / corpus.fingerprint)
    assert other.labels == corpus.labels
    assert max(np.abs(other.store[i].astype(int) - corpus.store[i]).max() for i in range(40)) <= 2


@needs_data
def test_an_interrupted_corpus_goes_on(corpus, cache, tmp_path, monkeypatch):
    for table in cache.glob("scorebox-*.npz"): shutil.copy(table, tmp_path)
    played, render_clip = [], scorebox.render_clip

    def stumble(arrangement, sampler):
        if len(played) == 20: raise KeyboardInterrupt
        played.append(arrangement.labels["clip_id"])
        return render_clip(arrangement, sampler)

    monkeypatch.setattr(scorebox, "render_clip", stumble)
    with pytest.raises(KeyboardInterrupt): scorebox.load(40, 3., cache=tmp_path, workers=1, progress=False)
    folder = tmp_path / "scorebox" / corpus.fingerprint
    with pytest.raises(FileNotFoundError, match="stopped after 1 chunk"): scorebox.Corpus(folder)
    played.clear()
    monkeypatch.setattr(scorebox, "render_clip", lambda a, s: played.append(a.labels["clip_id"]) or render_clip(a, s))
    whole = scorebox.load(40, 3., cache=tmp_path, workers=1, progress=False)
    assert played == corpus.clip_id[16:] and whole.labels == corpus.labels
    assert all(np.array_equal(whole.store[i], corpus.store[i]) for i in range(40))


@needs_data
def test_a_script_without_guard_still_gets_its_corpus(cache, tmp_path):
    for table in cache.glob("scorebox-*.npz"): shutil.copy(table, tmp_path)
    script = tmp_path / "make.py"
    script.write_text(f"from musicssl.data import scorebox\nprint(len(scorebox.load(10, 2., cache={str(tmp_path)!r}, workers=2, progress=False)))\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "10" and "going on in this one" in done.stderr


@needs_data
def test_lower_rates_are_derived(corpus, cache):
    small = scorebox.load(40, 3., sample_rate=8_000, cache=cache, progress=False)
    assert small.labels == corpus.labels and small.sample_rate == 8_000 and small.wave([0, 39]).shape == (2, 24_000)
    assert small.fingerprint != corpus.fingerprint
    for i in (0, 20):
        ours, theirs = (np.abs(np.fft.rfft(c.store[i].astype(float)))[30:9_000] / c.sample_rate for c in (small, corpus))
        assert np.corrcoef(ours, theirs)[0, 1] > .999


@needs_data
def test_a_cached_corpus_opens_at_once(corpus, cache):
    start = time.perf_counter()
    scorebox.load(40, 3., cache=cache, progress=False)
    assert time.perf_counter() - start < 1.5 # 0.2 s on an idle machine


@needs_data
def test_damage_is_found(corpus, cache, tmp_path):
    folder = tmp_path / corpus.fingerprint
    shutil.copytree(corpus.folder, folder)
    chunk = bytearray((folder / "00001.int16").read_bytes())
    chunk[1000] ^= 1
    (folder / "00001.int16").write_bytes(chunk)
    with pytest.raises(CorruptStore, match="chunk 1 has changed"): scorebox.Corpus(folder).wave([20])
    (folder / "labels.json.gz").write_bytes(b"")
    with pytest.raises(CorruptStore, match="labels.json.gz is missing or has changed"): scorebox.Corpus(folder)


@needs_data
def test_the_sound_is_sound(corpus):
    sound = scorebox.sound_report(corpus)
    assert sound.level.between(-24.1, -16.9).all() and sound.peak.max() < .96
    assert sound.silence.max() < 2.5 and sound.centroid.between(100, 5_000).all()


@needs_data
def test_refusals(cache):
    with pytest.raises(ValueError, match="got 44100 Hz"): scorebox.load(sample_rate=44_100, cache=cache)
    with pytest.raises(ValueError, match="got 9 clips"): scorebox.load(clips=9, cache=cache)
    with pytest.raises(ValueError, match="make the clips shorter"): scorebox.load(10, 900., cache=cache, progress=False)
