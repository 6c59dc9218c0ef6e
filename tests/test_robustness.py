"""Damage is as strong as it says, the same in any order, and the truth goes with it."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from musicssl.augment import Delay, Gain, Noise, PolarityInversion, RandomCrop, draw_seeds, single_chain
from musicssl.data.loader import seed_of
from musicssl.encoders.handmade import MFCC
from musicssl.probe import robustness
from musicssl.probe.frozen import read_features
from musicssl.probe.intervals import bootstrap_difference
from musicssl.probe.metrics import score
from musicssl.probe.robustness import DAMAGE, Damage, Damaged, curve, damage, damaged, kept, levels_at, quantise, truth_under

RATES = (8000, 22050)
CASES = [(name, level) for name, how in DAMAGE.items() for level in how.levels if level is not None]
NAMES = [f"{name} {level}" for name, level in CASES]


def music(n=5, seconds=1.5, rate=8000):
    """Chords that fade, and a little noise."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(int(seconds * rate) + 1) / rate
    notes = 110 * 2 ** (torch.randint(0, 36, (n, 3), generator=generator) / 12)
    chords = torch.sin(2 * math.pi * notes[..., None] * time).sum(1) * torch.exp(-2 * (time % .5))
    return .2 * chords + .003 * torch.randn(n, len(time), generator=generator)


def corpus_of(waves, rate=8000, **more):
    def wave(ids): return torch.stack([waves[int(i)] for i in ids])
    return SimpleNamespace(wave=wave, sample_rate=rate, fingerprint="toy", ids=lambda split=None: np.arange(len(waves)), **more)


CORPUS = corpus_of(music())


def possible(name, level, rate): return level in levels_at(name, rate)


# Nothing, and the length

@pytest.mark.parametrize("name", DAMAGE)
def test_nothing_is_nothing(name):
    wave = music()
    for level in {None, DAMAGE[name].nothing}:
        assert damage(wave, name, level, 8000, torch.arange(5)) is wave and damaged(CORPUS, name, level) is CORPUS


@pytest.mark.parametrize("name, level", CASES, ids=NAMES)
def test_length_type_and_source_stay(name, level):
    for rate in RATES:
        if not possible(name, level, rate): continue
        wave = music(2, rate=rate)
        before = wave.clone()
        after = damage(wave, name, level, rate, torch.arange(2))
        assert after.shape == wave.shape and after.dtype == wave.dtype and after.isfinite().all()
        assert torch.equal(wave, before) and not torch.equal(after, wave)


def test_silence_stays_silent():
    for name, level in CASES:
        if possible(name, level, 8000): assert damage(torch.zeros(2, 9000), name, level, 8000, torch.arange(2)).abs().max() < 1e-6, name


# As strong as it says

def peak(wave, rate):
    """Hz of the strongest partial, to a hundredth of a cent."""
    power = torch.fft.rfft((wave - wave.mean()).double() * torch.hann_window(len(wave), dtype=torch.float64), 2**20).abs().log()
    k = int(power.argmax())
    left, middle, right = power[k - 1:k + 2].tolist()
    return (k + (left - right) / (left - 2 * middle + right) / 2) * rate / 2**20


def loudness(wave): return 20 * wave.double().norm(dim=1).log10()


def tone(hertz, rate, seconds=6, pulse=0.):
    time = torch.arange(int(seconds * rate)) / rate
    return (.3 * torch.sin(2 * math.pi * hertz * time) * (1 + pulse * torch.sin(2 * math.pi * 4 * time)))[None]


def pulse(wave, rate):
    frame = rate // 100
    return peak(wave[0, :wave.shape[1] // frame * frame].reshape(-1, frame).norm(dim=1), rate / frame)


def check_strength(name, level, rate, work):
    """Against meters that know nothing of the transforms."""
    spoil = lambda wave: work(wave, level, rate, torch.arange(len(wave)))
    if name == "noise":
        for wave in (music(rate=rate), tone(440, rate)):
            snr = loudness(wave) - loudness(spoil(wave) - wave)
            assert (snr - level).abs().max() < .5, snr
    elif name == "gain":
        wave = music(rate=rate)
        assert (loudness(spoil(wave)) - loudness(wave) - level).abs().max() < .01
    elif name == "pitch":
        for hertz in (220., 440., 1000.):
            assert abs(1200 * math.log2(peak(spoil(tone(hertz, rate))[0], rate) / hertz) - level) < 1
        assert abs(pulse(spoil(tone(440, rate, pulse=.5)), rate) / 4 - 1) < .003
    elif name == "tempo":
        wave = spoil(tone(440, rate, pulse=.5))
        assert abs(pulse(wave, rate) / 4 - 1 - level / 100) < .003
        assert abs(1200 * math.log2(peak(wave[0], rate) / 440)) < 1
    elif name == "low-pass":
        left = {share: float(loudness(spoil(tone(level * share, rate))) - loudness(tone(level * share, rate)))
                for share in (.1, .5, 1., 2.) if level * share < rate / 2}
        assert max(abs(left[.1]), abs(left[.5])) < .1 and abs(left[1.] + 6.02) < .2 and left.get(2., -60) < -45
    else: check_telephone(level, rate, spoil)


def check_telephone(bits, rate, spoil):
    left = lambda hertz: float(loudness(spoil(tone(hertz, rate))) - loudness(tone(hertz, rate)))
    assert left(100) < -40 and abs(left(1000)) < (1 if bits > 4 else 5) and (rate < 12000 or left(5000) < -40)
    wave = tone(997, rate) + .3 * tone(1609, rate)
    error = float(loudness(wave) - loudness(spoil(wave) - wave))
    expected = 20 * math.log10((2 ** (bits - 1) - 1) / math.log(256)) + 10 * math.log10(12)        # of even steps on a logarithmic scale
    assert abs(error - expected) < 2, (error, expected)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name, level", CASES, ids=NAMES)
def test_strength(name, level, rate):
    if possible(name, level, rate): check_strength(name, level, rate, DAMAGE[name].work)


MUTANTS = {"noise": lambda level: level + 1, "gain": lambda level: level - .1, "pitch": lambda level: level + 2, "tempo": lambda level: level + .5,
           "low-pass": lambda level: level * 1.02, "telephone": lambda level: level + 1}


@pytest.mark.parametrize("name", DAMAGE)
def test_the_meters_notice_a_little_more(name):
    level, how = DAMAGE[name].levels[-1], DAMAGE[name]
    with pytest.raises(AssertionError): check_strength(name, level, 8000, lambda wave, level, *rest: how.work(wave, MUTANTS[name](level), *rest))


def test_the_meters_notice_a_slower_tape():
    """The mutation: speed and pitch changed together."""
    def tape(wave, percent, rate, seeds):
        return robustness._pitch(robustness._tempo(wave, percent, rate, seeds), round(1200 * math.log2(1 + percent / 100)), rate, seeds)
    with pytest.raises(AssertionError): check_strength("tempo", 10, 8000, tape)


def test_numbers_of_steps():
    for bits in (2, 3, 4, 8): assert len(quantise(torch.linspace(-1, 1, 20_001), bits).unique()) == 2 ** bits - 1
    assert quantise(torch.tensor([0., 1., -1., 7.]), 8).tolist() == [0., 1., -1., 1.]
    fine, x = quantise(torch.tensor([.01, .9]), 8), torch.tensor([.01, .9])
    assert ((fine - x).abs() < torch.tensor([.0005, .02])).all()                       # soft sounds have finer steps
    with pytest.raises(ValueError, match="got 1 bits, wanted at least 2"): quantise(x, 1)


# The same in any order

def check_order(kind, name, level):
    sounds = kind(CORPUS, name, level)
    whole = sounds.wave(range(5))
    assert torch.equal(sounds.wave([3, 0, 3]), whole[[3, 0, 3]]) and torch.equal(sounds.wave(torch.tensor([4])), whole[4:])
    assert torch.equal(sounds.wave([2, 1], start=1000, length=500), whole[[2, 1], 1000:1500])
    assert torch.equal(kind(CORPUS, name, level).wave([1]), whole[[1]])
    return whole


class ByPlace(Damaged):
    """The mutation: seeds by the place in the batch."""
    def wave(self, ids, start=0, length=None):
        waves = self._sounds.wave(ids)
        seeds = torch.tensor([seed_of("damage", self.seed, place) for place in range(len(waves))])
        whole = damage(waves, self.name, self.level, self.sample_rate, seeds)
        return whole[:, start:None if length is None else start + length]


class PieceOnly(Damaged):
    """The mutation: only the piece is damaged."""
    def wave(self, ids, start=0, length=None):
        end = None if length is None else start + length
        ids = torch.as_tensor(ids).tolist()
        seeds = {i: torch.tensor([seed_of("damage", self.seed, i)]) for i in ids}
        return torch.cat([damage(self._sounds.wave([i])[:, start:end], self.name, self.level, self.sample_rate, seeds[i]) for i in ids])


@pytest.mark.parametrize("name, level", CASES, ids=NAMES)
def test_any_order_and_any_batch_sound_the_same(name, level):
    if possible(name, level, 8000): check_order(Damaged, name, level)


@pytest.mark.parametrize("mutant, name", [(ByPlace, "noise"), (PieceOnly, "noise"), (PieceOnly, "low-pass"), (PieceOnly, "tempo")])
def test_the_order_notices(mutant, name):
    with pytest.raises(AssertionError): check_order(mutant, name, DAMAGE[name].levels[-1])


def test_clips_and_seeds_have_noises_of_their_own_and_levels_share_one():
    noise = lambda level, seed=0: damaged(CORPUS, "noise", level, seed).wave(range(5)) - CORPUS.wave(range(5))
    loud, other = noise(0), noise(0, seed=1)
    assert np.corrcoef(torch.cat([loud, other])).round(1).tolist() == np.eye(10).tolist()
    soft = noise(20)
    assert all(float(torch.corrcoef(torch.stack(pair))[0, 1]) > .999 for pair in zip(loud, soft))


def test_a_damaged_set_has_its_own_name_and_no_labels():
    sounds = [CORPUS, *(damaged(CORPUS, name, level) for name, level in CASES), damaged(CORPUS, "noise", 0, seed=1),
              damaged(CORPUS, "noise", 0, seed=2)]
    assert len({each.fingerprint for each in sounds}) == len(sounds)
    labelled = corpus_of(music(), tags=np.ones((5, 2)), labels=[{}] * 5, store="clean")
    for name in ("tags", "labels", "store", "beat_times"): assert not hasattr(damaged(labelled, "tempo", 10), name)
    assert damaged(labelled, "tempo", 10).ids().tolist() == [0, 1, 2, 3, 4]


def test_features_are_those_of_the_damaged_sound():
    """What reads a data set reads a damaged one."""
    waves = music(3, seconds=2, rate=22050)
    sounds = damaged(corpus_of(waves, 22050), "low-pass", 1000)
    found = read_features(MFCC(), sounds, [2, 0], progress=False)
    assert torch.allclose(torch.as_tensor(found.clip), MFCC()(sounds.wave([2, 0])).clip, atol=1e-3)
    clean = read_features(MFCC(), corpus_of(waves, 22050), [2, 0], progress=False)
    assert not np.allclose(found.clip, clean.clip, atol=1e-1)


# Truth

def test_keys_are_transposed_within_their_mode():
    keys = np.arange(24)
    for semitones in (-13, -2, -1, 1, 2, 12):
        moved = truth_under("pitch", 100 * semitones, "key", keys)
        assert (moved // 12 == keys // 12).all() and ((moved - keys) % 12 == semitones % 12).all()
    assert (truth_under("pitch", 30, "key", keys) == keys).all()
    assert (truth_under("pitch", -130, "key", keys) == truth_under("pitch", -100, "key", keys)).all()
    for cents in (50, -50, 150):
        with pytest.raises(ValueError, match="half way between two keys"): truth_under("pitch", cents, "key", keys)


def clicks(times, seconds, rate=8000):
    """A short, high tick at each moment."""
    time, wave = torch.arange(int(seconds * rate)) / rate, torch.zeros(1, int(seconds * rate))
    for t in times: wave += torch.sin(2 * math.pi * 1000 * (time - t)) * torch.exp(-((time - t) / .01) ** 2)
    return wave


def check_beats(percent, truth_under):
    """At the moments the truth names it is loud, between them it is not."""
    beats = [np.arange(.3, 6, .5)]
    wave = damage(clicks(beats[0], 6.), "tempo", percent, 8000, torch.tensor([0]))[0].abs()
    (moved,) = truth_under("tempo", percent, "beats", beats, 6.)
    assert (np.diff(moved) > 0).all() and moved.min() >= 0 and moved.max() < 6
    around = lambda t: float(wave[max(0, int(8000 * (t - .06))):int(8000 * (t + .06))].square().sum())
    inner = [t for t in moved if .1 < t < 5.9]
    assert sum(map(around, inner)) > .85 * float(wave[800:-800].square().sum())
    assert min(map(around, inner)) > .4 * max(map(around, inner))
    expected = 12 * (1 + percent / 100)
    assert abs(len(moved) - expected) <= 1


@pytest.mark.parametrize("percent", [-20, -4, 10, 20])
def test_beats_are_where_they_are_heard(percent):
    check_beats(percent, truth_under)


@pytest.mark.parametrize("mutant", [lambda name, p, kind, truth, s: truth, lambda name, p, kind, truth, s: [t * (1 + p / 100) for t in truth],
                                    lambda name, p, kind, truth, s: [t / (1 + p / 100) for t in truth]], ids=["left", "the wrong way", "no loop"])
def test_the_clicks_notice(mutant):
    with pytest.raises(AssertionError): check_beats(20, mutant)


def test_every_kind_has_a_truth_or_a_refusal():
    assert truth_under("tempo", 10, "tempo", np.array([60., 100.])).tolist() == pytest.approx([66., 110.])
    truth = np.array([1, 2])
    for name, level in CASES:
        assert truth_under(name, level, "tags", truth) is truth and truth_under(name, None, "class", truth) is truth
        for kind in ("class", "number"):
            if name not in ("pitch", "tempo"): assert truth_under(name, level, kind, truth) is truth
            else:
                with pytest.raises(ValueError, match=f"whether {name} changes a {kind} depends"): truth_under(name, level, kind, truth)
    with pytest.raises(ValueError, match="length in seconds is not known"): truth_under("tempo", 10, "beats", [np.array([1.])])


# Curves

TONES = [60, 63, 67, 70, 62, 65]                             # MIDI numbers; a "key" is the tone itself


def of_tones(sounds):
    """A perfect ear for the pitch class of a tone."""
    found = [round(69 + 12 * math.log2(int(torch.fft.rfft(wave).abs().argmax()) / 440)) % 12 for wave in sounds.wave(range(len(TONES)))]
    return np.eye(24)[found]


TONE_CORPUS = corpus_of(torch.cat([tone(440 * 2 ** ((midi - 69) / 12), 8000, seconds=1) for midi in TONES]), seconds=1.)
KEYS = np.array(TONES) % 12


def test_a_perfect_ear_has_a_flat_curve_only_under_the_right_truth():
    ask = {"kind": "key", "truth": KEYS, "metric": "accuracy", "resamples": 20}
    points = curve(of_tones, TONE_CORPUS, "pitch", **ask)
    assert [p.level for p in points] == list(DAMAGE["pitch"].levels) and all(p.score.mean == 1 for p in points)
    forgetful = curve(of_tones, TONE_CORPUS, "pitch", truth_at=kept, **ask)            # the mutation: the truth does not follow
    assert [p.score.mean for p in forgetful] == [0, 0, 1, 1, 1, 0, 0]
    for name in ("noise", "gain"): assert all(p.score.mean == 1 for p in curve(of_tones, TONE_CORPUS, name, **ask))


def test_a_change_is_paired_and_only_where_the_truth_stays():
    points = curve(of_tones, TONE_CORPUS, "pitch", "key", KEYS, metric="accuracy", resamples=20)
    assert [p.change is None for p in points] == [True, True, True, False, True, True, True]
    deaf = lambda sounds: np.eye(24)[KEYS] * (1 if sounds is TONE_CORPUS else np.arange(6)[:, None] % 2)
    clean, *others = curve(deaf, TONE_CORPUS, "noise", "key", KEYS, metric="accuracy", resamples=50)
    for point in others:
        wanted = bootstrap_difference(KEYS, deaf(None), deaf(TONE_CORPUS), "accuracy", 50)
        assert point.change == wanted and point.score.mean == score("accuracy", KEYS, deaf(None)) and clean.change.mean == 0


def test_the_clean_set_is_heard_once_and_the_truth_refused_first():
    heard = []
    def answer(sounds):
        heard.append(sounds)
        return np.eye(24)[KEYS]
    curve(answer, TONE_CORPUS, "gain", "key", KEYS, resamples=5)
    assert sum(sounds is TONE_CORPUS for sounds in heard) == 1 and len(heard) == len(DAMAGE["gain"].levels)
    heard.clear()
    with pytest.raises(ValueError, match="pass truth_at"): curve(answer, TONE_CORPUS, "pitch", "class", KEYS)
    with pytest.raises(ValueError, match="half way"): curve(answer, TONE_CORPUS, "pitch", "key", KEYS, levels=[100, 50])
    assert not heard


def test_the_probe_hears_the_level_it_is_told():
    found = []
    curve(lambda sounds: found.append((getattr(sounds, "name", None), getattr(sounds, "level", None))) or np.eye(24)[KEYS],
          TONE_CORPUS, "noise", "key", KEYS, levels=[None, 10, 0], resamples=5)
    assert found == [(None, None), ("noise", 10), ("noise", 0)]


def test_names_and_levels_there_are_not():
    with pytest.raises(ValueError, match="got damage 'rain', wanted one of noise, gain, low-pass, pitch"): damaged(CORPUS, "rain", 3)
    with pytest.raises(ValueError, match="wanted more than 0 and less than 4000"): damaged(CORPUS, "low-pass", 8000).wave([0])
    assert levels_at("low-pass", 8000) == [None, 2000, 1000, 500] and levels_at("noise", 8000) == list(DAMAGE["noise"].levels)
    assert all(isinstance(how, Damage) and None in how.levels for how in DAMAGE.values())


# In the space itself

SONGS, DRAWN = music(), draw_seeds(5, torch.Generator().manual_seed(3))
LOUD = {"polarity": PolarityInversion(), "noise": Noise(snr_db=(0., 0.)), "gain": Gain(gain_db=(-20., -20.))}


class Ear(torch.nn.Module):
    """Sums and squares of eight parts of a piece, or nothing but one point; batch normalisation in it."""
    sample_rate, hop, dim, n_samples = 8000, 1000, 16, 8000

    def __init__(self, deaf=False, sloppy=False):
        super().__init__()
        self.norm, self.deaf, self.sloppy = torch.nn.BatchNorm1d(16), deaf, sloppy

    def forward(self, wave):
        parts = wave.unflatten(1, (8, -1))
        if self.sloppy: self.norm.train()
        clip = self.norm(torch.cat([parts.mean(2), parts.square().mean(2)], 1))
        return SimpleNamespace(clip=torch.full_like(clip, .3) if self.deaf else clip)


def one_song_at_a_time(ear, transform, mean_of=None):
    """The same cosines, written without a batch."""
    crop, ear = RandomCrop(8000), ear.eval()
    with torch.no_grad():
        pieces = [crop.augment(SONGS[i:i + 1], DRAWN[i:i + 1])[0] for i in range(5)]
        crops = [ear(piece).clip[0].double() for piece in pieces]
        twins = [ear(transform.augment(piece, DRAWN[i:i + 1])[0]).clip[0].double() for i, piece in enumerate(pieces)]
    mean = torch.stack(mean_of or crops).mean(0)
    cosine = lambda a, b: float((a - mean) @ (b - mean) / (a - mean).norm() / (b - mean).norm())
    return np.array([[cosine(crop, twin) for twin in twins] for crop in crops])


@pytest.mark.parametrize("name", LOUD)
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_twins_equal_a_loop_over_songs(name, batch):
    """The mutation: embeddings with nothing taken off, which are other numbers."""
    wanted, (found,) = one_song_at_a_time(Ear(), LOUD[name]), robustness.invariance(Ear(), SONGS, {name: LOUD[name]}, DRAWN, batch=batch)[1:]
    others = np.array([np.delete(row, i).mean() for i, row in enumerate(wanted)])
    np.testing.assert_allclose(found.same, np.diag(wanted), atol=1e-5)
    np.testing.assert_allclose(found.others, others, atol=1e-5)
    assert found.nearest.tolist() == [row.argmax() == i for i, row in enumerate(wanted)] and found.transform == name
    assert not np.allclose(robustness.invariance(Ear(), SONGS, {name: LOUD[name]}, DRAWN, torch.zeros(16))[1].others, others, atol=1e-2)


def test_who_overlooks_a_transform_and_who_does_not():
    """Squares overlook the sign, sums turn it round."""
    squares, sums = Ear(), Ear()
    squares.norm.weight.data[:8], sums.norm.weight.data[8:] = 0, 0
    for ear, cosine in ((squares, 1), (sums, -1)):
        twins = robustness.invariance(ear, SONGS, {"polarity": PolarityInversion()}, DRAWN, torch.zeros(16))[1]
        np.testing.assert_allclose(twins.same, cosine, atol=1e-6)
        assert twins.nearest.all() == (cosine == 1)


def test_one_point_is_not_invariance():
    """The mutation: without the mean taken off, an encoder that says the same of everything has every cosine at 1. The count sees it all the same."""
    for twins in robustness.invariance(Ear(deaf=True), SONGS, LOUD, DRAWN):
        assert np.abs(twins.same).max() < 1e-6 and np.abs(twins.others).max() < 1e-6 and not twins.nearest.any()
    for twins in robustness.invariance(Ear(deaf=True), SONGS, LOUD, DRAWN, torch.zeros(16)):
        assert twins.same.min() > 1 - 1e-6 and twins.others.min() > 1 - 1e-6 and not twins.nearest.any()


def test_a_chain_of_one_transform_is_that_transform():
    """Its crop has nowhere to go in a piece of its own length."""
    ways = [{"delay": Delay(sample_rate=8000)}, {"delay": single_chain("delay", 8000, 8000)}]
    one, other = (robustness.invariance(Ear(), SONGS, way, DRAWN)[1] for way in ways)
    np.testing.assert_array_equal(one.same, other.same)
    assert np.ptp(one.same) > .01


def test_another_crop_is_asked_for_where_there_is_one():
    first = robustness.invariance(Ear(), SONGS, {}, DRAWN)
    assert [twins.transform for twins in first] == ["another crop"] and first[0].same.max() < .999
    assert robustness.invariance(Ear(), SONGS[:, :8000], {}, DRAWN) == []


def test_invariance_reads_and_refuses():
    ear = Ear().train()
    robustness.invariance(ear, SONGS, {}, DRAWN)
    assert ear.training and ear.norm.num_batches_tracked == 0
    with pytest.raises(RuntimeError, match="norm.running_mean"): robustness.invariance(Ear(sloppy=True), SONGS, {}, DRAWN)
    with pytest.raises(ValueError, match="got 1 song, wanted at least 2"): robustness.invariance(Ear(), SONGS[:1], {}, DRAWN[:1])
    with pytest.raises(ValueError, match="MFCC takes any length; pass n_samples"): robustness.invariance(MFCC(8000), SONGS, {}, DRAWN)
