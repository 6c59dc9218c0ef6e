"""Features against librosa, against signals one knows, and against what a training step may do to them. (The constant-Q room has its own file.)"""
import contextlib
import math
from functools import lru_cache

import librosa
import numpy as np
import pytest
import torch
from scipy import signal

from musicssl import compat
from musicssl.features import mel, spectral
from musicssl.features.mel import MFCC, Delta, LogMel, Magnitude, mel_bank, standardise
from musicssl.features.rhythm import Aperiodicity, OnsetStrength, Pitch, Prosody, Tempogram, fill_gaps
from musicssl.features.spectral import (RMS, ChromaSTFT, Gammatone, LogPower, SpectralCentroid, SpectralContrast, SpectralFlatness,
                                        ZeroCrossingRate, chroma_bank, erb_centres)

RATE = 16000
# The settings of the multi-task paper's targets: 16 kHz, hop 160.
ALL = {
    "log-mel": lambda: LogMel(RATE, 1024, 160, 128, log="ln", eps=1e-5), "log-mel in dB": lambda: LogMel(RATE, 512, 160, 40, win_length=400),
    "mfcc": lambda: MFCC(RATE, 20, 2048, 160), "magnitude": lambda: Magnitude(1024, 160), "log power": lambda: LogPower(),
    "chroma": lambda: ChromaSTFT(RATE, 2048, 160), "gammatone": lambda: Gammatone(RATE), "contrast": lambda: SpectralContrast(RATE, 1024, 160),
    "centroid": lambda: SpectralCentroid(RATE, 1024, 160), "flatness": lambda: SpectralFlatness(1024, 160), "rms": lambda: RMS(320, 160),
    "crossings": lambda: ZeroCrossingRate(320, 160), "onset": lambda: OnsetStrength(RATE, 1024, 160),
    "tempogram": lambda: Tempogram(RATE, 1024, 160, step=4), "prosody": lambda: Prosody(RATE),
}
WIDTH = {"log-mel": 128, "log-mel in dB": 40, "mfcc": 20, "magnitude": 513, "log power": 1025, "chroma": 12, "gammatone": 40, "contrast": 7,
         "centroid": 1, "flatness": 1, "rms": 1, "crossings": 1, "onset": 1, "tempogram": 96, "prosody": 4}
each = pytest.mark.parametrize("name", ALL)
build = lru_cache(lambda name: ALL[name]())


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def tone(hertz, seconds=1., rate=RATE, partials=(1.,)):
    time = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    return sum(a * torch.sin(2 * torch.pi * h * hertz * time) for h, a in enumerate(partials, 1)).float()


@lru_cache
def tune(rate=RATE, seconds=1.):
    """Plucked notes and a little noise, so that every bin holds something."""
    notes = [tone(h, .25, rate, (1, .5, .3, .2)) * torch.exp(-torch.arange(round(.25 * rate)) / (.1 * rate))
             for h in (262, 330, 392, 523, 294, 349, 440, 587)]
    wave = torch.cat(notes)
    wave = wave.repeat(math.ceil(seconds / 2))[:round(seconds * rate)]
    return .2 * wave + .001 * torch.randn(len(wave), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------------------- librosa
SETTINGS = [(22050, 2048, 512), (16000, 1024, 160), (24000, 2048, 320), (44100, 2048, 1024), (8000, 512, 128)]


@pytest.mark.parametrize("rate, n_fft, hop, window", [*((*setting, "hann") for setting in SETTINGS), (*SETTINGS[3], "hamming")])
def test_mel_and_chroma_as_librosa(rate, n_fft, hop, window):
    """P7: 1e-5 relative L2, at librosa's defaults and elsewhere."""
    wave = tune(rate)
    same, n_mels = dict(y=wave.numpy(), sr=rate, n_fft=n_fft, hop_length=hop, window=window), 40 if rate == 8000 else 128
    power = librosa.feature.melspectrogram(**same, n_mels=n_mels)
    module = lambda **options: LogMel(rate, n_fft, hop, n_mels, window=window, **options)(wave)
    assert relative(module(), librosa.power_to_db(power)) < 1e-5
    assert relative(module(log=None), power) < 1e-5
    assert relative(module(log="ln", eps=1e-5), np.log(power + 1e-5)) < 1e-5
    assert relative(ChromaSTFT(rate, n_fft, hop, window=window)(wave), librosa.feature.chroma_stft(**same, tuning=0)) < 1e-5


def test_a_short_window_and_the_other_scale():
    wave = tune()
    power = librosa.feature.melspectrogram(y=wave.numpy(), sr=RATE, n_fft=512, win_length=400, hop_length=160, n_mels=40, htk=True)
    assert relative(LogMel(RATE, 512, 160, 40, win_length=400, scale="htk", log=None)(wave), power) < 1e-5
    assert relative(LogMel(RATE, 512, 160, 40, win_length=400, log=None)(wave), power) > .1 # the other scale is another feature


def test_the_default_is_what_it_was():
    """To the bit: the floor of the committed tables is made of it. A power of the real and imaginary part would be faster and differ."""
    wave = torch.stack([tune(), .001 * tune().flip(0), torch.zeros(16000)])
    old = lambda n_fft, hop, bank: 10 * (bank.T @ compat.torchaudio().functional.spectrogram(
        wave, 0, torch.hann_window(n_fft), n_fft, hop, n_fft, power=2., normalized=False, pad_mode="constant")).clamp_min(1e-10).log10()
    level = old(2048, 512, mel_bank(RATE))
    floored = level.maximum(level.amax((-2, -1), keepdim=True) - 80)
    assert torch.equal(LogMel(RATE)(wave), floored) and torch.equal(LogMel(RATE, top_db=None)(wave), level)
    spectrum = torch.stft(wave, 2048, 512, window=torch.hann_window(2048), pad_mode="constant", return_complex=True)
    other = 10 * (mel_bank(RATE).T @ (spectrum.real**2 + spectrum.imag**2)).clamp_min(1e-10).log10()
    assert not torch.equal(other, level)


@pytest.mark.parametrize("order, width", [(1, 9), (2, 9), (1, 3), (2, 5), (3, 11)])
def test_delta_as_librosa(order, width):
    x = torch.randn(2, 20, 50, generator=torch.Generator().manual_seed(0))
    assert relative(Delta(order, width)(x), librosa.feature.delta(x.numpy(), order=order, width=width)) < 1e-5


@pytest.mark.parametrize("rate, n_fft, n_chroma", [(22050, 2048, 12), (44100, 2048, 12), (16000, 1024, 12), (24000, 2048, 264), (8000, 512, 36)])
def test_chroma_bank_as_librosa(rate, n_fft, n_chroma):
    theirs = librosa.filters.chroma(sr=rate, n_fft=n_fft, n_chroma=n_chroma, tuning=0)
    np.testing.assert_allclose(chroma_bank(rate, n_fft, n_chroma).T, theirs, atol=1e-6)


@pytest.mark.parametrize("rate, n_fft, hop", SETTINGS[:4])
def test_shapes_of_the_spectrum_as_librosa(rate, n_fft, hop):
    wave = tune(rate)
    same = dict(y=wave.numpy(), n_fft=n_fft, hop_length=hop)
    assert relative(SpectralContrast(rate, n_fft, hop)(wave), librosa.feature.spectral_contrast(**same, sr=rate)) < 1e-5
    assert relative(SpectralCentroid(rate, n_fft, hop)(wave), librosa.feature.spectral_centroid(**same, sr=rate)) < 1e-5
    assert relative(SpectralFlatness(n_fft, hop)(wave), librosa.feature.spectral_flatness(**same)) < 1e-5


@pytest.mark.parametrize("frame, hop", [(2048, 512), (320, 160)])
def test_the_wave_itself_as_librosa(frame, hop):
    wave = torch.cat([tune(), torch.zeros(5000), -tune()])
    same = dict(y=wave.numpy(), frame_length=frame, hop_length=hop)
    assert relative(RMS(frame, hop)(wave), librosa.feature.rms(**same)) < 1e-5
    assert relative(ZeroCrossingRate(frame, hop)(wave), librosa.feature.zero_crossing_rate(**same)) < 1e-6


@pytest.mark.parametrize("rate, n_fft, hop", SETTINGS[:3])
def test_rhythm_as_librosa(rate, n_fft, hop):
    wave = tune(rate, 4.)
    onset = librosa.onset.onset_strength(y=wave.numpy(), sr=rate, n_fft=n_fft, hop_length=hop)
    assert relative(OnsetStrength(rate, n_fft, hop)(wave)[0], onset) < 1e-5
    whole = librosa.feature.tempogram(onset_envelope=onset, sr=rate, hop_length=hop)
    assert relative(Tempogram(rate, n_fft, hop)(wave), whole) < 1e-5
    assert relative(Tempogram(rate, n_fft, hop, step=4)(wave), whole[::4]) < 1e-5
    assert relative(Tempogram(rate, n_fft, hop, win_length=200)(wave), librosa.feature.tempogram(onset_envelope=onset, win_length=200)) < 1e-5


@pytest.mark.parametrize("channel", [0, 7, 15, 23, 30])
def test_gammatone_as_scipy(channel):
    """The gain within two bandwidths, and the level of filtered noise, against a filter that runs over the wave."""
    centre = float(erb_centres(40, 500, 8000)[channel])
    b, a = signal.gammatone(centre, "iir", fs=RATE)
    hertz = np.arange(1025) * RATE / 2048
    gain = np.abs(signal.freqz(b, a, 2 * np.pi * hertz / RATE)[1])**2
    near = np.abs(hertz - centre) < 2 * 24.7 * (1 + .00437 * centre)
    np.testing.assert_allclose(10 * np.log10(spectral.gammatone_bank(RATE).numpy()[near, channel]), 10 * np.log10(gain[near]), atol=.25)
    noise = torch.randn(2 * RATE, generator=torch.Generator().manual_seed(0))
    filtered = signal.lfilter(b, a, noise.numpy())
    ours = Gammatone(RATE)(noise)[channel].exp().square().mean().sqrt()
    assert abs(float(ours) / np.sqrt((filtered**2).mean()) - 1) < .02


# ------------------------------------------------------------------------------------------------------- known signals
def test_a_tone():
    """440 Hz: pitch class A, the mel channel and the gammatone channel that hold it, its own frequency as centroid; an octave changes no class."""
    wave = tone(440)
    assert (ChromaSTFT(RATE, 2048, 160)(wave)[:, 8:-8].argmax(0) == 9).all()
    assert (ChromaSTFT(RATE, 2048, 160)(tone(880))[:, 8:-8].argmax(0) == 9).all()
    assert (ChromaSTFT(RATE, 2048, 160)(tone(466.16))[:, 8:-8].argmax(0) == 10).all()
    peak = mel_bank(RATE, 1024, 128)[28].argmax() # bin 28 is 437.5 Hz
    assert (LogMel(RATE, 1024, 160, 128)(wave)[:, 5:-5].argmax(0) - peak).abs().max() <= 1
    near = (erb_centres(40, 500, 8000) - 2000).abs().argmin()
    assert (Gammatone(RATE)(tone(2000))[:, 5:-5].argmax(0) == near).all()
    assert (SpectralCentroid(RATE, 1024, 160)(tone(1000))[0, 5:-5] / 1000 - 1).abs().max() < .02
    assert SpectralFlatness(1024, 160)(wave)[0, 5:-5].max() < 1e-3


def test_noise_and_steps():
    noise = torch.randn(4 * RATE, generator=torch.Generator().manual_seed(0))
    assert abs(float(SpectralFlatness()(noise).mean()) - math.exp(-np.euler_gamma)) < .01
    assert abs(float(SpectralCentroid(RATE)(noise)[0, 5:-5].mean()) / (RATE / 4) - 1) < .01
    rich = tone(220, partials=[1 / h for h in range(1, 20)])
    assert SpectralContrast(RATE)(rich)[2:6, 10:20].mean() > SpectralContrast(RATE)(noise)[2:6, 10:20].mean() + 10
    torch.testing.assert_close(RMS()(tone(1000))[0, 10], torch.tensor(.5**.5), atol=1e-3, rtol=0)
    assert abs(float(ZeroCrossingRate()(tone(1000))[0, 10]) * RATE - 2000) < 16
    assert (Gammatone(RATE)(tone(float(erb_centres(40, 500, 8000)[25])))[25, 10:-10].exp() / .5**.5 - 1).abs().max() < .01


@pytest.mark.parametrize("per_minute, lag", [(120, 50), (100, 60), (150, 40)])
def test_clicks_have_their_lag(per_minute, lag):
    """M-5: 120 beats a minute at 100 frames a second come back after 50 frames, and after 100."""
    wave = torch.zeros(8 * RATE)
    wave[4000::round(60 / per_minute * RATE)] = .8
    picture = Tempogram(RATE, 1024, 160)(wave)[:, 200:600]
    assert (picture[20:round(1.5 * lag)].argmax(0) + 20 == lag).all()
    assert (picture[round(1.5 * lag):round(2.5 * lag)].argmax(0) + round(1.5 * lag) == 2 * lag).all()


@pytest.mark.parametrize("name", ["log-mel", "log-mel in dB", "log power", "gammatone", "rms", "onset"])
@pytest.mark.parametrize("sample", [4000, 9999, 14321])
def test_a_click_peaks_at_its_frame(name, sample):
    """M-2: every target is centred on its frame."""
    wave = torch.zeros(2 * RATE)
    wave[sample] = 1
    frames = build(name)(wave).sum(-2)
    top = (frames > frames.max() - .01 * (frames.max() - frames.min())).nonzero().float().mean() # a frame hears the click all the while it holds it
    assert abs(float(top) - sample / 160) <= 1, "the click is not where it was"


# --------------------------------------------------------------------------------------------------------------- pitch
@pytest.mark.parametrize("partials", [(1.,), (.3, 1., .8, .5), (1, 0, .6, 0, .4)], ids=["sine", "weak fundamental", "hollow"])
@pytest.mark.parametrize("rate", [16000, 22050])
def test_pitch_of_tones(partials, rate):
    """Within one per cent, with overtones and without."""
    hertz = torch.tensor([62, 85, 123.4, 180, 240, 298])
    found = Pitch(rate)(torch.stack([.1 * tone(float(h), .3, rate, partials) for h in hertz]))[:, 6:-6]
    assert (found / hertz[:, None] - 1).abs().max() < .01


def test_no_pitch_where_there_is_none():
    noise = torch.randn(3, RATE // 2, generator=torch.Generator().manual_seed(0))
    silence_and_hiss = torch.stack([torch.zeros(RATE // 2), 1e-7 * noise[0]])
    beyond = torch.stack([tone(440), tone(350), tone(1000), tone(50)])
    assert not Pitch(RATE)(noise).any() and not Pitch(RATE)(silence_and_hiss).any() and not Pitch(RATE)(beyond)[:, 6:-6].any()


def test_first_dip_not_deepest():
    """Mutation: the deepest dip between the limits, instead of the first of all, hears 440 Hz as 220 or lower."""
    differing = Aperiodicity(268, 160)(tone(440))[20:80]
    low, high = RATE // 300, RATE // 60
    deepest = differing[:, low:high].argmin(-1) + low
    assert (differing.gather(-1, deepest[:, None]) < .15).all(), "the mutation would call this voiced"
    assert not Pitch(RATE)(tone(440))[20:80].any()


def test_aperiodicity_by_the_book():
    x = tune()
    frame = x.double().numpy()[30 * 160 - 100:][:200]
    d = np.array([((frame[:100] - frame[k:k + 100])**2).sum() for k in range(101)])
    wanted = np.array([1.] + [d[k] / d[1:k + 1].mean() for k in range(1, 101)])
    np.testing.assert_allclose(Aperiodicity(100, 160)(x)[30], wanted, atol=1e-4)


def test_gaps_are_filled():
    x, known = torch.rand(50, 40, generator=torch.Generator().manual_seed(0)), torch.rand(50, 40, generator=torch.Generator().manual_seed(1)) < .15
    known[0], known[1] = False, True
    filled = fill_gaps(x, known, -7.)
    for row, mask, ours in zip(x.numpy(), known.numpy(), filled.numpy()):
        wanted = np.interp(np.arange(40), np.flatnonzero(mask), row[mask]) if mask.any() else np.full(40, -7)
        np.testing.assert_allclose(ours, wanted, atol=1e-6)


def test_prosody_joins_four_numbers():
    wave = torch.cat([tone(150, .5), torch.zeros(4000), tone(200, .5)])
    log_pitch, voiced, level, crossings = Prosody(RATE)(wave)
    assert voiced.unique().tolist() == [0, 1] and voiced[60:70].sum() == 0
    assert log_pitch[62:72].diff().std() < 1e-4 and math.log(150) < log_pitch[65] < math.log(200) # a straight line through the rest
    assert torch.equal(level, RMS(320, 160)(wave)[0]) and torch.equal(crossings, ZeroCrossingRate(320, 160)(wave)[0])


# ------------------------------------------------------------------------------------------------------------ levelling
def test_standardise():
    x = torch.randn(3, 5, 200, generator=torch.Generator().manual_seed(0)) * torch.tensor([1., 10, 100, .1, 0])[:, None] + 50
    z = standardise(x)
    torch.testing.assert_close(z.mean(-1), torch.zeros(3, 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(-1, unbiased=False)[:, :4], torch.ones(3, 4), atol=1e-3, rtol=0)
    wanted = (x - x.mean(-1, keepdim=True)) / (x.std(-1, unbiased=False, keepdim=True) + 1e-5)
    torch.testing.assert_close(z[:, :4], wanted[:, :4], atol=1e-4, rtol=1e-4)
    assert standardise(x.bfloat16()).dtype == torch.float32 and not z[:, 4].any()


def test_silence_is_levelled_to_zero():
    """Mutation: without taking the largest value off first, the rounding of a mean becomes a picture."""
    silent = LogMel(44100, 2048, 1024, 128, log="ln", eps=1e-7)(torch.zeros(30 * 44100))
    assert silent.shape == (128, 1292) and not standardise(silent).any()
    naive = (silent - silent.mean(-1, keepdim=True)) / (silent.std(-1, unbiased=False, keepdim=True) + 1e-5)
    assert naive.any()


def test_what_stands_still_has_no_movement():
    """T17: exactly none, else levelling makes a picture of it. Mutation: the weighted sum without taking the centre off first."""
    still = torch.linspace(-1000, 1000, 999)[:, None].expand(-1, 20)
    for order in (1, 2):
        assert not Delta(order)(still).any()
        assert sum(weight * still[:, k:k + 12] for k, weight in enumerate(Delta(order).weights)).any()


def test_padding_does_not_count():
    """Mutation: a mask that is ignored lets the padding in."""
    x, lengths = torch.randn(4, 6, 100, generator=torch.Generator().manual_seed(0)), torch.tensor([100, 60, 1, 0])
    mask = torch.arange(100) < lengths[:, None]
    dirty = x.masked_fill(~mask[:, None], float("inf"))
    z = standardise(dirty, mask)
    assert z.isfinite().all() and not z[~mask[:, None].expand_as(z)].any()
    for row, length in enumerate(lengths[:3].tolist()):
        torch.testing.assert_close(z[row, :, :length], standardise(x[row, :, :length]), atol=1e-5, rtol=1e-5)
    assert not standardise(dirty)[1].isfinite().all()


def test_musicoder_columns():
    """T17, T18: the pieces that are not constant-Q, 30 s at 44.1 kHz; twice as loud leaves the levelled mel columns as they are."""
    wave = .1 * torch.randn(30 * 44100, generator=torch.Generator().manual_seed(0))
    options = dict(n_fft=2048, hop=1024, window="hamming")
    mfcc = MFCC(44100, 20, **options)(wave)
    log_mel = LogMel(44100, n_mels=128, log="ln", eps=1e-7, **options)
    silent = MFCC(44100, 20, **options)(0 * wave)
    assert not standardise(torch.cat([ChromaSTFT(44100, **options)(0 * wave), silent, Delta()(silent), log_mel(0 * wave)])).any()
    columns = standardise(torch.cat([ChromaSTFT(44100, **options)(wave), mfcc, Delta()(mfcc), log_mel(wave)]))
    assert columns.shape == (12 + 20 + 20 + 128, 1292) and columns.isfinite().all()
    assert columns.mean(-1).abs().max() < 1e-3 and (columns.std(-1, unbiased=False) - 1).abs().max() < 1e-2
    torch.testing.assert_close(standardise(log_mel(2 * wave)), columns[-128:], atol=1e-2, rtol=0)


# ------------------------------------------------------------------------------------------- what a training step may do
@each
def test_any_leading_shape(name):
    module, wave = build(name), torch.stack([tune(), tune().flip(0)])
    one, two, three = module(wave[0]), module(wave), module(wave.view(1, 2, 1, -1))
    assert one.shape == (WIDTH[name], 1 + 16000 // 160) and two.shape == (2, *one.shape) and three.shape == (1, 2, 1, *one.shape)
    torch.testing.assert_close(two[0], one, atol=1e-4, rtol=1e-4)
    assert torch.equal(three[0, :, 0], two) and not module.state_dict()
    assert module(wave[:, :1]).shape == (2, WIDTH[name], 1)


@each
def test_rows_do_not_know_each_other(name):
    module, rows = build(name), [tune(), .001 * tune().flip(0), torch.zeros(16000), tune().roll(999)]
    together = module(torch.stack(rows))
    for row, wave in zip(together, rows): torch.testing.assert_close(row, module(wave), atol=1e-4, rtol=1e-4)


@each
def test_pieces_do_not_show(name, monkeypatch):
    """Seven rows at once, in pieces of two, and one by one."""
    module, wave = build(name), torch.stack([tune().roll(1000 * k) * .5**k for k in range(7)])
    monkeypatch.setattr(mel, "PIECE", 10**9)
    whole = module(wave)
    for piece in (40000, 1):
        monkeypatch.setattr(mel, "PIECE", piece)
        torch.testing.assert_close(module(wave), whole, atol=1e-4, rtol=1e-4)


def test_there_are_pieces(monkeypatch):
    """At most `PIECE` samples reach the transform, or one row. Mutation: a limit nobody reaches."""
    seen, stft = [], torch.stft
    monkeypatch.setattr(torch, "stft", lambda wave, *given, **options: (seen.append(len(wave)), stft(wave, *given, **options))[1])
    monkeypatch.setattr(mel, "PIECE", 40000)
    MFCC(RATE)(torch.zeros(7, 16000)), MFCC(RATE)(torch.zeros(2, 50000))
    assert seen == [2, 2, 2, 1, 1, 1]
    monkeypatch.setattr(mel, "PIECE", 10**9)
    MFCC(RATE)(torch.zeros(7, 16000))
    assert seen[6:] == [7]


@pytest.mark.parametrize("name", ["log-mel in dB", "contrast", "onset"])
def test_the_row_check_notices_a_shared_floor(name, monkeypatch):
    """Mutation: a floor below the loudest point of the batch, which is what librosa does."""
    shared = lambda power, eps=1e-10, top_db=80.: (level := 10 * power.clamp_min(eps).log10()).maximum(level.amax() - top_db)
    monkeypatch.setattr(mel, "to_db", shared)
    monkeypatch.setattr(spectral, "to_db", shared)
    with pytest.raises(AssertionError): test_rows_do_not_know_each_other(name)


@each
def test_float32_under_autocast(name):
    module, wave = build(name), tune()
    with torch.autocast("cpu", dtype=torch.bfloat16): inside = module(wave)
    assert inside.dtype == torch.float32 and torch.equal(inside, module(wave))
    for dtype in (torch.float64, torch.bfloat16): assert module(wave.to(dtype)).dtype == torch.float32


@pytest.mark.parametrize("name", ["log-mel", "chroma", "gammatone", "mfcc"])
def test_autocast_would_do_harm(name):
    """Mutation: the same module without `in_float32`."""
    module = build(name)
    with torch.autocast("cpu", dtype=torch.bfloat16): bare = type(module).forward.__wrapped__(module, tune())
    assert bare.dtype != torch.float32 or relative(bare, module(tune())) > 1e-4


@each
def test_silence_is_finite(name):
    for wave in (torch.zeros(2, 8000), torch.full((2, 8000), 1e-30), torch.cat([torch.zeros(2, 4000), torch.ones(2, 4000)], -1)):
        assert build(name)(wave).isfinite().all()


def test_silence_needs_its_guards(monkeypatch):
    """Mutation: without a floor, without the guard of a zero sum, silence is not finite."""
    assert not LogMel(RATE, log="ln", eps=0.)(torch.zeros(8000)).isfinite().all()
    monkeypatch.setattr(torch.Tensor, "where", lambda x, condition, other: x)
    for name in ("chroma", "centroid", "tempogram"): assert not build(name)(torch.zeros(8000)).isfinite().all(), name


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("crossings", "prosody")])
def test_gradients_reach_the_wave(name):
    wave = torch.cat([tune(), torch.zeros(8000)]).requires_grad_()
    out = build(name)(wave)
    (out * torch.rand(out.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert wave.grad.isfinite().all() and wave.grad[:16000].abs().sum() > 0


def test_gradients_of_the_levelled():
    x = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 4
    standardise(x.requires_grad_()).square().sum().backward()
    assert x.grad.isfinite().all()


@each
def test_nothing_is_read_back_from_the_device(name, monkeypatch):
    """On a device without data, whatever looks at a value, or mixes devices, fails; autocast does not know that device."""
    monkeypatch.setattr(torch, "autocast", lambda *given, **options: contextlib.nullcontext())
    out = ALL[name]().to("meta")(torch.empty(2, 16000, device="meta"))
    assert out.device.type == "meta" and out.shape == (2, WIDTH[name], 101)


@pytest.mark.parametrize("look", [lambda x: bool(x.any()), lambda x: x + torch.zeros(x.shape), lambda x: x[x > 0]], ids=["value", "device", "shape"])
def test_the_read_back_check_notices(look, monkeypatch):
    """Mutation: a feature that looks at a value, brings its own CPU tensor, or makes a shape of values."""
    monkeypatch.setattr(Magnitude, "forward", lambda self, wave: (look(wave), torch.zeros(1))[1])
    with pytest.raises((RuntimeError, NotImplementedError)): test_nothing_is_read_back_from_the_device("magnitude", monkeypatch)


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("call, message", [
    (lambda: LogMel(RATE, hop=0), "got a hop of 0 samples"), (lambda: LogMel(RATE, 512, win_length=513, n_mels=40), "wanted 1 to n_fft = 512"),
    (lambda: Magnitude(power=3), "got the power 3, wanted 1 or 2"),
    (lambda: LogMel(RATE, window="kaiser"), "got the window 'kaiser', wanted one of"),
    (lambda: LogMel(RATE, scale="bark"), "wanted 'slaney' or 'htk'"),
    (lambda: LogMel(RATE, log="log2"), "got the logarithm 'log2'"), (lambda: Delta(2, 8), "odd width > order"),
    (lambda: Delta()(torch.zeros(3, 8)), "got 8 frames"),
    (lambda: ChromaSTFT(RATE, n_chroma=13), "wanted a multiple of 12"), (lambda: Gammatone(RATE, f_min=8000.), "channels from 8000.0 to 8000.0"),
    (lambda: SpectralContrast(8000), "from 6400.0 to 12800.0 Hz"), (lambda: SpectralContrast(RATE, quantile=1.), "0 < quantile < 1"),
    (lambda: RMS(321), "wanted an even frame"), (lambda: ZeroCrossingRate(320, 0), "hop >= 1"),
    (lambda: Tempogram(RATE, step=385), "wanted 1 to 384"),
    (lambda: Tempogram(RATE, win_length=7), "wanted an even number"), (lambda: Pitch(RATE, f_min=300., f_max=60.), "wanted 0 < f_min < f_max"),
])
def test_errors_say_what_was_wanted(call, message):
    with pytest.raises(ValueError, match=message): call()


@each
def test_an_empty_wave_is_refused(name):
    for wave in (torch.zeros(2, 0), torch.tensor(1.)):
        with pytest.raises(ValueError, match="wanted at least one sample"): build(name)(wave)
