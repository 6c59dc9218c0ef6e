"""What the notebooks on PASE+'s distortions and MERT's mixture cannot show: every dtype and split, replay, and what each protection is for."""
import math

import pytest
import torch

from musicssl.augment import distortions, mixture
from musicssl.augment.base import Compose, Gain, draw_seeds
from musicssl.augment.distortions import AdditiveNoise, BandDrop, Chopping, Clipping, DownSample, Overlap, pase_plus
from musicssl.augment.mixture import NoiseMixture

DEVICES = [torch.device("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
SEEDS = draw_seeds(9, torch.Generator().manual_seed(0))
BANK = torch.randn(3, 1500, generator=torch.Generator().manual_seed(5))
MIXTURE = {"length": (300, 600)}
ALONE = {"noise": AdditiveNoise, "recorded": lambda p=1.: AdditiveNoise(p, bank=BANK), "band": BandDrop, "rate": DownSample, "clip": Clipping,
         "chop": Chopping, "overlap from a bank": lambda p=1.: Overlap(p, bank=BANK)}
TOGETHER = {"overlap": Overlap, "mixture": lambda p=1.: NoiseMixture(p, **MIXTURE)}


def waves(n_samples=4000, rows=9):
    return .1 * torch.randn(rows, n_samples, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("split", [(1,) * 9, (2, 7), (4, 5)])
@pytest.mark.parametrize("name", ALONE)
def test_rows_do_not_depend_on_the_batch(name, split):
    """R23, bit for bit, where no row looks at another."""
    whole, params = ALONE[name](.7)(waves(), seeds=SEEDS, return_params=True)
    parts = [ALONE[name](.7)(part, seeds=seeds) for part, seeds in zip(waves().split(split), SEEDS.split(split))]
    applied = params["applied"]
    assert torch.equal(torch.cat(parts), whole)
    assert applied.any() and not applied.all() and torch.equal(whole[~applied], waves()[~applied])
    assert (whole[applied] != waves()[applied]).any(1).all()


@pytest.mark.parametrize("name", TOGETHER)
def test_rows_that_look_at_others_say_so_and_can_be_replayed(name):
    """They depend on the batch, as their docstrings say; what was drawn is enough to repeat them."""
    step = TOGETHER[name](.7)
    whole, params = step(waves(), seeds=SEEDS, return_params=True)
    applied = params["applied"]
    assert "epend" in step.__doc__ and not torch.equal(step(waves()[:5], seeds=SEEDS[:5]), whole[:5])
    assert torch.equal(step.transform(waves(), params), whole) and torch.equal(step(waves(), seeds=SEEDS), whole)
    assert applied.any() and not applied.all() and torch.equal(whole[~applied], waves()[~applied])
    assert (whole[applied] != waves()[applied]).any(1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ALONE | TOGETHER)
def test_shape_dtype_and_device_are_kept(name, dtype, device):
    wave, step = waves().to(device, dtype), (ALONE | TOGETHER)[name]().to(device)
    before, out = wave.clone(), step(wave, seeds=SEEDS)
    assert (out.shape, out.dtype, out.device) == (wave.shape, wave.dtype, wave.device)
    assert out.isfinite().all() and torch.equal(wave, before)
    assert step(torch.zeros_like(wave), seeds=SEEDS).isfinite().all(), "silence"


@pytest.mark.parametrize("name", ALONE | TOGETHER)
def test_nothing_happens_at_p_0_or_in_evaluation(name):
    step = (ALONE | TOGETHER)[name](0.)
    assert torch.equal(step(waves(), seeds=SEEDS), waves())
    assert torch.equal((ALONE | TOGETHER)[name]().eval()(waves(), seeds=SEEDS), waves())


@pytest.mark.parametrize("name", ALONE | TOGETHER)
def test_nobody_asks_a_device(name):
    out, params = (ALONE | TOGETHER)[name](.5).to("meta")(torch.zeros(9, 4000, device="meta"), seeds=SEEDS, return_params=True)
    assert out.shape == (9, 4000) and all(value.device.type == "cpu" for value in params.values())


def test_a_new_distortion_leaves_the_draws_of_the_others_alone():
    before = pase_plus().augment(waves(), SEEDS)[1]
    after = Compose([Gain(), *pase_plus().transforms, NoiseMixture(**MIXTURE)]).augment(waves(), SEEDS)[1]
    assert all(torch.equal(before[key], after[key]) for key in before)


# PASE+

def test_order_and_probabilities_are_those_of_pase_plus():
    assert [(step.name, step.p) for step in pase_plus().transforms] == [
        ("reverb", .5), ("additive", .4), ("band_drop", .35), ("downsample", .25), ("clipping", .2), ("chopping", .2), ("overlap", .1)]


@pytest.mark.parametrize("snr", [-10., 0., 5., 10., 30.])
def test_ratio_and_energy(snr):
    """Rows of any level: the ratio is the one asked for and the energy stays."""
    wave = waves(20_000).double() * torch.logspace(-4, 0, 9)[:, None]
    bank = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(3)).double()
    step = AdditiveNoise(snr_db=(snr,), bank=bank)
    out, params = step(wave, seeds=SEEDS, return_params=True)
    noise = step._noise(wave, params)
    share = torch.stack([torch.linalg.lstsq(torch.stack([x, v], 1), y[:, None]).solution[:, 0] for x, v, y in zip(wave, noise, out)])
    ratio = 20 * (share[:, 0] * wave.norm(dim=1) / (share[:, 1] * noise.norm(dim=1))).log10()
    torch.testing.assert_close(ratio, torch.full((9,), snr).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.norm(dim=1), wave.norm(dim=1), atol=0, rtol=1e-6)


def test_without_it_the_level_would_tell(monkeypatch):
    """The mutation: energy not restored. Noise at 0 dB is then 3 dB of loudness, which an encoder could simply read."""
    gain = lambda out: 20 * (out.norm(dim=1) / waves().norm(dim=1)).log10()
    assert gain(AdditiveNoise(snr_db=(0.,))(waves(), seeds=SEEDS)).abs().max() < 1e-3
    monkeypatch.setattr(distortions, "_to_energy", lambda changed, wave: changed)
    assert gain(AdditiveNoise(snr_db=(0.,))(waves(), seeds=SEEDS)).min() > 2


def test_recordings_go_round():
    step = AdditiveNoise(snr_db=(-60.,), bank=torch.arange(1., 8.)[None])
    noise = step(waves(30), seeds=SEEDS)
    noise = noise / noise[:, :7].amax(1, keepdim=True) * 7
    assert (noise[:, 7:] - noise[:, :-7]).abs().max() < .05 and (noise.diff(dim=1) - 1).abs().lt(.1).float().mean() > .8


@pytest.mark.parametrize("n_samples", [1, 100, 22_050])
def test_filters_take_any_length(n_samples):
    for step in (BandDrop(), DownSample(), AdditiveNoise(), Chopping(), Clipping()): assert step(waves(n_samples), seeds=SEEDS).isfinite().all()


def response_db(step, params):
    impulse = torch.zeros(1, 22_050, dtype=torch.float64)
    impulse[:, 11_025] = 1
    return 20 * torch.fft.rfft(step.transform(impulse, params)).abs()[0].clamp_min(1e-12).log10()


@pytest.mark.parametrize("low, width", [(100., .5), (1000., 1.), (4000., 2.)])
def test_the_band_is_gone_and_nothing_else(low, width):
    db = response_db(BandDrop(), {"low_hz": torch.tensor([low]).double(), "octaves": torch.tensor([width]).double()})   # one bin per Hz
    high, edge = min(low * 2**width, 11_025), 2 ** (1 / 12)
    inside, outside = db[math.ceil(low * edge):math.floor(high / edge)], torch.cat([db[:int(low / edge)], db[math.ceil(high * edge):]])
    assert inside.max() < outside.median() - 40 and (outside - outside.median()).abs().max() < .1


@pytest.mark.parametrize("factor", [2., 4.])
def test_the_lower_rate_holds_what_is_left(factor):
    db, limit = response_db(DownSample(), {"factor": torch.tensor([factor]).double()}), 11_025 / factor
    assert db[int(limit) + 5:].max() < db[10:1000].median() - 60
    assert (db[10:int(limit / 2 ** (1 / 6))] - db[10:1000].median()).abs().max() < .1


def test_chopping_zeroes_what_it_says():
    out, params = Chopping()(waves(40_000) + 1, seeds=SEEDS, return_params=True)
    expected = waves(40_000) + 1
    for row, starts, lengths in zip(expected, params["start"].tolist(), params["length"].tolist()):
        for start, length in zip(starts, lengths): row[start:start + length] = 0
    assert torch.equal(out, expected) and ((out == 0).sum(1) > 0).sum() >= 8
    many = Chopping().draw(torch.zeros(1, 100_000), draw_seeds(10_000, torch.Generator().manual_seed(1)))
    windows = (many["length"] > 0).sum(1)
    assert windows.max() == 5 and (torch.bincount(windows, minlength=6)[1:] / 10_000 - .2).abs().max() < .03
    assert (many["start"] + many["length"]).max() <= 100_000 and abs(many["length"][many["length"] > 0].double().mean() / 22_050 - .076) < .002


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
def test_nobody_overlaps_with_himself(rows):
    wave, seeds = waves(rows=rows), draw_seeds(rows, torch.Generator().manual_seed(4))
    out, params = Overlap()(wave, seeds=seeds, return_params=True)
    if rows == 1: assert torch.equal(out, wave) and not params["applied"].any()
    else:
        assert (params["partner"] != torch.arange(rows)).all() and params["partner"].max() < rows
        assert (params["onset"] < 3000).all() and (params["start"] <= params["onset"]).all()
    partners = Overlap().draw(torch.zeros(3000, 8), draw_seeds(3000, torch.Generator()))["partner"]
    assert abs((partners.double() - 1499.5).mean()) < 3 * 3000 / (12 * 3000) ** .5


# MERT: the numbers are those of its tests

def runs(changed):
    """Lengths of the stretches in which a row was changed."""
    edges = torch.nn.functional.pad(changed.int(), (1, 1)).diff()
    return (edges == -1).nonzero()[:, 0] - (edges == 1).nonzero()[:, 0]


def by_the_book(wave, params):
    out = wave.clone()
    for i in range(len(wave)):
        pool = torch.cat([wave[:i], wave[i + 1:]]).flatten()
        for length, source, place in zip(*(params[key][i].tolist() for key in ("length", "source", "place"))):
            if params["applied"][i]: out[i, place:place + length] += pool[source:source + length]
    return out


@pytest.mark.parametrize("p", [.25, .5, .8])
def test_15_mixture(p):
    """Share of altered clips; at most three stretches of the right length, a slice of the others each; off in eval; the same again."""
    seeds = draw_seeds(200, torch.Generator().manual_seed(6))
    wave = torch.randint(1, 9, (200, 5000), generator=torch.Generator().manual_seed(8)).float()      # whatever is added, it shows
    step = NoiseMixture(p, **MIXTURE)
    mixed, params = step(wave, seeds=seeds, return_params=True)
    altered = (mixed != wave).any(1)
    assert torch.equal(altered, params["applied"]) and abs(altered.double().mean() - p) <= 3 * (p * (1 - p) / 200) ** .5
    assert torch.equal(mixed, by_the_book(wave, params)) and torch.equal(step(wave, seeds=seeds), mixed)
    for row in (mixed != wave)[altered]: assert len(runs(row)) <= 3 and runs(row).min() >= 300 and runs(row).max() <= 3 * 600
    one = NoiseMixture(p, (1, 1), (300, 600))(wave, seeds=seeds)
    assert all(len(runs(row)) == 1 and 300 <= runs(row) <= 600 for row in (one != wave)[(one != wave).any(1)])
    assert torch.equal(step.eval()(wave, seeds=seeds), wave)


def test_15_the_condition_that_was_released():
    """At p = 0.25 the inverted condition mixes three clips out of four: exactly those that the meant one leaves alone."""
    seeds, shape = draw_seeds(10_000, torch.Generator().manual_seed(7)), torch.zeros(10_000, 600, device="meta")
    meant, released = (NoiseMixture(.25, official_inverted=inverted, **MIXTURE).augment(shape, seeds)[1]["applied"] for inverted in (False, True))
    assert torch.equal(meant, ~released) and abs(released.double().mean() - .75) <= 3 * (.25 * .75 / 10_000) ** .5


def test_15_pieces_never_come_from_the_clip_itself(monkeypatch):
    """Clip k holds 10^k: what was added must be of other clips, straddling allowed. The mutation: a pool that forgets to skip."""
    wave = (10. ** torch.arange(4))[:, None].expand(4, 700).clone()
    def own(seeds):
        mixed, params = NoiseMixture(1., (1, 1), (500, 700))(wave, seeds=seeds, return_params=True)
        return any((mixed[k] == 2 * wave[k]).any() for k in range(4)), by_the_book(wave, params), mixed
    batches = [draw_seeds(4, torch.Generator().manual_seed(number)) for number in range(20)]
    assert not any(own(seeds)[0] for seeds in batches) and all(torch.equal(*own(seeds)[1:]) for seeds in batches)
    assert any(len(row.unique()) > 2 for seeds in batches for row in own(seeds)[2]), "a piece that straddles two clips"
    right = mixture._add_pieces
    def unskipped(wave, length, source, place): return torch.stack([right(torch.cat([wave[k:k + 1], wave]), *(
        torch.cat([value[k:k + 1], value]) for value in (length, source, place)))[0] for k in range(len(wave))])
    monkeypatch.setattr(mixture, "_add_pieces", unskipped)
    assert any(own(seeds)[0] for seeds in batches)


def test_15_whole_range_is_drawn():
    _, params = NoiseMixture(length=(3, 5)).augment(torch.zeros(3000, 7, device="meta"), draw_seeds(3000, torch.Generator()))
    used = params["length"] > 0
    assert set(params["length"][used].tolist()) == {3, 4, 5} and set(params["place"][params["length"] == 3].tolist()) == set(range(5))
    assert params["source"][used].max() + 5 > .99 * 2999 * 7 and (params["source"] + params["length"]).max() <= 2999 * 7


@pytest.mark.parametrize("step", [NoiseMixture(1., **MIXTURE), NoiseMixture(0., official_inverted=True, **MIXTURE)], ids=["p = 1", "inverted"])
def test_16_a_batch_of_one_comes_back(step):
    out, params = step(waves(rows=1), seeds=SEEDS[:1], return_params=True)
    assert torch.equal(out, waves(rows=1)) and not params["applied"].any()


def test_no_loop_runs_over_rows():
    """As many operations for 400 rows as for 4, in everything that is not dealt out in fours."""
    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        calls = 0
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))
    counts = []
    for rows in (4, 400):
        wave, seeds = torch.zeros(rows, 4000, device="meta"), draw_seeds(rows, torch.Generator())
        with Count() as count: Compose([*(make() for make in (AdditiveNoise, BandDrop, DownSample, Clipping, Chopping, Overlap)),
                                        NoiseMixture(1., **MIXTURE)])(wave, seeds=seeds)
        counts.append(count.calls)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("call, match", [
    (lambda: DownSample(factors=(1.,)), "wanted above 1"),
    (lambda: Clipping(factors=(1.5,)), "wanted 0 to 1"),
    (lambda: BandDrop(low_hz=(0., 100.)), "wanted above 0"),
    (lambda: BandDrop(octaves=(2., 1.)), "wanted low <= high"),
    (lambda: Chopping(most=0), "wanted at least 1"),
    (lambda: NoiseMixture()(waves(), seeds=SEEDS), "got clips of 4000 samples, wanted at least 24000"),
    (lambda: NoiseMixture(segments=(3, 1)), "wanted low <= high"),
    (lambda: NoiseMixture(length=(0, 3)), "wanted at least 1 of each"),
])
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match): call()
