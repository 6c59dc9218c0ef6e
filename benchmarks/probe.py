"""Is reading out an encoder quicker than one tag at a time? Probe, scores and intervals, against what scikit-learn does.

    python benchmarks/probe.py [--quick] [--json] [--only P18 P19]

P18  logistic regression of 50 tags, on one core, against one-vs-rest L-BFGS: on features mixed at random and on features whose variance falls
     off as a network's does; without a target on white ones, the easiest that L-BFGS can meet, and with the penalty chosen among four
P19  macro ROC-AUC and average precision of 50 tags, on one core, against scikit-learn's functions; and their intervals from 1,000 resamples,
     against a loop over them

Nothing is timed before the candidates agree. P18: no tag's objective is above scikit-learn's at its default tolerance (by 1e-7, the
rounding of single precision), nor 1e-4 above the minimum, which Newton's method finds in double precision. It starts from our answer: the problem
is convex, so that the start decides only how long it takes. P19: scores and resampled scores are equal to 1e-12, with many ties. The loop over
resamples is timed on some of them, as its row says, and multiplied.
"""
import argparse
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.multiclass import OneVsRestClassifier
from threadpoolctl import threadpool_limits

from musicssl.probe.intervals import bootstrap, resample_weights
from musicssl.probe.logistic import all_tags, fit_logistic, fit_multi_logistic
from musicssl.probe.metrics import tagging_scores
from paired import Disagreement, Row, as_json, header, paired, row, table

SCORES = {"roc_auc": roc_auc_score, "pr_auc": average_precision_score}


@dataclass(frozen=True)
class Size:
    """How much is measured."""
    rounds: int | None # None: as many as the rules ask for
    probe: tuple[int, int, int] # clips, features and tags of P18
    grid: tuple[int, int, int] # the same where the penalty is chosen, a third of the clips for validation
    scored: tuple[int, int] # clips and tags of P19
    resamples: int # of ours
    loop: int # of scikit-learn's


SIZES = {"full": Size(None, (10_000, 512, 50), (4500, 512, 50), (3000, 50), 1000, 100),
         "quick": Size(3, (3000, 256, 50), (1500, 256, 20), (3000, 50), 1000, 10),
         "test": Size(1, (300, 20, 4), (300, 20, 4), (300, 4), 20, 4)}


# P18: the probe

def tagged(clips: int, n: int, tags: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Features (R, D), standardised, and tags (R, C) drawn from a logistic model of them, rare ones among them."""
    rng = np.random.default_rng(0)
    x, mixing = rng.standard_normal((clips, n)), rng.standard_normal((n, n))
    if kind == "mixed": x = x @ (np.eye(n) + 1.1 * mixing / n ** .5)
    if kind == "falling variance": x = x / np.arange(1, n + 1) ** .7 @ np.linalg.qr(mixing)[0]
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    logits = x @ rng.standard_normal((n, tags)) / (2 * n ** .5) + np.linspace(-3.5, 0., tags)
    return x, (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.int64)


Weights = tuple[np.ndarray, np.ndarray] # (D, C) and (C,), float64


def ours(x: np.ndarray, y: np.ndarray) -> Weights:
    tags, = all_tags(x, y)
    return tags.weight.T.double().numpy(), tags.bias.double().numpy()


def one_vs_rest(x: np.ndarray, y: np.ndarray) -> Weights:
    found = OneVsRestClassifier(LogisticRegression(max_iter=1000)).fit(x, y).estimators_
    return np.stack([tag.coef_[0] for tag in found], 1).astype(np.float64), np.array([tag.intercept_[0] for tag in found], np.float64)


def objectives(x: np.ndarray, y: np.ndarray, weights: Weights) -> np.ndarray:
    """(C,) in double precision, at C = 1, the default of both."""
    w, b = weights
    z = x.astype(np.float64) @ w + b
    return (w ** 2).sum(0) / 2 + (np.logaddexp(0, z) - y * z).sum(0)


def newton(x: np.ndarray, y: np.ndarray, weights: Weights) -> Weights:
    """The minimum, tag by tag, in double precision: whole steps until a step promises less than 1e-10 of the objective."""
    X, R = np.column_stack([x.astype(np.float64), np.ones(len(x))]), np.diag(np.append(np.ones(x.shape[1]), 0.))
    found = np.vstack(weights)
    for tag, w in enumerate(found.T):
        for _ in range(50):
            p = 1 / (1 + np.exp(-X @ w))
            g = R @ w + X.T @ (p - y[:, tag])
            step = np.linalg.solve(R + (X * (p * (1 - p))[:, None]).T @ X, g)
            if g @ step < 1e-10 * len(x): break
            w -= step
        else: raise Disagreement(f"tag {tag}: Newton's method finds no minimum from here")
    return found[:-1], found[-1]


def agree(what: str, found: np.ndarray, theirs: np.ndarray, minimum: np.ndarray) -> str:
    """Objectives tag by tag (C,): not above theirs but for rounding, at most 1e-4 above the minimum. Returns by how much, for the table."""
    over, above = (found - theirs) / theirs, (found - minimum) / minimum
    if not over.max() <= 1e-7: raise Disagreement(f"{what}: the objective of tag {over.argmax()} is {over.max():.1e} above scikit-learn's")
    if not above.max() <= 1e-4: raise Disagreement(f"{what}: the objective of tag {above.argmax()} is {above.max():.1e} above Newton's, wanted 1e-4")
    return f"agreed: worst tag {over.max():+.0e} of theirs, {above.max():+.0e} of Newton's"


def probes(size: Size) -> list[Row]:
    """P18."""
    rows = []
    for name, least in (("mixed", 4.), ("falling variance", 4.), ("white", None)):
        x, y = tagged(*size.probe, name)
        found = ours(x, y)
        agreed = agree(name, *(objectives(x, y, weights) for weights in (found, one_vs_rest(x, y), newton(x, y, found))))
        times = paired({"theirs": lambda: one_vs_rest(x, y), "ours": lambda: ours(x, y)}, size.rounds)
        rows.append(row("P18", f"{' x '.join(f'{n:,}' for n in size.probe)}, {name}: one-vs-rest L-BFGS : ours", times["theirs"], times["ours"],
                        at_least=least, note=f"{median(times['theirs']):.2f} and {median(times['ours']):.2f} s; {agreed}"))
    return [*rows, chosen(size)]


def chosen(size: Size) -> Row:
    """The penalty chosen among four: the same one, and the same scores to a thousandth."""
    x, y = tagged(*size.grid, "falling variance")
    third = len(x) // 3
    works = {name: lambda fit=fit: fit(x[third:], y[third:], (x[:third], y[:third])) for name, fit in
             (("theirs", fit_logistic), ("ours", fit_multi_logistic))}
    a, b = (tagging_scores(y[:third], fitted.scores(x[:third]))["pr_auc"] for fitted in (work() for work in works.values()))
    if not abs(a - b) <= 1e-3: raise Disagreement(f"the penalty chosen: PR-AUC {b:.4f}, scikit-learn's {a:.4f}")
    times = paired(works, size.rounds)
    return row("P18", f"{' x '.join(f'{n:,}' for n in size.grid)}, four penalties: scikit-learn : ours", times["theirs"], times["ours"],
               note=f"{median(times['theirs']):.2f} and {median(times['ours']):.2f} s; agreed: PR-AUC {a:.4f} and {b:.4f}")


# P19: scores and intervals

def scored(clips: int, tags: int) -> tuple[np.ndarray, np.ndarray]:
    """Tags (n, C), the rarest on a few clips in a hundred, and scores with a few hundred different values."""
    rng = np.random.default_rng(1)
    y = (rng.random((clips, tags)) < np.linspace(.05, .4, tags)).astype(np.int64)
    return y, (y + 1.5 * rng.standard_normal(y.shape)).round(2)


def both(y: np.ndarray, s: np.ndarray) -> tuple[float, float]:
    return tuple(score(y, s, average="macro") for score in SCORES.values())


def loop(y: np.ndarray, s: np.ndarray, metric: str, weights: np.ndarray) -> list[float]:
    """Resample by resample: the clips drawn, in full, and scikit-learn's score of them."""
    drawn = [np.repeat(np.arange(len(y)), column) for column in weights.T.astype(int)]
    return [SCORES[metric](y[clips], s[clips], average="macro") for clips in drawn]


def equal(what: str, found: np.ndarray, expected: np.ndarray) -> None:
    off = np.abs(np.asarray(found) - expected).max()
    if not off <= 1e-12: raise Disagreement(f"{what}: {off:.1e} away from scikit-learn's, wanted at most 1e-12")


def timed(works: dict[str, Callable], size: Size, times: float = 1.) -> tuple[list[float], list[float], str]:
    """Seconds of theirs, times as many, and of ours."""
    taken = paired(works, size.rounds)
    theirs = [times * t for t in taken["theirs"]]
    return theirs, taken["ours"], f"{median(theirs):.3g} and {median(taken['ours']):.3g} s; agreed to 1e-12"


def metrics(size: Size) -> list[Row]:
    """P19."""
    y, s = scored(*size.scored)
    found, shape = tagging_scores(y, s), " x ".join(f"{n:,}" for n in size.scored)
    equal("scores", [found[metric] for metric in SCORES], both(y, s))
    theirs, ours, note = timed({"theirs": lambda: both(y, s), "ours": lambda: tagging_scores(y, s)}, size)
    rows, share = [row("P19", f"{shape}, both scores: scikit-learn : ours", theirs, ours, at_least=5., note=note)], size.resamples / size.loop
    few = resample_weights(len(y), 1, None, size.resamples, 0)[0][:, :size.loop]
    for metric in SCORES:
        works = {"theirs": lambda: loop(y, s, metric, few), "ours": lambda: bootstrap(y, s, metric, size.resamples)}
        equal(f"{metric}, resampled", works["ours"]().draws[:size.loop], works["theirs"]())
        theirs, ours, note = timed(works, size, share)
        what = f"{metric}, {size.resamples:,} resamples: ours : loop of {size.loop}, times {share:g}"
        rows.append(row("P19", what, ours, theirs, at_most=.2, note=note))
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="full", help="within a minute")
    parser.add_argument("--size", choices=SIZES, help="test: to see that everything runs")
    parser.add_argument("--json", action="store_true", help="one object by target instead of the table")
    parser.add_argument("--only", nargs="+", choices=("P18", "P19"), default=("P18", "P19"), help="default: both")
    given = parser.parse_args(arguments)
    size, rows = SIZES[given.size], []
    torch.set_num_threads(1)
    with threadpool_limits(1):
        if "P18" in given.only: rows += probes(size)
        if "P19" in given.only: rows += metrics(size)
    if given.json: print(as_json(rows))
    else: print(header("scikit-learn"), table(rows), sep="\n")


if __name__ == "__main__": main()
