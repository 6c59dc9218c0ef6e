"""What the notebook on augmentations cannot show: other processes, other dtypes, other sources of randomness (R7, R23)."""
import hashlib
import itertools
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from musicssl.augment import (CLMR_CHAINS, Compose, Delay, Gain, Noise, PitchShift, PolarityInversion, RandomCrop, Transform, clmr_chain,
                              draw_seeds, fold_in, normal, clmr_views, single_chain, uniform)

DEVICES = [torch.device("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
PRESERVING = {"polarity": PolarityInversion(), "noise": Noise(), "gain": Gain(), "some": Compose([PolarityInversion(.5), Noise(.5), Gain(.5)])}
SEEDS = draw_seeds(16, torch.Generator().manual_seed(0))


def waves(n_samples=3000, rows=16):
    return .1 * torch.randn(rows, n_samples, generator=torch.Generator().manual_seed(1))


def busy_chain():
    """Everything happens often, so that a difference cannot hide."""
    return Compose([RandomCrop(2000), PolarityInversion(.5), Noise(.5, snr_db=(0., 20.)), Gain(.5), Noise(.5, snr_db=(0., 20.))])


@pytest.mark.parametrize("split", [(1,) * 16, (2, 14), (5, 5, 6), (15, 1)])
def test_rows_do_not_depend_on_the_batch(split):
    """R23: any split of the batch gives the same rows, bit for bit, and the same parameters."""
    whole, params = busy_chain()(waves(), seeds=SEEDS, return_params=True)
    parts = [busy_chain()(part, seeds=seeds, return_params=True) for part, seeds in zip(waves().split(split), SEEDS.split(split))]
    assert torch.equal(torch.cat([part for part, _ in parts]), whole)
    for name in params: assert torch.equal(torch.cat([drawn[name] for _, drawn in parts]), params[name])


def test_order_of_rows_is_free():
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(busy_chain()(waves()[order], seeds=SEEDS[order]), busy_chain()(waves(), seeds=SEEDS)[order])


def test_only_the_generator_decides():
    """R23: global random states neither matter nor move; the same generator gives the same views."""
    results = []
    for seed in (0, 1):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        results.append(torch.cat(clmr_views(waves(), busy_chain(), torch.Generator().manual_seed(9))))
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.cat(clmr_views(waves(), busy_chain(), torch.Generator().manual_seed(10))))


def test_the_generator_moves_on():
    generator = torch.Generator().manual_seed(9)
    first, second = (torch.cat(clmr_views(waves(), busy_chain(), generator)) for _ in range(2))
    assert not torch.equal(first, second)


def test_another_process_draws_the_same():
    """R23: nothing depends on the process, its hash seed or its number of threads."""
    code = ("import hashlib, torch; torch.set_num_threads({threads}); from musicssl.augment import clmr_chain, draw_seeds;"
            "_, params = clmr_chain(n_samples=100).augment(torch.zeros(64, 200), draw_seeds(64, torch.Generator().manual_seed(5)));"
            "print(hashlib.sha256(repr([(name, value.tolist()) for name, value in params.items()]).encode()).hexdigest())")
    def digest(threads, hash_seed):
        environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
        return subprocess.run([sys.executable, "-c", code.format(threads=threads)], env=environment, capture_output=True, text=True, check=True).stdout.strip()
    _, params = clmr_chain(n_samples=100).augment(torch.zeros(64, 200), draw_seeds(64, torch.Generator().manual_seed(5)))
    here = hashlib.sha256(repr([(name, value.tolist()) for name, value in params.items()]).encode()).hexdigest()
    assert digest(1, 1) == digest(2, 2) == here


@pytest.mark.parametrize("preset", CLMR_CHAINS)
def test_no_bit_depends_on_the_number_of_threads(preset):
    """R23: with any number of threads, and in any split of the batch, every row of the views is the same; and the number is left as it was."""
    wave, seeds, chain, before = waves(60_000, 8), SEEDS[:8], clmr_chain(preset), torch.get_num_threads()
    views = clmr_views(wave, chain, seeds=seeds)
    try:
        for threads, split in ((1, (3, 5)), (2, (4, 4)), (3, (2, 6)), (8, (1, 7))):
            torch.set_num_threads(threads)
            parts = zip(*(clmr_views(some, chain, seeds=own) for some, own in zip(wave.split(split), seeds.split(split))))
            for view, part in zip(views, parts): torch.testing.assert_close(torch.cat(part), view, rtol=0, atol=0)
            assert torch.get_num_threads() == threads
    finally: torch.set_num_threads(before)


def test_random_streams_are_pinned():
    """A change of the mapping would change every experiment: it must be a decision, not an accident."""
    assert fold_in(torch.tensor([0, 1]), "gain").tolist() == [6924202782909236670, 3449002613042226131]
    assert uniform(torch.tensor([0])).item() == 0xE220A8397B1DCDAF // 2**11 * 2.**-53
    assert torch.equal(normal(SEEDS, 999), torch.cat([normal(seed[None], 999) for seed in SEEDS]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PRESERVING)
def test_shape_dtype_and_device_are_kept(name, dtype, device):
    wave = waves().to(device, dtype)
    out, before = PRESERVING[name](wave, seeds=SEEDS), waves().to(device, dtype)
    assert (out.shape, out.dtype, out.device) == (wave.shape, wave.dtype, wave.device)
    assert out.isfinite().all() and not torch.equal(out, wave)
    assert torch.equal(wave, before), "the input was changed in place"


@pytest.mark.gpu
def test_views_on_the_gpu_are_those_of_the_cpu():
    here, there = (clmr_views(waves().to(device), busy_chain(), seeds=SEEDS) for device in ("cpu", "cuda"))
    for a, b in zip(here, there): torch.testing.assert_close(b.cpu(), a, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("preset", CLMR_CHAINS)
def test_silence_stays_finite(preset):
    """R7: a batch of silence goes through every preset without a NaN."""
    for view in clmr_views(torch.zeros(200, 500), clmr_chain(preset, 400), seeds=draw_seeds(200, torch.Generator().manual_seed(0))):
        assert view.shape == (200, 400) and (view == 0).all()


@pytest.mark.parametrize("snr", [0., 10., 40., 60.])
def test_noise_has_the_drawn_ratio(snr):
    wave = waves().double() * torch.logspace(-4, 0, 16)[:, None]
    noisy = Noise(snr_db=(snr, snr))(wave, seeds=SEEDS)
    torch.testing.assert_close(20 * (wave.norm(dim=1) / (noisy - wave).norm(dim=1)).log10(), torch.full((16,), snr, dtype=torch.float64), atol=.01, rtol=0)


def test_noise_differs_between_rows_views_and_steps():
    wave = waves(rows=1).expand(16, -1)
    chain = Compose([Noise(), Noise()])
    first, second = (view - wave for view in clmr_views(wave, chain, seeds=SEEDS))
    noises = torch.cat([first, second])
    assert torch.corrcoef(noises)[~torch.eye(32, dtype=torch.bool)].abs().max() < .12
    _, params = chain.augment(wave, SEEDS)
    assert not (params["noise.noise_seed"] == params["noise_2.noise_seed"]).any()


@pytest.mark.parametrize("name, noise, gain", [("clmr_paper", .01, (-6, 0)), ("clmr_code_v1", 0., (-20, -1)), ("clmr_code_v2", .01, (-20, -1))])
def test_chains(name, noise, gain):
    """The order and the probabilities of the paper's text and of two versions of its code; rates within three standard deviations of p."""
    expected = {"crop": 1., "polarity": .8, "noise": noise, "gain": .3, "filter": .8, "delay": .3, "pitch": .6, "reverb": .6}
    chain, seeds = clmr_chain(name), draw_seeds(10_000, torch.Generator().manual_seed(2))
    assert [(step.name, step.p) for step in chain.transforms] == [*expected.items()]
    _, params = chain.augment(torch.zeros(10_000, 60_000, device="meta"), seeds)
    for step, p in expected.items():
        rate = params[f"{step}.applied"].double().mean().item()
        assert abs(rate - p) <= 3 * (p * (1 - p) / 10_000) ** .5, (step, rate)
    gains, (low, high) = params["gain.gain_db"], gain
    assert low <= gains.min() < low + .5 and high - .5 < gains.max() <= high
    assert (gains == gains.round()).all().item() == (name == "clmr_code_v1")
    assert 40 <= params["noise.snr_db"].min() and params["noise.snr_db"].max() <= 80
    whole = {"clmr_paper": (False, False), "clmr_code_v1": (True, True), "clmr_code_v2": (False, True)}[name]
    for key, wanted in zip(("filter.cutoff_hz", "reverb.damping"), whole): assert (params[key] == params[key].round()).all().item() == wanted
    assert sorted(params["delay.delay_ms"].unique().tolist()) == [*range(200, 501 if name == "clmr_paper" else 500, 50)]
    assert params["pitch.cents"].min() == -700 and params["pitch.cents"].max() == 700


NAMES = ["polarity", "noise", "gain", "filter", "delay", "pitch", "reverb"]


@pytest.mark.parametrize("source", CLMR_CHAINS)
@pytest.mark.parametrize("name", NAMES)
def test_a_single_transform_is_the_chain_s_own(name, source):
    """It draws for a row what it draws inside the chain, from the same range, at the rate and length asked for; and it always happens."""
    seeds = draw_seeds(2000, torch.Generator().manual_seed(2))
    long = torch.zeros(2000, 30_000, device="meta")
    alone, inside = (chain.augment(long, seeds)[1] for chain in (single_chain(name, 20_000, 8000, source=source), clmr_chain(source, 20_000, 8000)))
    assert {key.split(".")[0] for key in alone} == {"crop", name} and alone.pop(f"{name}.applied").all()
    assert all(torch.equal(value, inside[key]) for key, value in alone.items())


def test_a_single_transform_leaves_the_rest_of_the_sound():
    """By hand: the same crop, polarity alone. The mutation: the chain as it is, which does more."""
    view, params = single_chain("polarity", 2000).augment(waves(), SEEDS)
    cropped, _ = single_chain(None, 2000).augment(waves(), SEEDS)
    whole, _ = clmr_chain(n_samples=2000).augment(waves(), SEEDS)
    assert torch.equal(view, -cropped) and not torch.equal(whole.abs(), cropped.abs())
    assert torch.equal(cropped, torch.stack([row[start:start + 2000] for row, start in zip(waves(), params["crop.start"])]))


@pytest.mark.parametrize("p", [0., .4, .8, 1.])
def test_a_single_transform_happens_as_often_as_asked(p):
    _, params = single_chain("filter", 100, p=p).augment(torch.zeros(10_000, 200, device="meta"), draw_seeds(10_000, torch.Generator().manual_seed(2)))
    assert abs(params["filter.applied"].double().mean().item() - p) <= 3 * (p * (1 - p) / 10_000) ** .5


def test_every_single_chain_is_new():
    """One chain's probability must not leak into the next."""
    assert single_chain("pitch", p=.4).transforms[1].p == .4 and single_chain("pitch").transforms[1].p == 1. and clmr_chain().transforms[6].p == .6


@pytest.mark.parametrize("asked, message", [({"name": "crop"}, "got 'crop', wanted None or one of polarity, "), ({"name": "gain", "p": 1.5}, "got p = 1.5"),
                                            ({"name": "gain", "source": "v3"}, "got 'v3', wanted one of clmr_paper, ")])
def test_single_chains_there_are_not(asked, message):
    with pytest.raises(ValueError, match=message): single_chain(**asked)


@pytest.mark.parametrize("sample_rate, highest", [(8000, 3600), (16_000, 4000), (22_050, 4000)])
def test_low_pass_filters_stay_below_half_the_rate(sample_rate, highest):
    for name in CLMR_CHAINS:
        step = clmr_chain(name, 400, sample_rate).transforms[4]
        assert step.low_pass == (2200, highest) and step.high_pass == (200, 1200) and step.sample_rate == sample_rate


def test_every_pair_of_transforms_is_independent():
    chain = Compose([PolarityInversion(.5), Noise(.5), Gain(.5), Gain(.5)])
    _, params = chain.augment(torch.zeros(20_000, 1), draw_seeds(20_000, torch.Generator().manual_seed(2)))
    for a, b in itertools.combinations([value for value in params.values() if value.dtype != torch.int64], 2):
        assert torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].abs() < .03


def test_views_are_drawn_in_evaluation_mode_and_transforms_are_not():
    chain = busy_chain().eval()
    assert chain(waves()) is not None and torch.equal(chain(waves()), waves())
    assert chain(waves(), return_params=True)[1] == {}
    for evaluated, trained in zip(clmr_views(waves(), chain, seeds=SEEDS), clmr_views(waves(), busy_chain(), seeds=SEEDS)):
        assert torch.equal(evaluated, trained)


def test_one_view_can_have_its_own_chain():
    view_i, view_j, params_i, params_j = clmr_views(waves(), busy_chain(), seeds=SEEDS, chain_j=RandomCrop(2000), return_params=True)
    assert set(params_j) == {"applied", "start"} and "gain.gain_db" in params_i
    assert torch.equal(view_j, torch.stack([row[start:start + 2000] for row, start in zip(waves(), params_j["start"])]))


def test_a_transform_of_ones_own():
    class Reverse(Transform):
        name = "reverse"
        def transform(self, wave, params): return wave.flip(1)
    out, params = Compose([Reverse(p=.5)])(waves(), seeds=SEEDS, return_params=True)
    applied = params["reverse.applied"]
    assert applied.any() and not applied.all()
    assert torch.equal(out[applied], waves()[applied].flip(1)) and torch.equal(out[~applied], waves()[~applied])


class Spy(Transform):
    """Turns the wave round and writes down how many rows it got."""
    name = "spy"

    def __init__(self, p=.9):
        super().__init__(p)
        self.sizes = []

    def transform(self, wave, params):
        self.sizes.append((len(wave), len(params["applied"])))
        return wave.flip(1)


def test_a_cpu_changes_four_rows_at_a_time():
    """Elsewhere, and where gradients are wanted, all that take part; the result is the same."""
    applied = Spy().augment(waves(), SEEDS)[1]["applied"]
    n = int(applied.sum())
    expected = torch.where(applied[:, None], waves().flip(1), waves())
    for wave, sizes in ((waves(), [4] * (n // 4) + [n % 4] * (n % 4 > 0)), (waves().requires_grad_(), [n]), (waves().to("meta"), [n])):
        spy = Spy()
        out = spy(wave, seeds=SEEDS)
        assert 4 < n < 16 and spy.sizes == [(size, size) for size in sizes]
        assert out.device.type == "meta" or torch.equal(out, expected)


class Kept(Transform):
    """Returns what it keeps for the next time."""
    name = "kept"

    def __init__(self, value):
        super().__init__()
        self.value = value

    def transform(self, wave, params): return self.value


@pytest.mark.parametrize("steps", [[Gain(.5), Gain(.5), Noise(.5)], [Gain(0.), Gain(.5)], [Transform(), Gain(.5)], [Compose([Gain(0.)]), Gain(.5)],
                                   [Gain(.5), Transform(), Gain(.5)]], ids=["some", "none first", "the same", "a chain", "same between"])
def test_a_chain_writes_into_its_own_copies_only(steps):
    wave, one_by_one = waves(), waves()
    for number, step in enumerate(steps):
        label = sum(isinstance(other, type(step)) for other in steps[:number]) + 1
        one_by_one = step.augment(one_by_one, SEEDS if label == 1 else fold_in(SEEDS, label))[0]
    assert torch.equal(Compose(steps)(wave, seeds=SEEDS), one_by_one) and torch.equal(wave, waves())


def test_what_a_step_keeps_is_not_written_into():
    kept = Kept(waves(rows=16).flip(0))
    Compose([Gain(.5), kept, Gain(.5)])(waves(), seeds=SEEDS)
    assert torch.equal(kept.value, waves(rows=16).flip(0))


def test_a_chain_that_took_every_wave_for_its_own_would_be_found_out(monkeypatch):
    """The mutation: each step writes into whatever it is given. Input and kept values change."""
    augment = Transform._augment
    monkeypatch.setattr(Transform, "_augment", lambda self, wave, seeds, own: augment(self, wave, seeds, True))
    wave, kept = waves(), Kept(waves().flip(0))
    Compose([Gain(.5), kept, Gain(.5)])(wave, seeds=SEEDS)
    assert not torch.equal(wave, waves()) and not torch.equal(kept.value, waves().flip(0))


def test_a_chain_makes_one_copy():
    """However many steps leave some rows alone, the batch is copied once."""
    class Clones(TorchDispatchMode):
        number = 0
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.number += function is torch.ops.aten.clone.default
            return function(*args, **(kwargs or {}))
    with Clones() as clones: Compose([Gain(.5), PolarityInversion(.5), Noise(.5)])(waves(), seeds=SEEDS)
    assert clones.number == 1


def test_gradients_flow():
    wave = waves(300, rows=4).requires_grad_()
    Compose([RandomCrop(200), PolarityInversion(.5), Gain(.5)])(wave, seeds=SEEDS[:4]).sum().backward()
    assert ((wave.grad != 0).sum(dim=1) == 200).all()


def test_an_empty_batch_is_cropped_too():
    assert clmr_chain(n_samples=400)(torch.zeros(0, 500), torch.Generator()).shape == (0, 400)


@pytest.mark.parametrize("call, match", [
    (lambda: Gain()(waves()), "neither a generator nor seeds"),
    (lambda: Gain()(waves()[0], seeds=SEEDS), "wanted a floating-point wave"),
    (lambda: Gain()(waves().int(), seeds=SEEDS), "wanted a floating-point wave"),
    (lambda: Gain()(waves(), seeds=SEEDS[:3]), "one per row"),
    (lambda: Gain()(waves(), seeds=SEEDS.double()), "wanted torch.int64"),
    (lambda: Gain(p=-.1), "wanted a probability"),
    (lambda: Noise(snr_db=(80., 40.)), "wanted low <= high"),
    (lambda: Noise(even_in="power"), "wanted 'dB' or 'amplitude'"),
    (lambda: clmr_chain("v3"), "wanted one of clmr_paper, clmr_code_v1, clmr_code_v2"),
    (lambda: clmr_views(waves(100), clmr_chain(n_samples=101), seeds=SEEDS), "got 100 samples, wanted at least 101"),
])
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match): call()


@pytest.mark.parametrize("step", [RandomCrop(59_049), Delay(), PitchShift()])
def test_gradients_need_no_more_than_the_waves(step):
    """The mutation in mind: the gradient of a view of all pieces is as large as all of them, here 200 GB."""
    wave = torch.randn(4, 70_000).requires_grad_()
    step(wave, seeds=SEEDS[:4]).square().sum().backward()
    assert wave.grad.isfinite().all() and (wave.grad != 0).sum(1).min() >= 40_000
