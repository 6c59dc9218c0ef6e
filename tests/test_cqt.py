"""The constant-Q transform and its chroma: the definition, librosa and nnAudio as referees, and signals with known answers."""
import dataclasses
import json
import sys
from pathlib import Path

import librosa
import numpy as np
import pytest
import scipy.signal
import torch
from nnAudio.features.cqt import CQT1992v2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import features as benchmark
from paired import Disagreement

from musicssl.data import scorebox
from musicssl.features import cqt as room
from musicssl.features.cqt import C1, CQT, ChromaCQT, chroma_fold, quality

MERT = {"sr": 24_000, "hop_length": 320, "fmin": 32.7, "n_bins": 336, "bins_per_octave": 48}


def relative(found, expected) -> float:
    """Norm of the difference over the norm of what was expected."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def sine(frequency: float, samples: int, rate: int) -> torch.Tensor:
    return torch.sin(2 * torch.pi * frequency * torch.arange(samples, dtype=torch.float64) / rate).float()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return .1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def swelling(samples: int, rate: int) -> torch.Tensor:
    """Forty tones that come and go, between 55 Hz and 1,760 Hz."""
    rng, t = np.random.default_rng(0), np.arange(samples) / rate
    tones = sum(np.sin(2 * np.pi * 440 * 2**(step / 12) * t + rng.uniform(0, 6)) * np.exp(-(t - rng.uniform(0, t[-1]))**2 / .3)
                for step in rng.integers(-36, 24, 40))
    return torch.from_numpy(tones / np.abs(tones).max()).float()


@pytest.fixture(scope="module")
def music() -> dict[int, torch.Tensor]:
    """Five seconds of a chorale, by sample rate."""
    return {rate: scorebox.load(10, 5., rate, progress=False).wave([9])[0] for rate in (22_050, 24_000)}


@pytest.fixture(scope="module")
def mert() -> CQT:
    return CQT.preset("mert")


def by_definition(wave: torch.Tensor, transform: CQT, window=(.5, .5), power: float = .5) -> np.ndarray:
    """Every bin as a correlation with its filter, in double precision, every `hop`-th value of it."""
    frames, rows = 1 + len(wave) // transform.hop, []
    for f, length in zip(transform.centres.tolist(), transform.lengths.tolist()):
        half = int(length // 2)
        t = np.arange(-half, half + 1)
        weight = window[0] + window[1] * np.cos(2 * np.pi * t / length)
        kernel = weight / weight.sum() * np.exp(-2j * np.pi * f / transform.sample_rate * t) * length**power
        padded = np.pad(wave.double().numpy(), (half, half + transform.hop))
        rows.append(scipy.signal.fftconvolve(padded, kernel[::-1], mode="valid")[::transform.hop][:frames])
    return np.stack(rows)


# The definition

SETTINGS = {
    "12 per octave": {"sample_rate": 8000, "hop": 256, "f_min": 55., "n_bins": 60},
    "24 per octave": {"sample_rate": 8000, "hop": 160, "f_min": 110., "n_bins": 96, "bins_per_octave": 24},
    "odd hop": {"sample_rate": 8000, "hop": 147, "f_min": 100., "n_bins": 55},
    "hop of 3": {"sample_rate": 4000, "hop": 3, "f_min": 200., "n_bins": 36, "seconds": .5},
    "hop of 1": {"sample_rate": 4000, "hop": 1, "f_min": 400., "n_bins": 24, "seconds": .25},
    "a single bin": {"sample_rate": 8000, "hop": 80, "f_min": 440., "n_bins": 1},
    "huge hop": {"sample_rate": 8000, "hop": 20_000, "f_min": 440., "n_bins": 24}}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_equals_the_definition(setting):
    transform, wave = CQT(**setting), noise(30_000)
    assert relative(transform(wave), np.abs(by_definition(wave, transform))) < 5e-4


def test_bins_beside_half_the_sample_rate_are_off_by_a_per_cent():
    """What lies beyond is not mirrored: 1 % two widths below the edge, nothing an octave below."""
    transform, wave = CQT(8000, 80, 1000., 23), noise(30_000)
    errors = [relative(*rows) for rows in zip(transform(wave), np.abs(by_definition(wave, transform)))]
    assert max(errors) == errors[-1] < .02 and errors[-5] < 1e-3 and errors[-13] < 1e-4


@pytest.mark.parametrize("samples", [1, 2, 255, 256, 257, 4000, 39_999, 40_000, 40_256, 100_000])
def test_every_length(samples):
    """Shorter than the filters, of one piece exactly, one frame more, and of many pieces."""
    transform, wave = CQT(8000, 256, 110., 36), noise(samples)
    found = transform(wave)
    assert found.shape == (36, 1 + samples // 256) and relative(found, np.abs(by_definition(wave, transform))) < 5e-4


@pytest.mark.parametrize("norm, power, factor", [("sqrt_length", .5, 1), ("unit_sum", 0, 1), ("amplitude", 0, 2)])
def test_scales(norm, power, factor):
    transform, wave = CQT(8000, 256, 110., 36, norm=norm), noise(20_000)
    assert relative(transform(wave), factor * np.abs(by_definition(wave, transform, power=power))) < 5e-4


def test_hamming_is_cut_where_its_spectrum_decays_slowly():
    """Hamming's window ends at .08, so more of its spectrum lies outside the band that is kept."""
    transform, wave = CQT(8000, 160, 110., 60, 24, window="hamming"), noise(20_000)
    assert 1e-4 < relative(transform(wave), np.abs(by_definition(wave, transform, (.54, .46)))) < 1e-2


def test_phase_is_that_of_the_definition():
    transform, wave = CQT(8000, 256, 110., 36, phase=True), noise(50_000)
    found = transform(wave)
    assert found.dtype == torch.complex64 and relative(found, by_definition(wave, transform)) < 5e-4
    assert torch.allclose(found.abs(), CQT(8000, 256, 110., 36)(wave), atol=1e-6)


def test_pieces_cannot_be_told_apart():
    """Named mutation: pieces that do not overlap. The seams then show."""
    whole, wave = CQT(8000, 256, 110., 36, seconds=20.), noise(150_000)
    cut = CQT(8000, 256, 110., 36, seconds=2.)
    assert relative(cut(wave), whole(wave)) < 1e-4
    cut.fresh += 2 * cut.reach
    with pytest.raises(AssertionError): assert cut(wave).shape == whole(wave).shape and relative(cut(wave), whole(wave)) < 1e-2


# The referees

def test_agrees_with_nnaudio(mert, music):
    """P5: what MERT's own code computes, on tones, noise and music."""
    wave = torch.stack([swelling(48_000, 24_000), noise(48_000), music[24_000][:48_000], sine(440, 48_000, 24_000)])
    peer = CQT1992v2(**MERT, pad_mode="constant", verbose=False)
    with torch.no_grad(): expected, found = peer(wave), mert(wave)
    deviations = [relative(a, b) for a, b in zip(found, expected)]
    assert max(deviations) < 2e-3, deviations
    held, theirs = (sum(b.numel() * b.element_size() for b in module.buffers()) for module in (mert, peer))
    assert held < theirs / 10, f"weights: {held / 1e6:.0f} MB, nnAudio {theirs / 1e6:.0f} MB"


LIBROSA = {
    "mert": ({"q": quality(48, both_sides=True)}, MERT),
    "musicoder": ({}, {"sr": 44_100, "hop_length": 1024, "n_bins": 144, "bins_per_octave": 24, "window": "hamming"}),
    "multitask": ({}, {"sr": 16_000, "hop_length": 160, "n_bins": 84})}


@pytest.mark.parametrize("name", LIBROSA)
def test_agrees_with_librosa(name, music):
    """Where we are further than 1e-2 from librosa, at 12 bins per octave, librosa is as far from the definition, and we are not."""
    changes, options = LIBROSA[name]
    transform = CQT.preset(name, **changes)
    rate = transform.sample_rate
    waves = {"tones": swelling(3 * rate, rate), "noise": noise(3 * rate),
             "music": torch.from_numpy(librosa.resample(music[24_000][:72_000].numpy(), orig_sr=24_000, target_sr=rate))}
    for what, wave in waves.items():
        found, expected = transform(wave), np.abs(librosa.cqt(wave.numpy(), tuning=0, **options))
        if relative(found, expected) < 1e-2: continue
        exact = np.abs(by_definition(wave, transform))
        assert name == "multitask" and relative(found, exact) < 1e-4 and 1e-2 < relative(exact, expected) < 2e-2, what


def test_q_of_the_neighbours_matters():
    """librosa's Q and nnAudio's differ by 3 % at 12 bins per octave, more than the tolerance."""
    wave = swelling(64_000, 16_000)
    expected = np.abs(librosa.cqt(wave.numpy(), sr=16_000, hop_length=160, tuning=0))
    assert relative(CQT.preset("multitask", q=None)(wave), expected) > 2 * relative(CQT.preset("multitask")(wave), expected)


# Known signals

def test_target_of_mert(mert):
    """A unit sine at 440 Hz: bin 180, 30.6; 120,000 samples: 376 frames; noise of deviation .1: .108 on average."""
    found = mert(sine(440, 120_000, 24_000))
    assert found.shape == (336, 376) and found.dtype == torch.float32
    assert (found[:, 100:276].argmax(0) == 180).all() and abs(float(found[180, 100:276].mean()) - 30.6) < .05
    assert abs(float(mert(noise(4, 120_000)).mean()) - .108) < .001


def test_two_tones_make_two_peaks(mert):
    found = mert(sine(220, 120_000, 24_000) + .5 * sine(220 * 2**.5, 120_000, 24_000))[:, 188]
    peaks, _ = scipy.signal.find_peaks(found, height=1.)
    assert peaks.tolist() == [132, 156]
    assert found[156] / found[132] == pytest.approx(.5 * 2**-.25, rel=1e-2)


def test_columns_of_musicoder():
    found = CQT.preset("musicoder")(sine(440, 30 * 44_100, 44_100))
    assert found.shape == (144, 1292) and (found[:, 30:-30].argmax(0) == 90).all()
    assert ChromaCQT.preset("musicoder")(sine(440, 44_100, 44_100)).mean(1).argmax() == 9 * 12


def test_a_click_stands_where_it_was():
    transform = CQT.preset("multitask")
    for at in (0, 81, 8000, 8100, 15_999):
        wave = torch.zeros(16_000)
        wave[at] = 1
        assert abs(int(transform(wave)[60:].mean(0).argmax()) - round(at / 160)) <= 1


def test_silence_is_zero_and_its_gradient_finite(mert):
    for module in (mert, ChromaCQT(24_000, 320)):
        wave = torch.zeros(2, 9000, requires_grad=True)
        found = module(wave)
        found.sum().backward()
        assert (found == 0).all() and wave.grad.isfinite().all()


def test_a_hop_later_is_a_frame_later(mert):
    wave = noise(120_000)
    assert relative(mert(wave[320:])[:, 80:-80], mert(wave)[:, 81:-80]) < 1e-4


def test_gradient_is_the_adjoint(mert):
    """<y, A v> = <A* y, v>, with autograd computing A* y."""
    transform, wave, direction = CQT(8000, 256, 110., 36, phase=True), noise(30_000).requires_grad_(), noise(30_000, seed=1)
    weights = torch.complex(noise(36, 118, seed=2), noise(36, 118, seed=3))
    (weights.conj() * transform(wave)).real.sum().backward()
    assert float(wave.grad @ direction) == pytest.approx(float((weights.conj() * transform(direction)).real.sum()), rel=1e-4)


# Batches and devices

def test_rows_do_not_see_each_other(mert):
    wave = noise(5, 30_000)
    expected = torch.stack([mert(row) for row in wave])
    wave[2] = float("nan")
    found = mert(wave)
    assert found[2].isnan().all() and torch.allclose(found[[0, 1, 3, 4]], expected[[0, 1, 3, 4]], atol=1e-5)


def test_shapes_in_shapes_out(mert):
    wave = noise(6, 10_000)
    expected = mert(wave)
    assert torch.allclose(mert(wave.view(2, 3, -1)), expected.view(2, 3, 336, -1), atol=1e-6)
    assert torch.allclose(mert(wave[0]), expected[0], atol=1e-5)
    assert expected.is_contiguous() and torch.allclose(mert(wave.double()), expected) and not mert.state_dict()


def test_autocast_changes_nothing(monkeypatch):
    """Named mutation: without `in_float32`, products are computed in bfloat16."""
    transform, chroma, wave = CQT(8000, 256, 110., 36), ChromaCQT(16_000, n_octaves=6), noise(2, 30_000)
    expected = transform(wave), chroma(wave)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transform(wave), expected[0]) and torch.equal(chroma(wave), expected[1])
        monkeypatch.setattr(CQT, "forward", CQT.forward.__wrapped__)
        assert relative(transform(wave), expected[0]) > 1e-3


def test_as_many_operations_for_many_rows_and_none_waits(mert):
    """No loop over rows: per octave a product and an inverse FFT. Nothing asks the device for a value."""
    counts = []
    for rows in (1, 9):
        wave = noise(rows, 20_000)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile: mert(wave)
        names = [event.name for event in profile.events()]
        assert not {"aten::item", "aten::_local_scalar_dense", "aten::nonzero"} & set(names)
        counts.append({name: names.count(f"aten::{name}") for name in ("_fft_r2c", "bmm", "_fft_c2c", "cat")})
    assert counts == 2 * [{"_fft_r2c": 1, "bmm": 7, "_fft_c2c": 7, "cat": 1}]


# Chroma

@pytest.mark.parametrize("options", [{}, {"bins_per_octave": 24, "n_octaves": 6}, {"n_chroma": 24, "bins_per_octave": 48}], ids=str)
def test_chroma_agrees_with_librosa(options, music):
    """With the tuning librosa would otherwise guess set to 0; the largest class of every frame is 1."""
    chroma = ChromaCQT(22_050, **options)
    peer = {"n_chroma": 12, "bins_per_octave": 36, "n_octaves": 7} | options
    for wave in (music[22_050], swelling(88_200, 22_050), noise(88_200)):
        found, expected = chroma(wave), librosa.feature.chroma_cqt(y=wave.numpy(), sr=22_050, tuning=0, **peer)
        assert relative(found, expected) < 1e-2 and torch.equal(found.amax(0), torch.ones(found.shape[1]))


@pytest.mark.parametrize("bins, per_octave, classes, lowest", [(252, 36, 12, C1), (84, 12, 12, C1), (100, 24, 12, 55.), (200, 48, 24, 41.2),
                                                               (1008, 144, 144, C1), (60, 36, 12, 27.5)])
def test_fold_is_librosas(bins, per_octave, classes, lowest):
    fold = chroma_fold(bins, per_octave, classes, lowest)
    np.testing.assert_array_equal(fold, librosa.filters.cq_to_chroma(bins, bins_per_octave=per_octave, n_chroma=classes, fmin=lowest))
    assert (fold.sum(0) == 1).all()


def test_chroma_of_a_tone_forgets_the_octave():
    chroma = ChromaCQT.preset("multitask")
    for octave in range(4): assert (chroma(sine(110 * 2**octave, 32_000, 16_000))[:, 40:-40].argmax(0) == 9).all()
    assert chroma(sine(440, 32_000, 16_000)).shape == (12, 201)


# What is refused

@pytest.mark.parametrize("build, message", [
    (lambda: CQT(44_100, n_bins=144), "up to 133,952 Hz"), (lambda: CQT(8000), "at most half of 8000 Hz"), (lambda: CQT(22_050, hop=0), "hop of 0"),
    (lambda: CQT(22_050, n_bins=0), "0 bins"), (lambda: CQT(22_050, f_min=0.), "from 0.0 Hz"), (lambda: CQT(22_050, seconds=0.), "pieces of 0.0 s"),
    (lambda: CQT(22_050, window="boxcar"), "hann, hamming"), (lambda: CQT(22_050, norm="l2"), "sqrt_length, unit_sum, amplitude"),
    (lambda: CQT(22_050, bins_per_octave=0), "wanted at least 1"), (lambda: CQT(8000, n_bins=12)(torch.zeros(2, 0)), "at least one sample"),
    (lambda: chroma_fold(84, 40), "multiple of 12"), (lambda: CQT.preset("paper"), "it has mert, musicoder, multitask"),
    (lambda: ChromaCQT.preset("paper"), "it has multitask, musicoder")])
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message): build()


def test_presets_are_the_papers():
    assert set(CQT.presets()) == {"mert", "musicoder", "multitask"} and set(ChromaCQT.presets()) == {"multitask", "musicoder"}
    CQT.presets()["mert"]["hop"] = 1
    assert CQT.presets()["mert"] == {"sample_rate": 24_000, "hop": 320, "f_min": 32.7, "n_bins": 336, "bins_per_octave": 48}
    assert CQT.preset("mert", n_bins=84, bins_per_octave=12).n_bins == 84


def test_window_spectrum_is_a_fourier_transform():
    """At a length that is not whole, for both windows, against the sum itself."""
    theta, t = torch.linspace(-3, 3, 601, dtype=torch.float64), np.arange(-50, 51)
    for name, (a, b) in room._WINDOWS.items():
        weight = a + b * np.cos(2 * np.pi * t / 100.7)
        expected = np.cos(np.outer(theta, t)) @ weight / weight.sum()
        np.testing.assert_allclose(room.window_spectrum(theta, torch.tensor(100.7, dtype=torch.float64), name), expected, atol=1e-12)


# benchmarks/features.py: it runs, agreement comes before time, and what is missing is said. No time is asserted.

def test_the_benchmark_as_json(capsys):
    benchmark.main(["--size", "test", "--json"])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert {row["what"]: row["at_least"] for row in found["P5"]["rows"]} == {
        "MERT's target: nnAudio CQT1992v2 : ours": 12., "MERT's target: nnAudio CQT2010v2 : ours": 1.2, "MERT's target: librosa : ours": None}
    assert {row["what"]: row["at_least"] for row in found["P7"]["rows"]} == {
        "log-mel: librosa : ours": 1.5, "log-mel: nnAudio : ours": 3., "log-mel: torchaudio : ours": .95, "chroma: librosa : ours": 1.5}
    assert list(found) == ["P5", "P7"] and "P6: skipped, it needs a GPU" in printed.err


@pytest.mark.parametrize("name, id", [("nnaudio_cqt", "P5"), ("librosa_cqt", "P5"), ("librosa_mel", "P7"), ("librosa_chroma", "P7")])
def test_the_benchmark_times_nothing_that_disagrees(name, id, monkeypatch):
    """Named mutation: a peer that is 2 % too loud."""
    honest = getattr(benchmark, name)
    loud = (lambda kind: lambda wave: 1.02 * honest(kind)(wave)) if name == "nnaudio_cqt" else lambda y: 1.02 * honest(y)
    monkeypatch.setattr(benchmark, name, loud)
    monkeypatch.setattr(benchmark, "paired", lambda *given: pytest.fail("timed"))
    with pytest.raises(Disagreement, match="relative L2"): benchmark.main(["--size", "test", "--only", id])


def test_the_benchmark_without_nnaudio(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "nnAudio"]: monkeypatch.setitem(sys.modules, name, None)
    benchmark.main(["--size", "test", "--only", "P5", "P7"])
    printed = capsys.readouterr()
    assert "nnAudio" not in printed.out.split("\n", 1)[1] and "librosa : ours" in printed.out
    assert "no rows for nnAudio" in printed.err and "when last measured, 2026-" in printed.err


def test_the_share_of_merts_step_is_measured_of_what_the_step_asks(monkeypatch):
    """On a CPU, to see that it runs. Named mutation: a step that asks for the target of a louder wave."""
    row = benchmark.in_the_step(benchmark.SIZES["test"], "cpu")
    assert (row.id, row.at_most) == ("P6", .02) and 0 < row.ratio < .5
    listen = benchmark.MERTPretext.listen
    monkeypatch.setattr(benchmark.MERTPretext, "listen", lambda self, batch: listen(self, dataclasses.replace(batch, wave=1.02 * batch.wave)))
    monkeypatch.setattr(benchmark, "paired", lambda *given: pytest.fail("timed"))
    with pytest.raises(Disagreement, match="in the step and alone"): benchmark.in_the_step(benchmark.SIZES["test"], "cpu")
