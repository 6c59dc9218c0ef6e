"""All tags at once: the same minimum as Newton's method and never a worse one than scikit-learn's; what is promised about the rest is true."""
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from musicssl.probe import logistic
from musicssl.probe.logistic import all_tags, fit_logistic, fit_multi_logistic
from musicssl.probe.metrics import tagging_scores


def tagged(clips=400, n=20, tags=5, kind="falling", rarest=-3.5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((clips, n))
    if kind == "falling": x = x / np.arange(1, n + 1) @ np.linalg.qr(rng.standard_normal((n, n)))[0]
    if kind == "shifted": x = 3 + x * np.linspace(.1, 5, n)
    if kind == "sparse": x = rng.random((clips, n)) < .01
    z = x @ rng.standard_normal((n, tags)) / n ** .5 + np.linspace(rarest, 0, tags)
    y = (x[:, :tags] > 0) & (rng.random((clips, tags)) < .7) if kind == "sparse" else rng.random(z.shape) < 1 / (1 + np.exp(-z))
    return x.astype(np.float32), y.astype(np.int64)


def objective(x, y, C, weight, bias):
    w, b = np.asarray(weight, np.float64), np.asarray(bias, np.float64)
    z = x.astype(np.float64) @ w.T + b
    return (w ** 2).sum(1) / 2 + C * (np.logaddexp(0, z) - y * z).sum(0)


def newton(x, y, C):
    """The minimum (C,), by halved Newton steps in double precision, from nothing."""
    X, R = np.column_stack([x.astype(np.float64), np.ones(len(x))]), np.diag(np.append(np.ones(x.shape[1]), 0.))
    least = []
    for tag in y.T:
        w = np.zeros(len(R))
        at = lambda w: w @ R @ w / 2 + C * (np.logaddexp(0, X @ w) - tag * (X @ w)).sum()
        for _ in range(100):
            p = 1 / (1 + np.exp(-X @ w))
            g = R @ w + C * X.T @ (p - tag)
            step = np.linalg.solve(R + C * (X * (p * (1 - p))[:, None]).T @ X, g)
            if g @ step < 1e-12: break
            while at(w - step) > at(w) - 1e-4 * g @ step and np.abs(step).max() > 1e-12: step = step / 2
            w = w - step
        least.append(at(w))
    return np.array(least)


CASES = [(kind, C, shape) for kind in ("white", "falling", "shifted", "sparse") for C in (.01, 1., 30.) for shape in ((400, 20), (30, 40))
         if (kind, shape) != ("sparse", (30, 40))]


@pytest.mark.parametrize("kind, C, shape", CASES)
def test_the_minimum(kind, C, shape):
    """More features than clips, rare tags, other scales and penalties: near Newton's minimum, not above scikit-learn's, promises kept."""
    x, y = tagged(*shape, kind=kind)
    y[:2], y[2:4] = 0, 1
    found, = all_tags(x, y, (C,))
    values, least = objective(x, y, C, found.weight, found.bias), newton(x, y, C)
    theirs = [LogisticRegression(C=C, max_iter=5000).fit(x, tag) for tag in y.T]
    assert ((values - least) / values <= found.gap.numpy() + 1e-6).all() and found.gap.max() <= 1e-7
    assert (values <= (1 + 2e-7) * objective(x, y, C, [t.coef_[0] for t in theirs], [t.intercept_[0] for t in theirs])).all()


def test_in_double_precision_as_near_as_asked():
    x, y = tagged()
    found, = all_tags(x.astype(np.float64), y, tolerance=1e-12)
    least = newton(x, y, 1.)
    assert found.weight.dtype == torch.float64 and (np.abs(objective(x, y, 1., found.weight, found.bias) - least) / least < 2e-12).all()


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8, 12])
def test_who_stops_early_says_how_far_it_is(most):
    x, y = tagged(kind="shifted")
    x = x.astype(np.float64)
    with pytest.warns(UserWarning, match=f"after {most} gradients still up to"): found, = all_tags(x, y, tolerance=1e-9, most=most)
    values = objective(x, y, 1., found.weight, found.bias)
    above = (values - newton(x, y, 1.)) / values
    assert found.steps == most and (above <= found.gap.numpy()).all() and above.max() > 1e-7


def test_a_loose_tolerance_would_be_seen():
    """The mutation: the promise is not waited for. The objective is then above scikit-learn's."""
    x, y = tagged()
    theirs = [LogisticRegression(max_iter=5000).fit(x, tag) for tag in y.T]
    theirs = objective(x, y, 1., [t.coef_[0] for t in theirs], [t.intercept_[0] for t in theirs])
    above = lambda tolerance: (objective(x, y, 1., *[(f.weight, f.bias) for f in all_tags(x, y, tolerance=tolerance)][0]) > theirs).any()
    assert above(.3) and not above(1e-7)


def never_rises(x, y, C):
    """Objectives after 1, 2, ... steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [all_tags(x.astype(np.float64), y, (C,), 1e-12, most)[0] for most in range(1, 25)]
    values = np.array([objective(x, y, C, f.weight, f.bias) for f in found])
    return (np.diff(values, axis=0) <= 2e-6 * values[:-1]).all()


def test_a_step_that_rises_is_taken_back(monkeypatch):
    """The mutation: objectives that never rise as far as the descent can see. Steps of a tag with few clips in doubt then lead up."""
    x, y = tagged(5000, 60, 5, "sparse")
    assert never_rises(x, y, 100.)
    at, state = logistic._at, {}
    def blind(u, w, C):
        wrong, value = at(u, w, C)
        state["least"] = torch.minimum(value, state["least"]) if len(value) == len(state.get("least", [])) else value
        return wrong, state["least"]
    def fresh(*given, right=logistic._descend):
        state.clear()
        return right(*given)
    monkeypatch.setattr(logistic, "_at", blind)
    monkeypatch.setattr(logistic, "_descend", fresh)
    assert not never_rises(x, y, 100.)


def test_what_can_be_done_by_hand():
    """Features that say nothing leave the rate; two clips at +1 and -1 leave w = 2 C p, p the probability of the wrong answer."""
    flat, = all_tags(np.zeros((10, 3)), np.arange(10)[:, None] < 2)
    assert (flat.weight == 0).all() and float(flat.bias[0].sigmoid()) == pytest.approx(.2)
    pair, = all_tags(np.array([[1.], [-1.]]), np.array([[1], [0]]), (5.,), 1e-14)
    w = float(pair.weight[0, 0])
    assert w == pytest.approx(10 / (1 + np.exp(w)), rel=1e-6) and abs(float(pair.bias[0])) < 1e-9


def test_tags_do_not_know_each_other():
    x, y = tagged(kind="white")
    together, = all_tags(x.astype(np.float64), y, tolerance=1e-10)
    alone = [all_tags(x.astype(np.float64), y[:, [tag]], tolerance=1e-10)[0] for tag in range(5)]
    turned, = all_tags(x.astype(np.float64), y[:, ::-1].copy(), tolerance=1e-10)
    for other in (torch.cat([one.weight for one in alone]), turned.weight.flip(0)):
        torch.testing.assert_close(together.weight, other, rtol=0, atol=1e-3)


def test_a_penalty_does_not_know_the_grid():
    x, y = tagged()
    grid, alone = all_tags(x, y, (.01, 1., .1)), [all_tags(x, y, (C,))[0] for C in (.01, 1., .1)]
    assert [f.C for f in grid] == [.01, 1., .1] and all(torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias) for a, b in zip(grid, alone))


def test_tags_of_one_class():
    x, y = tagged()
    y[:, 1], y[:, 3] = 0, 1
    probe = fit_multi_logistic(x, y, C=1.)
    scores = probe.scores(x)
    assert (scores[:, 1] == 0).all() and (scores[:, 3] == 1).all() and probe.tags.gap[[1, 3]].eq(0).all()
    np.testing.assert_array_equal(scores[:, 0], fit_multi_logistic(x, y[:, [0, 2, 4]], C=1.).scores(x)[:, 0])
    nothing = fit_multi_logistic(x, y[:, [1, 3]], C=1.).scores(x)
    assert nothing.tolist() == [[0., 1.]] * len(x)


@pytest.mark.parametrize("change, words", [
    (lambda x, y: (x[1:], y, (1.,)), r"\(399, 20\) and labels \(400, 5\)"), (lambda x, y: (x, y[:, 0], (1.,)), r"wanted \(R, D\) and \(R, C\)"),
    (lambda x, y: (x[:0], y[:0], (1.,)), "wanted"), (lambda x, y: (x, y * .5, (1.,)), "other than 0 and 1"),
    (lambda x, y: (x, y, (1., -1.)), "wanted values above 0"), (lambda x, y: (np.where(x > 1, np.nan, x), y, (1.,)), "features are not finite")])
def test_refusals(change, words):
    with pytest.raises(ValueError, match=words): all_tags(*change(*tagged()))


def test_as_scikit_learn_with_windows_and_chosen_penalty():
    x, y = tagged(900, 12, 4, "shifted", -2.)
    windows = np.stack([x, x + .1 * np.random.default_rng(1).standard_normal(x.shape)], 1).astype(np.float32)
    train, valid, test = ((windows[part], y[part]) for part in (slice(400), slice(400, 600), slice(600, None)))
    one_by_one, together = fit_logistic(*train, valid), fit_multi_logistic(*train, valid)
    assert together.C == one_by_one.C and together.scores(test[0]).shape == (300, 4)
    np.testing.assert_allclose(together.scores(test[0]), one_by_one.scores(test[0]), atol=2e-3)
    assert fit_multi_logistic(*train, C=.1).C == .1
    with pytest.raises(ValueError, match="4 values of C and no validation clips"): fit_multi_logistic(*train)


def test_the_floor_is_scikit_learn_s_to_the_bit():
    x, y = tagged()
    scaler = StandardScaler().fit(x)
    same = scaler.transform(x)
    direct = [LogisticRegression(C=.1, max_iter=500).fit(same, tag).predict_proba(same)[:, 1] for tag in y.T.astype(np.float32)]
    np.testing.assert_array_equal(fit_logistic(x, y, C=.1).scores(x), np.stack(direct, 1))


def test_shuffled_labels_are_chance_and_separable_ones_are_perfect():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3000, 10)).astype(np.float32)
    clear = (x[:, :4] > 0).astype(np.int64)
    fitted = lambda y: tagging_scores(y[2000:], fit_multi_logistic(x[:2000], y[:2000], C=1000.).scores(x[2000:]))["roc_auc"]
    assert fitted(clear) > .999 and abs(fitted(rng.permutation(clear)) - .5) < .03
