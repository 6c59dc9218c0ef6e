"""The probe's promises that need more than a lesson: the referee is scikit-learn, on many shapes and with ties everywhere."""
from itertools import product
from time import perf_counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from musicssl import probe

REFEREE = {"roc_auc": roc_auc_score, "pr_auc": average_precision_score}


def scored(tags):
    return [c for c in range(tags.shape[1]) if 0 < tags[:, c].sum() < len(tags)]


def macro(metric, labels, scores):
    return np.mean([REFEREE[metric](labels[:, c], scores[:, c]) for c in scored(labels)])


def made_up(n, tags, seed, levels=None):
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, tags)) < rng.uniform(.02, .6, tags)).astype(int)
    scores = labels * .7 + rng.normal(size=(n, tags))
    return labels, scores if levels is None else np.round(scores * levels) / levels


@pytest.mark.parametrize("n, levels", list(product([3, 40, 301], [None, 2, 1, .25])))
def test_scores_equal_scikit_learn(n, levels):
    labels, scores = made_up(n, 7, seed=n, levels=levels)
    ours = probe.tagging_scores(labels, scores)
    assert ours["n_tags"] == len(scored(labels)) and ours["n_tags"] + ours["n_empty"] == 7
    for metric in REFEREE:
        np.testing.assert_allclose(ours[metric], macro(metric, labels, scores), rtol=0, atol=1e-12)


def test_constant_scores_are_worth_the_base_rate():
    labels = np.array([[1], [0], [0], [0]])
    assert probe.tagging_scores(labels, np.zeros((4, 1)))["pr_auc"] == .25
    assert probe.tagging_scores(labels, np.zeros((4, 1)))["roc_auc"] == .5


@pytest.mark.parametrize("metric, grouped, levels", list(product(REFEREE, [False, True], [None, 1])))
def test_bootstrap_equals_scikit_learn_on_resampled_rows(metric, grouped, levels):
    labels, scores = made_up(60, 6, seed=5, levels=levels)
    groups = np.random.default_rng(1).integers(0, 20, 60) if grouped else None
    weights, _ = probe.resample_weights(60, 1, groups, 12, seed=3)
    ours = probe.macro_scores(labels, scores, weights, metric, chunk=5)
    rows = [np.repeat(np.arange(60), w.astype(int)) for w in weights.T]
    np.testing.assert_allclose(ours, [macro(metric, labels[r], scores[r]) for r in rows], rtol=0, atol=1e-12)
    assert not grouped or all(len(set(weights[groups == g, 0])) == 1 for g in set(groups))
    assert len({len(set(r)) for r in rows}) > 1


def test_resampling_seeds_widens_the_interval():
    labels, scores = made_up(150, 5, seed=0)
    runs = np.stack([scores, .3 * scores + np.random.default_rng(9).normal(size=scores.shape), scores])
    alone, hierarchy = probe.bootstrap(labels, runs[0]), probe.bootstrap(labels, runs)
    assert hierarchy.high - hierarchy.low > 1.3 * (alone.high - alone.low)
    assert hierarchy.mean == pytest.approx(np.mean([macro("pr_auc", labels, run) for run in runs]), abs=1e-12)
    assert "seeds" in hierarchy.kind and "seeds" not in alone.kind and hierarchy.seeds == 3


def test_grouping_widens_the_interval():
    labels, scores = made_up(50, 5, seed=2)
    labels, scores, groups = (np.repeat(part, 4, axis=0) for part in (labels, scores, np.arange(50)))
    apart, together = probe.bootstrap(labels, scores), probe.bootstrap(labels, scores, groups=groups)
    assert together.high - together.low > 1.5 * (apart.high - apart.low) and "groups" in together.kind


def test_interval_covers_about_as_often_as_it_says():
    def sample(n, seed):
        rng = np.random.default_rng(seed)
        labels = (rng.random((n, 3)) < .3).astype(int)
        return labels, labels + rng.normal(size=(n, 3))

    truth = probe.tagging_scores(*sample(200_000, 0))["roc_auc"]
    intervals = [probe.bootstrap(*sample(150, 1 + i), "roc_auc", resamples=200) for i in range(100)]
    assert 88 <= sum(i.low <= truth <= i.high for i in intervals) <= 100


def test_difference_pairs_tracks_and_seeds():
    labels, scores = made_up(120, 5, seed=4)
    runs = scores + np.arange(3)[:, None, None] * np.random.default_rng(0).normal(size=scores.shape)
    same = probe.bootstrap_difference(labels, runs, runs)
    assert (same.draws == 0).all()
    more, fewer = probe.bootstrap_difference(labels, runs, runs[0]), probe.bootstrap_difference(labels, runs[0], runs)
    assert more.mean == pytest.approx(-fewer.mean)


def test_bootstrap_is_a_function_of_its_seed():
    labels, scores = made_up(80, 4, seed=6)
    first, second, other = (probe.bootstrap(labels, scores, seed=s) for s in (1, 1, 2))
    assert first == second and (first.draws == second.draws).all() and first != other


def test_refusals():
    labels, scores = made_up(30, 4, seed=7)
    with pytest.raises(ValueError, match="groups of 29 clips, wanted 30"):
        probe.bootstrap(labels, scores, groups=np.arange(29))
    with pytest.raises(ValueError, match="none of 4 tags"):
        probe.tagging_scores(np.zeros_like(labels), scores)
    with pytest.raises(ValueError, match=r"wanted \(n, C\) both"):
        probe.tagging_scores(labels[:-1], scores)
    with pytest.raises(ValueError, match="not finite"):
        probe.fit_probe(np.full((30, 1, 5), np.nan), labels, (np.zeros((30, 1, 5)), labels))


@pytest.mark.parametrize("seed", range(5))
def test_subsets_hold_every_tag_when_they_can(seed):
    rng = np.random.default_rng(seed)
    labels = (rng.random((500, 12)) < rng.uniform(.01, .3, 12)).astype(int)
    order = [probe.label_subset(labels, f, seed) for f in (.001, .01, .02, .05, .1, .5, 1.)]
    assert [len(ids) for ids in order] == [1, 5, 10, 25, 50, 250, 500]
    assert all(set(a) < set(b) for a, b in zip(order, order[1:]))
    assert labels[order[3]].any(0).tolist() == labels.any(0).tolist()
    assert (probe.label_subset(labels, .1, seed) == order[4]).all() and (probe.label_subset(labels, .1, seed + 1) != order[4]).any()
    assert order[-1].tolist() == list(range(500))


def test_one_clip_can_be_the_whole_budget():
    labels = np.eye(4, dtype=int)[[0, 0, 1, 2, 3, 3]]
    labels[4] = 1
    assert probe.label_subset(labels, .01).tolist() == [4]


class Averages(torch.nn.Module):
    """Mean of every quarter of a segment, behind a batch normalisation."""
    sample_rate, hop, dim, n_samples = 8000, 100, 4, 400

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, wave):
        return SimpleNamespace(clip=self.norm(wave.reshape(len(wave), 4, 100).mean(2)))


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_extract_keeps_rows_segments_and_encoder(batch):
    waves = torch.arange(5.)[:, None] * 10 + torch.arange(900) // 400
    corpus, encoder = SimpleNamespace(wave=lambda ids: waves[ids], sample_rate=8000), Averages().train()
    features = probe.extract(encoder, corpus, [3, 0, 4], batch=batch)
    assert features.shape == (3, 2, 4) and encoder.training
    np.testing.assert_allclose(features[:, :, 0], np.array([[30, 31], [0, 1], [40, 41]]), rtol=1e-4, atol=1e-4)
    assert probe.extract(encoder, corpus, [0], legacy=True).shape == (1, 2, 4)


def sawtooth(ids): # (B, 900): sample t of clip i is 1000 i + t, so that a feature tells where it was cut
    return torch.as_tensor(np.asarray(ids))[:, None] * 1000. + torch.arange(900.)


def cut_at(features): # the start of each segment; its first quarter's mean is start + 49.5
    return features[..., 0] * (1 + 1e-5) ** .5 - 49.5


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_one_crop_per_clip_whatever_the_batch_and_the_order(batch):
    """Code v2's training features. A clip keeps its crop among any others; another seed gives another."""
    how = dict(sample_rate=8000, segments="one", batch=batch)
    ids = np.array([7, 2, 5, 11])
    found = probe.extract(Averages(), sawtooth, ids, **how)
    assert found.shape == (4, 1, 4)
    np.testing.assert_array_equal(found[::-1], probe.extract(Averages(), sawtooth, ids[::-1].copy(), **how))
    np.testing.assert_array_equal(found[2:3], probe.extract(Averages(), sawtooth, [5], **how))
    assert not np.array_equal(found, probe.extract(Averages(), sawtooth, ids, seed=1, **how))


def test_one_crop_lies_anywhere_and_is_one_piece():
    """Every start is as likely, the last one included; on the grid of the segments lie few. By hand: the quarters follow each other."""
    ids = np.arange(3000)
    ramps = lambda ids: torch.arange(420.).repeat(len(ids), 1)
    found = probe.extract(Averages(), ramps, ids, sample_rate=8000, segments="one")[:, 0]
    starts = np.rint(cut_at(found)).astype(int)
    times = np.bincount(starts, minlength=21)
    assert len(times) == 21 and times.min() > 90 and times.max() < 200
    np.testing.assert_allclose(np.diff(found, axis=1), 100, atol=.01)


def test_all_segments_stay_what_they_were_and_what_is_too_short_is_refused():
    every = probe.extract(Averages(), sawtooth, [3, 0], sample_rate=8000)
    np.testing.assert_array_equal(every, probe.extract(Averages(), sawtooth, [3, 0], sample_rate=8000, segments="all", seed=9))
    np.testing.assert_allclose(cut_at(every), [[3000, 3400], [0, 400]], atol=.01)
    assert probe.extract(Averages(), lambda ids: sawtooth(ids)[:, :400], [0], sample_rate=8000, segments="one", legacy=True).shape == (1, 1, 4)
    with pytest.raises(ValueError, match="a clip of 399 samples gives no segment"):
        probe.extract(Averages(), lambda ids: sawtooth(ids)[:, :399], [0], sample_rate=8000, segments="one")
    with pytest.raises(ValueError, match="got segments='some', wanted 'all' or 'one'"): probe.extract(Averages(), sawtooth, [0], sample_rate=8000, segments="some")


def test_extract_takes_the_rate_from_a_bound_method():
    class Corpus:
        sample_rate = 16000
        def wave(self, ids): return torch.zeros(len(ids), 400)

    with pytest.raises(ValueError, match="16000 Hz.*8000 Hz"):
        probe.extract(Averages(), Corpus().wave, [0])
    with pytest.raises(ValueError, match="sample rate of the audio is not known"):
        probe.extract(Averages(), lambda ids: torch.zeros(len(ids), 400), [0])


def test_probe_is_a_function_of_its_seed_and_leaves_the_global_generator():
    labels, _ = made_up(60, 3, seed=8)
    features = labels @ np.random.default_rng(0).normal(size=(3, 6)) + np.random.default_rng(1).normal(size=(60, 6))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second, other = (probe.fit_probe(features[:, None], labels, (features[:, None], labels), "mlp", seed=s, epochs=3) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))


def test_probe_scale_of_features_does_not_matter():
    labels, _ = made_up(200, 3, seed=8)
    features = labels @ np.random.default_rng(0).normal(size=(3, 6)) + np.random.default_rng(1).normal(size=(200, 6))
    big = features * np.logspace(-3, 3, 6) + 100.
    fits = [probe.fit_probe(x[:, None], labels, (x[:, None], labels), epochs=20).scores(x[:, None]) for x in (features, big)]
    np.testing.assert_allclose(*fits, atol=.02)


def test_best_epoch_is_kept():
    labels, _ = made_up(40, 3, seed=9)
    rng = np.random.default_rng(0)
    train, valid = rng.normal(size=(40, 1, 50)), rng.normal(size=(40, 1, 50))
    fitted = probe.fit_probe(train, labels, (valid, labels[::-1].copy()), lr=.05)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(fitted(torch.tensor(valid[:, 0]).float()), torch.tensor(labels[::-1].copy()).float())
    best = min(row["valid"] for row in fitted.history)
    assert loss.item() == pytest.approx(best, abs=1e-5) and fitted.history[-1]["valid"] > best
    assert len(fitted.history) == [row["valid"] for row in fitted.history].index(best) + 11


def test_logistic_recovers_the_map_it_was_drawn_from():
    rng = np.random.default_rng(0)
    true, x = rng.normal(size=(8, 3)), rng.normal(size=(4000, 8))
    labels = (rng.random((4000, 3)) < 1 / (1 + np.exp(-x @ true))).astype(int)
    fitted = probe.fit_logistic(x[:3000], labels[:3000], (x[3000:], labels[3000:]), C=(1e-4, 1.))
    best = probe.tagging_scores(labels[3000:], x[3000:] @ true)["pr_auc"]
    assert fitted.C == 1. and probe.tagging_scores(labels[3000:], fitted.scores(x[3000:]))["pr_auc"] > best - .01


def test_bootstrap_is_much_faster_than_a_loop_over_scikit_learn():
    labels, scores = made_up(1500, 10, seed=10)
    start = perf_counter()
    probe.bootstrap(labels, scores, resamples=100)
    ours, start = perf_counter() - start, perf_counter()
    for seed in range(10):
        rows = np.random.default_rng(seed).integers(0, 1500, 1500)
        macro("pr_auc", labels[rows], scores[rows])
    assert ours < (perf_counter() - start) * 10 / 3


@pytest.mark.parametrize("seed", [0, 1])
def test_one_percent_of_segments_as_the_code_draws_them(seed):
    """Slow rule: within each combination of tags, its rounded share and at least one; so the nominal 1 % is more."""
    labels, segments = (np.random.default_rng(seed).random((90, 5)) < .3).astype(int), 4
    combination = [tuple(row) for row in labels.repeat(segments, 0)]
    for fraction in (.01, .2, .5, 1.):
        drawn = probe.segment_subset(labels, segments, fraction, seed)
        found = {key: sum(combination[i] == key for i in drawn) for key in set(combination)}
        assert found == {key: max(1, int(fraction * combination.count(key) + .5)) for key in found}
        assert (np.diff(drawn) > 0).all()
    assert len(probe.segment_subset(labels, segments, .01)) == len(set(combination)) > .01 * len(combination)
    assert (probe.segment_subset(labels, segments, .2, 5) != probe.segment_subset(labels, segments, .2, 6)).any()
    with pytest.raises(ValueError, match="wanted 0 < fraction"): probe.segment_subset(labels, segments, 0.)
