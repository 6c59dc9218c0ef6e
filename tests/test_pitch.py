"""Pitch shift beyond its notebook: every length, dtype and split, chords at all shifts, and what each protection is for."""
import math

import pytest
import torch
import torch.nn.functional as F

from musicssl.augment import pitch
from musicssl.augment.base import Compose, Gain, draw_seeds
from musicssl.augment.pitch import PitchShift, stretch, vary_speed

DEVICES = [torch.device("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
RATE = 22050
SEEDS = draw_seeds(9, torch.Generator().manual_seed(0))
CENTS = torch.tensor([-700, -699, -401, -100, -7, 1, 33, 250, 555, 700])


def waves(n_samples=30_000, rows=9):
    return .1 * torch.randn(rows, n_samples, generator=torch.Generator().manual_seed(1))


def tones(*hertz, n_samples=50_000):
    time = torch.arange(n_samples) / RATE
    return sum(torch.sin(2 * math.pi * f * time) for f in hertz)[None] / len(hertz)


def shifted(wave, cents=CENTS):
    return PitchShift().transform(wave.expand(len(cents), -1), {"cents": cents})


def off_by(wave, hertz):
    """How far the strongest partial near each frequency is from it, in cents."""
    n = 2**19
    power = torch.fft.rfft(wave[:, 8192:40960].double() * torch.hann_window(32768, dtype=torch.float64), n).abs().clamp_min(1e-12).log()
    scale = torch.arange(1, n // 2 + 1, dtype=torch.float64) * RATE / n
    near = (1200 * (scale / hertz[:, None]).log2()).abs() < 100
    top = F.pad(power[:, 1:].where(near, -torch.inf), (1, 0), value=-torch.inf).argmax(1, keepdim=True)
    a, b, c = (power.gather(1, top + step)[:, 0] for step in (-1, 0, 1))
    return 1200 * ((top[:, 0] + .5 * (a - c) / (a - 2 * b + c)) * RATE / n / hertz).log2()


@pytest.mark.parametrize("chord", [(110.,), (440.,), (3520.,), (261.63, 329.63, 392.), (130.81, 164.81, 196.), (220., 261.63, 311.13, 369.99)])
def test_within_a_cent(chord):
    """P4: each note of a tone, a major triad and a diminished chord, at ten shifts."""
    out = shifted(tones(*chord))
    for f in chord: assert off_by(out, f * 2 ** (CENTS.double() / 1200)).abs().max() < 1, f


def test_a_short_window_loses_close_notes():
    """What the default window is for: with 2,048 samples the lowest note of a diminished chord is gone a fifth lower."""
    out = PitchShift(window=2048).transform(tones(220., 261.63, 311.13, 369.99), {"cents": CENTS[:1]})
    assert off_by(out, 220. * 2 ** (CENTS[:1].double() / 1200)).abs() > 50


def test_the_measure_notices_a_cent():
    assert off_by(tones(440. * 2 ** (1 / 1200)), torch.tensor([440.]))[0] == pytest.approx(1, abs=.02)


def level_db(wave):
    return 10 * wave[:, 8192:40960].square().mean(1).log10()


def test_tones_keep_their_level_because_peaks_lead():
    """The mutation: without peaks every bin goes its own way, and a tone loses more than half a decibel."""
    wave = tones(440.)
    assert (level_db(shifted(wave)) - level_db(wave)).abs().max() < .05
    with pytest.MonkeyPatch.context() as mutated:
        mutated.setattr(pitch, "_nearest_peak", lambda power: torch.arange(power.shape[-1]).expand(power.shape))
        assert (level_db(shifted(wave)) - level_db(wave)).abs().max() > .5


def test_noise_and_clicks_stay_within_bounds():
    """Noise loses at most 4 dB of level; 95 % of a click's energy stays within 50 ms, and a shift of one cent does not move it."""
    noise = waves(59_049, 1)
    assert -4 < (level_db(shifted(noise)) - level_db(noise)).min() < (level_db(shifted(noise)) - level_db(noise)).max() < .1
    clicks = torch.zeros(1, 30_000)
    clicks[:, 15_000] = 1
    energy, far = shifted(clicks).square(), (torch.arange(30_000) - 15_000).abs() / RATE
    assert (energy[:, far < .05].sum(1) > .95 * energy.sum(1)).all()
    assert shifted(clicks, torch.tensor([-1, 1])).argmax(1).tolist() == pytest.approx([15_000] * 2, abs=25)


def near_clicks():
    """Over clicks at 13 places, the smallest share of energy that stays within 50 ms."""
    at = torch.arange(12_000, 18_001, 500)
    clicks = torch.zeros(len(at), 30_000)
    clicks[torch.arange(len(at)), at] = 1
    energy = torch.stack([shifted(click[None]) for click in clicks]).square()             # (13, shifts, samples)
    return (energy * ((torch.arange(30_000) - at[:, None, None]).abs() < .05 * RATE)).sum(-1).div(energy.sum(-1)).min()


def test_clicks_stay_together_wherever_they_fall(monkeypatch):
    """And the mutation: when every bin goes its own way, a click is scattered."""
    assert near_clicks() > .95
    monkeypatch.setattr(pitch, "_nearest_peak", lambda power: torch.arange(power.shape[-1]).expand(power.shape))
    assert near_clicks() < .9


def quietest_click():
    """Over clicks at 13 places within two frames, in dB."""
    places = range(15_000, 18_100, 256)
    return min(10 * shifted(F.pad(torch.ones(1, 1), (at, 33_000 - at)), CENTS[:1]).square().sum().log10() for at in places)


def test_no_click_falls_between_two_frames():
    """A fifth down, frames are read one and a half hops apart and must still overlap."""
    assert quietest_click() > -10.5


def wrong_db(hertz, speed):
    """The loudest partial that should not be there, against the tone that came in."""
    window = torch.signal.windows.kaiser(32768, beta=24., dtype=torch.float64)
    out = vary_speed(tones(hertz, n_samples=59_049), torch.tensor([speed], dtype=torch.float64), 32768)[0].double()
    level = 20 * (torch.fft.rfft(out * window).abs() * 2 / window.sum() + 1e-9).log10()
    return level[(torch.fft.rfftfreq(32768, 1 / RATE) - speed * hertz).abs() > 20].max().item()


@pytest.mark.parametrize("cents", [-1200, -700, 0, 1, 700, 1200])
def test_nothing_comes_back_as_a_wrong_note(cents):
    assert max(wrong_db(f, 2 ** (cents / 1200)) for f in (440., 3000., 7000., 9000., 10_500.)) < -58


def test_the_filter_is_what_keeps_wrong_notes_out(monkeypatch):
    """The mutation: a filter that does not follow the speed lets 9 kHz, a fifth up, come back at 8.6 kHz."""
    finer = pitch._finer
    monkeypatch.setattr(pitch, "_finer", lambda wave, speed: finer(wave, torch.ones_like(speed)))
    assert wrong_db(9000., 2 ** (700 / 1200)) > -3


@pytest.mark.parametrize("n_samples", [1, 2, 100, 1791, 1792, 15_360, 15_361, 40_000])
def test_every_length_comes_back(n_samples):
    out = PitchShift()(waves(n_samples), seeds=SEEDS)
    assert out.shape == (9, n_samples) and out.isfinite().all()


def test_long_waves_have_no_seams():
    """Blocks of the filter leave no trace: a tone over forty of them, at speed 1, is the tone."""
    wave = tones(1234.5, n_samples=70_000)
    assert (vary_speed(wave, torch.ones(1), 70_000) - wave)[:, 100:-100].abs().max() < 2e-3


@pytest.mark.parametrize("n_samples", [14_207, 14_208, 14_335, 14_336, 30_720])
def test_silence_follows_the_end(n_samples):
    """Also where the wave ends with a block: its last value does not go on."""
    assert vary_speed(torch.ones(2, n_samples), torch.tensor([1., 1.5]), 2 * n_samples)[:, n_samples + 600:].abs().max() < 1e-3


@pytest.mark.parametrize("window", [512, 1024, 3072, 4096])
def test_stretch_by_one_is_the_wave(window):
    """All of it, the highest bin included."""
    wave = waves()
    torch.testing.assert_close(stretch(wave, torch.ones(9), 30_000, window)[:, 3000:-3000], wave[:, 3000:-3000], atol=1e-4, rtol=0)


def test_stretch_keeps_onsets_where_they_belong():
    bursts = torch.zeros(2, 40_000)
    bursts[:, 20_000:22_000] = tones(440., n_samples=2000)
    rate = torch.tensor([.7, 1.4])
    energy = stretch(bursts, rate, 40_000).square()
    middle = (energy * torch.arange(40_000)).sum(1) / energy.sum(1)
    assert (middle - 21_000 / rate).abs().max() < 400


@pytest.mark.parametrize("split", [(1,) * 9, (2, 7), (4, 5), (8, 1)])
def test_rows_do_not_depend_on_the_batch(split):
    """R23: bit for bit in any split, whatever the size of the groups a processor works in."""
    whole, params = PitchShift(.7)(waves(), seeds=SEEDS, return_params=True)
    parts = [PitchShift(.7)(part, seeds=seeds) for part, seeds in zip(waves().split(split), SEEDS.split(split))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(whole[~params["applied"]], waves()[~params["applied"]]) and not params["applied"].all()


def test_the_order_of_rows_is_free():
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    assert torch.equal(PitchShift()(waves()[order], seeds=SEEDS[order]), PitchShift()(waves(), seeds=SEEDS)[order])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_shape_dtype_and_device_are_kept(dtype, device):
    wave = waves(5000).to(device, dtype)
    before = wave.clone()
    out = PitchShift()(wave, seeds=SEEDS)
    assert (out.shape, out.dtype, out.device) == (wave.shape, wave.dtype, wave.device)
    assert out.isfinite().all() and torch.equal(wave, before)


@pytest.mark.gpu
def test_a_gpu_shifts_as_a_processor_does():
    """Where two neighbouring bins are equally loud, rounding may choose the other: compare energies, and tones exactly."""
    here, there = (shifted(tones(440., 660.).to(device), CENTS.to(device)).cpu() for device in ("cpu", "cuda"))
    agree(there, here, 1e-3)


def agree(there, here, atol):
    """Up to the last frame; there a tone breaks off, and rounding decides which of many equally weak bins leads."""
    torch.testing.assert_close(there[:, :-3072], here[:, :-3072], atol=atol, rtol=0)
    torch.testing.assert_close(there, here, atol=.02, rtol=0)


def test_all_rows_at_once_as_row_by_row():
    """What a GPU does, done here: the array between is as long as the lowest shift asks, and nothing else changes."""
    wave = tones(440., 660.).expand(len(CENTS), -1)
    agree(PitchShift()._shift(wave, CENTS, -700), shifted(wave[:1]), 1e-5)


def test_silence_before_music_turns_nothing(monkeypatch):
    """Silence stays silence, and music after it as loud as it was; and the mutation: a turn of length 0 leaves silence for good."""
    assert (PitchShift()(torch.zeros(9, 3000), seeds=SEEDS) == 0).all()
    late = torch.cat([torch.zeros(1, 20_000), tones(440.)], 1)
    assert (level_db(shifted(late)[:, 20_000:]) - level_db(tones(440.))).abs().max() < .05
    tiny = PitchShift()(1e-25 * waves(3000), seeds=SEEDS)
    assert tiny.isfinite().all() and tiny.abs().max() < 1e-23
    monkeypatch.setattr(pitch, "_NOTHING", 0.)
    assert (shifted(late)[:, 25_000:] == 0).any()


def test_quiet_music_stays_in_tune():
    """What is taken for silence lies far below: a chord 80 dB down, less than three steps of 16 bits."""
    out = shifted(1e-4 * tones(261.63, 329.63, 392.))
    for f in (261.63, 329.63, 392.): assert off_by(1e4 * out, f * 2 ** (CENTS.double() / 1200)).abs().max() < 1, f


def test_no_row_is_looked_at_and_no_loop_runs_over_rows(monkeypatch):
    """On the `meta` device values do not exist; the same calls are made for 4 rows and for 400."""
    calls = []
    monkeypatch.setattr(pitch, "stretch", lambda *given: calls.append(len(given[0])) or stretch(*given))
    for rows in (4, 400): PitchShift()(torch.zeros(rows, 59_049, device="meta"), seeds=draw_seeds(rows, torch.Generator()))
    assert calls == [4, 400]


def test_gradients_flow():
    wave = waves(4000, 2).requires_grad_()
    PitchShift()(wave, seeds=SEEDS[:2]).square().sum().backward()
    assert wave.grad.isfinite().all() and (wave.grad != 0).any(1).all()


def test_draws_cover_the_range_evenly():
    params = PitchShift(cents=(-3, 3)).draw(torch.zeros(1), draw_seeds(10_000, torch.Generator().manual_seed(2)))
    counts = torch.bincount(params["cents"] + 3)
    assert len(counts) == 7 and (counts - 10_000 / 7).abs().max() < 4 * (10_000 * 6 / 49) ** .5


def test_it_stands_in_a_chain():
    _, params = Compose([PitchShift(.5), Gain(.5)])(waves(), seeds=SEEDS, return_params=True)
    assert {"pitch.applied", "pitch.cents"} <= set(params)


@pytest.mark.parametrize("call, match", [
    (lambda: PitchShift(cents=(700, -700)), "wanted low <= high"),
    (lambda: PitchShift(cents=(-.5, 700)), "wanted whole numbers"),
    (lambda: PitchShift(p=1.1), "wanted a probability"),
])
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match): call()
