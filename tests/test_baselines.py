"""Chapter 0: features that hear what they should, splits that keep compositions together, read-outs that see no test clip, honest intervals."""
import types
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from musicssl import probe
from musicssl.experiments import scorebox as chapter

RATE = 22_050


def tones(*pitches, seconds=3.):
    """Sine waves, one after the other in a batch."""
    time = torch.arange(round(seconds * RATE)) / RATE
    return torch.stack([torch.sin(2 * torch.pi * 440 * 2 ** ((pitch - 69) / 12) * time) for pitch in pitches])


# ------------------------------------------------------------------------------------------------------------ features

def test_every_key_of_the_piano_sounds_where_it_should():
    pitches = list(range(chapter.LOW, chapter.HIGH + 1))
    heard = chapter.pitch_spectrum(tones(*pitches), RATE)
    assert (heard.argmax(1) + chapter.LOW).tolist() == pitches
    assert chapter.chroma(heard.numpy()).argmax(1).tolist() == [pitch % 12 for pitch in pitches]
    np.testing.assert_allclose(chapter.chroma(heard.numpy()).sum(1), 1, rtol=1e-5)


def test_a_detuned_tone_stays_on_its_key():
    heard = chapter.pitch_spectrum(tones(69.25, 68.75), RATE)
    assert (heard.argmax(1) + chapter.LOW).tolist() == [69, 69]


def test_too_short_a_frame_is_refused():
    with pytest.raises(ValueError, match="keys have no bin of 2048 samples at 22050 Hz"): chapter.semitones(RATE, 2048)


@pytest.mark.parametrize("period", [20, 43])
def test_rhythm_peaks_at_the_distance_of_the_clicks(period):
    """Clicks every `period` frames: the autocorrelation is highest there, and at no shorter lag."""
    wave = torch.zeros(1, 5 * RATE)
    for start in range(512 * 5, 5 * RATE - 2000, 512 * period): wave[0, start:start + 64] = torch.hann_window(64)
    heard = chapter.rhythm(wave, RATE)[0]
    assert heard.argmax() + chapter.LAGS.start == period


def test_silence_and_short_clips_have_finite_features():
    for wave in (torch.zeros(2, RATE), torch.randn(2, 9000)):
        assert torch.isfinite(chapter.rhythm(wave, RATE)).all() and chapter.rhythm(wave, RATE).shape == (2, 106)
        assert torch.isfinite(chapter.pitch_spectrum(wave, RATE)).all()
        assert np.isfinite(chapter.chroma(chapter.pitch_spectrum(wave, RATE).numpy())).all()


class Sound:
    """What `features_of` needs of a corpus, and how often it was listened to."""
    sample_rate, fingerprint = RATE, "test-sound"
    def __init__(self): self.heard = 0
    def __len__(self): return 40
    def wave(self, ids):
        self.heard += 1
        return tones(*(60 + np.asarray(ids) % 12), seconds=1.)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MUSICSSL_CACHE", str(tmp_path))
    return tmp_path / "baselines"


def test_features_are_measured_once(cache):
    sound = Sound()
    first, times = chapter.features_of(sound), sound.heard
    again = chapter.features_of(sound)
    assert sound.heard == times == 2, "40 clips, 32 at a time, and then from the cache"
    assert all(np.array_equal(first[name], again[name]) for name in first) and len(first["chroma"]) == 40
    assert first["chroma"].argmax(1).tolist() == [n % 12 for n in range(40)], "rows are in the order of the clips"


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "other"])
def test_a_damaged_file_of_features_is_made_again(cache, harm):
    sound = Sound()
    first = chapter.features_of(sound)
    path, = cache.glob("*.npz")
    whole = path.read_bytes()
    middle = whole.index(b"pitch.npy") + 2000 # within the array, behind the names
    path.write_bytes({"cut": whole[:len(whole) // 2], "flip": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1:],
                      "empty": b"", "other": b"not an archive"}[harm])
    again = chapter.features_of(sound)
    assert sound.heard == 4 and all(np.array_equal(first[name], again[name]) for name in first)


@contextmanager
def in_place(path):
    """The mutation of `files.atomic`: write where the file will be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path


@pytest.mark.parametrize("mutation", [False, True], ids=["atomic", "mutation: in place"])
def test_a_write_that_fails_leaves_no_file(cache, monkeypatch, mutation):
    """The disk fills up half-way. Mutation: written in place, half a file is left, and this test sees it."""
    def half(path, **arrays):
        path.write_bytes(b"PK" + bytes(1000))
        raise OSError("no room")
    with monkeypatch.context() as patch:
        patch.setattr(chapter.np, "savez", half)
        if mutation: patch.setattr(chapter.files, "atomic", in_place)
        with pytest.raises(OSError): chapter.features_of(Sound())
    assert bool(list(cache.glob("*.npz"))) == mutation
    assert len(chapter.features_of(Sound())["MFCC"]) == 40, "the next call makes it anew"


# -------------------------------------------------------------------------------------------------------------- splits

GROUPS = np.repeat(np.arange(300) * 7919, 3)

def straddles(group, out):
    """Compositions that are both in and out."""
    return set(group[out]) & set(group[~out])


def test_splits_keep_compositions_together_and_differ():
    splits = [chapter.in_test(GROUPS, seed) for seed in range(5)]
    assert not any(straddles(GROUPS, out) for out in splits)
    assert all(.12 < out.mean() < .28 for out in splits)
    assert all((a != b).any() for i, a in enumerate(splits) for b in splits[:i])
    assert np.array_equal(chapter.in_test(GROUPS[::-1], 0), splits[0][::-1]), "a clip's place in the list does not matter"


def test_mutation_a_split_by_clip_is_noticed():
    """Mutation: held out by clip instead of by composition."""
    by_clip = chapter.in_test(np.arange(len(GROUPS)), 0)
    assert straddles(GROUPS, by_clip)


def test_the_interval_is_the_corrected_one():
    values = np.array([.70, .72, .69, .73, .71])
    found = chapter.over_splits(values)
    half = stats.t.ppf(.975, 4) * np.sqrt(values.var(ddof=1) * (1 / 5 + .25))
    assert found.mean == pytest.approx(.71) and found.high - found.mean == pytest.approx(half) and found.mean - found.low == pytest.approx(half)
    assert half > 1.49 * stats.t.ppf(.975, 4) * stats.sem(values), "wider than if the splits were independent"
    with pytest.raises(ValueError, match="wanted 2 or more"): chapter.over_splits(values[:1])


# ----------------------------------------------------------------------------------------------------------- read-outs

def test_keys_are_scored_by_the_rule_of_mir_eval():
    """Its documentation: 1 the same, 0.5 a perfect fifth above, 0.3 relative, 0.2 parallel, else 0."""
    wanted = {0: 1., 7: .5, 9 + 12: .3, 12: .2}
    assert [chapter.key_score(0, guess) for guess in range(24)] == [wanted.get(guess, 0.) for guess in range(24)]
    wanted = {9 + 12: 1., 4 + 12: .5, 0: .3, 9: .2} # A minor: E minor, C major, A major
    assert [chapter.key_score(21, guess) for guess in range(24)] == [wanted.get(guess, 0.) for guess in range(24)]
    turned = [[chapter.key_score((k % 12 + 1) % 12 + k // 12 * 12, (g % 12 + 1) % 12 + g // 12 * 12) for g in range(24)] for k in range(24)]
    assert turned == [[chapter.key_score(k, g) for g in range(24)] for k in range(24)], "the same in every key"


def toy(n=200, seed=0):
    """Two classes a line apart, with 20 features of noise, and a split."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    x = rng.normal(size=(n, 20)) + 2 * y[:, None] * (np.arange(20) == 3)
    return {"x": x}, y, np.arange(n) % 5 != 0


@pytest.mark.parametrize("kind", ["class", "number", "tags"])
def test_an_answer_depends_on_training_clips_alone(kind):
    """The other test clips change, labels and features; the answer to the first one stays."""
    found, y, train = toy()
    y = {"class": y.astype(str), "number": y.astype(float), "tags": np.stack([y, 1 - y], 1)}[kind]
    before = chapter.answers(kind, found, y, train, ~train)
    other, shuffled = {"x": found["x"].copy()}, y.copy()
    other["x"][np.flatnonzero(~train)[1:]] = 50.
    shuffled[~train] = y[~train][::-1]
    after = chapter.answers(kind, other, shuffled, train, ~train)
    assert np.array_equal(before["x"][0], after["x"][0]) and np.array_equal(before["constant"], after["constant"])


def test_mutation_features_scaled_on_all_clips_are_noticed():
    """Mutation: standardised before the split. Then the answer to the first test clip moves with the others."""
    found, y, train = toy()
    other = found["x"].copy()
    other[np.flatnonzero(~train)[1:]] = 50.
    leaky = [chapter.answers("number", {"x": StandardScaler().fit_transform(x)}, y.astype(float), train, ~train)["x"][0] for x in (found["x"], other)]
    assert leaky[0] != leaky[1]


def test_answers_are_those_of_a_plain_pipeline():
    found, y, train = toy()
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=.3)).fit(found["x"][train], y[train]).predict(found["x"][~train])
    assert np.array_equal(chapter.answers("class", found, y, train, ~train)["x"], plain)


def test_the_constant_answer_scores_what_chance_scores():
    _, y, train = toy()
    for kind, task, values, wanted in [
            ("class", "texture", y.astype(str), {"accuracy": np.mean(y[~train] == np.bincount(y[train]).argmax())}),
            ("number", "density", y.astype(float), {"R²": 0.}),
            ("tags", "instrument tags", np.stack([y, 1 - y], 1), {"ROC-AUC": .5, "PR-AUC": .5, "tags without clips": 0})]:
        constant = chapter.answers(kind, {}, values, train, ~train)["constant"]
        found = chapter.scores(task, values[~train], constant, constant)
        assert found == pytest.approx(wanted), task


def test_tempo_counts_hits_within_four_per_cent():
    y = np.log2([100., 100., 100., 100.])
    answer = np.log2([103.9, 104.1, 96.2, 100.])
    assert chapter.scores("tempo", y, answer, y - 1)["within 4 %"] == .75


def test_a_tag_without_clips_is_counted_and_left_out():
    y = np.array([[1, 0], [0, 0], [1, 0], [0, 0]])
    found = chapter.scores("instrument tags", y, np.array([[.9, .1], [.2, .3], [.8, .2], [.1, .9]]), y)
    assert found == {"PR-AUC": 1., "ROC-AUC": 1., "tags without clips": 1}


def test_no_test_clip_or_a_single_class_gives_nothing():
    found, y, train = toy()
    assert chapter.examine("t", "class", found, y.astype(str), train, np.zeros_like(train)) == ([], {})
    assert chapter.examine("t", "class", found, np.full(len(y), "a"), train, ~train) == ([], {})


def test_turned_chroma_knows_keys_it_never_saw():
    """Training holds C major and A minor alone; the test has all 24 keys. Mutation: a plain read-out answers only those two."""
    shapes = np.stack([np.roll(profile, tonic) for profile in chapter.PROFILES for tonic in range(12)])
    key = np.array([0] * 20 + [21] * 20 + list(range(24)))
    heard = shapes[key] + .05 * np.random.default_rng(0).normal(size=(len(key), 12))
    train = np.arange(len(key)) < 40
    made = chapter.more_keys(heard, key.astype(str), train, ~train)
    assert (made["chroma, turned"] == key[~train].astype(str)).all() and (made["Krumhansl profiles"] == key[~train].astype(str)).all()
    plain = chapter.answers("class", {"chroma": heard}, key.astype(str), train, ~train)["chroma"]
    assert set(plain) <= {"0", "21"}


def test_truth_leaves_out_rare_classes_missing_labels_and_unsteady_beats():
    rows = [{"tune_type": "reel", "bpm": 100., "metre": [4, 4], "key24": 3}] * 300 + [{"tune_type": "waltz", "bpm": 50., "metre": None, "key24": -1}]
    rows += [{"tune_type": None, "bpm": 200., "metre": [6, 8], "key24": 0}] * 99
    corpus = types.SimpleNamespace(labels=rows, steady=np.arange(400) < 300)
    corpus = type("Rows", (), {"__len__": lambda self: 400, **vars(corpus)})()
    y, known = chapter.truth(corpus, "tune type")
    assert known.tolist() == [True] * 300 + [False] * 100 and set(y[known]) == {"reel"}, "one waltz in 400 is below half a percent"
    y, known = chapter.truth(corpus, "tempo")
    assert known.sum() == 300 and y[0] == np.log2(100)
    y, known = chapter.truth(corpus, "metre")
    assert set(y[known]) == {"4/4", "6/8"} and known.sum() == 399
    assert chapter.truth(corpus, "key24")[1].sum() == 399


# ---------------------------------------------------------------------------------------------------------------- runs

def test_the_grid_has_one_run_a_split_and_one_for_the_twins():
    runs = chapter.grid("laptop")
    assert [(run["arm"], run["seed"]) for run in runs] == [("split", seed) for seed in range(5)] + [("twins", 0)]
    assert all(run["clips"] == 2000 and run["seconds"] == 15 and "seeds" not in run for run in runs)


def test_a_run_gives_the_same_scores_twice_and_scores_follow_from_its_answers(tmp_path):
    config = next(run for run in chapter.grid("test") if run["arm"] == "split")
    with threadpool_limits(1): (first, arrays), (again, more) = chapter.run(config, tmp_path), chapter.run(config, tmp_path) # as `records.fill` does
    assert first == again and all(np.array_equal(arrays[name], more[name]) for name in arrays)
    for row in first["scores"]:
        if row["metric"] == "accuracy" and f"{row['task']}|{row['features']}" in arrays:
            hits = arrays[f"{row['task']}|truth"] == arrays[f"{row['task']}|{row['features']}"]
            assert hits.mean() == pytest.approx(row["value"]) and len(hits) == row["n"], row
    assert {row["task"] for row in first["scores"]} >= {"instrument tags", "texture", "key24", "note pitch, new programs"}


def test_twins_are_row_by_row_the_same_music():
    config = next(run for run in chapter.grid("test") if run["arm"] == "twins")
    corpus = chapter.load_corpus(config, "new timbres")
    arrays = chapter.twins(config)[1]
    twin = {row["paired_with"]: i for i, row in enumerate(corpus.labels) if row["paired_with"]}
    tests = corpus.ids("test")
    assert np.array_equal(corpus.tags[[twin[corpus.clip_id[i]] for i in tests]], arrays["truth"])
    assert arrays["changed"].sum() == 12 and arrays["heard"].shape == arrays["unheard"].shape == (len(tests), 22)
    assert not np.allclose(arrays["heard"], arrays["unheard"]), "a twin sounds different"
    assert probe.tagging_scores(arrays["truth"], arrays["heard"])["n_tags"] > 0
