"""The codec, its loss and its teacher where a lesson would be too long."""
import json
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import musicssl.teachers.codec as room
from musicssl import meter
from musicssl.audio import Batch
from musicssl.augment import draw_seeds
from musicssl.checkpoint import Mismatch, load_weights, save_weights
from musicssl.data.loader import Loader
from musicssl.features.mel import mel_bank
from musicssl.teachers.codec import RVQVAE, CodecTeacher, SpectralLoss, rate_table
from musicssl.train import TrainConfig, fit


def generator(seed=0): return torch.Generator().manual_seed(seed)
def noise(*shape, seed=0): return .1 * torch.randn(*shape, generator=generator(seed))
def batch(clips=4, samples=3200, seed=0): return Batch(wave=noise(clips, samples, seed=seed), seeds=draw_seeds(clips, generator(seed)))


def tiny(**changes):
    torch.manual_seed(0)
    return RVQVAE.preset("tiny", **{"channels": 16, "dim": 8, "n_codes": 8, "fft_sizes": (256, 512), **changes})


def trained(steps=3, **changes):
    codec = tiny(**changes)
    adam = torch.optim.Adam(codec.parameters(), 1e-3)
    for step in range(steps):
        adam.zero_grad()
        codec(batch(seed=step))["loss"].backward()
        adam.step()
    return codec


# The spectral loss

def by_hand(wave, target, sizes, floor):
    total = 0.
    for n in sizes:
        def log_mel(x):
            x, window = torch.nn.functional.pad(x, (n // 2, n // 2)).double(), torch.hann_window(n).double()
            frames = [torch.fft.rfft(x[start:start + n] * window).abs() ** 2 for start in range(0, len(x) - n + 1, n // 4)]
            return (torch.stack(frames) @ mel_bank(24_000, n, n // 16).double() + floor * .375 * n**2 / 24_000).log()
        gap = torch.stack([log_mel(a) - log_mel(b) for a, b in zip(wave, target)])      # (B, N, channels)
        total += gap.abs().mean() + gap.square().mean(2).sqrt().mean()
    return (total / len(sizes)).item()


def test_the_spectral_loss_is_the_sum_by_hand():
    sizes, wave, target = (256, 1024), noise(2, 6000), noise(2, 6000, seed=1)
    assert_close(SpectralLoss(24_000, sizes)(wave, target).item(), by_hand(wave, target, sizes, 1e-7), atol=1e-4, rtol=1e-4)
    assert abs(SpectralLoss(24_000, sizes)(wave, target).item() - by_hand(wave, target, (256, 512), 1e-7)) > 1e-2 # other sizes


@pytest.mark.parametrize("floor", [1e-5, 1e-7])
def test_the_floor_is_white_noise_of_that_variance(floor):
    "Where the target is noise as loud as the floor, silence is wrong by a factor of two in power: 0.69, once for L1 and nearly so for L2."
    quiet = math.sqrt(floor) * torch.randn(4, 24_000, generator=generator())
    gaps = SpectralLoss(24_000, (512, 2048), floor).gaps(torch.zeros_like(quiet), quiet)
    assert all(abs(gap.exp().reciprocal().mean() - 2) < .1 for gap in gaps)


def test_the_gradient_of_the_spectral_loss_is_finite_even_in_silence():
    wave = torch.zeros(1, 4000).requires_grad_()
    SpectralLoss(24_000)(wave, noise(1, 4000)).backward()
    assert wave.grad.isfinite().all()
    assert SpectralLoss(24_000)(noise(1, 4000), noise(1, 4000)).isfinite()


# Frames and samples

@pytest.mark.parametrize("bands", [2, 5, 8, 320])
def test_lapped_windows_give_the_samples_back(bands):
    wave = noise(1, 1, 12 * bands)
    down, up = room._down(1, bands, bands), room._up(bands, 1, bands)
    room._know_frequencies(down, up)
    nn.init.zeros_(down.bias), nn.init.zeros_(up.bias)
    assert_close(up(down(wave))[..., 2 * bands:-2 * bands], wave[..., 2 * bands:-2 * bands], atol=1e-5, rtol=0)
    with torch.no_grad(): down.weight[0] *= 1.1 # the mutation
    assert (up(down(wave)) - wave)[..., 2 * bands:-2 * bands].abs().max() > 1e-4


@pytest.mark.parametrize("strides", [(2, 4, 5, 8), (320,), (3, 7)])
def test_frames_for_every_length(strides):
    codec = tiny(strides=strides, channels=4, fft_sizes=(256,))
    hop = math.prod(strides)
    codec(batch(2, 40 * hop))
    for samples in (1, hop - 1, hop, hop + 1, 7 * hop + 3):
        codes = codec.codes(noise(2, samples))
        assert codes.shape == (2, -(-samples // hop), 4) and codes.dtype == torch.int64
        assert codec.sound(codes).shape == (2, codes.shape[1] * hop)
        assert codes.shape[1] >= (samples - 400) // 320 + 1 or hop != 320


def test_a_frame_hears_its_own_samples():
    "A click in the middle of frame 20 is loudest there."
    codec, wave = tiny(), torch.zeros(1, 320 * 40)
    wave[0, 320 * 20 + 160] = 1.
    with torch.no_grad(): loudness = (codec._frames(wave) - codec._frames(0 * wave)).norm(dim=-1)[0]
    assert loudness.argmax() == 20 and loudness[:18].max() == 0 and loudness[23:].max() == 0


def test_the_rate_and_the_sizes():
    codec = RVQVAE.preset("24k")
    assert (codec.hop, codec.sizes, codec.bit_rate) == (320, (1024,) * 8, 6000)


def test_a_stride_of_one_is_refused():
    with pytest.raises(ValueError, match="wanted each at least 2"): tiny(strides=(1, 320))


# Learning

def test_it_overfits_one_batch():
    codec, same = tiny(channels=64, dim=32, n_codes=32, dropout=False), batch(4, 6400)
    adam, losses = torch.optim.Adam(codec.parameters(), 3e-3), []
    for _ in range(60):
        adam.zero_grad()
        (parts := codec(same))["loss"].backward()
        adam.step()
        losses.append({name: value.item() for name, value in parts.items()})
    assert losses[-1]["loss"] < .8 * losses[0]["loss"] and losses[-1]["spectral_loss"] < .8 * losses[0]["spectral_loss"]
    assert 0 < losses[-1]["codes_used"] <= 1


def test_the_loss_is_the_weighted_sum_of_its_parts():
    parts = tiny(wave_weight=3., commitment_weight=.5)(batch())
    assert_close(parts["loss"], parts["spectral_loss"] + 3 * parts["wave_loss"] + .5 * parts["commitment_loss"])


def test_listening_teaches_nothing_and_neither_do_batch_mates():
    codec, wave = trained().train(), noise(3, 3200)
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    codes = codec.codes(wave)
    assert all(torch.equal(before[name], value) for name, value in codec.state_dict().items())
    assert torch.equal(codec.codes(wave[1:2]), codes[1:2])
    codec(Batch(wave=wave, seeds=draw_seeds(3, generator())))      # the mutation: to listen by way of the objective
    assert not all(torch.equal(before[name], value) for name, value in codec.state_dict().items())


def test_a_run_resumes_to_the_same_codebooks(tmp_path):
    clips = (noise(12, 6400) * 32767).to(torch.int16).numpy()
    config = TrainConfig(steps=6, lr=1e-3, clip_norm=1., checkpoint_every=3)
    def run(folder, **options):
        codec = tiny()
        fit(codec, Loader(clips, batch_size=4, crop=3200), config, tmp_path / folder, progress=False, **options)
        return codec.state_dict()

    whole = run("whole")
    run("broken", until=3)
    resumed = run("broken")
    assert all(torch.equal(whole[name], value) for name, value in resumed.items()) and whole["quantiser.started"]


def test_counting_operations_does_not_touch_the_codebooks():
    codec, some = tiny(), batch()
    meter.flops(codec, some)
    assert not codec.quantiser.started


# The teacher

def test_a_teacher_is_frozen_and_its_own():
    codec = trained()
    teacher, wave = CodecTeacher(codec), noise(2, 3200)
    codes = teacher.train()(wave)
    for step in range(3): codec(batch(seed=step + 10))
    assert torch.equal(teacher(wave), codes) and not torch.equal(codec.codes(wave), codes)
    assert not any(p.requires_grad for p in teacher.parameters()) and all(p.requires_grad for p in codec.parameters())
    assert (teacher.sample_rate, teacher.hop, teacher.sizes) == (24_000, 320, (8, 8, 8, 8))


def test_settings_and_weights_bring_a_teacher_back(tmp_path):
    teacher, wave = CodecTeacher(trained()), noise(2, 3200)
    save_weights(tmp_path / "teacher.safetensors", teacher)
    settings = json.loads(json.dumps(teacher.settings))
    reopened = CodecTeacher(**settings)
    with pytest.raises(ValueError, match="codebooks are empty"): reopened(wave)
    load_weights(tmp_path / "teacher.safetensors", reopened)
    assert torch.equal(reopened(wave), teacher(wave))
    other = CodecTeacher({**settings["codec"], "n_codes": 9})
    with pytest.raises(Mismatch, match="codebooks"): load_weights(tmp_path / "teacher.safetensors", other)


def test_the_rate_table_counts_what_is_heard():
    codec, wave = trained(), noise(3, 3000)
    rows = rate_table(codec, wave)
    assert [row["n_codebooks"] for row in rows] == [1, 2, 3, 4] and rows[-1]["kbps"] * 1000 == codec.bit_rate
    made = codec.sound(codec.codes(wave), 2)[:, :3000]
    assert_close(rows[1]["snr"], 10 * math.log10(wave.square().sum() / (wave - made).square().sum()), atol=1e-3, rtol=0)
    first = codec.codes(wave)[..., 0].flatten()
    assert_close(rows[0]["used"], len(first.unique()) / 8, atol=1e-6, rtol=0)
