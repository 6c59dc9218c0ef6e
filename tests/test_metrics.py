"""Every metric against a referee, under weights and with ties. The referees are scikit-learn, mir_eval and plain loops."""
import warnings

import mir_eval
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, r2_score, roc_auc_score

from musicssl.probe import metrics
from musicssl.probe.metrics import KEYS, KINDS, METRICS, best_thresholds, check, counts, f1_at, key_score, macro_scores, per_track, score, sdr

SHARPS = [f"{tonic} {mode}" for mode in ("major", "minor") for tonic in "C C# D D# E F F# G G# A A# B".split()]


def macro(referee):
    """Over the tags that have clips with and without."""
    return lambda truth, answer: np.mean([referee(y, s) for y, s in zip(truth.T, answer.T) if 0 < y.sum() < len(y)])


def beat_counts(truth, answer):
    return np.array([(len(mir_eval.util.match_events(t, a, .07)), len(t), len(a)) for t, a in zip(truth, answer)])


def recall(k):
    """Ties by lot: the mean over every place that the right song can take among its equals."""
    def referee(truth, answer):
        places = [range(int((row > row[t]).sum()), int((row >= row[t]).sum())) for t, row in zip(truth, answer)]
        return np.mean([np.mean([place < k for place in track]) for track in places])
    return referee


def median_rank(truth, answer):
    return np.median([np.mean(range(1 + int((row > row[t]).sum()), 1 + int((row >= row[t]).sum()))) for t, row in zip(truth, answer)])


REFEREE = {
    "pr_auc": macro(average_precision_score), "roc_auc": macro(roc_auc_score),
    "accuracy": lambda y, s: accuracy_score(y, s.argmax(1)), "macro_f1": lambda y, s: f1_score(y, s.argmax(1), average="macro"),
    "key_score": lambda y, s: np.mean([mir_eval.key.weighted_score(SHARPS[a], SHARPS[b]) for a, b in zip(y, s.argmax(1))]),
    "acc1": lambda y, s: np.mean([abs(b / a - 1) <= .04 for a, b in zip(y, s)]),
    "acc2": lambda y, s: np.mean([any(abs(b / (a * f) - 1) <= .04 for f in (1, 2, .5, 3, 1 / 3)) for a, b in zip(y, s)]),
    "tempo_error": lambda y, s: np.mean(abs(y - s)),
    "r2": r2_score,
    "beat_f1": lambda y, s: np.mean([mir_eval.beat.f_measure(t, a) for t, a in zip(y, s)]),
    "beat_f1_micro": lambda y, s: 2 * beat_counts(y, s)[:, 0].sum() / beat_counts(y, s)[:, 1:].sum(),
    "recall_at_1": recall(1), "recall_at_5": recall(5), "recall_at_10": recall(10), "median_rank": median_rank,
}


def made_up(kind, n=40, seed=0):
    """A truth and an answer that leans towards it, with ties everywhere, rare tags and rare classes."""
    rng = np.random.default_rng(seed)
    lean = lambda truth, C: (1.5 * np.eye(C)[truth] + rng.normal(size=(len(truth), C))).round()
    if kind == "tags":
        truth = (rng.random((n, 6)) < [.5, .3, .2, .1, .05, 0]).astype(int)
        return truth, (truth + rng.normal(size=truth.shape)).round()
    if kind in ("class", "key"):
        C = {"class": 9, "key": 24}[kind]
        truth = rng.choice(C, n, p=np.arange(1, C + 1) / (C * (C + 1) / 2))
        return truth, lean(truth, C)
    if kind == "tempo":
        truth = rng.uniform(50, 180, n)
        return truth, truth * rng.choice([1, 1.02, 1.05, .5, 2, 3, 1 / 3, .67], n)
    if kind == "number":
        truth = rng.normal(size=(n, 3)).round(1)
        return truth, truth + rng.normal(size=truth.shape)
    if kind == "retrieval":
        return np.arange(n), lean(np.arange(n), n)
    truth = [np.arange(rng.uniform(0, 1), 8, rng.uniform(.3, .9)) for _ in range(n)]
    return truth, [np.sort(times + rng.normal(0, .08, len(times)))[::rng.integers(1, 3)] for times in truth]


def rows_of(things, rows):
    return [things[row] for row in rows] if isinstance(things, list) else things[rows]


def drawn(n, columns, seed=0):
    """Test sets drawn with replacement: the rows, and how often each row came."""
    rows = [np.random.default_rng([seed, i]).integers(0, n, n) for i in range(columns)]
    return rows, np.stack([np.bincount(r, minlength=n) for r in rows], axis=1)


def test_every_metric_has_a_referee_and_a_kind():
    assert set(REFEREE) == set(METRICS) == {name for names in KINDS.values() for name in names}
    assert all(kind in METRICS[name].kinds for kind, names in KINDS.items() for name in names)
    assert all(name in KINDS[kind] for name, metric in METRICS.items() for kind in metric.kinds)
    assert {name for name, metric in METRICS.items() if not metric.higher_is_better} == {"tempo_error", "median_rank"}
    assert all(METRICS[names[0]].higher_is_better for names in KINDS.values()), "models are chosen by the first, the higher the better"


@pytest.mark.parametrize("name, seed", [(name, seed) for name in METRICS for seed in range(3)])
def test_equals_its_referee(name, seed):
    truth, answer = made_up(METRICS[name].kinds[0], 60, seed)
    assert score(name, truth, answer) == pytest.approx(REFEREE[name](truth, answer), abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
@pytest.mark.parametrize("name", METRICS)
def test_a_weight_is_that_many_copies(name, dtype):
    truth, answer = made_up(METRICS[name].kinds[0])
    rows, weights = drawn(40, 6)
    with warnings.catch_warnings(action="ignore"):                        # scikit-learn on a tag without positives
        copied = [REFEREE[name](rows_of(truth, r), rows_of(answer, r)) for r in rows]
    np.testing.assert_allclose(score(name, truth, answer, weights.astype(dtype)), copied, rtol=0, atol=1e-12)
    # mutation: weights are not looked at
    assert np.abs(score(name, truth, answer) - np.array(copied)).max() > 1e-3


def test_copies_of_odd_and_even_number_have_their_median():
    """Mutation: only the upper of two middle ranks."""
    truth, similarity = np.zeros(2, int), np.array([[3., 1., 1.], [1., 2., 3.]])  # ranks 1 and 3
    assert score("median_rank", truth, similarity, np.array([[1, 2, 1, 0], [1, 1, 2, 5]])).tolist() == [2, 1, 3, 3]
    upper = lambda weights: np.repeat([1, 3], weights)[sum(weights) // 2]
    assert upper([1, 1]) != 2


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.each])
def test_mean_of_the_tracks_own_values(name):
    pair = made_up(METRICS[name].kinds[0])
    assert np.nanmean(per_track(name, *pair)) == pytest.approx(score(name, *pair), abs=1e-12) and len(per_track(name, *pair)) == 40


def test_no_values_of_tracks_where_the_score_is_no_mean():
    assert {name for name, metric in METRICS.items() if per_track(name, *made_up(metric.kinds[0])) is None} == {
        "pr_auc", "roc_auc", "macro_f1", "r2", "beat_f1_micro", "median_rank"}


# Nothing known

def test_constant_answers_are_worth_chance():
    """musicoder T22, mulap M21: ROC-AUC .5, average precision the mean prevalence, R2 not above 0."""
    truth = made_up("tags", 200)[0][:, :5]
    for constant in (0., -3.5, 1e9):
        assert score("roc_auc", truth, np.full(truth.shape, constant)) == .5
        assert score("pr_auc", truth, np.full(truth.shape, constant)) == pytest.approx(truth.mean(), abs=1e-12)
    numbers = made_up("number")[0]
    assert score("r2", numbers, np.tile(numbers.mean(0), (40, 1))) == pytest.approx(0, abs=1e-12)
    assert all(score("r2", numbers, np.full(numbers.shape, c)) <= 1e-12 for c in (-1., 0., .1, 4.))
    assert [score(f"recall_at_{k}", np.arange(20), np.ones((20, 20))) for k in (1, 5, 10)] == pytest.approx([1 / 20, 5 / 20, 10 / 20])
    assert score("median_rank", np.arange(20), np.ones((20, 20))) == 10.5


def test_ties_by_row_order_would_flatter():
    """Mutation: equal similarities ranked as a stable sort leaves them, the right song being column 0."""
    truth, similarity = np.zeros(10, int), np.ones((10, 5))
    flattered = np.mean([np.argsort(-row, kind="stable")[0] == t for t, row in zip(truth, similarity)])
    assert flattered == 1 and score("recall_at_1", truth, similarity) == .2


# Tags and classes that are not there

def test_empty_and_full_tags_are_left_out():
    truth, answer = made_up("tags", 50)
    assert truth[:, 5].sum() == 0
    filled = np.column_stack([truth, np.ones(50, int)]), np.column_stack([answer, answer[:, 0]])
    for name in ("pr_auc", "roc_auc"): assert score(name, *filled) == score(name, truth, answer) == score(name, truth[:, :5], answer[:, :5])
    with warnings.catch_warnings(action="ignore"):                        # mutation: an empty tag counts 0
        assert average_precision_score(truth, answer) < score("pr_auc", truth, answer) - .05
    with pytest.raises(ValueError, match="none of 1 tags"): score("pr_auc", truth[:, 5:], answer[:, 5:])
    one = np.zeros((50, 1)); one[0] = 1
    assert np.isnan(score("pr_auc", truth, answer, one)).all()


def test_macro_f1_is_over_the_classes_in_truth_or_answer():
    truth, said = np.array([0, 0, 1, 1]), np.eye(5)[[0, 0, 1, 3]]
    assert score("macro_f1", truth, said) == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert score("macro_f1", truth, said) == pytest.approx(f1_score(truth, said.argmax(1), average="macro"))
    gone = np.array([[1], [1], [1], [0]])                                 # class 3 is no longer named: it leaves the mean
    assert score("macro_f1", truth, said, gone)[0] == pytest.approx(1)
    # mutations: all five classes, or only those of the truth
    assert f1_score(truth, said.argmax(1), average="macro", labels=range(5), zero_division=0) == pytest.approx(1 / 3)
    assert f1_score(truth, said.argmax(1), average="macro", labels=[0, 1]) == pytest.approx(5 / 6)


# Keys

def test_keys_of_the_benchmark():
    """marble test 1."""
    wanted = {"C major": 1, "G major": .5, "F major": 0, "A minor": .3, "C minor": .2}
    assert {guess: key_score("C major", guess) for guess in wanted} == wanted
    assert {guess: key_score(0, KEYS.index(guess)) for guess in wanted} == wanted
    assert all(key_score(*pair) == 1 for pair in (("C# major", "Db major"), ("Gb minor", "f# minor"), ("A# major", 10), (8, "G# major")))


def test_every_pair_of_keys_is_mir_evals_in_either_spelling():
    table = np.array([[key_score(a, b) for b in range(24)] for a in range(24)])
    assert table.tolist() == [[mir_eval.key.weighted_score(a, b) for b in SHARPS] for a in SHARPS]
    turned = np.roll(np.arange(24).reshape(2, 12), 5, axis=1).ravel()
    assert (table == table[np.ix_(turned, turned)]).all(), "the same in every key"
    assert (table != table.T).any(), "a fifth above is not a fifth below"


def test_what_is_no_key():
    for bad in (-1, 24): # mutation: Python's own indexing would take -1 for B minor
        with pytest.raises(ValueError, match=f"got key {bad}, wanted 0 to 23"): key_score(0, bad)
    assert KEYS[-1] == "B minor"
    with pytest.raises(ValueError, match="H major|H"): key_score("C major", "H major")


# Numbers

def test_r2_is_blind_to_units_and_to_a_far_origin():
    """marble test 2; the second half fails when the sums are taken without centring first (mutation)."""
    truth, answer = made_up("number")
    for scale, shift in ((10, -7), (-.1, 3)):
        assert score("r2", scale * truth + shift, scale * answer + shift) == pytest.approx(score("r2", truth, answer), abs=1e-12)
    rows, weights = drawn(40, 3)
    far, near = (score("r2", truth + add, answer + add, weights) for add in (1e6, 0.))
    np.testing.assert_allclose(far, near, rtol=0, atol=1e-8)
    y, w = truth + 1e6, weights.astype(float)
    spread = w.T @ y ** 2 - (w.T @ y) ** 2 / w.sum(0)[:, None]
    careless = (1 - w.T @ (truth - answer) ** 2 / spread).mean(1)
    assert np.abs(careless - near).max() > 1e-6


def test_r2_of_a_target_that_a_resample_makes_constant():
    truth, answer = np.array([[1., 5.], [1., 6.], [2., 8.]]), np.array([[1., 5.], [1.5, 6.], [2., 7.]])
    found = score("r2", truth, answer, np.array([[1, 3], [1, 0], [0, 0]]))
    assert found[0] == pytest.approx(r2_score(truth[:2, 1], answer[:2, 1])) and np.isnan(found[1])


# Beats

def test_beats_of_the_benchmark():
    """marble test 6, and a track a time; nothing is trimmed (mutation: mir_eval's own 5 s)."""
    beats = np.arange(.4, 5, .4)
    for ms, wanted in ((0, 1), (69, 1), (-69, 1), (71, 0), (-71, 0)):
        assert score("beat_f1", [beats], [beats + ms / 1000]) == wanted == mir_eval.beat.f_measure(beats, beats + ms / 1000)
    with warnings.catch_warnings(action="ignore"):
        assert mir_eval.beat.f_measure(*[mir_eval.beat.trim_beats(beats)] * 2) == 0


def test_micro_and_mean_over_tracks_differ():
    truth, answer = [np.arange(4.), np.arange(20) * .4], [np.arange(4.), np.arange(20) * .4 + .2]
    assert score("beat_f1", truth, answer) == .5 and score("beat_f1_micro", truth, answer) == pytest.approx(4 / 24)


def test_a_beat_serves_one_tap():
    """Mutation: every tap near a beat counts."""
    truth, answer = [np.array([1., 2.])], [np.array([.95, 1., 1.05, 2.])]
    assert counts(truth, answer).tolist() == [[2, 2, 4]]
    assert sum(np.abs(truth[0] - tap).min() <= .07 for tap in answer[0]) == 4


def test_tracks_without_beats():
    none, some = np.array([]), np.array([1., 2.])
    assert score("beat_f1", [some, none], [some, some]) == .5 and score("beat_f1", [some, some], [some, none]) == .5
    assert score("beat_f1", [some, none], [some, none]) == 1 and np.isnan(per_track("beat_f1", [some, none], [some, none])[1])
    assert score("beat_f1_micro", [some, none], [some, none]) == 1
    with pytest.raises(ValueError, match="beat_f1: nothing to score in 1 tracks"): score("beat_f1", [none], [none])


# Tempo

def test_edges_of_the_tempo():
    truth = np.full(9, 100.)
    guess = np.array([104, 96, 104.1, 95.9, 200, 50, 300, 100 / 3, 150.])
    assert per_track("acc1", truth, guess).tolist() == [1, 1] + 7 * [0]
    assert per_track("acc2", truth, guess).tolist() == [1, 1, 0, 0, 1, 1, 1, 1, 0]


# Separation

def test_sdr_of_the_benchmark():
    """marble test 7."""
    s = np.random.default_rng(0).normal(size=(2, 4000))
    assert sdr(s, s) == pytest.approx(10 * np.log10(((s ** 2).sum() + 1e-7) / 1e-7))
    assert sdr(s, s / 2) == pytest.approx(20 * np.log10(2), abs=1e-6) and sdr(s, 0 * s) == 0
    assert sdr(0 * s, 0 * s) == 0
    with pytest.raises(ValueError, match=r"got reference \(2, 4000\) and estimate \(2, 3999\)"): sdr(s, s[:, 1:])
    with pytest.raises(ValueError, match="values of the estimate are not finite"): sdr(s, s * np.inf)


# Thresholds

def labelled(seed):
    rng = np.random.default_rng(seed)
    labels = (rng.random((80, 12)) < np.geomspace(.5, .02, 12)).astype(int)
    return labels, (labels + rng.normal(size=labels.shape)).round(1)


def test_thresholds_are_the_best_there_are():
    labels, scores = labelled(0)
    assert labels.any(0).all()
    best = best_thresholds(labels, scores)
    np.testing.assert_allclose(f1_at(labels, scores, best), f1_score(labels, scores >= best, average=None, zero_division=np.nan), atol=1e-12)
    for tag in range(12):
        tried = [f1_score(labels[:, tag], scores[:, tag] >= t, zero_division=0) for t in np.unique(scores[:, tag])]
        assert f1_at(labels, scores, best)[tag] == pytest.approx(max(tried), abs=1e-12)


def test_thresholds_never_read_test_labels():
    """mulap M22: the test labels are poisoned, and only the F1 notices. Mutation: thresholds tuned on the test labels do notice."""
    valid, test = labelled(1), labelled(2)
    poisoned = 1 - test[0]
    honest = [f1_at(labels, test[1], best_thresholds(*valid)) for labels in (test[0], poisoned)]
    decisions = [test[1] >= best_thresholds(*valid) for _ in (test[0], poisoned)]
    assert (decisions[0] == decisions[1]).all() and not np.allclose(*honest, equal_nan=True)
    assert not np.array_equal(best_thresholds(test[0], test[1]), best_thresholds(poisoned, test[1]))
    assert np.nanmean(f1_at(*test, best_thresholds(*test))) > np.nanmean(honest[0])


def test_a_tag_that_validation_never_shows():
    labels, scores = labelled(3)
    labels[:, 0] = 0
    assert best_thresholds(labels, scores)[0] == np.inf and np.isnan(f1_at(labels, scores, best_thresholds(labels, scores))[0])
    with pytest.raises(ValueError, match=r"got thresholds \(3,\), wanted \(12,\)"): f1_at(labels, scores, np.zeros(3))


# Refusals

def spoilt(kind, value):
    truth, answer = made_up(kind)
    if kind == "beats": return truth, answer[:7] + [np.append(answer[7], value)] + answer[8:]
    answer = answer.astype(float)
    answer[7] = value
    return truth, answer


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", METRICS)
def test_what_is_not_finite_is_refused_by_name(name, value):
    truth, answer = spoilt(METRICS[name].kinds[0], value)
    with pytest.raises(ValueError, match=f"answer of track 7: .*{value}|values of the answer are not finite: {value} in track 7"):
        score(name, truth, answer)
    with pytest.raises(ValueError, match="finite"): per_track(name, truth, answer)


def test_without_the_check_a_nan_would_be_scored(monkeypatch):
    """Mutation: `_finite` lets everything pass."""
    monkeypatch.setattr(metrics, "_finite", lambda what, values: np.asarray(values, dtype=np.float64))
    for name in ("accuracy", "key_score", "acc1", "recall_at_5"):
        assert np.isfinite(score(name, *spoilt(METRICS[name].kinds[0], np.nan))), "nobody would have noticed"


@pytest.mark.parametrize("kind, truth, answer, message", [
    ("tags", np.zeros((3, 2)), np.zeros((3, 3)), r"tags: got truth \(3, 2\) and answer \(3, 3\), wanted \(n, C\) both"),
    ("tags", np.full((3, 2), 2), np.zeros((3, 2)), "tags: got truth 2 to 2, wanted 0 and 1"),
    ("tags", np.zeros((0, 2)), np.zeros((0, 2)), r"got truth \(0, 2\)"),
    ("class", np.array([0, 1]), np.array([0, 1]), r"class: got truth \(2,\) and answer \(2,\), wanted \(n,\) and \(n, C\)"),
    ("class", np.array([0, 4]), np.zeros((2, 4)), "class: got truth 0 to 4 .int64., wanted whole numbers 0 to 3"),
    ("class", np.array([0., 1.]), np.zeros((2, 4)), "float64.*wanted whole numbers"),
    ("key", np.array([0]), np.zeros((1, 12)), r"wanted \(n,\) and \(n, 24\)"),
    ("tempo", np.array([0.]), np.array([90.]), "tempo: got a truth of 0 BPM"),
    ("number", np.ones((4, 1)), np.zeros((4, 1)), "target 0 is the same in all 4 tracks"),
    ("beats", [[1.]], [[1.], [2.]], "beats: got 1 and 2 lists"),
    ("beats", [[2., 1.]], [[1.]], r"truth of track 0: got \[2.0, 1.0\], wanted finite times in s, ascending"),
    ("beats", [1., 2.], [1., 2.], "truth of track 0: got 1.0"),
    ("retrieval", np.array([5]), np.zeros((1, 5)), "retrieval: got truth 5 to 5"),
    ("chords", [0], [0], "got kind 'chords', wanted one of tags, class"),
])
def test_what_does_not_fit_is_refused_by_name(kind, truth, answer, message):
    with pytest.raises(ValueError, match=message): check(kind, truth, answer)


def test_weights_that_count_nothing():
    truth, answer = made_up("class")
    for weights, message in ((np.ones(40), r"got weights \(40,\), wanted \(40, W\)"), (np.ones((39, 2)), r"\(39, 2\)"),
                             (-np.ones((40, 1)), "below 0"), (np.full((40, 1), np.nan), "not finite"),
                             (np.eye(40, 41), "column 40 of the weights counts no track")):
        with pytest.raises(ValueError, match=message): score("accuracy", truth, answer, weights)
    with pytest.raises(ValueError, match="got metric 'auc', wanted one of pr_auc"): score("auc", truth, answer)
    with pytest.raises(ValueError, match="got metric 'auc'"): per_track("auc", truth, answer)


def test_chunks_of_resamples_do_not_matter():
    truth, answer = made_up("tags", 60)
    weights = drawn(60, 9)[1].astype(np.float32)
    for name in ("pr_auc", "roc_auc"):
        assert np.array_equal(macro_scores(truth, answer, weights, name, chunk=2), score(name, truth, answer, weights), equal_nan=True)
