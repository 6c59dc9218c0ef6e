"""ScoreBox across processes, and the hashes that say that its recipe has not changed."""
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soxr
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

from musicssl import files
from musicssl.data import scorebox
from musicssl.data.arrange import QUARTER, SHARED_TEMPO, TAGS, arrange, beat_ticks, key24
from musicssl.data.deal import HELD_OUT, deal
from musicssl.data.sampler import NOTE_FIELDS, SOUNDFONT_SHA256, Sampler
from musicssl.data.scores import Score, load_table, split_of
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
def test_usual_options_leave_the_name_alone(corpus):
    recipe = {"version": scorebox.VERSION, "clips": 40, "seconds": 3., "sample_rate": 22_050, "seed": 0}
    assert corpus.recipe == recipe
    assert corpus.fingerprint == files.fingerprint(recipe | {"scores": load_table(progress=False).facts["source"], "soundfont": SOUNDFONT_SHA256})


def labels_of(**recipe):
    """The label rows and arrangements of a corpus that nobody plays."""
    scores, recipe = load_table(progress=False), {"clips": 200, "seconds": 6., "sample_rate": 22_050, "seed": 0} | recipe
    return [scorebox._arranged(scores, name, recipe) for name in scorebox.clip_names(scores, recipe)]


@needs_data
def test_every_label_is_there_and_true():
    """Recomputed from score and notes by other means than the arranger's."""
    scores, near = load_table(progress=False), lambda a, b: abs(a - b) < 2e-4
    for made in labels_of():
        row, score = made.labels, scores[made.labels["score_id"]]
        assert set(row) == {"clip_id", "score_id", "take", "group", "split", "collection", "title", "composer", "bpm", "start", "beats", "downbeats",
            "metre", "metre3", "tune_type", "tonic", "mode", "key24", "key_evidence", "chords", "tags", "texture", "transpose", "detune", "room",
            "level", "density", "polyphony"}
        assert json.loads(json.dumps(row)) == row and row["clip_id"] == f"{score.score_id}#{row['take']}" and row["split"] == split_of(score.group)
        assert set(row["tags"]) == set(made.instruments)
        assert all(row[name] == getattr(score, name) for name in ("title", "composer", "collection", "group", "tune_type", "key_evidence"))
        drums, start = made.notes[:, 4] == 128, round(row["start"] * QUARTER)
        assert (made.notes[~drums, 8] == row["detune"]).all() and start in score.downbeats
        stop = start + round(6. * row["bpm"] / 60 * beat_ticks(score.metre))
        own = np.flatnonzero((score.onset_ticks >= start) & (score.onset_ticks < stop))
        assert near(row["density"], len(own) / 6.)
        assert sorted((score.pitch[own].astype(int) + row["transpose"]) % 12) == sorted(made.notes[:len(own), 2].astype(int) % 12)
        sound = np.clip(made.notes[~drums, 0] + made.notes[~drums, 1], 0, 6.) - np.clip(made.notes[~drums, 0], 0, 6.)
        assert near(row["polyphony"], sound.sum() / 6.)
        assert row["beats"][0] == row["downbeats"][0] == 0 and set(row["downbeats"]) <= set(row["beats"]) and row["beats"][-1] < 6.
        if row["key24"] < 0: assert row["tonic"] is None and not (score.key_evidence & 6 and score.mode and score.tonic is not None)
        else: assert row["key24"] == key24(score.tonic + row["transpose"], score.mode) and row["mode"] == score.mode and row["key_evidence"] & 6
        assert row["metre"] == (list(score.metre) if score.metre else None)
        assert (row["metre3"] == "compound") == ((row["metre"] or [0])[0] in (6, 9, 12))
        for start, stop, root, quality in row["chords"] or []:
            inside = ~drums & (made.notes[:, 0] > start + .12) & (made.notes[:, 0] < stop - .12)
            inside[:len(own)] = False
            assert set(made.notes[inside, 2].astype(int) % 12) <= {root, (root + (4 if quality == "maj" else 3)) % 12, (root + 7) % 12}
        assert bool(row["chords"]) == (row["texture"] in ("chords", "chords+bass", "full"))


def test_steady_finds_the_bar_of_odd_length():
    bars = np.cumsum([0, *[1440, 480] * 10]).astype(np.int32) # every other bar holds two thirds of a beat
    rows = [arrange(score, 0, 6., 0).labels for score in (jig(), jig(bars=bars, downbeats=bars))]
    assert scorebox.Corpus.steady.func(SimpleNamespace(labels=rows)).tolist() == [True, False]
    assert scorebox.Corpus.beat_times(SimpleNamespace(labels=rows), 0).tolist() == rows[0]["beats"]


@needs_data
def test_the_shared_tempo_is_shared():
    usual, shared = labels_of(), labels_of(tempo="shared")
    low, high = SHARED_TEMPO
    assert all(low <= made.labels["bpm"] <= high for made in shared) and not all(low <= made.labels["bpm"] <= high for made in usual)
    mean = lambda clips, kind: np.log([made.labels["bpm"] for made in clips if made.labels["tune_type"] == kind]).mean()
    assert mean(usual, "jig") - mean(usual, "hornpipe") > .2 > .1 > abs(mean(shared, "jig") - mean(shared, "hornpipe"))
    assert digest(shared[:40]) == "fddb74e944203661"


def leaked(clips):
    """Instruments that play the program kept out."""
    program = NOTE_FIELDS.index("program")
    return {name for made in clips for name, note in zip(made.instruments, made.notes) if note[program] == HELD_OUT.get(name)}


@needs_data
def test_programs_kept_out_stay_out():
    made = labels_of(newtimbre=True)
    clips, twins = made[:200], made[200:]
    assert not leaked(clips) and leaked(twins) == set(HELD_OUT)
    assert leaked(labels_of()) # mutation: without `recast` the check notices
    assert not leaked(labels_of(newtimbre=True, only="train"))
    tests = [clip for clip in clips if clip.labels["split"] == "test"]
    assert len(tests) == len(twins) == 40
    for clip, twin in zip(tests, twins):
        changed = (clip.notes != twin.notes).any(1)
        assert {name for name, new in zip(clip.instruments, changed) if new} == set(twin.labels["unheard"])
        assert twin.labels["paired_with"] == clip.labels["clip_id"] and twin.labels["split"] == "test_newtimbre"
    assert digest(made[:20] + made[-20:]) == "9463ec22476dae59"


@needs_data
def test_a_twin_sounds_the_same_but_for_the_timbre(cache):
    both = scorebox.load(30, 3., newtimbre=True, cache=cache, workers=1, progress=False)
    pairs = list(zip(both.ids("test"), both.ids("test_newtimbre")))
    assert len(both) == 36 and [both.labels[j]["paired_with"] for _, j in pairs] == [both.clip_id[i] for i, _ in pairs]
    assert both.splits == ["train", "valid", "test", "test_newtimbre"] and both.tag_counts().shape == (22, 4)
    assert np.array_equal(both.tags[both.ids("test")], both.tags[both.ids("test_newtimbre")])
    for i, j in pairs:
        assert np.array_equal(both.store[i], both.store[j]) == (not both.labels[j]["unheard"])
        made = both.arrangement(j)
        assert made.labels == both.labels[j] and np.array_equal(made.notes[:, :3], both.arrangement(i).notes[:, :3])
    small = scorebox.load(30, 3., sample_rate=8_000, newtimbre=True, cache=cache, progress=False)
    assert small.labels == both.labels and small.arrangement(35).labels == both.labels[35]


@needs_data
def test_a_corpus_of_one_split():
    scores = load_table(progress=False)
    many, usual = deal(scores, 2_000, 3., only="train"), deal(scores, 2_000, 3.)
    assert deal(scores, 77, 3., only="train") == many[:77] and len(set(many)) == 2_000
    splits = lambda pairs: {split_of(scores[name].group) for name, _ in pairs}
    assert splits(many) == {"train"} and splits(usual) == {"train", "valid", "test"}
    for voices in ("one", "many"): # the training clips of the usual corpus come first
        queues = [[pair for pair in pairs if scores[pair[0]].voices == voices and splits([pair]) == {"train"}] for pairs in (usual, many)]
        assert queues[0] == queues[1][:len(queues[0])]


@needs_data
def test_a_corpus_of_one_split_says_so(cache):
    more = scorebox.load(3, 3., only="train", cache=cache, workers=1, progress=False)
    assert more.ids("train").tolist() == [0, 1, 2] and more.splits == ["train"]
    with pytest.raises(ValueError, match="got split 'test', wanted train$"): more.ids("test")


@needs_data
def test_a_short_corpus_is_the_beginning_of_a_long_one(corpus):
    scores = load_table(progress=False)
    pairs = deal(scores, 300, 3.)
    assert [f"{name}#{take}" for name, take in pairs[:40]] == corpus.clip_id and len(set(pairs)) == 300
    for n in (10, 24, 40, 300):
        many = sum(scores[name].voices == "many" for name, _ in pairs[:n])
        assert abs(many - .3 * n) <= 1


@needs_data
def test_no_composition_is_in_two_splits(corpus):
    scores = load_table(progress=False)
    splits = {}
    for name, _ in deal(scores, 400, 3.):
        group = scores[name].group
        splits.setdefault(group, set()).add(split_of(group))
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
def test_24_khz_is_rendered_not_resampled(corpus, cache):
    wide = scorebox.load(20, 3., sample_rate=24_000, cache=cache, workers=1, progress=False)
    assert wide.labels == corpus.labels[:20] and wide.wave([0]).shape == (1, 72_000)
    level = lambda wave, low, high: 10 * np.log10((np.abs(np.fft.rfft(wave / 32768)[3 * low:3 * high]) ** 2).mean() + 1e-12)
    drums = [i for i in range(20) if "drums" in corpus.labels[i]["tags"]]
    for i in drums:
        resampled = soxr.resample(corpus.store[i].astype(float), 22_050, 24_000)
        assert level(wide.store[i], 11_200, 11_500) > level(wide.store[i], 9_000, 10_000) - 20
        assert level(resampled, 11_200, 11_500) < level(resampled, 9_000, 10_000) - 25 # mutation: a resampled clip is noticed
    dry = [i for i in range(20) if corpus.labels[i]["room"] <= .25] # a hall is noise, and another one at another rate
    for i in dry: # the same partials at the same frequencies
        ours, theirs = (np.abs(np.fft.rfft(c.store[i].astype(float)))[300:9_000] / c.sample_rate for c in (wide, corpus))
        assert np.corrcoef(ours, theirs)[0, 1] > .999 > np.corrcoef(ours[1:], theirs[:-1])[0, 1] + .01, i
    assert len(drums) > 1 and len(dry) > 1


@needs_data
def test_a_cached_corpus_opens_at_once(corpus, cache):
    start = time.process_time() # not lengthened by what else is running
    scorebox.load(40, 3., cache=cache, progress=False)
    assert time.process_time() - start < 1.5 # 0.2 s


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


def faults(waves):
    """What a listener would complain about: clips that clip, clips silent for more than a fifth, clips that are there twice."""
    frames = [wave[:len(wave) // 1_000 * 1_000].reshape(-1, 1_000) / 32768 for wave in waves]
    return {"clipped": sum(np.abs(wave.astype(int)).max() >= 32_767 for wave in waves),
            "silent": sum((np.sqrt((f ** 2).mean(1)) < .001).mean() > .2 for f in frames),
            "twice": len(waves) - len({wave.tobytes() for wave in waves})}


@needs_data
def test_no_clip_clips_or_is_silent_or_is_there_twice(corpus):
    waves = [corpus.store[i] for i in range(40)]
    assert faults(waves) == {"clipped": 0, "silent": 0, "twice": 0} and len(set(corpus.clip_id)) == 40
    loud, torn = waves[0].copy(), waves[1].copy()
    loud[0], torn[:len(torn) // 4] = 32_767, 0
    assert faults([*waves, loud, torn, waves[2]]) == {"clipped": 1, "silent": 1, "twice": 1} # mutations: each fault is noticed


PLAIN_PROCESSOR = """
import json, sys
import numpy as np
from numpy._core._multiarray_umath import __cpu_features__
sys.path.insert(0, {tests!r})
from test_scorebox import digest, duet, jig, labels_of, scorebox
from musicssl.data.arrange import arrange
from musicssl.data.sampler import Sampler
assert not any(__cpu_features__[name] for name in {features!r})
made, sampler = labels_of(clips=20, seconds=3., newtimbre=True), Sampler()
np.save({waves!r}, np.stack([scorebox.render_clip(m, sampler) for m in made]))
print(json.dumps([digest(arrange(score, take, 6.) for take in range(20)) for score in (jig(), duet())] + [digest(labels_of(clips=40, seconds=3.)), digest(made)]))
"""


@needs_data
def test_another_processor_makes_the_same_corpus(tmp_path):
    """NumPy without the instructions this processor has beyond the plainest: labels and notes to the bit, sound within 2 steps of 16 bits."""
    features = [name for name in __cpu_dispatch__ if __cpu_features__.get(name)]
    if not features: pytest.skip("this NumPy uses the plainest instructions anyway")
    script = PLAIN_PROCESSOR.format(tests=str(Path(__file__).parent), features=features, waves=str(tmp_path / "waves.npy"))
    plain = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(features)}
    done = subprocess.run([sys.executable, "-c", script], env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made, sampler = labels_of(clips=20, seconds=3., newtimbre=True), Sampler()
    assert json.loads(done.stdout) == ["ebe33a20c3be4f0b", "13da078392501300", "792fad64703eaa21", digest(made)]
    theirs, ours = np.load(tmp_path / "waves.npy").astype(int), np.stack([scorebox.render_clip(m, sampler) for m in made]).astype(int)
    assert np.abs(theirs - ours).max() <= 2
    rough = np.stack([scorebox.render_clip(m, Sampler(oversample=1)) for m in made[:1]]).astype(int)
    assert np.abs(rough - theirs[:1]).max() > 2 # mutation: a sampler that only sounds alike is noticed


@needs_data
def test_refusals(cache):
    with pytest.raises(ValueError, match="got 44100 Hz"): scorebox.load(sample_rate=44_100, cache=cache)
    with pytest.raises(ValueError, match="got 9 clips"): scorebox.load(clips=9, cache=cache)
    with pytest.raises(ValueError, match="make the clips shorter"): scorebox.load(10, 900., cache=cache, progress=False)
