"""Handmade encoders: the contract, agreement with librosa, and settings that tell two of them apart."""
import librosa
import numpy as np
import pytest
import torch

from musicssl.encoders import handmade
from musicssl.encoders.base import Encoder

KINDS = handmade.LogMel, handmade.MFCC, handmade.CQT, handmade.Chroma
ALL = [(kind, preset) for kind in KINDS for preset in kind.presets()]


def noise(rows, samples, seed=0):
    return .1 * torch.randn(rows, samples, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind, preset", ALL, ids=[f"{kind.__name__}-{preset}" for kind, preset in ALL])
def test_contract(kind, preset):
    encoder = kind.preset(preset)
    wave = noise(2, 2 * encoder.sample_rate // 5)
    told = encoder(wave)
    n = 1 + wave.shape[1] // encoder.hop
    assert isinstance(encoder, Encoder) and not list(encoder.parameters()) and encoder.sample_rate / encoder.hop == 50
    assert told.layers.shape == (2, 1, n, encoder.dim) and told.clip.shape == (2, 2 * encoder.dim) and told.layers.dtype == torch.float32
    frames = told.layers[:, 0].double()
    torch.testing.assert_close(told.clip.double(), torch.cat([frames.mean(1), frames.std(1, unbiased=False)], 1), rtol=1e-4, atol=1e-4)
    assert torch.isfinite(encoder(torch.zeros(1, encoder.sample_rate // 2)).clip).all()


@pytest.mark.parametrize("kind", KINDS)
def test_any_length_from_one_hop(kind):
    encoder = kind.preset("8k")
    for samples in (160, 161, 1023, 8001):
        assert encoder(noise(1, samples)).layers.shape[2] == 1 + samples // 160
    with pytest.raises(ValueError, match="got 159 samples, wanted at least 160"):
        encoder(noise(1, 159))


def test_a_row_does_not_know_its_neighbours():
    wave = noise(5, 8000) * torch.logspace(-3, 0, 5)[:, None]
    for kind in KINDS:
        encoder = kind.preset("8k")
        together, alone = encoder(wave).clip, torch.cat([encoder(row[None]).clip for row in wave])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_cepstra_and_their_derivatives_are_librosas():
    encoder, wave = handmade.MFCC.preset("22k-deltas"), noise(1, 22050)
    mfcc = librosa.feature.mfcc(y=wave[0].numpy(), sr=22050, n_mfcc=20, n_fft=2048, hop_length=441, n_mels=128)
    theirs = np.concatenate([mfcc, librosa.feature.delta(mfcc), librosa.feature.delta(mfcc, order=2)])
    ours = encoder(wave)
    np.testing.assert_allclose(ours.layers[0, 0].T, theirs, atol=2e-3)
    np.testing.assert_allclose(ours.clip[0], np.concatenate([theirs.mean(1), theirs.std(1)]), atol=2e-3)


def test_pitch_classes_start_at_c():
    time = torch.arange(16000) / 16000
    for tone, pitch in enumerate(range(60, 72)):
        wave = .3 * torch.sin(2 * torch.pi * 440 * 2 ** ((pitch - 69) / 12) * time)[None]
        assert handmade.Chroma.preset("16k")(wave).clip[0, :12].argmax() == tone
        assert handmade.CQT.preset("16k")(wave).clip[0, :84].argmax() == pitch - 24


def test_settings_say_all_that_was_chosen():
    """Two encoders of equal buffers and different hops differ in `settings`; rebuilding from `settings` gives the same numbers."""
    for kind in KINDS:
        one, other = kind.preset("8k"), kind.preset("8k", hop=200)
        assert one.settings != other.settings and kind(**one.settings).settings == one.settings
        torch.testing.assert_close(kind(**other.settings)(noise(1, 4000)).clip, other(noise(1, 4000)).clip, rtol=0, atol=0)
    with pytest.raises(ValueError, match="MFCC has no preset '44k'"):
        handmade.MFCC.preset("44k")
