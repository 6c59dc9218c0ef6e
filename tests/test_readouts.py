"""Read-outs: each protocol is its source's, a mixture is what it claims to be, validation decides, and nothing is found where nothing is."""
import csv
import inspect
from dataclasses import asdict, fields, replace
from time import process_time

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import nn

from musicssl import settings
from musicssl.probe import readouts
from musicssl.probe.frozen import Features
from musicssl.probe.metrics import KINDS, score
from musicssl.probe.readouts import (ENSEMBLES, PROTOCOLS, RULES, Mixture, ReadOut, aggregate, fit_probe, fit_readout, knn, pool_segments,
                                     protocol_grid, search)


QUICK = ReadOut("mlp", 2, hidden=32, lr=1e-2, batch=64, epochs=40, patience=8, plateau=3)


def of(layers, track, ids, clip=None):
    layers = np.asarray(layers, np.float32)
    return Features(layers, np.asarray(layers[:, -1] if clip is None else clip, np.float32), np.asarray(track), np.asarray(ids), {})


def crowd(n, seed, noise=.02, dim=8, n_layers=4):
    """Tracks of one to three windows around one of four corners; layer 2 shows the corner, the others noise. Labels of every kind."""
    rng = np.random.default_rng(seed)
    corner, track = rng.permutation(np.arange(n) % 4), np.repeat(np.arange(n), rng.integers(1, 4, n))
    layers = rng.normal(size=(len(track), n_layers, dim))
    layers[:, 2] = 3 * np.eye(4, dim)[corner[track]] + noise * rng.normal(size=(len(track), dim))
    bits = np.stack([corner % 2, corner // 2], 1)
    labels = {"tags": bits, "class": corner, "key": corner * 5, "number": 2. * bits - 1, "tempo": np.array([60., 84., 118., 165.])[corner]}
    return of(layers, track, 1000 * seed + np.arange(n)), labels

TRAIN, VALID, TEST = crowd(120, 1), crowd(48, 2), crowd(60, 3)


def fitted(kind, how=QUICK, train=TRAIN, valid=VALID, **more):
    return fit_readout(train[0], train[1][kind], valid[0], valid[1][kind], kind, how, **more)


# Protocols ---------------------------------------------------------------------------------------------------------------------------------------


def published():
    with open(settings.root() / "data" / "reported" / "probe_protocols.csv", encoding="utf8", newline="") as file: return list(csv.DictReader(file))


def same(theirs, ours):
    """A value of the table and one of ours: "a..b" is a range, "a|b" a choice."""
    if "|" in theirs: return any(same(part, ours) for part in theirs.split("|"))
    if isinstance(ours, (bool, str)): return theirs == str(ours)
    if ".." in theirs: return float(theirs.split("..")[0]) <= ours <= float(theirs.split("..")[1])
    return float(theirs) == ours


def setting(how, name):
    """A field; `monitor.tags` and `aggregate.key` as they come out for that kind; the size of the grid."""
    first, _, rest = name.partition(".")
    if first == "settings": return len(protocol_grid(how.protocol, int(rest.split("_")[0])))
    return {"monitor": how.watched, "aggregate": how.rule}[first](rest) if rest else getattr(how, name)


@pytest.mark.parametrize("row", published(), ids=lambda row: f"{row['protocol']}-{row['field']}")
def test_field_is_the_protocols(row):
    how = PROTOCOLS[row["protocol"]]
    assert not row["value"] or same(row["value"], setting(how, row["field"])), f"{row} against {setting(how, row['field'])}"
    assert row["mark"] in {"P", "R", "C1", "C2", "U"} and (row["verified"] == "yes") == bool(row["source"]) == (row["mark"] != "U")
    assert row["value"] or row["note"] or row["mark"] == "U"


def test_the_table_is_complete():
    plain = {f.name for f in fields(ReadOut)} - {"monitor", "aggregate", "protocol"}
    wanted = plain | {f"{part}.{kind}" for part in ("monitor", "aggregate") for kind in ("tags", "class", "key", "number")}
    for name in PROTOCOLS:
        rows = [row["field"] for row in published() if row["protocol"] == name]
        assert len(rows) == len(set(rows)) and set(rows) - {"settings.13_layers", "settings.25_layers"} == wanted, name


def test_the_comparison_notices_a_changed_field():
    """Mutation: every stated field of every protocol, changed, disagrees with its row."""
    stated = [row for row in published() if row["value"] and not row["field"].startswith("settings")]
    for row in stated:
        ours = setting(PROTOCOLS[row["protocol"]], row["field"])
        other = not ours if isinstance(ours, bool) else ours + 1000 if isinstance(ours, (int, float)) else f"{ours}x"
        assert not same(row["value"], other) or row["value"] == "True|False", row
    assert len(stated) > 80


def test_the_grids_are_the_protocols():
    layers = {how.layer for how in protocol_grid("marble-v1", 13)}
    assert layers == {"mix", *range(13)} and {how.layer for how in protocol_grid("marble-v1", 1)} == {0}
    for name in PROTOCOLS:
        grid = protocol_grid(name, 13)
        assert len({str(how) for how in grid}) == len(grid) and {how.protocol for how in grid} == {name}


@pytest.mark.parametrize("name, kind", [(name, kind) for name in PROTOCOLS for kind in RULES if name != "clmr" or kind == "tags"])
def test_every_protocol_fits_every_kind(name, kind):
    how = replace(PROTOCOLS[name], hidden=32, lr=1e-2, epochs=60, patience=20, dropout=.1)
    if how.layer == "clip": how = replace(how, layer=2)
    fit = fitted(kind, how)
    assert fit.rule in RULES[kind] and score(KINDS[kind][0], TEST[1][kind], fit.answer(TEST[0])) > .7


# The mixture -------------------------------------------------------------------------------------------------------------------------------------


class OneHot(Mixture):
    def __init__(self, n_layers):
        super().__init__(n_layers)
        with torch.no_grad(): self.logits[:] = torch.where(torch.arange(1, n_layers) == 2, 0., -1e4)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_one_hot_mixture_is_the_single_layer(monkeypatch, kind, head):
    """From the first weight to the last answer, bit for bit: one start, one order, one dropout."""
    monkeypatch.setattr(readouts, "Mixture", OneHot)
    single, mixed = (fitted(kind, replace(QUICK, head=head, layer=layer, epochs=5)) for layer in (2, "mix"))
    assert [row["loss"] for row in single.history] == [row["loss"] for row in mixed.history]
    np.testing.assert_array_equal(single.answer(TEST[0]), mixed.answer(TEST[0]))
    np.testing.assert_array_equal(mixed.layer_weights, [0, 0, 1, 0])
    assert single.layer_weights is None


def deaf_to(layer, how):
    """Does the answer stay when one layer is replaced by noise?"""
    features, fit = TEST[0], fitted("number", replace(how, epochs=2))
    other = features.layers.copy()
    other[:, layer] = np.random.default_rng(0).normal(size=other[:, layer].shape)
    return np.array_equal(fit.answer(features), fit.answer(of(other, features.track, features.ids, features.clip)))


def test_layer_0_is_left_out_by_v1_and_read_by_v2():
    assert [deaf_to(layer, replace(QUICK, layer="mix")) for layer in range(4)] == [True, False, False, False]
    assert [deaf_to(layer, replace(QUICK, layer="flat")) for layer in range(4)] == [False] * 4
    assert [deaf_to(layer, QUICK) for layer in range(4)] == [True, True, False, True]


def test_leaving_layer_0_in_is_noticed(monkeypatch):
    """Mutation: a mixture over all layers hears layer 0."""
    class Whole(Mixture):
        def __init__(self, n_layers): super().__init__(n_layers + 1)
        def forward(self, layers): return torch.einsum("l,bl...->b...", self.logits.softmax(0), layers)
    monkeypatch.setattr(readouts, "Mixture", Whole)
    assert not deaf_to(0, replace(QUICK, layer="mix"))


def test_the_mixture_starts_at_random_and_takes_any_shape():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        starts = torch.cat([Mixture(13).logits for _ in range(400)])
        mixture, layers = Mixture(3), torch.randn(2, 3, 5, 4)
    assert abs(starts.mean()) < .05 and abs(starts.std() - 1) < .05           # N(0, 1), 4,800 draws
    torch.testing.assert_close(mixture(layers), sum(w * layers[:, l] for l, w in enumerate(mixture.weights)))
    assert mixture.weights[0] == 0 and abs(mixture.weights.sum() - 1) < 1e-6


# From windows to tracks --------------------------------------------------------------------------------------------------------------------------


def sigmoid(x): return 1 / (1 + np.exp(-x))


def softmax(x): return np.exp(x) / np.exp(x).sum(1, keepdims=True)


def by_loop(a, track, n, kind, rule):
    """Another implementation, track by track."""
    each = {"probability": sigmoid if kind == "tags" else softmax, "log_probability": lambda x: np.log(softmax(x)),
            "vote": lambda x: np.eye(x.shape[1])[x.argmax(1)]}.get(rule, lambda x: x)
    return np.stack([each(a[track == i]).max(0) if rule == "max_logit" else each(a[track == i]).mean(0) for i in range(n)])


EVERY_RULE = pytest.mark.parametrize("kind, rule", [(kind, rule) for kind in RULES for rule in RULES[kind]])


@EVERY_RULE
def test_aggregation_equals_a_loop(kind, rule):
    rng = np.random.default_rng(0)
    track = rng.permutation(np.repeat(np.arange(9), rng.integers(1, 6, 9)))
    a = rng.normal(size=(len(track), 4))
    np.testing.assert_allclose(aggregate(a, track, 9, kind, rule), by_loop(a, track, 9, kind, rule), rtol=0, atol=1e-12)


@EVERY_RULE
def test_identical_windows_count_once(kind, rule):
    one = np.random.default_rng(1).normal(size=(1, 5))
    np.testing.assert_allclose(aggregate(one.repeat(7, 0), np.zeros(7, int), 1, kind, rule), aggregate(one, [0], 1, kind, rule), rtol=0, atol=1e-12)


def test_identical_windows_count_once_for_a_fitted_probe():
    first = np.flatnonzero(np.diff(TEST[0].track, prepend=-1))
    once = of(TEST[0].layers[first], np.arange(60), TEST[0].ids)
    often = of(TEST[0].layers[first.repeat(4)], np.arange(60).repeat(4), TEST[0].ids)
    for kind in RULES:
        fit = fitted(kind, replace(QUICK, epochs=3))
        np.testing.assert_allclose(fit.answer(once), fit.answer(often), rtol=1e-5, atol=1e-5)


def test_the_order_of_mean_and_sigmoid_matters():
    """CLMR and MuLaP: the mean of sigmoids. The sigmoid of the mean is another number, and ranks two tracks the other way."""
    logits, track = np.array([[6.], [-2], [-2], [.2], [.2], [.2]]), np.repeat([0, 1], 3)
    mean_of_sigmoids, mean_of_logits = (aggregate(logits, track, 2, "tags", rule)[:, 0] for rule in ("probability", "logit"))
    assert not np.allclose(mean_of_sigmoids, sigmoid(mean_of_logits), atol=.1)
    assert mean_of_sigmoids.argmax() == 1 and mean_of_logits.argmax() == 0
    np.testing.assert_allclose(mean_of_sigmoids, pool_segments(logits.reshape(2, 3, 1))[:, 0], rtol=0, atol=1e-12)


def test_softmax_over_tags_changes_the_macro_score():
    """The defect before July 2021: tags that come together take probability from each other."""
    rng = np.random.default_rng(0)
    labels = (rng.random((200, 6)) < .3).astype(int)
    labels[:, 1] |= labels[:, 0]
    logits = 3 * labels[:, None] + rng.normal(size=(200, 4, 6)) - 1
    macro = {rule: np.mean([average_precision_score(labels[:, c], pool_segments(logits, rule)[:, c]) for c in range(6)])
             for rule in ("probability", "softmax")}
    assert macro["probability"] > macro["softmax"] + .02
    assert score("pr_auc", labels, pool_segments(logits)) == pytest.approx(macro["probability"], abs=1e-12)


DIVIDED = np.array([[6., 5, -3, -1], [4, 4, 3, 5], [4, 0, 5, 6], [2, 5, -3, -2], [6, 6, 7, 4]])   # five windows on which no two ensembles agree


def test_the_four_ensembles_can_all_disagree():
    said = {rule: aggregate(DIVIDED, np.zeros(5, int), 1, "key", rule)[0].argmax() for rule in ENSEMBLES}
    assert said == {"vote": 3, "max_logit": 2, "logit": 0, "probability": 1}


class Says(nn.Module):
    """A model that answers with what it is given."""
    unit, zero = torch.ones(24), torch.zeros(24)

    def read(self, x): return x


@pytest.mark.parametrize("truth, chosen", [(3, "vote"), (2, "max_logit"), (0, "logit"), (1, "probability")])
def test_validation_chooses_the_ensemble(truth, chosen):
    """The truth decides which of four ensembles is right."""
    windows = np.full((5, 24), -50.)
    windows[:, :4] = DIVIDED
    fit = readouts.Fitted(PROTOCOLS["marble-v1"], "key", Says(), "key_score")
    track = of(windows[:, None], np.zeros(5, int), [0])
    row = readouts._look(fit, torch.from_numpy(windows).float(), torch.full((5,), truth), track, np.array([truth]))
    assert (row["rule"], row["valid"], row["cost"]) == (chosen, 1., -1.)


def test_every_window_is_an_example_with_its_tracks_label():
    """A loop over windows, written here, gives the first loss."""
    fit = fitted("class", replace(QUICK, head="linear", epochs=1, batch=10_000, standardise=False))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = nn.Linear(8, 4)
    logits, label = first(torch.from_numpy(TRAIN[0].layers[:, 2])), TRAIN[1]["class"][TRAIN[0].track]
    assert fit.history[0]["loss"] == pytest.approx(np.mean([-row.log_softmax(0)[y].item() for row, y in zip(logits, label)]), abs=1e-5)


# Learning, and not learning ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [2, "mix", "flat"])
@pytest.mark.parametrize("kind", RULES)
def test_separable_features_reach_100_per_cent(kind, layer):
    fit = fitted(kind, replace(QUICK, layer=layer, epochs=200, patience=40, plateau=10, dropout=0., monitor={"tempo": "tempo_error"}))
    reached = score(KINDS[kind][0], TEST[1][kind], fit.answer(TEST[0]))
    assert reached == 1 if kind != "number" else reached > .97, f"{kind}: {reached}"


CHANCE = {"tags": ("roc_auc", .5), "class": ("accuracy", .25), "number": ("r2", 0.)}


def blind(kind, seed, leak=0.):
    """How far above chance, on labels that have nothing to do with their features; a leak adds the label to every feature."""
    metric, floor = CHANCE[kind]
    rng, sets = np.random.default_rng(seed), []
    for features, labels in (TRAIN, VALID, TEST):
        y = rng.permutation(labels[kind])
        hint = leak * y.reshape(len(y), -1)[features.track, 0]
        sets += [of(features.layers + hint[:, None, None], features.track, features.ids), y]
    fit = fit_readout(*sets[:4], kind, replace(QUICK, epochs=6, lr=3e-3, seed=seed))
    return score(metric, sets[5], fit.answer(sets[4])) - floor


@pytest.mark.parametrize("kind", ["tags", "class"])
def test_shuffled_labels_stay_at_chance(kind):
    """Twelve seeds, 60 test tracks each: one run scatters by some .06, their mean by some .02; three times that is allowed."""
    above = [blind(kind, seed) for seed in range(12)]
    assert abs(np.mean(above)) < .06 and np.std(above) < .15, above


def test_shuffled_numbers_are_not_explained():
    assert -.3 < np.mean([blind("number", seed) for seed in range(6)]) < .02


@pytest.mark.parametrize("kind", CHANCE)
def test_a_leak_is_noticed(kind):
    """Mutation: features that hold the label; the same detector then reads far above chance."""
    assert np.mean([blind(kind, seed, leak=3.) for seed in range(3)]) > .12


@pytest.mark.parametrize("how", [QUICK, replace(QUICK, layer="mix"), replace(QUICK, layer="flat", every=7),
                                 replace(QUICK, head="linear", dropout_input=True)])
def test_same_seed_same_numbers_and_nobody_elses_dice(how):
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        first = fitted("class", replace(how, epochs=4))
        assert torch.equal(before, torch.get_rng_state())
        torch.rand(3)
        again, other = (fitted("class", replace(how, epochs=4, seed=seed)) for seed in (0, 1))
    assert first.history == again.history and np.array_equal(first.answer(TEST[0]), again.answer(TEST[0]))
    assert not np.array_equal(first.answer(TEST[0]), other.answer(TEST[0]))


def test_five_seeds_scatter():
    train, valid, (test, labels) = (crowd(60, seed, noise=3.) for seed in (11, 12, 13))
    scores = [score("accuracy", labels["class"], fitted("class", replace(QUICK, seed=seed), train, valid).answer(test)) for seed in range(5)]
    print(f"five seeds: {np.mean(scores):.3f} ± {np.std(scores, ddof=1):.3f}")
    assert 0 < np.std(scores, ddof=1) < .2 and np.mean(scores) > .3


# Validation decides ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, 3])
def test_converged_says_who_ended_it(every):
    """With patience the fit ends so many looks after the best; without time it says that it did not converge."""
    done = fitted("class", replace(QUICK, epochs=500, every=every))
    best = max(range(len(done.history)), key=lambda look: done.history[look]["valid"])
    assert done.converged and len(done.history) == best + 1 + QUICK.patience and done.value == done.history[best]["valid"]
    cut = fitted("class", replace(QUICK, epochs=2, lr=1e-5, every=every, patience=50))
    assert not cut.converged and cut.history[-1]["step"] == 2 * -(-len(TRAIN[0].track) // QUICK.batch)


def test_the_best_look_is_kept():
    """On noise the loss of validation tracks soon grows; the answer is still the best look's."""
    fit = fitted("tags", replace(QUICK, layer=1, plateau=0, monitor={"tags": "loss"}))
    of_window = torch.from_numpy(VALID[1]["tags"][VALID[0].track]).float()
    kept = nn.functional.binary_cross_entropy_with_logits(fit.outputs(VALID[0]), of_window).item()
    assert kept == pytest.approx(fit.value, abs=1e-6) and fit.value == min(row["valid_loss"] for row in fit.history)
    assert fit.history[-1]["valid_loss"] > 1.01 * fit.value


def test_equal_looks_take_the_smaller_loss():
    """Twelve validation tracks are soon all right; the look kept is the surest of those."""
    few = VALID[0].of(VALID[0].ids[:12]), {"class": VALID[1]["class"][:12]}
    fit = fitted("class", replace(QUICK, patience=15), valid=few)
    right = [row["valid_loss"] for row in fit.history if row["valid"] == 1.]
    loss = nn.functional.cross_entropy(fit.outputs(few[0]), torch.from_numpy(few[1]["class"][few[0].track])).item()
    assert len(right) > 10 and loss == pytest.approx(min(right), rel=1e-4) and min(right) < right[0] / 2


def test_whole_tracks_are_watched():
    """The value kept is the metric of track answers, which is not the metric of windows."""
    fit = fitted("class", replace(QUICK, layer=1))
    windows = score("accuracy", VALID[1]["class"][VALID[0].track], fit.outputs(VALID[0]).numpy())
    assert fit.value == score("accuracy", VALID[1]["class"], fit.answer(VALID[0])) != windows


@pytest.mark.parametrize("monitor, metric, best", [({}, "pr_auc", max), ({"tags": "roc_auc"}, "roc_auc", max), ({"tags": "loss"}, "loss", min)])
def test_what_is_watched(monitor, metric, best):
    fit = fitted("tags", replace(QUICK, layer=1, monitor=monitor, lr=3e-2))
    assert fit.metric == metric and fit.value == best(row["valid_loss" if metric == "loss" else "valid"] for row in fit.history)
    assert fitted("tags", replace(QUICK, monitor={"tags": "loss"}), metric="roc_auc").metric == "roc_auc"


def test_an_error_is_made_small():
    fit = fitted("tempo", replace(QUICK, layer=1), metric="tempo_error")
    assert fit.value == min(row["valid"] for row in fit.history) < max(row["valid"] for row in fit.history)


def test_the_rate_drops_on_a_plateau():
    rates = [row["lr"] for row in fitted("class", replace(QUICK, epochs=60, plateau=2, patience=12)).history]
    assert rates[0] == 1e-2 and rates[-1] <= 2.5e-3 and {a / b for a, b in zip(rates, rates[1:])} <= {1., 2.}
    assert {row["lr"] for row in fitted("class", replace(QUICK, plateau=0)).history} == {1e-2}


def test_a_diverging_fit_says_so():
    with pytest.raises(FloatingPointError, match="not finite any more, at a learning rate of 1e"):
        fitted("number", replace(QUICK, lr=1e30))


# What may be known, and by whom -----------------------------------------------------------------------------------------------------------------


def test_statistics_are_the_training_tracks():
    """Mutation: other validation tracks and targets; a mean that looked at them would move."""
    features, labels = VALID
    moved = (of(features.layers * 7 + 5, features.track, features.ids), {"number": labels["number"] * 9 + 4})
    ours, theirs = (fitted("number", replace(QUICK, epochs=1), valid=valid).net for valid in (VALID, moved))
    rows, numbers = TRAIN[0].layers[:, 2], TRAIN[1]["number"]
    for name, wanted in {"mean": rows.mean(0), "std": rows.std(0), "zero": numbers.mean(0), "unit": numbers.std(0)}.items():
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
        np.testing.assert_allclose(getattr(ours, name), wanted, atol=1e-5)


def test_numbers_do_not_care_for_their_unit():
    scaled = [(features, {"number": labels["number"] * 1000 - 77}) for features, labels in (TRAIN, VALID)]
    np.testing.assert_allclose(fitted("number", QUICK, *scaled).answer(TEST[0]), fitted("number").answer(TEST[0]) * 1000 - 77, atol=20)


def test_tempo_is_learned_in_octaves_and_answered_in_bpm():
    fit = fitted("tempo")
    octaves = fit.outputs(TEST[0])[:, 0].double().numpy()
    np.testing.assert_allclose(fit.answer(TEST[0]), [2 ** octaves[TEST[0].track == i].mean() for i in range(len(TEST[0]))], rtol=1e-9)
    np.testing.assert_allclose(fit.net.zero.item(), np.log2(TRAIN[1]["tempo"]).mean(), atol=1e-5)


@pytest.mark.parametrize("broken, message", [
    (dict(kind="beats"), "got kind 'beats'"), (dict(y=TRAIN[1]["class"][:-1]), r"truth \(119,\)"), (dict(y=TRAIN[1]["class"] - 1), "wanted whole"),
    (dict(y=TRAIN[1]["tags"]), r"truth \(120, 2\)"),
    (dict(valid=TRAIN[0], y_valid=TRAIN[1]["class"]), "120 tracks are in training and in validation"),
    (dict(n_classes=3), "wanted whole numbers 0 to 2"), (dict(how=replace(QUICK, layer=4)), "got layer 4, wanted 0 to 3"),
    (dict(metric="pr"), "got metric .pr. for class"), (dict(train=of(TRAIN[0].layers * np.nan, TRAIN[0].track, TRAIN[0].ids)), "not finite")])
def test_what_does_not_fit_is_refused(broken, message):
    good = dict(train=TRAIN[0], y=TRAIN[1]["class"], valid=VALID[0], y_valid=VALID[1]["class"], kind="class", how=replace(QUICK, epochs=1))
    fit_readout(**good)
    with pytest.raises(ValueError, match=message): fit_readout(**(good | broken))


def test_settings_and_features_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"got features \(5,\), fitted to \(8,\)"): fitted("class").answer(of(np.zeros((1, 4, 5)), [0], [0]))
    with pytest.raises(ValueError, match="wanted 2 at least"): Mixture(1)
    with pytest.raises(ValueError, match="windows of 2 tracks, wanted some of each of 3"): aggregate(np.zeros((3, 2)), [0, 2, 2], 3, "class")
    for wrong in (dict(head="deep"), dict(layer="all"), dict(layer=-1)):
        with pytest.raises(ValueError, match="wanted"): ReadOut(**wrong)


# Grids -------------------------------------------------------------------------------------------------------------------------------------------


GRID = [replace(QUICK, layer=layer, lr=lr, epochs=12, aggregate={"key": "valid"}) for layer in (1, 2) for lr in (1e-2, 1e-6)]


def tried(kind, grid, metric=None):
    return search(TRAIN[0], TRAIN[1][kind], VALID[0], VALID[1][kind], kind, grid, metric)


def test_every_row_is_recorded_and_validation_chooses():
    found = tried("key", GRID)
    assert [(row["layer"], row["lr"]) for row in found.rows] == [(how.layer, how.lr) for how in GRID] and found.metric == "key_score"
    assert set(asdict(GRID[0])) | {"metric", "valid", "looks", "converged", "chosen"} <= set(found.rows[0])
    chosen, = [row for row in found.rows if row["chosen"]]
    assert (chosen["layer"], chosen["lr"]) == (2, 1e-2) and found.best.how == GRID[2]
    assert chosen["valid"] == max(row["valid"] for row in found.rows) == score("key_score", VALID[1]["key"], found.best.answer(VALID[0]))
    assert chosen["aggregate"] == found.best.rule and all(row["aggregate"] in ENSEMBLES for row in found.rows)


def test_an_error_chooses_the_smallest():
    found = tried("tempo", GRID, "tempo_error")
    assert found.best.how.layer == 2 and next(row["valid"] for row in found.rows if row["chosen"]) == min(row["valid"] for row in found.rows)


def test_a_setting_that_diverges_keeps_its_row():
    far = replace(QUICK, lr=1e30)
    found = tried("number", [far, replace(QUICK, epochs=3)])
    assert "not finite" in found.rows[0]["failed"] and np.isnan(found.rows[0]["valid"]) and found.rows[1]["chosen"]
    with pytest.raises(FloatingPointError, match="all 2 settings diverged"): tried("number", [far, far])


def test_test_tracks_cannot_reach_the_choice():
    """By signature: one training and one validation set is all that goes in."""
    for function, more in ((fit_readout, {"how"}), (search, {"grid"})):
        assert set(inspect.signature(function).parameters) == {"train", "y", "valid", "y_valid", "kind", "metric", "n_classes"} | more


# Neighbours --------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RULES)
def test_neighbours_find_the_corner(kind):
    name, (lent, shuffled) = KINDS[kind][0], (TRAIN[1][kind], np.random.default_rng(0).permutation(TRAIN[1][kind]))
    told, guessed = (score(name, TEST[1][kind], knn(TRAIN[0], y, kind, 5, layer=2).answer(TEST[0])) for y in (lent, shuffled))
    assert told > .98 and guessed < .8


def test_neighbours_equal_a_loop():
    memory, asked = (np.stack([features.layers[features.track == i, 1].mean(0) for i in range(len(features))]) for features in (TRAIN[0], TEST[0]))
    places, queries = ((x - memory.mean(0)) / memory.std(0) for x in (memory, asked))
    by_hand = np.zeros((60, 4))
    for i, q in enumerate(queries):
        cosine = places @ q / np.linalg.norm(places, axis=1) / np.linalg.norm(q)
        for j in np.argsort(-cosine)[:7]: by_hand[i, TRAIN[1]["class"][j]] += np.exp(cosine[j] / .2)
    ours = knn(TRAIN[0], TRAIN[1]["class"], "class", 7, 1, .2).answer(TEST[0])
    np.testing.assert_allclose(ours, by_hand / by_hand.sum(1, keepdims=True), atol=1e-5)


def test_neighbours_know_their_limits():
    y = TRAIN[1]["class"]
    np.testing.assert_array_equal(knn(TRAIN[0], y, "class", 1, 1).answer(TRAIN[0]).argmax(1), y)    # everybody's nearest is oneself
    assert knn(TRAIN[0], y, "class", 3, n_classes=9).answer(TEST[0]).shape == (60, 9)
    for wrong in (dict(k=0), dict(k=121), dict(layer="mix")):
        with pytest.raises(ValueError, match="wanted 1 to 120 and one layer"): knn(TRAIN[0], y, "class", **wrong)


# What was there before, and what it costs -------------------------------------------------------------------------------------------------------


def test_the_older_probe_gives_its_old_numbers():
    """Numbers of the release before the rooms were divided: committed records depend on them."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3, 8)), rng.integers(0, 2, (40, 4))
    probe = fit_probe(x[:30], y[:30], (x[30:], y[30:]), "mlp", seed=3, epochs=5)
    assert probe.scores(x[30:]).sum() == pytest.approx(float.fromhex("0x1.3f350a5277f78p+4"), rel=1e-6)
    assert probe.history[-1]["valid"] == pytest.approx(float.fromhex("0x1.62ad160000000p-1"), rel=1e-6)


def test_a_thousand_tracks_take_seconds():
    """1,000 tracks of 4 windows of 512 features, 50 tags, 512 hidden units: five epochs, processor time of one thread."""
    rng = np.random.default_rng(0)
    make = lambda n, first: of(rng.normal(size=(4 * n, 1, 512)), np.repeat(np.arange(n), 4), first + np.arange(n))
    y, train, valid = (rng.random((1200, 50)) < .2).astype(int), make(1000, 0), make(200, 5000)
    start = process_time()
    fit_readout(train, y[:1000], valid, y[1000:], "tags", ReadOut("mlp", epochs=5))
    assert process_time() - start < 8
