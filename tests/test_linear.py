"""Filters, echoes and rooms: against referees, row by row, in every split of a batch, and without anybody waiting for a device."""
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.signal import butter, lfilter
from torch.utils._python_dispatch import TorchDispatchMode

from musicssl.augment import linear
from musicssl.augment.base import Compose, Gain, Noise, PolarityInversion, RandomCrop, Transform, draw_seeds
from musicssl.augment.linear import Delay, Filter, Reverb, in_fours

DEVICES = [torch.device("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
KINDS = {"sinc": Filter, "first-order": lambda p=1.: Filter(p, kind="first-order"), "delay": Delay, "reverb": Reverb}
SEEDS = draw_seeds(17, torch.Generator().manual_seed(0))
RATE = 22050


def waves(n_samples=4000, rows=17):
    return .1 * torch.randn(rows, n_samples, generator=torch.Generator().manual_seed(1))


def doubles(**params):
    return {key: torch.tensor(value, dtype=None if isinstance(value[0], bool) else torch.float64) for key, value in params.items()}


# Referees

def test_filters_are_those_of_code_v2():
    """Julius, which the official code calls, edges included."""
    from julius import filters
    cutoffs = {True: [200., 201.7, 555.5, 1200.], False: [2200., 2731.3, 4000.]}
    for high, hertz in cutoffs.items():
        found = Filter().transform(waves(60_000, len(hertz)), doubles(highpass=[high] * len(hertz), cutoff_hz=hertz))
        julius = filters.highpass_filter if high else filters.lowpass_filter
        wanted = torch.cat([julius(row[None], cutoff / RATE) for row, cutoff in zip(waves(60_000, len(hertz)), hertz)])
        assert (found - wanted).abs().max() < 1e-6


def by_the_formula(row, cutoff, high):
    """Four zero crossings to a side, under a Hann window, the sum one, the ends repeated; written without a tensor."""
    reach = int(4 * RATE / cutoff)
    kernel = np.array([np.sinc(2 * cutoff / RATE * t) * math.cos(math.pi * t / 2 / reach) ** 2 for t in range(-reach, reach + 1)])
    low = np.convolve(np.pad(row, reach, mode="edge"), kernel / kernel.sum(), mode="valid")
    return row - low if high else low


@pytest.mark.parametrize("n_samples", [1, 5, 881, 8192, 9000])
def test_filters_are_windowed_sincs_at_any_length(n_samples):
    params = doubles(highpass=[True, False, True, False, True], cutoff_hz=[200., 2200., 1200., 4000., 640.])
    found = Filter().transform(waves(n_samples, 5), params)
    kernels = zip(waves(n_samples, 5).double().numpy(), params["cutoff_hz"].tolist(), params["highpass"].tolist())
    wanted = np.stack([by_the_formula(*one) for one in kernels])
    assert np.abs(found.numpy() - wanted).max() < 1e-6


def test_first_order_filters_are_butterworths():
    hertz, high = [200., 1200., 2200., 4000.], [True, True, False, False]
    found = Filter(kind="first-order").transform(waves(5000, 4), doubles(highpass=high, cutoff_hz=hertz))
    for row, before, cutoff, is_high in zip(found, waves(5000, 4).double().numpy(), hertz, high):
        assert np.abs(row.numpy() - lfilter(*butter(1, cutoff, "high" if is_high else "low", fs=RATE), before)).max() < 1e-6


@pytest.mark.parametrize("kind, least", [("sinc", 20.), ("first-order", 6.)])
@pytest.mark.parametrize("cutoff", [2200., 4000.])
def test_a_low_pass_keeps_the_low_and_takes_the_high(kind, least, cutoff):
    """At a quarter of the cutoff less than 1 dB is lost, at twice the cutoff 20 dB and more (first order: 6 and more)."""
    tones = torch.sin(2 * math.pi * torch.tensor([[cutoff / 4], [2 * cutoff]]) / RATE * torch.arange(22_050))
    found = Filter(kind=kind).transform(tones, doubles(highpass=[False] * 2, cutoff_hz=[cutoff] * 2))
    below, above = 20 * (found[:, 3000:-3000].norm(dim=1) / tones[:, 3000:-3000].norm(dim=1)).log10()
    assert abs(below) < 1 and above < -least


def test_delays():
    samples = [4410, 5512, 6615, 7717, 8820, 9922, 11025]
    delays = doubles(delay_ms=[200., 250., 300., 350., 400., 450., 500.])
    for gain in (.5, .2):
        found = Delay(gain=gain).transform(waves(12_000, 7), delays)
        for row, before, d in zip(found, waves(12_000, 7), samples):
            assert torch.equal(row[:d], before[:d] / 2)
            torch.testing.assert_close(row[d:], (before[d:] + gain * before[:-d]) / 2, rtol=0, atol=1e-7)
    ones = Delay().transform(torch.ones(7, 12_000), delays)
    for row, d in zip(ones, samples): assert (row[:d] == .5).all() and (row[d:] == .75).all()
    assert (Delay().transform(torch.eye(1, 12_000).expand(7, -1), delays).square().sum(dim=1) == .3125).all()
    assert torch.equal(Delay().transform(torch.ones(7, 100), delays), torch.full((7, 100), .5)), "longer than the row: nothing comes back"


COMBS, ALL_PASSES = (1116, 1188, 1277, 1356, 1422, 1491, 1557, 1617), (225, 341, 441, 556)


def sox(x, reverberance, damping, room_size, spread=12):
    """Sox's reverb sample by sample, both channels of a mono sound mixed to one."""
    a = -1 / math.log(1 - .3)
    b = 100 / (math.log(1 - .98) * a + 1)
    feedback, dull, scale = 1 - math.exp((reverberance - b) / (a * b)), damping / 100 * .3 + .2, room_size / 100 * .9 + .1
    out = np.zeros(len(x))
    for channel in (0, 1):
        turn = [channel * spread * (-1) ** i for i in range(8)]
        combs = [[0.] * int(scale * RATE / 44100 * (size + more) + .5) for size, more in zip(COMBS, turn)]
        passes = [[0.] * int(RATE / 44100 * (size + more) + .5) for size, more in zip(ALL_PASSES, turn)]
        stores = [0.] * 8
        for t, sample in enumerate(x.tolist()):
            wet = 0.
            for i, memory in enumerate(combs):
                heard = memory[t % len(memory)]
                stores[i] = heard + (stores[i] - heard) * dull
                memory[t % len(memory)] = sample + stores[i] * feedback
                wet += heard
            for memory in passes:
                heard = memory[t % len(memory)]
                memory[t % len(memory)] = wet + .5 * heard
                wet = heard - wet
            out[t] += .015 / 2 * wet
    return x + out


ROOMS = doubles(reverberance=[0., 50., 100., 100., 99.], damping=[100., 50., 0., 100., 13.], room_size=[100., 50., 100., 0., 31.])


@pytest.fixture(scope="module")
def rooms():
    """Noise and a click in five rooms, by the loop above."""
    wave = waves(4000, 5)
    wave[1] = torch.eye(1, 4000)
    settings = zip(*[ROOMS[key].tolist() for key in ("reverberance", "damping", "room_size")])
    return wave, np.stack([sox(row, *setting) for row, setting in zip(wave.double().numpy(), settings)])


@pytest.fixture
def forgetful():
    """What is kept from call to call is made anew, and not left to others."""
    kept = linear._circle, linear._smear
    for tables in kept: tables.cache_clear()
    yield kept
    for tables in kept: tables.cache_clear()


def test_rooms_are_those_of_sox(rooms):
    """Within 1/33,000 of the loudest sample (90 dB below it), also in rooms that ring for ten seconds."""
    wave, wanted = rooms
    assert (np.abs(Reverb().transform(wave, ROOMS).numpy() - wanted).max(1) < 3e-5 * np.abs(wanted).max(1)).all()


def test_a_view_of_clmr_is_long_enough_to_ring_past_its_end(forgetful):
    """The same in SciPy's filters, which are quick enough for 59,049 samples, and to show what fading protects from."""
    def lasting(x):
        out = 0
        for channel in (0, 1):
            turn, combs = [channel * 12 * (-1) ** i for i in range(8)], 0
            for size, more in zip(COMBS, turn):
                above, below, n = np.zeros(820), np.zeros(820), int((size + more) / 2 + .5)
                above[n:n + 2], below[:2], below[n] = (1, -.2), (1, -.2), -.98 * .8
                combs = combs + lfilter(above, below, x)
            for size, more in zip(ALL_PASSES, turn):
                n = int((size + more) / 2 + .5)
                combs = lfilter(np.r_[-1, np.zeros(n - 1), 1.5], np.r_[1, np.zeros(n - 1), -.5], combs)
            out = out + .0075 * combs
        return x + out
    wave, ringing = waves(59_049, 1), doubles(reverberance=[100.], damping=[0.], room_size=[100.])
    wanted = lasting(wave[0].double().numpy())
    far = lambda: np.abs(Reverb().transform(wave, ringing)[0].numpy() - wanted).max() / np.abs(wanted).max()
    assert far() < 6e-5
    with pytest.MonkeyPatch.context() as without:             # the mutation: no fading, so that the room's end rings at the beginning
        without.setattr("musicssl.augment.linear._FADE", 1.)
        for tables in forgetful: tables.cache_clear()
        assert far() > 1e-2


def test_one_channel_would_not_be_sox(rooms, monkeypatch, forgetful):
    """The mutation: both channels alike. The referee notices."""
    monkeypatch.setattr("musicssl.augment.linear._SPREAD", 0)
    wave, wanted = rooms
    assert np.abs(Reverb().transform(wave, ROOMS).numpy() - wanted).max() > 1e-2


# Draws

@pytest.mark.parametrize("transform, wanted", [
    (Filter(), {"low": (2200, 4000), "high": (200, 1200), "whole": False}),
    (Filter(kind="first-order"), {"low": (2200, 4000), "high": (200, 1200), "whole": True}),
    (Filter(low_pass=(500, 500), high_pass=(300, 400)), {"low": (500, 500), "high": (300, 400), "whole": False}),
])
def test_cutoffs(transform, wanted):
    params = transform.draw(waves(), draw_seeds(20_000, torch.Generator().manual_seed(3)))
    assert abs(params["highpass"].double().mean() - .5) < 3 * .5 / 20_000 ** .5
    for key, high in {"low": False, "high": True}.items():
        hertz, (least, most) = params["cutoff_hz"][params["highpass"] == high], wanted[key]
        assert least <= hertz.min() and hertz.max() <= most
        assert hertz.min() - least <= (most - least) / 1000 and most - hertz.max() <= (most - least) / 1000
        assert (torch.histc(hertz, 10, least, most) / len(hertz) - .1).abs().max() < .015 or least == most, "evenly spread"
        assert (hertz == hertz.round()).all() == wanted["whole"] or least == most


@pytest.mark.parametrize("options, wanted", [
    ({}, set(range(200, 501, 50))), ({"include_last": False}, set(range(200, 451, 50))),
    ({"delay_ms": (10, 25), "step_ms": 10}, {10, 20}), ({"delay_ms": (10, 25), "step_ms": 10, "include_last": False}, {10, 20}),
    ({"delay_ms": (7.5, 7.5)}, {7.5}),
])
def test_which_delays_are_drawn(options, wanted):
    assert set(Delay(**options).draw(waves(), draw_seeds(2000, torch.Generator().manual_seed(3)))["delay_ms"].tolist()) == wanted


@pytest.mark.parametrize("options, wanted", [
    ({"reverberance": (0, 99), "damping": (0, 99), "room_size": (0, 99), "whole": True}, set(range(100))),
    ({"reverberance": (1, 100), "damping": (1, 100), "room_size": (1, 100), "whole": True}, set(range(1, 101))),
])
def test_rooms_in_whole_numbers(options, wanted):
    params = Reverb(**options).draw(waves(), draw_seeds(5000, torch.Generator().manual_seed(3)))
    assert all(set(value.tolist()) == wanted for value in params.values())
    assert torch.corrcoef(torch.stack(list(params.values()))).fill_diagonal_(0).abs().max() < .05, "drawn apart"


@pytest.mark.parametrize("p", [.3, .6, .8])
@pytest.mark.parametrize("kind", [Filter, Delay, Reverb])
def test_rate_of_application(kind, p):
    """On the meta device, where nothing is computed: draws need no sound."""
    _, params = kind(p).augment(torch.zeros(10_000, 100, device="meta"), draw_seeds(10_000, torch.Generator().manual_seed(2)))
    assert abs(params["applied"].double().mean() - p) < 3 * (p * (1 - p) / 10_000) ** .5


# Rows

def chain():
    """Everything happens often, so that a difference cannot hide."""
    return Compose([RandomCrop(3000), PolarityInversion(.5), Gain(.5), Filter(.5), Filter(.5, kind="first-order"),
                    Delay(.5, delay_ms=(20, 60), step_ms=20), Reverb(.5)])


def by_parts(split):
    parts = [chain()(part, seeds=seeds, return_params=True) for part, seeds in zip(waves().split(split), SEEDS.split(split))]
    return torch.cat([part for part, _ in parts]), {name: torch.cat([drawn[name] for _, drawn in parts]) for name in parts[0][1]}


@pytest.mark.parametrize("split", [(1,) * 17, (2, 15), (5, 5, 7), (16, 1)])
def test_rows_do_not_depend_on_the_batch(split):
    """R23: any split of the batch gives the same rows and parameters, bit for bit on a CPU."""
    whole, params = chain()(waves(), seeds=SEEDS, return_params=True)
    parts, drawn = by_parts(split)
    assert torch.equal(parts, whole) and all(torch.equal(drawn[name], params[name]) for name in params)


def test_long_rows_do_not_depend_on_the_batch_and_why():
    """At CLMR's length too, where a transform of one row differs in its last bits from one of many: always four of them are transformed."""
    wave, seeds = waves(59_049, 5), SEEDS[:5]
    alone = lambda transform: torch.cat([transform(wave[i:i + 1], seeds=seeds[i:i + 1]) for i in range(5)])
    for transform in (Filter(kind="first-order"), Filter(), Delay(), Reverb()):
        assert torch.equal(alone(transform), transform(wave, seeds=seeds)), transform.name
    with pytest.MonkeyPatch.context() as without:             # the mutation: as many rows at a time as there are
        without.setattr("musicssl.augment.linear.in_fours", lambda work, wave, params: work(wave, params))
        differ = {name: (alone(KINDS[name]()) - KINDS[name]()(wave, seeds=seeds)).abs().max().item() for name in KINDS}
    assert max(differ.values()) > 0 and differ.pop("reverb") < 3e-5 and max(differ.values()) < 1e-6, "as where a batch stays whole"


def test_order_of_rows_is_free():
    order = torch.randperm(17, generator=torch.Generator().manual_seed(3))
    assert torch.equal(chain()(waves()[order], seeds=SEEDS[order]), chain()(waves(), seeds=SEEDS)[order])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_take_no_part_come_back_as_they_were(kind):
    out, params = KINDS[kind](p=.5)(waves(), seeds=SEEDS, return_params=True)
    applied = params["applied"]
    assert applied.any() and not applied.all()
    assert torch.equal(out[~applied], waves()[~applied]) and (out[applied] != waves()[applied]).any(dim=1).all()
    assert torch.equal(KINDS[kind](p=0.)(waves(), seeds=SEEDS), waves()) and torch.equal(KINDS[kind]().eval()(waves()), waves())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_shape_dtype_and_device_are_kept(kind, dtype, device):
    """Half precision goes through in single: what comes out is the rounded result of the rounded input, nothing worse."""
    wave = waves().to(device, dtype)
    out, before = KINDS[kind]()(wave, seeds=SEEDS), waves().to(device, dtype)
    assert (out.shape, out.dtype, out.device) == (wave.shape, wave.dtype, wave.device)
    assert torch.equal(wave, before), "the input was changed in place"
    wanted = KINDS[kind]()(before.float(), seeds=SEEDS)
    torch.testing.assert_close(out, wanted.to(dtype), atol=1e-5 if dtype == torch.float64 else 0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_silence_stays_silence_and_a_broken_row_breaks_no_other(kind):
    wave = waves()
    wave[3], wave[8] = 0, float("nan")
    out = KINDS[kind]()(wave, seeds=SEEDS)
    assert (out[3] == 0).all() and out[8].isnan().any()
    good = torch.arange(17) != 8
    assert torch.equal(out[good], KINDS[kind]()(waves().where(good[:, None] & (torch.arange(17) != 3)[:, None], 0), seeds=SEEDS)[good])


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_and_a_single_sample(kind):
    assert KINDS[kind]()(torch.zeros(0, 500), seeds=SEEDS[:0]).shape == (0, 500)
    assert KINDS[kind]()(torch.ones(3, 1), seeds=SEEDS[:3]).shape == (3, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_linear_and_treat_all_moments_alike(kind):
    """Sum and scale go through; a sound that comes 100 samples later is answered 100 samples later."""
    transform = KINDS[kind]()
    params = transform.draw(waves(), SEEDS)
    a, b = torch.zeros(2, 17, 6000)
    a[:, 1000:1500], b[:, 700:2100] = waves(500), waves(1400)
    apply = lambda wave: transform.transform(wave, params)
    torch.testing.assert_close(apply(2 * a - b), 2 * apply(a) - apply(b), atol=1e-5, rtol=0)
    torch.testing.assert_close(apply(a.roll(100, 1))[:, 100:], apply(a)[:, :-100], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow(kind):
    wave = waves(300, rows=5).double().requires_grad_()
    transform, seeds = KINDS[kind](), SEEDS[:5]
    probe = torch.randn(5, 300, generator=torch.Generator().manual_seed(5)).double()
    (transform(wave, seeds=seeds) * probe).sum().backward()
    step = 1e-3 * torch.randn(5, 300, generator=torch.Generator().manual_seed(6)).double()
    moved = ((transform(wave.detach() + step, seeds=seeds) - transform(wave.detach(), seeds=seeds)) * probe).sum()
    torch.testing.assert_close((wave.grad * step).sum(), moved, atol=1e-6, rtol=1e-3)


def test_gradients_flow_after_inference(forgetful):
    """Tables first made in inference mode are kept, and are needed for gradients later."""
    with torch.inference_mode(): Reverb()(waves(300, 2), seeds=SEEDS[:2])
    wave = waves(300, 2).requires_grad_()
    Reverb()(wave, seeds=SEEDS[:2]).sum().backward()
    assert (wave.grad != 0).all()


@pytest.mark.parametrize("call, match", [
    (lambda: Filter(low_pass=(4000, 2200)), "wanted low <= high"),
    (lambda: Filter(high_pass=(0, 1200)), "more than 0"),
    (lambda: Filter(sample_rate=8000), "less than 4000.0, half the sample rate"),
    (lambda: Filter(kind="iir"), "wanted 'sinc' or 'first-order'"),
    (lambda: Delay(delay_ms=(500, 200)), "wanted low <= high"),
    (lambda: Delay(delay_ms=(-1, 200)), "wanted 0 or more"),
    (lambda: Delay(step_ms=0), "steps above 0"),
    (lambda: Reverb(damping=(0, 101)), "got damping 0 to 101, wanted 0 to 100"),
    (lambda: Reverb(room_size=(-1, 3)), "wanted 0 to 100"),
    (lambda: Reverb(reverberance=(3, 1)), "wanted low <= high"),
    (lambda: Reverb(p=2), "wanted a probability"),
])
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match): call()


# Nobody waits for a device

def everything():
    return Compose([RandomCrop(3000), PolarityInversion(.5), Noise(.5), Gain(.5), Filter(.5), Filter(.5, kind="first-order"),
                    Delay(.5), Reverb(.5)])


class Copies(TorchDispatchMode):
    """Writes down every copy from the CPU to another device, and whether it waits."""
    def __init__(self):
        super().__init__()
        self.waiting = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and kwargs.get("device") not in (None, torch.device("cpu")):
            self.waiting.append(not kwargs.get("non_blocking"))
        return function(*args, **kwargs)


def test_no_step_looks_at_the_wave():
    """Meta tensors have no values: whatever asks for one (`.item()`, `bool`, `nonzero`, indexing by a mask) fails there."""
    out, params = everything()(torch.zeros(17, 4000, device="meta"), seeds=SEEDS, return_params=True)
    assert out.shape == (17, 3000) and all(value.device.type == "cpu" for value in params.values())


def test_copies_to_the_device_do_not_wait():
    with Copies() as copies: everything()(torch.zeros(17, 4000, device="meta"), seeds=SEEDS)
    assert len(copies.waiting) > 20 and not any(copies.waiting)


class Nosy(Transform):
    """The mutations: steps that look at the wave, or wait for a copy."""
    name = "nosy"

    def __init__(self, look):
        super().__init__()
        self.look = look

    def transform(self, wave, params):
        self.look(wave)
        return wave


@pytest.mark.parametrize("look", [lambda wave: wave.max().item(), lambda wave: bool((wave > 0).all()), lambda wave: wave[wave > 0],
                                  lambda wave: wave.tolist()], ids=["item", "bool", "mask", "tolist"])
def test_a_step_that_looks_is_found_out(look):
    with pytest.raises((RuntimeError, NotImplementedError)): Compose([Nosy(look)])(torch.zeros(3, 10, device="meta"), seeds=SEEDS[:3])


def test_a_copy_that_waits_is_found_out():
    with Copies() as copies: Nosy(lambda wave: torch.arange(3).to(wave.device))(torch.zeros(3, 10, device="meta"), seeds=SEEDS[:3])
    assert any(copies.waiting)


def test_no_loop_over_rows_off_the_cpu():
    """As many operations for 400 rows as for 4."""
    class Count(TorchDispatchMode):
        calls = 0
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))
    calls = []
    steps = Compose([Filter(), Filter(kind="first-order"), Delay(), Reverb()])
    for rows in (4, 4, 400):                                  # once to fill what is kept from call to call
        wave, seeds = torch.zeros(rows, 4000, device="meta"), draw_seeds(rows, torch.Generator())
        with Count() as count: steps(wave, seeds=seeds)
        calls.append(count.calls)
    assert calls[1] == calls[2]


def test_in_fours_takes_always_four():
    sizes = []
    add = lambda wave, params: sizes.append((len(wave), len(params["a"]))) or wave + params["a"][:, None]
    out = in_fours(add, torch.zeros(6, 2), {"a": torch.arange(6.)})
    assert sizes == [(4, 4), (4, 4)] and torch.equal(out, torch.arange(6.)[:, None].expand(6, 2))


@pytest.fixture
def watched():
    """Every wait for the device is an error; it is checked that one would be noticed."""
    torch.zeros(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("step", range(8))
def test_no_step_waits_for_the_gpu(watched, step):
    wave = torch.zeros(17, 4000, device="cuda")
    everything().transforms[step].augment(wave, SEEDS)
    everything().augment(wave, SEEDS)
    with pytest.raises(RuntimeError, match="synchroniz"): wave.max().item()


@pytest.mark.gpu
def test_the_gpu_gives_what_the_cpu_gives():
    here, there = (everything()(waves().to(device), seeds=SEEDS).cpu() for device in ("cpu", "cuda"))
    torch.testing.assert_close(there, here, atol=5e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("split", [(1,) * 17, (2, 15), (16, 1)])
def test_rows_depend_on_the_batch_in_their_last_bits_only_on_a_gpu(split):
    whole = chain()(waves().cuda(), seeds=SEEDS)
    parts = torch.cat([chain()(part.cuda(), seeds=seeds) for part, seeds in zip(waves().split(split), SEEDS.split(split))])
    torch.testing.assert_close(parts, whole, atol=3e-5, rtol=0)
    less = Compose([step for step in chain().transforms if not isinstance(step, Reverb)])
    alone = torch.cat([less(waves()[i:i + 1].cuda(), seeds=SEEDS[i:i + 1]) for i in range(17)])
    torch.testing.assert_close(alone, less(waves().cuda(), seeds=SEEDS), atol=1e-6, rtol=0)


# The benchmark

@pytest.fixture(scope="module")
def benchmark():
    """By its path: WavAugment has its name."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("benchmark_of_augment", folder / "augment.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_runs_and_says_what_is_missing(benchmark, capsys):
    benchmark.main(["--size", "test", "--json"])
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert "P3: skipped" in said.err and "P4" in found and {row["at_least"] for row in found["P4"]["rows"]} >= {2.5, 5.}
    present = {name: importlib.util.find_spec(name) is not None for name in ("torchaudio_augmentations", "augment_cpp")}
    assert ("P1" in found) == all(present.values()) and ("P2" in found) == present["torchaudio_augmentations"]
    for name, id in {"torchaudio_augmentations": "torchaudio-augmentations", "augment_cpp": "sox"}.items():
        assert present[name] or f"no rows for {id}" in said.err and "when last measured" in said.err


def test_a_shift_out_of_tune_is_not_timed(benchmark, monkeypatch):
    transform = benchmark.PitchShift.transform
    monkeypatch.setattr(benchmark.PitchShift, "transform", lambda self, wave, params: transform(self, wave, {"cents": params["cents"] + 2}))
    monkeypatch.setattr(benchmark, "paired", lambda *given: pytest.fail("it was timed"))
    with pytest.raises(benchmark.Disagreement, match="cents away"): benchmark.main(["--size", "test", "--only", "P4"])


def test_steps_that_differ_are_not_timed(benchmark):
    right = torch.ones(2, 3)
    benchmark.agree("a step", right, right, 1e-6)
    for wrong in (right + 1e-5, right.where(right < 0, float("nan"))):
        with pytest.raises(benchmark.Disagreement, match="a step"): benchmark.agree("a step", wrong, right, 1e-6)
