"""Beats: the decoder against a Viterbi search written out in full, edges of the raster, and a fit that leaves everything else alone."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from musicssl.encoders.base import Embedding
from musicssl.probe import beats
from musicssl.probe.beats import DOWNBEAT, BeatHead, decode_beats, decode_downbeats, fit_beats, frame_rate, frame_targets
from musicssl.probe.metrics import per_track, score


def noisy(seed, n=60, spread=2.):
    """Activations at 100 frames/s of beats every 8 to 14 frames, under much noise."""
    rng = np.random.default_rng(seed)
    clean = frame_targets(np.arange(rng.uniform(0, .1), n / 100, rng.integers(8, 15) / 100), n, 100).clip(.05, .95)
    return 1 / (1 + np.exp(-np.log(clean / (1 - clean)) - rng.normal(0, spread, n)))


def written_out(on, off, periods, loud, stiffness):
    """The same network with one state per period and step, frame by frame: librosa's Viterbi search. First loud step of each beat."""
    librosa = pytest.importorskip("librosa")
    states = [(p, step) for p in periods for step in range(p)]
    place = {state: number for number, state in enumerate(states)}
    moves = np.zeros((len(states), len(states)))
    for q in periods:
        for step in range(q - 1): moves[place[q, step], place[q, step + 1]] = 1
        bend = np.exp(-stiffness * np.abs(periods / q - 1))
        for p, share in zip(periods, bend / bend.sum()): moves[place[q, q - 1], place[p, 0]] = share
    is_loud = np.array([step < loud[list(periods).index(p)] for p, step in states])
    heard = np.where(is_loud[:, None], np.exp(np.diff(on)), np.exp(np.diff(off)))
    path = librosa.sequence.viterbi(heard, moves)
    return [t for t, state in enumerate(path) if states[state][1] == 0]


def both(seed, parts=5, stiffness=20.):
    """First steps of the beats inside a clip, by our search and by the written-out one."""
    a, periods = noisy(seed).clip(.01, .99), np.arange(8, 15)
    edge, loud = periods[-1], -(-periods // parts)
    evidence = np.pad([np.log(a), np.log((1 - a) / (parts - 1))], ((0, 0), (edge, edge)))
    on, off = np.pad(evidence.cumsum(1), ((0, 0), (1, 0)))
    inside = lambda starts: [int(t) for t in starts if edge <= t < edge + len(a) - loud[-1]]
    return inside(t for t, _ in beats._best_path(on, off, periods, loud, stiffness)), inside(written_out(on, off, periods, loud, stiffness))


@pytest.mark.parametrize("seed", range(12))
def test_leaping_finds_what_the_full_search_finds(seed):
    ours, referee = both(seed)
    assert ours == referee and len(ours) >= 3


def test_the_referee_notices_a_tempo_that_bends_for_nothing(monkeypatch):
    """Mutation: the search without the price of a new tempo."""
    search = beats._best_path
    monkeypatch.setattr(beats, "_best_path", lambda on, off, periods, loud, stiffness: search(on, off, periods, loud, 0.))
    assert any(ours != referee for ours, referee in map(both, range(12)))


@pytest.mark.parametrize("rate", [20., 22050 / 512, 50., 75., 100.])
def test_every_tempo_and_metre_from_perfect_activations(rate):
    rng = np.random.default_rng(0)
    for bpm in np.linspace(55, 215, 9):
        for m in (2, 3, 4):
            truth = np.arange(rng.uniform(0, 60 / bpm), 10 - 1 / rate, 60 / bpm)
            first = truth[rng.integers(m)::m]
            activation = np.stack([frame_targets(truth, round(10 * rate), rate), frame_targets(first, round(10 * rate), rate, DOWNBEAT)], 1)
            found = decode_beats(activation[:, 0], rate)
            assert score("beat_f1", [truth], [found]) >= .99, (bpm, m)
            assert score("beat_f1", [first], [decode_downbeats(activation, found, rate)]) >= .99, (bpm, m)


def test_narrow_beats_and_a_stiff_tempo_lose_fast_ones():
    """Mutation: madmom's constants at 20 frames/s, for which they were not made."""
    truth = [np.arange(.1, 10, 60 / bpm) for bpm in np.linspace(190, 215, 6)]
    heard = [frame_targets(t, 200, 20) for t in truth]
    assert score("beat_f1", truth, [decode_beats(a, 20) for a in heard]) >= .99
    assert score("beat_f1", truth, [decode_beats(a, 20, stiffness=100., parts=16) for a in heard]) < .95


def test_shuffled_activations_are_worth_a_deaf_metronome():
    rng = np.random.default_rng(1)
    truth = [np.arange(rng.uniform(0, .5), 10, 60 / bpm) for bpm in np.linspace(60, 180, 20)]
    heard = [rng.permutation(frame_targets(t, 500, 50)) for t in truth]
    deaf = [np.arange(rng.uniform(0, .5), 10, 60 / rng.uniform(55, 215)) for _ in truth]
    assert score("beat_f1", truth, [decode_beats(a, 50) for a in heard]) < score("beat_f1", truth, deaf) + .15


def test_shy_downbeats_in_two_stay_in_two():
    """Half-hearted downbeats, .45 against .1: without the prior the longer bar would win."""
    times = np.arange(.2, 8, .5)
    activation = np.stack([frame_targets(times, 400, 50, (1, 1)), np.full(400, .1)], 1)
    activation[:, 1] = np.maximum(.1, .45 * frame_targets(times[1::2], 400, 50, (1, 1)))
    assert np.array_equal(decode_downbeats(activation, times, 50), times[1::2])


def test_the_prior_is_what_keeps_them(monkeypatch):
    """Mutation: no idea before listening (1/2) in the place of one beat in three."""
    monkeypatch.setattr(beats, "PRIOR", .5)
    with pytest.raises(AssertionError): test_shy_downbeats_in_two_stay_in_two()


def test_no_beats_no_downbeats():
    assert len(decode_downbeats(np.zeros((50, 2)), np.array([]), 50)) == 0


def test_beats_beyond_the_edges_are_no_answer():
    """A path begins before the clip and ends behind it; here its first beat lies a millisecond before the clip."""
    truth = -.001 + np.arange(1, 26) * 60 / 155
    found = decode_beats(frame_targets(truth, 1000, 100), 100)
    assert len(found) == len(truth) and np.abs(found - truth).max() <= .011


def test_without_the_floor_they_would_be(monkeypatch):
    """Mutation: no activation at all is enough for a beat across the edge."""
    monkeypatch.setattr(beats, "FLOOR", 0.)
    with pytest.raises(AssertionError): test_beats_beyond_the_edges_are_no_answer()


def test_tolerance_and_the_two_averages():
    truth = [np.arange(.2, 8, 1.), np.arange(.2, 8, .4)]
    late = lambda seconds: [truth[0] + seconds, truth[1]]
    assert score("beat_f1", truth, late(.069)) == 1 and score("beat_f1", truth, late(.071)) == .5
    assert score("beat_f1_micro", truth, late(.071)) == 20 / 28 and per_track("beat_f1", truth, late(.071)).tolist() == [0, 1]


def test_targets_of_overlapping_and_outside_beats():
    assert frame_targets([.2, .3], 6, 10, DOWNBEAT).tolist() == np.float32([.25, .5, .95, .95, .5, .25]).tolist()
    assert frame_targets([-.1, .8], 6, 10, DOWNBEAT).tolist() == np.float32([.5, .25, 0, 0, 0, 0]).tolist()
    assert frame_targets([.6], 6, 10, DOWNBEAT).tolist() == np.float32([0, 0, 0, 0, .25, .5]).tolist()


class Levels(nn.Module):
    """L layers of four features each; the beats stand in one of them, the others are noise."""
    sample_rate, hop, dim = 1000, 20, 4

    def __init__(self, n_layers=3, at=2):
        super().__init__()
        self.at, self.n_layers = at, n_layers
        self.norm = nn.BatchNorm1d(1)

    def forward(self, wave):
        level = self.norm(wave[:, None])[:, 0].unfold(-1, 20, 20).amax(-1)
        frames = torch.sin(torch.arange(level.numel() * 4 * self.n_layers, dtype=torch.float32) ** 2).view(len(wave), self.n_layers, -1, 4)
        frames[:, self.at] = torch.stack([level, level.roll(1, -1), level.roll(-1, -1), level.roll(2, -1) + level.roll(-2, -1)], -1)
        return Embedding(frames, frames.mean((1, 2)))


class Pulses:
    """A sample of 1 at every beat, of 2 at every third."""
    sample_rate = 1000

    def __init__(self, n=14):
        self.bpm = np.random.default_rng(0).uniform(70, 190, n)
        self.labels = [{"downbeats": self.beat_times(i)[::3]} for i in range(n)]

    def beat_times(self, i): return np.arange(.21, 6 if i % 2 else 5, 60 / self.bpm[i])

    def wave(self, ids):
        (i,) = ids # clips differ in length, so they come one by one
        wave = torch.zeros(1, 6000 if i % 2 else 5000)
        wave[0, (self.beat_times(i) * 1000).astype(int)] = 1.
        wave[0, (self.labels[i]["downbeats"] * 1000).astype(int)] = 2.
        return wave


def learned(**how):
    encoder, pulses = Levels(), Pulses()
    return encoder, pulses, fit_beats(encoder, pulses, range(8), range(8, 11), **{"epochs": 25, **how})


def test_a_fit_converges_and_touches_nothing_else():
    encoder, pulses = Levels().train(), Pulses()
    before, dice = {name: value.clone() for name, value in encoder.state_dict().items()}, torch.random.get_rng_state()
    fitted = fit_beats(encoder, pulses, range(8), range(8, 11), layer=2, epochs=25)
    truth, (found, bars) = [pulses.beat_times(i) for i in range(11, 14)], fitted.answer(encoder, pulses, range(11, 14))
    assert score("beat_f1", truth, found) == 1 and score("beat_f1", [pulses.labels[i]["downbeats"] for i in range(11, 14)], bars) == 1
    assert len(fitted.history) < 25, "a perfect score cannot improve: it stops"
    assert encoder.training and all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(dice, torch.random.get_rng_state())


def test_an_encoder_left_in_training_mode_would_change(monkeypatch):
    """Mutation: nobody calls eval()."""
    encoder = Levels().train()
    monkeypatch.setattr(encoder, "eval", lambda: encoder)
    before = encoder.norm.running_mean.clone()
    with pytest.raises(RuntimeError, match="the encoder changed while it was read: 3 tensors, norm.running_mean"):
        fit_beats(encoder, Pulses(), range(2), range(8, 9), epochs=1)
    assert not torch.equal(before, encoder.norm.running_mean)


def test_a_mixture_hears_the_later_layers_and_never_the_first():
    encoder, pulses, fitted = learned(lr=1e-2)
    assert fitted.head.mix.numel() == 2
    blind = fit_beats(Levels(at=0), pulses, range(8), range(8, 11), epochs=3)
    assert max(e["valid_f1"] for e in fitted.history) > .95 > max(e["valid_f1"] for e in blind.history)


def test_the_best_epoch_is_kept_and_seeds_repeat():
    encoder, pulses, fitted = learned(lr=1e-2, epochs=6, seed=3)
    answer = fitted.answer(encoder, pulses, range(8, 11))[0]
    assert score("beat_f1", [pulses.beat_times(i) for i in range(8, 11)], answer) == max(e["valid_f1"] for e in fitted.history)
    assert learned(lr=1e-2, epochs=6, seed=3)[2].history == fitted.history != learned(lr=1e-2, epochs=6, seed=4)[2].history


def test_shuffled_labels_teach_nothing():
    """A leak detector: the audio of one clip under the beats of another."""
    encoder, pulses = Levels(1, 0), Pulses()
    wrong = SimpleNamespace(sample_rate=1000, wave=pulses.wave, beat_times=lambda i: pulses.beat_times(i) + .17 * (1 + i % 3),
                            labels=[{"downbeats": row["downbeats"] + .17 * (1 + i % 3)} for i, row in enumerate(pulses.labels)])
    right, lost = (fit_beats(encoder, corpus, range(8), range(8, 11), epochs=8) for corpus in (pulses, wrong))
    assert max(e["valid_f1"] for e in right.history) == 1 and max(e["valid_f1"] for e in lost.history) < .7


def test_refusals():
    slow = SimpleNamespace(sample_rate=22050, hop=59049)
    with pytest.raises(ValueError, match="0.37 frames/s, beats need at least 20"): frame_rate(slow)
    with pytest.raises(ValueError, match="0.37 frames/s"): fit_beats(slow, Pulses(), [0], [1])
    with pytest.raises(ValueError, match="got audio at 8000 Hz, Levels expects 1000 Hz"):
        fit_beats(Levels(), SimpleNamespace(sample_rate=8000), [0], [1])
    for wrong in (np.array([.1, np.nan]), np.array([.1, 1.2]), np.zeros((4, 2))):
        with pytest.raises(ValueError, match="wanted .N,. in .0, 1."): decode_beats(wrong, 50)


def test_a_one_hot_mixture_is_the_single_layer():
    torch.manual_seed(0)
    head, layers = BeatHead(3, 5).eval(), torch.randn(2, 3, 7, 5)
    with torch.no_grad(): head.mix.copy_(torch.tensor([0., -torch.inf]))
    single = BeatHead(1, 5).eval()
    single.net.load_state_dict(head.net.state_dict())
    torch.testing.assert_close(head(layers), single(layers[:, 1:2]), rtol=0, atol=0)
