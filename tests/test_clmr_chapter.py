"""Chapter 1, its second and third parts: one change per arm, the thesis's settings, and what is looked at inside an encoder."""
from dataclasses import asdict

import numpy as np
import pytest
import torch

from musicssl import cluster, probe, report, settings
from musicssl.experiments import clmr, clmr_choices as choices, clmr_inside
from musicssl.tag import load_tagger

TEST, PAPER = ({"seed": 0, **asdict(settings.read(profile, choices.PAPER, choices.Recipe))} for profile in ("test", "paper"))


def arm(name, profile="test"): return next(config for config in choices.grid(profile) if config["arm"] == name)


# ------------------------------------------------------------------------------------------------------------- choices

CHANGES = { # of each family of arms: what may differ from the base
    "base": {"steps", "looks"}, "steps": {"steps", "looks"}, "random": {"steps", "looks"}, "crop": {"chain"}, "chain of the code": {"chain"},
    "gain and delay of the code": {"gain_and_delay"}, "batch": {"pairs", "steps", "looks"},
    "temperature": {"chain", "temperature"}, "rate": {"chain", "rate"}, "on": {"collection", "folder"}, "an item is a": {"item"}, "two devices": {"published"},
    **dict.fromkeys(("LARS", "Adam"), {"optimizer", "schedule", "learning_rate", "weight_decay"}), "": {"chain", "p"}}


@pytest.mark.parametrize("profile", ["test", "laptop", "gpu", "paper"])
def test_every_arm_departs_in_its_own_thing(profile):
    """The base is what `base_of` says; `on` and the empty family are matched last."""
    recipe = asdict(settings.read(profile, choices.PAPER, choices.Recipe))
    base, seen = choices.base_of(recipe), set()
    for config in choices.grid(profile):
        family = next(name for name in CHANGES if config["arm"].startswith((f"{name} ", f"{name},")) or config["arm"] == name or not name)
        changed = {field for field, value in config.items() if field not in ("paper", "arm", "seed") and base.get(field) != value}
        may = CHANGES[family] | ({"optimizer", "schedule", "learning_rate", "weight_decay"} if family == "batch" else set())
        assert changed <= may and (changed or config["arm"] in ("base", "random")), (config["arm"], changed)
        assert config["looks"] == [config["steps"]] or base["schedule"] == "constant", "read out before its rate has fallen"
        seen.add(family)
    assert seen == set(CHANGES) - ({"Adam", "steps"} if base["schedule"] == "constant" else set())


@pytest.mark.parametrize("profile", ["test", "laptop", "gpu", "paper"])
def test_runs_are_told_apart(profile):
    configs = choices.grid(profile)
    assert len({repr(sorted((name, str(value)) for name, value in config.items() if name != "arm")) for config in configs}) == len(configs)


def test_gain_and_delay_of_the_code_and_nothing_else():
    for version in ("v1", "v2"):
        found = {step.name: vars(step) for step in choices.new_objective(arm(f"gain and delay of the code, {version}")).chain.transforms}
        for name, theirs in (("gain", "code"), ("delay", "code"), ("filter", "base"), ("noise", "base"), ("reverb", "base")):
            other = arm("base") if theirs == "base" else arm(f"chain of the code, {version}")
            expected = next(vars(step) for step in choices.new_objective(other).chain.transforms if step.name == name)
            assert {key: value for key, value in found[name].items() if key[0] != "_"} == {key: value for key, value in expected.items() if key[0] != "_"}


def test_all_batches_hear_equally_much():
    recipe = settings.read("paper", choices.PAPER, choices.Recipe)
    heard = {config["pairs"] * config["steps"] for config in choices.grid("paper") if config["arm"].startswith("batch")}
    assert all(abs(many / (recipe.steps * recipe.batches[1]) - 1) < .01 for many in heard)


def test_a_single_transform_is_heard_by_one_view_alone():
    """As in the official code; with the transform in both views, the second would differ too."""
    objective, wave = choices.new_objective(arm("polarity at 1")), torch.ones(3, 40_000)
    one, other, both = (chain.augment(wave, torch.arange(3))[0] for chain in (objective.chain, objective.chain_j, choices.new_objective(arm("base")).chain))
    assert (one == -1).all() and (other == 1).all()
    assert choices.new_objective(arm("base")).chain_j is None and len(both) == 3


def test_the_thesis_s_settings():
    """Field by field against the checked-in table and the rows of the tables themselves."""
    table, told = report.hyperparameters("clmr"), report.reported("clmr", data="MTAT")
    rows = lambda item: told[(told["item"] == item) & (told["metric"] == "pr_auc")]["row"].tolist()
    assert float(table.loc["batch_size", "T"]) == PAPER["batches"][1] and {f"batch {size}" for size in PAPER["batches"]} == set(rows("T3"))
    assert {f"temperature {tau:g}" for tau in PAPER["temperatures"]} == set(rows("T6")) and float(table.loc["temperature", "T"]) == PAPER["temperatures"][-1]
    songs = 3923 // PAPER["batches"][1]                                                              # batches of an epoch, as version 1 counts
    assert [look // songs for look in PAPER["looks"]] == [1000, 3000, 10_000] and PAPER["steps"] == PAPER["looks"][1]
    assert {0., *PAPER["probabilities"]} == {float(row.split()[-1]) for row in rows("F4")}
    assert table.loc["optimiser", "T"] == "Adam below batch 96, else LARS"
    assert choices.optimiser(95, float(table.loc["adam_lr", "T"]))["optimizer"] == "adam" and choices.optimiser(96, 0.)["optimizer"] == "lars"
    assert choices.lars(48)["learning_rate"] == pytest.approx(.5196, abs=1e-4) and choices.lars(456)["learning_rate"] == pytest.approx(1.6016, abs=1e-4)
    assert choices.lars(96)["weight_decay"] == float(table.loc["lars_weight_decay", "T"]) and PAPER["width"] == 1 and PAPER["learning_rate"] == float(table.loc["adam_lr", "T"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The base at the test's scale: its metrics and its arrays."""
    return choices.run(arm("base"), tmp_path_factory.mktemp("base"))


def test_a_look_on_the_way_is_a_run_that_ended_there(base, tmp_path):
    """T4 reads one training three times. With a rate that falls towards the end this would not hold, hence the constant one."""
    shorter = choices.run({**arm("base"), "steps": 2, "looks": [2]}, tmp_path)
    assert np.array_equal(base[1]["all@2"], shorter[1]["all@2"]) and [row["loss"] for row in base[0]["history"]][:2] == [row["loss"] for row in shorter[0]["history"]]
    assert not np.array_equal(base[1]["all@2"], base[1]["all@3"])


def test_scores_are_segments_averaged(base):
    """What the table of rules pools again is what was scored."""
    assert np.allclose(probe.pool_segments(base[1]["segments@2"]), base[1]["all@2"], atol=1e-6)


def test_collections_part_the_music(base):
    corpus = choices.load_corpus(TEST | {"rate": "8k"})
    parts = [set(choices.clips_of(corpus, "train", name)) for name in choices.COLLECTIONS]
    assert set.union(*parts) == set(corpus.ids("train")) and not set.intersection(*parts) and all(parts)
    assert base[1]["tunes@2"].shape[0] == base[1]["tunes"].sum() and base[1]["part music@2"].shape[0] == (~base[1]["tunes"]).sum()
    heard = choices.pretraining(arm("on tunes"), corpus)[0].order.ids
    assert set(heard) <= parts[0]


def test_no_test_label_is_looked_at(base, tmp_path, monkeypatch):
    """Other labels of the test clips, the same answers; other labels of the training clips, other answers."""
    corpus = choices.load_corpus(TEST | {"rate": "8k"})
    monkeypatch.setattr(choices, "load_corpus", lambda config: corpus)
    for split, same in (("test", True), ("train", False)):
        kept = corpus.tags.copy()
        corpus.tags[corpus.ids(split)] = 1 - corpus.tags[corpus.ids(split)]
        found = choices.run({**arm("base"), "steps": 1, "looks": [1]}, tmp_path / split)[1]
        corpus.tags = kept
        assert np.array_equal(found["all@1"], base[1]["all@1"]) == same


# -------------------------------------------------------------------------------------------------------------- inside

@pytest.fixture(scope="module")
def inside(tmp_path_factory):
    """An untrained encoder, looked into: its scores and measurements, its corpus, and the folder."""
    folder, config = tmp_path_factory.mktemp("inside"), next(config for config in clmr.grid("test") if config["arm"] == "random")
    return clmr.run(config, folder)[1], clmr.load_corpus(config), folder


def test_the_tagger_says_what_the_record_says(inside):
    arrays, corpus, folder = inside
    tagger, test = load_tagger(folder / "tagger.safetensors"), corpus.ids("test")
    windows = corpus.wave(test).unfold(1, tagger.n_samples, tagger.n_samples)
    with torch.no_grad(): said = tagger(windows.flatten(0, 1)).unflatten(0, windows.shape[:2]).sigmoid().mean(1)
    assert tagger.tags == tuple(corpus.tag_names) and np.allclose(said, arrays["linear@1"], atol=1e-5)


def test_clean_points_of_the_curves_are_the_clean_score(inside):
    arrays, *_ = inside
    assert np.array_equal(arrays["gain|None"], arrays["linear@1"]) and not np.array_equal(arrays["gain|-40"], arrays["linear@1"])


def test_what_is_kept_for_the_third_part(inside):
    arrays, corpus, _ = inside
    assert {key.removeprefix("twins|") for key in arrays if key.startswith("twins|")} >= set(clmr.TRANSFORMS)
    assert arrays["twins|polarity"].shape == (3, min(64, len(corpus.ids("test"))))
    assert arrays["stories"].shape[0] == min(10, len(corpus.ids("test"))) and arrays["stories"].ndim == 3
    for block in clmr.BLOCKS: assert (np.diff(arrays[f"filters|{block}"].astype(np.float32).argmax(1)) >= 0).all(), "columns are sorted by their peak"
    assert clmr_inside.grid("test") == clmr.grid("test") and cluster.record_folder("clmr_inside", "test") == cluster.record_folder("clmr", "test")


def test_labels_of_segments_are_those_of_their_clips():
    """The second reading of "1 %": whole segments, each once, with the tags of the clip they were cut from."""
    config = next(config for config in clmr.grid("test") if config["arm"] == "supervised_segments")
    corpus, size = clmr.load_corpus(config), clmr.new_encoder(config).n_samples
    tags, segments = corpus.tags[corpus.ids("train")], probe.n_segments(corpus.wave(corpus.ids("train")[:1]).shape[1], size)
    drawn, batches = probe.segment_subset(tags, segments, config["fraction"], 0), clmr.labelled(config, corpus, size)
    assert len(batches.source) == len(drawn) and batches.source.lengths.tolist() == [size] * len(drawn)
    batch = batches(0)
    for wave, label, row in zip(batch.wave, batch.labels, drawn[batch.ids.numpy()]):
        clip, place = divmod(row, segments)
        assert torch.equal(wave, corpus.wave([corpus.ids("train")[clip]], place * size, size)[0]) and (label.numpy() == tags[clip]).all()
