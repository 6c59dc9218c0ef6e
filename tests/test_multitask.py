"""Workers, weights and targets together; M-6, M-7 and M-12 to M-16 are the numbers of the paper's specification."""
import copy
import math

import pytest
import torch
from lightning_fabric import Fabric
from torch.testing import assert_close

import musicssl.objectives.multitask as room
from musicssl import meter
from musicssl.audio import Batch
from musicssl.augment import draw_seeds, pase_plus
from musicssl.data.loader import Loader
from musicssl.encoders.base import Embedding
from musicssl.encoders.pase import PASE
from musicssl.objectives.multitask import MultiTask
from musicssl.objectives.weighting import DWA, WEIGHTINGS, Sum, Uncertainty
from musicssl.objectives.workers import GROUPS, WORKERS
from musicssl.optim import new_optimizer
from musicssl.train import TrainConfig, fit, largest_batch

import multitask_ranks as ranks
import pair


@pytest.fixture(scope="module")
def every():
    "All fourteen workers around a small encoder; windows long enough for SPC."
    return ranks.objective("sum", "every", chunk=8000)


def some(rows=4, seed=0, samples=9000): return ranks.batch(seed, rows, samples)
def weighted(made, weights, **options):
    "The same heads and targets, other weights."
    other = copy.deepcopy(made)
    other.weighting = Sum([*other.weighting.kinds], weights).double()
    for name, value in options.items(): setattr(other, name, value)
    return other


def gradients(made, batch=None):
    "Of the encoder (P,), and of each head."
    made.zero_grad()
    made(some() if batch is None else batch)["loss"].backward()
    flat = lambda module: torch.cat([p.grad.flatten() for p in module.parameters()])
    return flat(made.encoder), {name: flat(head) for name, head in made.heads.items()}


# M-6, M-7: a sum, and weights that act

def test_the_sum_of_all_pulls(every):
    each = every.encoder_gradients(some())
    assert each.shape == (14, sum(p.numel() for p in every.encoder.parameters())) and each.norm(dim=1).min() > 1e-6
    assert_close(gradients(every)[0], each.sum(0), atol=1e-6, rtol=0)


def weights_act(made):
    "Without it a worker is silent, doubled it is twice as loud."
    each, k = made.encoder_gradients(some()), len(made.workers)
    rows = torch.cat([torch.ones(k, k) - torch.eye(k), torch.ones(k, k) + torch.eye(k)]).double()
    return all((gradients(weighted(made, row.tolist()))[0] - row @ each).abs().max() < 1e-6 for row in rows)


def test_zero_removes_a_worker_and_two_doubles_it(every):
    assert weights_act(every)
    assert gradients(weighted(every, 14 * [0.]))[0].abs().max() == 0


def test_mutation_the_scaled_gradient_is_thrown_away(every, monkeypatch):
    "As in PASE's code."
    monkeypatch.setattr(room, "scale_gradient", lambda x, weight: x)
    assert not weights_act(every)


def test_heads_hear_of_weights_only_where_they_act_on_the_loss(every):
    weights = [0., 2., *12 * [1.]]
    plain, acting, on_loss = (gradients(made) for made in (every, weighted(every, weights), weighted(every, weights, act_on="loss")))
    assert_close(acting[0], on_loss[0])
    for factor, name in zip(weights, every.workers):
        assert torch.equal(acting[1][name], plain[1][name])
        assert_close(on_loss[1][name], factor * plain[1][name])


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_mechanism_reaches_the_encoder(name):
    made = ranks.objective("sum", ("logmel", "onset", "lim"))
    made.weighting = room.new_weighting(name, made.weighting.kinds).double()
    for step in range(3):
        each = made.encoder_gradients(some(4, step))
        made.zero_grad()
        parts = made(some(4, step))
        parts["loss"].backward()
        weights = torch.stack([parts[f"{worker}_weight"] for worker in made.workers])
        assert_close(torch.cat([p.grad.flatten() for p in made.encoder.parameters()]), weights @ each, atol=1e-6, rtol=0)
        assert_close(parts["loss"], sum(parts[f"{worker}_loss"] for worker in made.workers))
    state = copy.deepcopy(made.weighting.state_dict())
    made.eval()(some(4, 7))
    assert all(torch.equal(value, state[key]) for key, value in made.weighting.state_dict().items()), "in evaluation nothing moves"


@pytest.mark.parametrize("act_on", ["encoder", "loss"])
def test_the_price_of_uncertainty_has_a_gradient_and_no_value(act_on):
    made = ranks.objective("uncertainty", act_on=act_on)
    with torch.no_grad(): made.weighting.log_variance.copy_(torch.tensor([.5, -1., 0., 2.]))
    parts, s = made(some()), made.weighting.log_variance.detach()
    parts["loss"].backward()
    losses = torch.stack([parts[f"{name}_loss"] for name in made.workers]).detach()
    assert_close(made.weighting.log_variance.grad, .5 - .5 * (-s).exp() * losses)
    assert_close(parts["loss"].detach(), losses.sum() if act_on == "encoder" else (.5 * (-s).exp() * losses).sum(), atol=1e-6, rtol=1e-6)


# What is said, and what ignorance pays

def test_losses_by_definition(every):
    heard, batch = every.listen(some()), some()
    frames, parts = every.embed(heard.wave), every(batch)
    anchor, context = frames.chunk(2)
    for name in every.targets.names: assert_close(parts[f"{name}_loss"], (every.heads[name](anchor) - heard.targets[name]).square().mean())
    assert_close(parts["waveform_loss"], (every.heads["waveform"](anchor)[:, 0] - heard.clean).abs().mean())
    assert_close(parts["waveform_zero"], heard.clean.abs().mean())
    true, false = (torch.cat([anchor, other], 1) for other in (context, context[heard.strange]))
    answers = every.heads["lim"](torch.cat([true, false]))
    assert_close(parts["lim_loss"], room.pair_loss(answers))
    assert set(parts) == {"loss", "waveform_zero", *(f"{name}_{what}" for name in GROUPS["every"] for what in ("loss", "weight"))}


def test_who_says_zero_pays_one(every):
    silent = copy.deepcopy(every)
    for head in silent.heads.values():
        for p in head.parameters(): torch.nn.init.zeros_(p)
    parts = silent(ranks.batch(100))
    for name in every.targets.names: assert .75 < parts[f"{name}_loss"] < 1.25, name
    assert abs(parts["waveform_loss"] - parts["waveform_zero"]) < 1e-6
    for name in ("lim", "gim", "spc"): assert abs(parts[f"{name}_loss"] - math.log(2)) < 1e-6


def test_predictions(every):
    wave = some().wave[:, :8000]
    said = every.eval().predict(wave)
    every.train()
    assert list(said) == [name for name in every.workers if WORKERS[name].kind != "pairs"] and said["waveform"].shape == (4, 1, 8000)
    assert all(said[name].shape == true.shape and not said[name].requires_grad for name, true in every.targets(wave).items())


def test_half_precision_is_scored_in_float32():
    made = copy.deepcopy(ranks.objective("sum", ("waveform", "logmel", "gim"))).float().eval()
    batch = some()
    with torch.no_grad():
        exactly = made(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16): half = made(batch)
    assert all(value.dtype == torch.float32 for value in half.values())
    assert all(abs(half[name] - exactly[name]) < .02 for name in exactly if name.endswith("loss"))


# Windows and ids

def test_windows_are_those_of_the_row_alone(every):
    whole, batch = every.listen(some()), some()
    part = every.listen(Batch(wave=batch.wave[2:], seeds=batch.seeds[2:]))
    assert torch.equal(part.clean, whole.clean[2:]) and torch.equal(part.wave[2:], whole.wave[6:])
    assert not torch.equal(whole.wave[:4], whole.wave[4:]), "a context is another window"


def test_a_context_only_where_somebody_compares():
    calls = {}
    for workers in (("logmel",), ("logmel", "gim")):
        made = ranks.objective("sum", workers)
        made.encoder.register_forward_pre_hook(lambda module, inputs: calls.__setitem__(workers, len(inputs[0])))
        made(some())
    assert calls == {("logmel",): 4, ("logmel", "gim"): 8}


def meets_itself(batch, made):
    ids = torch.arange(len(batch)) if batch.ids is None else torch.as_tensor(batch.ids)
    return any((ids[made.listen(Batch(wave=batch.wave, seeds=batch.seeds + n, ids=batch.ids)).strange] == ids).any() for n in range(100))


def test_the_stranger_is_of_another_recording(monkeypatch):
    made, batch = ranks.objective("sum", ("lim",)), some()
    batch.ids = [7, 7, 8, 7]
    assert not meets_itself(batch, made)
    monkeypatch.setattr(room, "strangers", lambda ids, seeds: torch.arange(len(seeds)).roll(1))
    assert meets_itself(batch, made), "the mutation: the next row, whoever it is"
    monkeypatch.undo()
    batch.ids = [7, 7, 7, 7]
    with pytest.raises(ValueError, match="wanted two recordings"): made(batch)
    assert ranks.objective("sum", ("logmel",))(batch)["loss"].isfinite(), "nobody compares"


def test_padding_is_not_heard(every):
    batch = some()
    lengths = torch.tensor([8000, 8500, 9000, 8200])
    padded = Batch(wave=torch.cat([batch.wave, torch.full((4, 5000), .7)], 1), seeds=batch.seeds, lengths=lengths)
    assert (every.listen(padded).clean != .7).all() and (every.listen(Batch(wave=padded.wave, seeds=batch.seeds)).clean == .7).any()


# M-14: clean targets for distorted ears

def clean_whatever_is_heard(made):
    batch = some(8, 3)
    distorted, plain = made.train().listen(batch), made.eval().listen(batch)
    assert (distorted.wave != plain.wave).any(1).sum() > 3 and torch.equal(plain.wave[:8], plain.clean)
    return torch.equal(distorted.clean, plain.clean) and all(torch.equal(distorted.targets[name], plain.targets[name]) for name in plain.targets)


def test_targets_are_those_of_the_clean_window(monkeypatch):
    made = ranks.objective("sum", ("waveform", "logmel", "chroma", "gim"), chain=pase_plus(16_000))
    assert clean_whatever_is_heard(made)
    plainly = made.listen
    def mutant(batch):
        heard = plainly(batch)
        return heard._replace(targets=made.targets(heard.wave[:len(heard.clean)]))
    monkeypatch.setattr(made, "listen", mutant)
    assert not clean_whatever_is_heard(made), "the mutation: targets of what is heard"


# Fitting

def test_targets_are_fitted_on_windows_like_those_of_training():
    "On a beat, windows side by side would all begin alike, and their tempograms would hardly differ."
    time = torch.arange(48_000) / 16_000
    noise = torch.randn(8, 48_000, generator=torch.Generator().manual_seed(0))
    wave = torch.sin(2 * torch.pi * 440 * time) * torch.exp(-20 * (time % .25)) + .001 * noise
    batch = Batch(wave=wave, seeds=draw_seeds(8, torch.Generator().manual_seed(1)))
    made = MultiTask(ranks.Small(), "tempogram", chunk=16_000)
    def zero(fitted):
        made.targets.fit([fitted])
        return made.targets(made.listen(batch).clean)["tempogram"].square().mean()
    made.fit_targets([batch])
    assert made.targets(made.listen(batch).clean)["tempogram"].square().mean() < 2
    assert zero(wave.unfold(1, 16_000, 16_000).flatten(0, 1)) > 10, "the mutation: windows side by side"


def test_fitting_is_a_matter_of_the_batches_alone():
    loader = Loader(torch.randn(16, 9000, generator=torch.Generator().manual_seed(0)).numpy(), batch_size=8)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made = MultiTask(ranks.Small(), ("logmel", "onset"), chunk=4000)
        made.fit_targets(loader(number) for number in range(2))
        found.append(made.targets.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    with pytest.raises(ValueError, match="wanted at least a window"): made.fit_targets([Batch(wave=torch.zeros(2, 3999))])


# M-13: one batch, all workers

def test_one_batch_is_learned_by_heart():
    torch.manual_seed(0)
    made, batch = MultiTask(PASE.preset("tiny", dim=64), "every", chunk=6720, width=.25), some(2, 5)
    made.fit_targets([batch])
    heard = made.listen(batch)
    made.listen = lambda batch: heard                        # which is the same at every step
    adam, rows, kept = torch.optim.Adam(made.parameters(), 3e-3), [], {}
    def learned(): return all(share < (.9 if name == "waveform" else .5) for name, share in kept.items())
    while len(rows) < 200 and not (kept and learned()):      # two hundred steps at most
        parts = made(batch)
        adam.zero_grad(), parts["loss"].backward(), adam.step()
        rows.append({name: parts[f"{name}_loss"].item() for name in made.workers})
        if len(rows) > 5: kept = {name: sum(row[name] for row in rows[-5:]) / 5 / rows[0][name] for name in made.workers}
    assert learned(), kept


# M-15: two processes

@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return pair.run_as_pair(ranks.run, tmp_path_factory.mktemp("multitask"))


def alone(name):
    return ranks.train(Fabric(accelerator="cpu", devices=1), ranks.objective(name), 0, 1)


def difference(one, two, what):
    values = (lambda x: list(x.values()) if isinstance(x, dict) else list(x))
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(values(one[what]), values(two[what]), strict=True))


@pytest.mark.parametrize("name", ranks.MECHANISMS)
def test_two_processes_equal_one(found, name):
    one = alone(name)
    assert max(g.abs().max() for g in one["gradient"].values()) > 1e-3, "a gradient this small would prove nothing"
    assert name in ("sum", "random_half") or (one["weights"][-1] - 1).abs().max() > 1e-3, "nor would weights that never move"
    for two in found:
        for what in ("gradient", "weights", "state", "parameters"): assert difference(one, two[name], what) < 1e-6, what


@pytest.mark.parametrize("name", ranks.MECHANISMS)
def test_both_processes_agree_to_the_bit(found, name):
    for what in ("gradient", "weights", "state", "parameters"): assert difference(found[0][name], found[1][name], what) == 0, what


@pytest.mark.parametrize("mutant", ["dwa, OwnLosses", "mgda, OwnGram", "gradnorm, OwnGram", "random_half, OwnSeed"])
def test_mutations_every_device_for_itself(found, mutant):
    one = alone(mutant.split(",")[0])
    assert max(difference(one, two[mutant], what) for two in found for what in ("weights", "parameters")) > 1e-4


# M-16: resuming

class ForgetfulDWA(DWA):
    def __init__(self, *given, **options):
        super().__init__(*given, **options)
        for name, buffer in list(self.named_buffers()): self.register_buffer(name, buffer, persistent=False)


class ForgetfulUncertainty(Uncertainty):
    "Its variances are there, but nobody saves them."
    def _save_to_state_dict(self, destination, prefix, keep_vars): pass


KINDS = ["regression", "regression", "classification"]
RESUMED = {"dwa": lambda: DWA(KINDS, window=1, temperature=.1), "uncertainty": lambda: Uncertainty(KINDS),
           "initial_scale": lambda: room.new_weighting("initial_scale", KINDS, steps=3), "adaptive": lambda: room.new_weighting("adaptive", KINDS),
           "gradnorm": lambda: room.new_weighting("gradnorm", KINDS)}


def trained(folder, weighting, pauses=()):
    torch.manual_seed(0)
    config = TrainConfig(6, 1e-2, checkpoint_every=2, seed=1)
    for until in (*pauses, None):
        torch.manual_seed(0)
        made = MultiTask(ranks.Small(), ("logmel", "onset", "lim"), weighting(), chunk=ranks.CHUNK, width=1 / 16)
        made.fit_targets([some(8, 100)])
        result = fit(made, lambda number: Batch(wave=some(4, number).wave), config, folder, progress=False, until=until)
    rows = [{key: row[key] for key in row if key.endswith(("loss", "weight"))} for row in result.history]
    return rows, {name: value.clone() for name, value in made.state_dict().items()}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    (rows, weights), (again, resumed) = trained(tmp_path / "whole", RESUMED[name]), trained(tmp_path / "parts", RESUMED[name], (3,))
    assert rows == again and all(torch.equal(value, resumed[key]) for key, value in weights.items())
    assert len({row["logmel_weight"] for row in rows}) > 2, "a weight that never moves proves nothing"


def test_mutation_the_history_is_not_saved(tmp_path):
    forgetful = lambda: ForgetfulDWA(KINDS, window=1, temperature=.1)
    assert trained(tmp_path / "whole", forgetful)[0] != trained(tmp_path / "parts", forgetful, (3,))[0]


# The engine

def test_rates_and_decay():
    made = MultiTask.preset("tiny", workers=("logmel", "onset"), weighting="uncertainty", head_rate=.5)
    owner = {id(p): name.split(".")[0] for name, p in made.named_parameters()}
    groups = new_optimizer("adamw", made, 1e-3, .1).param_groups
    found = {(owner[id(p)], group["lr_factor"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found == {("encoder", 1., .1), ("heads", .5, .1), ("weighting", 1., 0.)}


def test_arithmetic_can_be_counted_and_the_largest_batch_found():
    made = MultiTask(ranks.Small(), ("waveform", "logmel", "onset", "lim"), chunk=ranks.CHUNK, width=1 / 16)
    made.fit_targets([some(8, 100)])
    batch = some()
    assert meter.flops(made, batch) > 1e6
    assert largest_batch(made, lambda number: Batch(wave=batch.wave, ids=torch.arange(4)), TrainConfig(1), most=4) == 4


class Coarse(ranks.Small):
    def forward(self, wave):
        layers = super().forward(wave).layers[:, :, ::2]
        return Embedding(layers, layers.mean((1, 2)))


@pytest.mark.parametrize("hop, chunk", [(160, 4000), (162, 3888), (256, 3840)])
def test_other_hops(hop, chunk):
    encoder = ranks.Small()
    encoder.hop, encoder.enter = hop, torch.nn.Linear(hop, 6)
    encoder.forward = lambda wave: Embedding(encoder.enter(wave.unfold(1, hop, hop))[:, None], None)
    made = MultiTask(encoder, ("waveform", "logmel", "onset"), chunk=4000, width=1 / 16)
    made.fit_targets([some()])
    assert made.chunk == chunk and made(some())["loss"].isfinite()


def test_an_encoder_with_too_few_frames_is_refused():
    made = MultiTask(Coarse(), "onset", chunk=ranks.CHUNK)
    made.fit_targets([some()])
    with pytest.raises(ValueError, match="Coarse gave 13 frames, wanted 25: one every hop"): made(some())


def test_gradients_are_not_compared_in_float16():
    made = ranks.objective("mgda").float()
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="short gradients vanish"): made(some())
    with torch.autocast("cpu", torch.bfloat16): assert torch.isfinite(made(some())["loss"])


@pytest.mark.parametrize("options, words", [({"workers": "melody"}, "no worker 'melody'"), ({"weighting": "best"}, "weighting 'best'"),
                                            ({"act_on": "both"}, "wanted 'encoder' or 'loss'"), ({"stack": 2}, "wanted an odd number"),
                                            ({"chunk": 159}, "got a window of 159 samples, wanted at least a frame of 160")])
def test_unknown_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words): MultiTask(ranks.Small(), **options)


def test_presets():
    made = MultiTask.preset("pase_plus")
    assert made.targets.n_channels["lps"] == 21_525 and sum(p.numel() for p in made.heads["lps"][2].parameters()) == 5_531_925
    assert made.chunk == 32_000 and made.chain is not None and made.lr_factors == {"heads": .5}
    assert MultiTask.preset("pase").chunk == 16_000 and MultiTask.preset("tiny", encoder=ranks.Small()).encoder.dim == 6
