"""What an independent implementation of CLMR must pass and no other file pins: views at their length, readers, shares of labels, the floor."""
import numpy as np
import pytest
import torch

from musicssl import probe, records, settings
from musicssl.augment import Delay, Filter, Gain, Noise, PitchShift, PolarityInversion, Reverb, draw_seeds
from musicssl.data.loader import Loader
from musicssl.experiments import clmr
from musicssl.update import read_batch

LENGTH = 59_049
DEVICES = [torch.device("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
SEEDS = draw_seeds(3, torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------------------------------------- views

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("step", [PolarityInversion(), Noise(), Gain(), Filter(), Filter(kind="first-order"), Delay(), PitchShift(), Reverb()],
                         ids=lambda step: getattr(step, "kind", None) or step.name)
def test_every_transform_keeps_what_a_view_is(step, device):
    """At CLMR's own length: shape, type, device; finite, also of silence; and it did something."""
    wave = .1 * torch.randn(3, LENGTH, generator=torch.Generator().manual_seed(1))
    wave[2] = 0
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        given = wave.to(device, dtype)
        out = step(given.clone(), seeds=SEEDS)
        assert (out.shape, out.dtype, out.device) == (given.shape, given.dtype, given.device)
        assert out.isfinite().all() and (out[2] == 0).all() and (out[:2] != given[:2]).any(1).all()


def drawn(loader):
    """Where pieces of one and the same sound begin, and the seeds of their views, over eight batches."""
    batches = [read_batch(loader, number, 0) for number in range(8)]
    loader.close()
    return [torch.cat(parts).tolist() for parts in ([batch.wave[:, 0] for batch in batches], [batch.seeds for batch in batches])]


def test_readers_do_not_repeat_each_other():
    """Two processes read turn and turn about; all clips are the same. The mutation: what both would draw if each began with the same seed."""
    ramps = lambda workers: Loader([np.arange(100_000, dtype=np.float32) / 100_000] * 4, batch_size=2, crop=1000, workers=workers)
    for values in drawn(ramps(2)): assert len(set(values)) == 16
    mutant = ramps(0)
    draw = mutant.order.draw
    mutant.order.draw = lambda number, *rest: draw(number // 2, *rest)
    assert len(set(drawn(mutant)[0])) == 8


# -------------------------------------------------------------------------------------------------------------- labels

def test_one_per_cent_of_the_training_clips_is_187():
    """Of 18,709; 259 are one per cent of all clips, test clips included. Every tag is there, which draws at random do not promise."""
    rng = np.random.default_rng(0)
    labels = rng.random((18_709, 50)) < np.geomspace(.19, .02, 50)
    kept = probe.label_subset(labels, .01)
    assert len(kept) == len(set(kept.tolist())) == 187 and labels[kept].any(0).all()
    by_chance = [labels[rng.choice(18_709, 187, replace=False)].any(0).all() for _ in range(20)]
    assert not all(by_chance), "nothing was shown: every draw holds every tag"


@pytest.mark.parametrize("seed", [0, 3])
def test_both_arms_get_the_labels_of_the_same_clips(seed):
    """C3: what the read-out is fitted to and what the supervised network is shown. The mutation: another seed in one arm."""
    recipe = {**next(config for config in clmr.grid("test") if config["arm"] == "supervised"), "seed": seed, "fractions": [.01, .2, 1.]}
    corpus, fitted = clmr.load_corpus(recipe), []
    found = {split: corpus.ids(split)[:, None, None].astype(float) for split in clmr.SPLITS}      # a feature that is the clip's number
    def fit(features, tags, valid):
        fitted.append(features[:, 0, 0].astype(int).tolist())
        assert (tags == corpus.tags[fitted[-1]]).all()
        return probe.Probe(1, tags.shape[1])
    clmr.read_out(found, corpus, recipe, {"linear": fit})
    shown = lambda seed: [clmr.labelled({**recipe, "seed": seed, "fraction": fraction}, corpus, 1).ids.tolist() for fraction in recipe["fractions"]]
    n = len(corpus.ids("train"))
    assert [len(ids) for ids in fitted] == [max(1, int(fraction * n + .5)) for fraction in recipe["fractions"]]
    assert shown(seed) == fitted != shown(seed + 1)


# --------------------------------------------------------------------------------------------------------------- floor

def test_random_weights_are_a_floor_well_under_training():
    """In the records of chapter 1, seed by seed: above a constant answer, which scores the tags' rates, and well under what training gives."""
    kept = records.load_all(settings.root() / "figures" / "laptop" / "records" / "clmr")
    said = {arm: {run.config["seed"]: run.arrays for run in records.select(kept, arm=arm)} for arm in ("clmr", "random")}
    assert len(said["clmr"].keys() & said["random"].keys()) >= 3
    for seed in said["clmr"].keys() & said["random"].keys():
        labels = said["random"][seed]["labels"]
        pr_auc = {arm: probe.tagging_scores(labels, runs[seed]["linear@1"])["pr_auc"] for arm, runs in said.items()}
        constant = probe.tagging_scores(labels, np.zeros(labels.shape))["pr_auc"]
        assert constant + .1 < pr_auc["random"] < pr_auc["clmr"] - .1
