"""Targets of multi-task training: frames in their place, neighbours and levels right to the digit, librosa and SciPy as referees (M-2 to M-5)."""
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import librosa
import pytest
import scipy.fft
import torch
from torch import nn

from musicssl.features import targets as room
from musicssl.features.mel import Delta, LogMel
from musicssl.features.rhythm import Tempogram
from musicssl.features.targets import TARGETS, Measurements, Moments, RunningStatistics, Target, Targets, new_target, stack_frames, unstack_frames

RATE = 16_000
CLICKS = (8_000, 8_010, 8_079, 8_081, 8_120, 16_050, 20_080)    # samples
WHERE = {"mfcc": 0, "mfcc_13": 0, "mfcc_long": 0, "cepstra": 0, "shape": 7, "prosody": 2} # the channel of level or brightness
TIMED = [name for name in TARGETS if name != "tempogram"]      # a tempogram does not say when


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sine(hertz: float, samples: int = 2 * RATE) -> torch.Tensor:
    return .5 * torch.sin(2 * torch.pi * hertz * torch.arange(samples, dtype=torch.float64) / RATE).float()


def music(rows: int = 4, samples: int = RATE) -> torch.Tensor:
    """Notes that start and fade, other ones in every row, over a little noise."""
    time = torch.arange(samples) / RATE
    def note(hertz: float, start: float) -> torch.Tensor: return torch.sin(2 * torch.pi * hertz * time) * torch.exp(-4 * ((time - start) % .8))
    played = [sum(note((110 + 37 * row) * (k + 1), k / 5) for k in range(5)) for row in range(rows)]
    return .1 * torch.stack(played) + .003 * noise(rows, samples, seed=3)


def clicks(period: int, samples: int = 4 * RATE) -> torch.Tensor:
    wave = torch.zeros(1, samples)
    wave[0, 2_000::period] = .8
    return wave


@pytest.fixture(scope="module")
def waves() -> torch.Tensor: return music()


# M-2: frames in their place

def misplaced(name: str, hop: int = 160, target: nn.Module | None = None) -> list[str]:
    """What is wrong with the number of frames, and with the frame in which a click over a hum is seen."""
    target, hum = target or new_target(name, hop=hop), .02 * sine(110).repeat(len(CLICKS), 1)
    hum[torch.arange(len(CLICKS)), torch.tensor(CLICKS)] += .9
    rows = target(hum)
    wrong = [] if rows.shape == (len(CLICKS), TARGETS[name].n_channels, 2 * RATE // hop) else [f"shape {tuple(rows.shape)}"]
    peaks = (rows[:, WHERE[name]] if name in WHERE else rows.sum(1)).argmax(-1).tolist()
    return wrong + [f"sample {at}: frame {peak}" for at, peak in zip(CLICKS, peaks) if abs(peak - round(at / hop)) > 1]


@pytest.mark.parametrize("hop", [160, 162])
@pytest.mark.parametrize("name", TIMED)
def test_a_click_is_seen_in_its_frame(name, hop):
    assert not misplaced(name, hop)


@pytest.mark.parametrize("samples", [31_999, 32_000, 32_159, 32_160])
def test_as_many_frames_as_whole_hops(samples):
    wave = noise(1, samples)
    frames = {name: rows.shape for name, rows in Measurements(list(TARGETS))(wave).items()}
    assert frames == {name: (1, recipe.n_channels, samples // 160) for name, recipe in TARGETS.items()}


def test_mutation_one_frame_more():
    with mock.patch.object(Target, "measure", lambda self, wave: self.front(wave)):
        assert any("shape" in fault for fault in misplaced("fbank"))


def test_mutation_windows_start_at_their_frame():
    from_the_left = torch.stft
    def stft(wave, n_fft, hop, length, window, pad_mode, return_complex):
        return from_the_left(nn.functional.pad(wave, (0, n_fft)), n_fft, hop, length, window, center=False, return_complex=return_complex)
    with mock.patch.object(torch, "stft", stft):
        assert all(misplaced(name) for name in ("lps", "fbank", "gammatone_long", "logmel", "shape"))


def test_mutation_onset_is_not_shifted():
    target = new_target("onset")
    target.back.shift = 0
    assert misplaced("onset", target=target)


# Referees

def test_against_librosa_and_scipy(waves):
    got, wave = Measurements(list(TARGETS)).raw(waves[:1]), waves[0].numpy()
    def mel(n_fft, window, n_mels, eps):
        power = librosa.feature.melspectrogram(y=wave, sr=RATE, n_fft=n_fft, win_length=window, hop_length=160, n_mels=n_mels)
        return torch.from_numpy(power + eps).log()[:, :100]
    fbank, logmel = mel(512, 400, 40, 1e-10), mel(1024, 1024, 128, 1e-5)
    flux = librosa.onset.onset_strength(S=logmel.numpy(), sr=RATE, n_fft=1024, hop_length=160)
    tempogram = librosa.feature.tempogram(onset_envelope=flux, sr=RATE, hop_length=160, win_length=384)
    spectrum = dict(y=wave, n_fft=1024, hop_length=160)
    referees = {"fbank": fbank, "logmel": logmel, "mfcc_long": scipy.fft.dct(mel(2048, 2048, 40, 1e-10).numpy(), axis=0, norm="ortho")[:20],
                "mfcc": scipy.fft.dct(fbank.numpy(), axis=0, norm="ortho")[:20], "cepstra": scipy.fft.dct(logmel.numpy(), axis=0, norm="ortho")[:20],
                "onset": flux[None], "tempogram": tempogram.reshape(96, 4, -1).mean(1),
                "shape": librosa.feature.spectral_contrast(**spectrum, sr=RATE)[:, :100]}
    off = {name: (got[name][0, :len(values)] - torch.as_tensor(values)).abs().max().item() for name, values in referees.items()}
    assert got["shape"][0, 7].numpy() == pytest.approx(librosa.feature.spectral_centroid(**spectrum, sr=RATE)[0, :100], rel=1e-4)
    assert got["shape"][0, 8].numpy() == pytest.approx(librosa.feature.spectral_flatness(**spectrum)[0, :100], rel=1e-3)
    assert max(off.values()) < 2e-3, off
    assert got["mfcc_13"].equal(got["mfcc"][:, :13])


# M-3: neighbours

def stacked_by_hand(x: torch.Tensor, r: int) -> torch.Tensor:
    batch, features, frames = x.shape
    at = lambda b, f, n: x[b, f, n].item() if 0 <= n < frames else 0.
    return torch.tensor([[[at(b, f, n + k - r // 2) for n in range(frames)] for f in range(features) for k in range(r)] for b in range(batch)])


def test_neighbours_of_one_feature():
    columns = stack_frames(torch.tensor([[[1., 2, 3, 4]]]), 3)[0].T
    assert columns.tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 0]]


@pytest.mark.parametrize("r", [1, 3, 7])
def test_neighbours_by_hand_and_back(r):
    x = noise(2, 3, 5)
    assert stack_frames(x, r).equal(stacked_by_hand(x, r)) and unstack_frames(stack_frames(x, r), r).equal(x)


def test_mutation_neighbours_frame_by_frame_or_repeated():
    x = 1 + noise(2, 3, 5).abs()
    frame_major = nn.functional.pad(x, (1, 1)).unfold(-1, 3, 1).permute(0, 3, 1, 2).flatten(1, 2)
    repeated = nn.functional.pad(x, (1, 1), mode="replicate").unfold(-1, 3, 1).transpose(-1, -2).flatten(1, 2)
    assert not frame_major.equal(stacked_by_hand(x, 3)) and not repeated.equal(stacked_by_hand(x, 3))


@pytest.mark.parametrize("r", [0, 2, -1])
def test_an_even_number_of_neighbours_is_refused(r):
    for build in (lambda: stack_frames(noise(1, 2, 3), r), lambda: unstack_frames(noise(1, 2, 3), r), lambda: Targets(["onset"], stack=r)):
        with pytest.raises(ValueError, match=f"got {r} frames side by side, wanted an odd number"): build()


# M-4: levels

PARTS = (1, 2, 5)       # rows of unequal batches, far from each other, so that every term counts


def parts() -> list[torch.Tensor]: return [100 * k + (k + 1) * noise(rows, 3, 11, seed=k) for k, rows in enumerate(PARTS)]


def not_the_whole(moments: nn.Module) -> float:
    """How far mean and variance are from those of all values at once, relative to them."""
    whole = torch.cat(parts()).double().transpose(0, 1).flatten(1)
    variance = whole.var(1, unbiased=False)
    return max(((moments.mean - whole.mean(1)) / whole.mean(1)).abs().max().item(),
               ((moments.squares / moments.count - variance) / variance).abs().max().item())


def gathered_from(moments: nn.Module) -> nn.Module:
    for part in parts(): moments.update(part)
    return moments


def test_streaming_moments_are_those_of_the_whole():
    assert not_the_whole(gathered_from(Moments(3))) < 1e-5


def test_mutation_moments_without_the_step_of_the_mean_or_the_counts():
    class WithoutStep(Moments):
        def merge(self, count, mean, squares):
            kept = self.squares + squares
            super().merge(count, mean, squares)
            self.squares.copy_(kept)
    class EveryBatchTheSame(Moments):
        def update(self, x):
            values = x.double().transpose(0, 1).flatten(1)
            self.merge(torch.ones((), dtype=torch.float64), values.mean(1), values.var(1, unbiased=False))
    assert min(not_the_whole(gathered_from(kind(3))) for kind in (WithoutStep, EveryBatchTheSame)) > .01


def test_small_movement_far_from_zero_survives():
    x = (-190 + .01 * noise(4, 1, 5_000)).float()
    statistics = RunningStatistics(1)
    for part in x: statistics.update(part[None])
    assert statistics(x).std().item() == pytest.approx(1, abs=.01)


def unlevel(targets: Targets, waves: torch.Tensor) -> list[str]:
    """Channels that are not level over the set they were fitted on."""
    wrong = []
    for name, x in targets(waves).items():
        spread, steady = x.std((0, 2), unbiased=False), x.abs().amax((0, 2)) == 0
        if not x.isfinite().all() or (x.mean((0, 2)).abs() > .02).any() or ((spread - 1).abs() > .02)[~steady].any(): wrong.append(name)
    return wrong


@pytest.fixture(scope="module")
def fitted(waves) -> Targets:
    targets = Targets(list(TARGETS))
    targets.fit(waves.split([1, 3]))
    return targets


def test_every_channel_is_level(fitted, waves):
    assert not unlevel(fitted, waves)


def test_who_says_zero_pays_one(fitted, waves):
    paid = {name: x.square().mean().item() for name, x in fitted(waves).items() if name != "prosody"}  # the voicing flag may never move
    assert all(abs(loss - 1) < .02 for loss in paid.values()), paid


def test_mutation_spread_within_chunks(fitted, waves):
    "PASE's code: the deviation, from chunk to chunk, of the deviation within a chunk."
    wrong, raw = copy.deepcopy(fitted), fitted.raw(waves)
    for name, level in wrong.levels.items(): level.squares.copy_(raw[name].double().std(-1).var(0) * level.count)
    assert set(unlevel(wrong, waves)) == set(TARGETS)


def test_a_channel_that_never_moves_is_zero():
    x = torch.stack([torch.full((2, 50), -23.025851), noise(2, 50), 1 + 6e-8 * noise(2, 50)], 1)  # the last: float32's rounding
    statistics = RunningStatistics(3)
    for row in x: statistics.update(row[None])
    levelled = statistics(x)
    assert not levelled[:, [0, 2]].any() and levelled[:, 1].std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert statistics.inverse(levelled).allclose(x, atol=1e-5)


def test_mutation_dividing_by_any_deviation():
    class Unguarded(RunningStatistics):
        std = property(lambda self: (self.squares / self.count).sqrt())
        def forward(self, x): return ((x - self.mean[:, None]) / self.std[:, None]).float()
    x = torch.stack([torch.full((2, 50), .5), 1 + 6e-8 * noise(2, 50)], 1)
    statistics = Unguarded(2)
    statistics.update(x)
    assert statistics(x)[:, 0].isnan().all() and statistics(x)[:, 1].abs().max() > 1


def fitted_by_two(names: list[str], shares: list[list[torch.Tensor]], gathering: bool = True) -> list[Targets]:
    """Two processes, played by two threads that wait for each other."""
    desk, together = {}, threading.Barrier(2)
    def fit(rank):
        def gather(mine):
            desk[rank] = mine
            together.wait()
            both = torch.stack([desk[0], desk[1]])
            together.wait()
            return both
        targets = Targets(names)
        targets.fit(shares[rank], gather if gathering else None)
        return targets
    with ThreadPoolExecutor(2) as pool: return list(pool.map(fit, (0, 1)))


def off_from(alone: Targets, others: list[Targets], waves: torch.Tensor) -> float:
    return max((other(waves)[name] - x).abs().max().item() for other in others for name, x in alone(waves).items())


@pytest.mark.parametrize("rows", [2, 1, 4])
def test_two_processes_learn_what_one_learns(waves, rows):
    alone = Targets(["fbank", "onset"])
    alone.fit([waves])
    first, second = fitted_by_two(["fbank", "onset"], [[waves[:rows]], [waves[rows:]] if rows < 4 else []])
    assert all(first.state_dict()[key].equal(value) for key, value in second.state_dict().items())
    assert off_from(alone, [first, second], waves) < 1e-4


def test_mutation_every_process_for_itself(waves):
    alone = Targets(["fbank", "onset"])
    alone.fit([waves])
    assert off_from(alone, fitted_by_two(["fbank", "onset"], [[waves[:2]], [waves[2:]]], gathering=False), waves) > .01


def test_unfitted_targets_say_so(waves):
    with pytest.raises(RuntimeError, match="before their means and deviations are known, wanted `fit` first"): Targets(["onset"])(waves)
    with pytest.raises(RuntimeError, match="wanted `fit` first"): Targets(["onset"]).physical("onset", noise(1, 1, 5))


def test_fit_refuses_nothing_and_what_is_not_finite(waves):
    with pytest.raises(ValueError, match="got 0 frames of fbank, squares summing to 0.0, wanted some frames, all finite"): Targets(["fbank"]).fit([])
    with pytest.raises(ValueError, match="squares summing to nan, wanted some frames, all finite"): Targets(["fbank"]).fit([waves, waves * torch.nan])


def test_a_second_fit_starts_anew(waves):
    twice, once = Targets(["fbank"]), Targets(["fbank"])
    twice.fit([.01 * waves]), twice.fit([waves]), once.fit([waves])
    assert twice(waves)["fbank"].equal(once(waves)["fbank"])
    with mock.patch.object(RunningStatistics, "reset", lambda self: None): twice.fit([.01 * waves])
    assert twice.levels["fbank"].count == 2 * once.levels["fbank"].count       # mutation: without the reset, this test would fail


def test_levels_travel_with_the_weights(fitted, waves):
    again = Targets(list(TARGETS))
    again.load_state_dict(fitted.state_dict())
    assert all(again(waves)[name].equal(x) for name, x in fitted(waves).items())
    assert set(fitted.state_dict()) == {f"levels.{name}.{part}" for name in TARGETS for part in ("count", "mean", "squares")}


# M-5: known signals

def test_a_sine_stands_where_it_should():
    a = sine(440)[None]
    centres = librosa.mel_frequencies(n_mels=130, fmin=0, fmax=8_000)[1:-1]
    assert new_target("chroma")(a).mean(-1).argmax() == 9                       # C is 0
    assert new_target("cqt")(a).mean(-1).argmax() == 45                         # semitones above the lowest C
    assert new_target("cqt")(2 * a).mean(-1).max().item() == pytest.approx(0, abs=.05)   # amplitude 1; the ends are heard less
    assert new_target("lps")(a).mean(-1).argmax() == round(440 * 2048 / RATE)
    for hertz in (440, 1_000, 3_000):
        assert new_target("logmel")(sine(hertz)[None]).mean(-1).argmax() == abs(centres - hertz).argmin()
    assert new_target("prosody")(sine(150)[None])[0, 0].exp().median().item() == pytest.approx(150, rel=.01)


def missed(tempogram: nn.Module) -> list[int]:
    """Periods of clicks, in frames, that are not the largest value away from lag 0."""
    return [period for period in (47, 48, 49, 50, 51, 58, 63)
            if 8 + tempogram(clicks(160 * period))[0, 8:, 200].argmax().item() not in ((period - 1) // 4, period // 4, (period + 1) // 4)]


def test_a_beat_stands_at_its_lag():
    assert new_target("tempogram")(clicks(8_000))[0, 4:].mean(-1).argmax() + 4 == 50 // 4     # 120 a minute: lags 48 to 51
    assert not missed(new_target("tempogram"))


def test_mutation_every_fourth_lag():
    assert 50 in missed(Tempogram(RATE, 1024, 160, win_length=384, step=4))


def test_silence_is_finite_and_says_nothing(fitted, waves):
    silence = torch.zeros(2, RATE)
    for x in (fitted.raw(silence) | {f"level {name}": x for name, x in fitted(silence).items()}).values(): assert x.isfinite().all()
    mute = Targets(list(TARGETS), stack=7, derivatives=2)
    mute.fit([silence])
    assert not any(x.any() for x in mute(silence).values())
    assert all(x.isfinite().all() for x in mute(waves).values())


# Together

def test_as_wide_as_pase_plus():
    targets = Targets(["lps", "lps_long", "fbank", "gammatone", "mfcc_13", "mfcc_long", "prosody"], stack=7, derivatives=2)
    assert {name: n // 7 for name, n in targets.n_channels.items()} == {"lps": 3075, "lps_long": 3075, "fbank": 120, "gammatone": 120, "mfcc_13": 39,
                                                                       "mfcc_long": 60, "prosody": 12}
    assert targets.n_channels["lps"] == 21_525


def test_movement_stands_behind_the_channels(waves):
    still, targets = new_target("fbank")(waves), Targets(["fbank"], stack=3, derivatives=2)
    targets.fit([waves])
    moving = torch.cat([still, Delta(1)(still), Delta(2)(still)], 1)
    assert Measurements(["fbank"], derivatives=2)(waves)["fbank"].equal(moving)
    mean, spread = moving.mean((0, 2))[:, None], moving.std((0, 2), unbiased=False)[:, None]
    assert unstack_frames(targets(waves)["fbank"], 3).allclose((moving - mean) / spread, atol=1e-3)
    assert targets.physical("fbank", targets(waves)["fbank"]).allclose(still, atol=1e-4)
    assert targets(waves)["fbank"].shape == (4, targets.n_channels["fbank"], 100)


def test_one_log_mel_for_four(waves):
    names = ["logmel", "cepstra", "tempogram", "onset"]
    with mock.patch.object(LogMel, "forward", autospec=True, side_effect=LogMel.forward) as measured: together = Measurements(names)(waves)
    assert measured.call_count == 1
    assert all(together[name].equal(new_target(name)(waves)) for name in names)


def test_rows_do_not_know_each_other(waves):
    assert all(x[1:2].allclose(new_target(name)(waves[1:2]), atol=1e-4, rtol=1e-4) for name, x in Measurements(list(TARGETS))(waves).items())


def test_no_gradient_and_no_half_precision(fitted, waves):
    expected = fitted(waves)
    with torch.autocast("cpu", torch.bfloat16): got = fitted(waves.clone().requires_grad_())
    assert all(x.dtype == torch.float32 and not x.requires_grad and x.equal(expected[name]) for name, x in got.items())


def test_mutation_half_precision_would_be_seen(waves):
    plain, target = new_target("cepstra")(waves), new_target("cepstra")
    with torch.autocast("cpu", torch.bfloat16): halved = target.back(target.measure(waves))   # without `read`
    assert halved.dtype == torch.bfloat16 or not halved.float().equal(plain)


def test_no_targets_are_no_targets(waves):
    nothing = Targets([])
    nothing.fit([waves])
    assert nothing(waves) == nothing.raw(waves) == nothing.n_channels == {}


def test_what_is_refused(waves):
    with pytest.raises(ValueError, match="got the target 'melody', wanted one of lps, lps_long"): Targets(["melody"])
    with pytest.raises(ValueError, match="got the targets onset, fbank, onset, wanted each once"): Targets(["onset", "fbank", "onset"])
    with pytest.raises(ValueError, match="got derivatives up to order 3, wanted 0, 1 or 2"): Targets(["onset"], derivatives=3)
    with pytest.raises(ValueError, match=r"got a wave of shape \(1, 159\), wanted \(B, T\) with T >= 160"): Targets(["onset"]).raw(waves[:1, :159])
    with pytest.raises(ValueError, match=r"got a wave of shape \(16000,\), wanted \(B, T\) with T >= 160"): new_target("onset")(waves[0])
    assert set(recipe.front for recipe in TARGETS.values()) == set(room._FRONTS)
