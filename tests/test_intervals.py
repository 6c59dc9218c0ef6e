"""Intervals for every kind of answer, and comparisons that refuse what cannot be compared. Referees: loops over resampled rows."""
from dataclasses import replace
from time import perf_counter

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from musicssl.probe import intervals
from musicssl.probe.intervals import Interval, Scored, bootstrap, bootstrap_difference, compare, resample_weights
from musicssl.probe.metrics import METRICS, macro_scores, score
from test_metrics import REFEREE, made_up, rows_of


def runs_of(kind, n=40, seeds=3):
    """One truth, and answers that differ as runs with another seed do."""
    truth, answer = made_up(kind, n)
    if kind == "beats":
        shifts = [np.random.default_rng(s).normal(0, .04, n) for s in range(seeds)]
        return truth, [[times + late for times, late in zip(answer, shift)] for shift in shifts]
    return truth, [answer + np.random.default_rng(s).normal(size=np.shape(answer)) * (.5 if kind != "tempo" else 4.) for s in range(seeds)]


def scored(kind="class", metric="accuracy", seeds=(0, 1, 2), **changes):
    truth, answers = runs_of(kind, seeds=len(seeds))
    return replace(Scored(kind, metric, truth, tuple(answers), np.arange(100, 140), seeds=seeds), **changes)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_has_the_interval_of_copied_rows(metric, grouped):
    truth, answers = runs_of(METRICS[metric].kinds[0], seeds=2)
    groups = np.arange(40) // 3 if grouped else None
    found = bootstrap(truth, answers, metric, resamples=12, seed=4, groups=groups)
    weights, shares = resample_weights(40, 2, groups, 12, 4)
    rows = [np.repeat(np.arange(40), w.astype(int)) for w in weights.T]
    of = lambda run, r: REFEREE[metric](rows_of(truth, r), rows_of(run, r))
    by_hand = [sum(share * of(run, r) for share, run in zip(part, answers)) for r, part in zip(rows, shares.T)]
    np.testing.assert_allclose(found.draws, by_hand, rtol=0, atol=1e-12)
    assert found.mean == pytest.approx(np.mean([REFEREE[metric](truth, run) for run in answers]), abs=1e-12)
    assert (found.n, found.metric, found.seeds) == (40, metric, 2) and ("groups" in found.kind) == grouped
    np.testing.assert_allclose((found.low, found.high), np.percentile(by_hand, [2.5, 97.5]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_one_answer_is_a_list_of_one(metric):
    truth, answers = runs_of(METRICS[metric].kinds[0], seeds=2)
    assert bootstrap(truth, answers[0], metric, 50) == bootstrap(truth, answers[:1], metric, 50) != bootstrap(truth, answers, metric, 50)
    same = bootstrap_difference(truth, answers[0], answers[:1], metric, 50)
    assert (same.draws == 0).all() and same.n == 40 and same.metric == metric


def test_width_of_an_accuracy_is_the_formulas():
    truth, answer = np.zeros(290, int), np.eye(2)[(np.arange(290) >= 232).astype(int)]
    found = bootstrap(truth, answer, "accuracy", resamples=4000)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * (.8 * .2 / 290) ** .5, rel=.06)


def test_interval_of_old_callers():
    assert Interval(.5, .4, .6, .95, "by hand", 2, None) == Interval(.5, .4, .6, kind="by hand", seeds=2) and Interval(.5, .4, .6).n == 0
    assert str(Interval(.5, .4, .6, n=3)) == "0.500 [0.400, 0.600]"


# P19

def test_a_thousand_resamples_cost_a_fifth_of_scikit_learn_and_are_equal():
    """P19 on 3,000 clips and 50 tags with ties, from a part of the resamples."""
    rng = np.random.default_rng(0)
    labels = (rng.random((3000, 50)) < np.geomspace(.5, .01, 50)).astype(int)
    said = (labels + rng.normal(size=labels.shape)).round(1)
    weights, _ = resample_weights(3000, 1, None, 128, seed=0)
    start = perf_counter()
    ours = {metric: macro_scores(labels, said, weights, metric) for metric in ("pr_auc", "roc_auc")}
    mine, start = (perf_counter() - start) / 128, perf_counter()
    for column in range(2):
        rows = np.repeat(np.arange(3000), weights[:, column].astype(int))
        for metric, referee in (("pr_auc", average_precision_score), ("roc_auc", roc_auc_score)):
            assert ours[metric][column] == pytest.approx(referee(labels[rows], said[rows]), abs=1e-12)
    assert mine < (perf_counter() - start) / 2 / 5


# Comparing

def test_compare_is_the_paired_difference():
    a, b = scored(), scored(seeds=(0, 1, 2), answers=tuple(runs_of("class", seeds=6)[1][3:]))
    found = compare(a, b, resamples=300)
    assert found == bootstrap_difference(a.truth, list(a.answers), list(b.answers), "accuracy", 300)
    assert found.mean == pytest.approx(a.interval(10).mean - b.interval(10).mean) and compare(b, a, 300).low == pytest.approx(-found.high)
    assert found.kind == "paired percentile bootstrap over tracks and seeds" and (found.n, found.metric, found.seeds) == (40, "accuracy", 3)
    assert (compare(a, a).draws == 0).all()
    grouped = [replace(arm, groups=np.arange(40) // 4) for arm in (a, b)]
    assert "groups of tracks" in compare(*grouped).kind and grouped[0].interval().kind == "percentile bootstrap over groups of tracks and seeds"


def test_pairing_is_what_makes_it_narrow():
    """Mutation: each arm meets tracks of its own."""
    truth, answer = made_up("tags", 200)
    a, b = (Scored("tags", "pr_auc", truth, (answer + .3 * np.random.default_rng(s).normal(size=answer.shape),), np.arange(200)) for s in (0, 1))
    paired = compare(a, b, 400)
    apart = a.interval(400, seed=1).draws - b.interval(400, seed=2).draws
    assert paired.high - paired.low < .6 * np.subtract(*np.percentile(apart, [97.5, 2.5]))


def test_runs_are_paired_by_their_seed():
    """Mutation: runs are paired by their place, whatever the seeds say."""
    truth, answers = runs_of("number")
    answers = [truth + size * (answer - truth) for size, answer in zip((.2, 1., 2.), answers)]    # seeds of very different luck
    a, b = (Scored("mood", "r2", truth, tuple(answers[s] for s in order), np.arange(40), seeds=order) for order in ((0, 1, 2), (2, 0, 1)))
    assert (compare(a, b, 100).draws == 0).all()
    assert bootstrap_difference(truth, list(a.answers), list(b.answers), "r2", 100).draws.std() > .1


def test_runs_of_other_seeds_are_drawn_for_themselves():
    a, b = scored(), scored(seeds=(7, 8, 9))
    assert (compare(a, replace(b, seeds=(0, 1, 2))).draws == 0).all() and (compare(a, b).draws != 0).any()
    single = replace(b, seeds=(0,), answers=b.answers[:1])
    assert compare(a, single, 50) == bootstrap_difference(a.truth, list(a.answers), list(single.answers), "accuracy", 50)
    with pytest.raises(ValueError, match="got 3 and 1 runs, which make no pairs"):
        bootstrap_difference(a.truth, list(a.answers), list(single.answers), "accuracy", 50, pair_seeds=True)


TRUTH, ANSWERS = runs_of("class")
TURNED = TRUTH.copy(); TURNED[5] = (TURNED[5] + 1) % 9
UNFAIR = {
    "task": (scored(task="genre"), "task 'class' against 'genre'"),
    "metric": (scored(metric="macro_f1"), "metric 'accuracy' against 'macro_f1'"),
    "other tracks": (scored(ids=np.arange(40)), "ids of track 100, 100 against 0"),
    "another order": (scored(ids=np.arange(100, 140)[::-1].copy()), "ids of track 100, 100 against 139"),
    "fewer tracks": (scored(truth=TRUTH[1:], answers=tuple(run[1:] for run in ANSWERS), ids=np.arange(101, 140)),
                     "ids of 40 tracks against 39 tracks"),
    "truth": (scored(truth=TURNED), f"truth of track 105, {TRUTH[5]} against {TURNED[5]}"),
    "groups": (scored(groups=np.arange(40)), "groups of none against 40 tracks"),
}


@pytest.mark.parametrize("name", UNFAIR)
def test_compare_refuses_what_differs_and_names_both(name, monkeypatch):
    other, message = UNFAIR[name]
    for a, b in ((scored(), other), (other, scored())):
        with pytest.raises(ValueError, match="cannot be compared"): compare(a, b)
    with pytest.raises(ValueError, match=message): compare(scored(), other)
    if len(other.truth) == 40: # mutation: without the look at both, a number comes out
        monkeypatch.setattr(intervals, "_difference", lambda a, b: None)
        assert np.isfinite(compare(scored(), other, 20).mean)


def test_truths_of_beats_are_compared_too():
    truth, answers = runs_of("beats")
    arm = Scored("beats", "beat_f1", truth, tuple(answers), np.arange(40), seeds=(0, 1, 2))
    assert arm.interval(50).n == 40 and (compare(arm, replace(arm, truth=[times.copy() for times in truth]), 20).draws == 0).all()
    with pytest.raises(ValueError, match="truth of track 3"): compare(arm, replace(arm, truth=truth[:3] + [truth[3] + .01] + truth[4:]))


def test_scored_holds_together():
    for changes, message in (({"metric": "auc"}, "got metric 'auc'"), ({"seeds": (0, 1)}, r"class: got 3 answers for seeds \(0, 1\)"),
                             ({"seeds": (0, 0, 1)}, "each seed once"), ({"answers": (), "seeds": ()}, "got 0 answers"),
                             ({"ids": np.arange(39)}, "class: got 39 ids, wanted 40"), ({"groups": np.arange(41)}, "class: got 41 groups, wanted 40"),
                             ({"answers": (*ANSWERS[:2], ANSWERS[2] * np.nan)}, "values of the answer are not finite"),
                             ({"answers": (*ANSWERS[:2], ANSWERS[2][1:])}, r"got truth \(40,\) and answer \(39, 9\)")):
        with pytest.raises(ValueError, match=message): replace(scored(), **changes)
    with pytest.raises(ValueError, match="got metric 'auc', wanted one of"): bootstrap(TRUTH, ANSWERS, "auc")


def test_two_equal_arms_are_told_apart_as_rarely_as_promised():
    """Two listeners of the same skill: the 95 % interval misses 0 about five times in a hundred."""
    missed = 0
    for i in range(200):
        right = np.random.default_rng(i).random((2, 120)) < .7
        a, b = (Scored("genre", "accuracy", np.zeros(120, int), (np.eye(2)[1 - r.astype(int)],), np.arange(120)) for r in right)
        found = compare(a, b, 200, seed=i)
        missed += not found.low <= 0 <= found.high
    assert 2 <= missed <= 22


def test_one_clip_can_move_macro_ap_further_than_any_clip_moves_accuracy():
    """What chapter and prose say of one test clip: leave-one-out by weights is leave-one-out by rows."""
    rng = np.random.default_rng(1)
    labels = (rng.random((150, 8)) < [.5, .4, .3, .2, .2, .1, .1, 0]).astype(int)
    labels[:3, 7] = 1
    said = 2 * labels + rng.normal(size=labels.shape)
    without = score("pr_auc", labels, said, 1 - np.eye(150))
    by_row = [REFEREE["pr_auc"](np.delete(labels, i, 0), np.delete(said, i, 0)) for i in range(5)]
    np.testing.assert_allclose(without[:5], by_row, rtol=0, atol=1e-12)
    assert np.abs(without - score("pr_auc", labels, said)).max() > 1 / 150
