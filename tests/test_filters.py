"""What filters listen for: found where it is known, never by turning up the volume, and without touching the encoder."""
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from musicssl.encoders.samplecnn import SampleCNN
from musicssl.probe import filters
from musicssl.probe.filters import activations, best_waveforms, spectra


class Known(nn.Module):
    """Filters that stand alone."""
    def __init__(self, kernels, stride=1):
        super().__init__()
        conv = nn.Conv1d(1, len(kernels), kernels.shape[1], stride, bias=False)
        conv.weight = nn.Parameter(kernels[:, None])
        self.blocks = nn.Sequential(nn.Sequential(conv, nn.ReLU()))


KERNELS = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def lived_in(seed=0):
    """A small SampleCNN whose statistics are not those of birth."""
    torch.manual_seed(seed)
    net = SampleCNN.preset("toy").train()
    with torch.no_grad(): net(.1 * torch.randn(4, 1536))
    return net


# It finds what is there

@pytest.mark.parametrize("stride", [1, 3, 12])
def test_a_filter_alone_wants_itself(stride):
    """Cauchy and Schwarz. The mutation: no ascent, which stays far below."""
    net, bound = Known(KERNELS, stride), .1 * 300 ** .5 * KERNELS.norm(dim=1)
    found = best_waveforms(net, 1, 300, steps=150)
    reached = activations(net, 1, found)
    assert (reached > .995 * bound).all() and (reached < 1.00001 * bound).all()
    assert (activations(net, 1, best_waveforms(net, 1, 300, steps=0)) < .6 * bound).all()
    at = torch.stack([F.conv1d(wave[None, None], kernel[None, None], stride=stride)[0, 0] for wave, kernel in zip(found, KERNELS)]).argmax(1) * stride
    pieces = torch.stack([wave[start:start + 12] for wave, start in zip(found, at.tolist())])
    assert F.cosine_similarity(pieces, KERNELS).min() > .99


def test_a_mean_over_frames_finds_the_stride():
    """Why it is the loudest frame: the mean's best waveform repeats with the stride, whatever the filter."""
    wave = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)).requires_grad_()
    own = torch.arange(5)
    slope, = torch.autograd.grad(filters._frames(Known(KERNELS[:, :3], 3), 1, wave)[own, own].mean(1).sum(), wave)
    torch.testing.assert_close(slope[:, 3:], slope[:, :-3])
    power = torch.fft.rfft(slope).abs() ** 2
    assert (power[:, [0, 100]].sum(1) > .9999 * power.sum(1)).all()


def climb(net, block, number, wave, steps, lr, rms):
    """One filter by itself, step by step."""
    wave = wave / wave.norm() * rms * len(wave) ** .5
    for _ in range(steps):
        wave = wave.detach().requires_grad_()
        frames = wave[None, None]
        for inner in net.blocks[:block - 1]: frames = inner(frames)
        for layer in net.blocks[block - 1][:-1]: frames = layer(frames)
        frames[0, number].max().backward()
        up = wave.detach() + lr * wave.detach().norm() * wave.grad / wave.grad.norm()
        wave = up / up.norm() * rms * len(up) ** .5
    return wave


@pytest.mark.parametrize("block", [1, 4, 6])
def test_all_filters_climb_as_each_would_alone(block):
    net, start = lived_in().eval(), torch.Generator().manual_seed(3)
    count = net.blocks[block - 1][0].out_channels
    noise = torch.randn(count, 200, generator=start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda *size, **how: noise)
        found = best_waveforms(net, block, 200, steps=5, lr=.2, rms=.05)
    for number in (0, count - 1):
        torch.testing.assert_close(found[number], climb(net, block, number, noise[number], 5, .2, .05), atol=1e-5, rtol=0)


@pytest.mark.parametrize("block", [1, 4, 6])
def test_it_climbs_and_does_not_turn_up_the_volume(block):
    """Far above the best of fifty noises of the same loudness. The mutation: steps down the slope."""
    net = lived_in()
    reached = activations(net, block, found := best_waveforms(net, block, 200, steps=40))
    noises = [F.normalize(torch.randn(found.shape, generator=torch.Generator().manual_seed(seed)), dim=1) * .1 * 200 ** .5 for seed in range(50)]
    by_chance = torch.stack([activations(net, block, noise) for noise in noises]).amax(0)
    assert (reached > 1.2 * by_chance).float().mean() > .9 and found.isfinite().all()
    np.testing.assert_allclose(found.square().mean(1).sqrt(), .1, rtol=1e-5)
    down = activations(net, block, best_waveforms(net, block, 200, steps=40, lr=-.1))
    assert (down < by_chance).float().mean() > .9


def test_activations_equal_a_loop():
    net = lived_in().eval()
    waves = .1 * torch.randn(32, 300, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): said = [net.blocks[3][:-1](net.blocks[:3](wave[None, None]))[0, number].max() for number, wave in enumerate(waves)]
    torch.testing.assert_close(activations(net, 4, waves), torch.stack(said), atol=1e-6, rtol=1e-5)


def test_a_filter_nobody_can_reach_keeps_its_noise():
    """No slope, no step, and no NaN."""
    kernels = KERNELS.clone()
    kernels[2] = 0
    start, found = (best_waveforms(Known(kernels), 1, 100, steps=steps) for steps in (0, 20))
    torch.testing.assert_close(found[2], start[2])
    assert found.isfinite().all() and not torch.allclose(found[1], start[1])


# It touches nothing

def test_the_encoder_stays_and_so_do_the_dice():
    net, state = lived_in(), torch.get_rng_state()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = best_waveforms(net, 4, 200, steps=3)
    assert torch.equal(torch.get_rng_state(), state) and net.training and torch.is_grad_enabled()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()) and all(p.grad is None for p in net.parameters())
    assert torch.equal(found, best_waveforms(net.eval(), 4, 200, steps=3)) and not torch.equal(found, best_waveforms(net, 4, 200, steps=3, seed=1))


def test_mutation_reading_in_training_mode_is_noticed():
    net = lived_in()
    net.blocks[1][1].eval = lambda: net.blocks[1][1]          # refuses evaluation mode
    net.blocks[1][1].train = lambda mode=True: net.blocks[1][1]
    with pytest.raises(RuntimeError, match="the encoder changed while it was read"): best_waveforms(net, 4, 200, steps=1)


def test_what_has_no_such_block_is_refused():
    net = lived_in()
    for block in (0, 12):
        with pytest.raises(ValueError, match=f"got block {block}, wanted 1 to 11"): best_waveforms(net, block)
    with pytest.raises(ValueError, match="block 6 cannot read 2 samples: "): best_waveforms(net, 6, 2)
    with pytest.raises(ValueError, match="Linear has no `blocks`"): best_waveforms(nn.Linear(3, 3), 1)
    with pytest.raises(ValueError, match="got 3 waveforms, wanted one for each of 16 filters"): activations(net, 1, torch.zeros(3, 200))


# Spectra

def test_spectra_are_numpy_s_and_stand_in_order():
    waves = torch.randn(20, 150, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = spectra(waves, 8000, 256)
    magnitude = np.abs(np.fft.rfft(waves.numpy(), 256))
    np.testing.assert_allclose(found.db, (20 * np.log10(magnitude / magnitude.max(1, keepdims=True)))[found.order], atol=1e-9)
    np.testing.assert_array_equal(found.peak, np.fft.rfftfreq(256, 1 / 8000)[magnitude.argmax(1)][found.order])
    assert sorted(found.order) == list(range(20)) and (np.diff(found.peak) >= 0).all() and found.peak[0] < found.peak[-1]
    np.testing.assert_array_equal(found.hertz[found.db.argmax(1)], found.peak)


@pytest.mark.parametrize("hertz", [150., 1000., 3700.])
def test_a_filter_that_hears_one_tone_has_its_peak_there(hertz):
    """From the filter to the picture."""
    time = torch.arange(200) / 8000
    tone = (torch.sin(2 * torch.pi * hertz * time) * torch.hann_window(200))[None]
    found = spectra(best_waveforms(Known(tone), 1), 8000)
    assert abs(found.peak[0] - hertz) < 16 and found.db.max() == 0


def test_no_spectrum_of_silence_or_of_too_few_points():
    with pytest.raises(ValueError, match="waveform 1 is silent"): spectra(torch.tensor([[1.], [0.]]).repeat(1, 9), 8000)
    with pytest.raises(ValueError, match="got 8 points for 9 samples, wanted at least as many"): spectra(torch.ones(1, 9), 8000, 8)
