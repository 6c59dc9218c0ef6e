"""Musicnn: counts to the unit, torchaudio's picture, the network written out a second time, and chunks that do not know each other."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from musicssl import compat, zoo
from musicssl.encoders import musicnn as room
from musicssl.encoders.base import Encoder, count_parameters
from musicssl.encoders.musicnn import Musicnn
from musicssl.features.mel import LogMel, to_db

CHUNK = 48_000


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return .1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def music(rows: int, samples: int) -> torch.Tensor:
    """Tones that come and go at different levels, over a little noise."""
    time, row = torch.arange(samples) / 16_000, torch.arange(1, rows + 1)[:, None]
    return .3 ** row * torch.sin(2 * torch.pi * 110 * row * time) * (time * row % 1) + 1e-3 * noise(rows, samples, seed=1)


def small(**changes) -> Musicnn:
    torch.manual_seed(0)
    return Musicnn.preset("small", **changes).eval()


@torch.no_grad()
def settled() -> Musicnn:
    """Its normalisations know music, and their factors are no longer 1 and 0."""
    encoder = small()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d): module.momentum = None # the plain mean of what was heard
    encoder.train()(music(4, 2 * CHUNK))
    for seed, (name, parameter) in enumerate(encoder.named_parameters()):
        if parameter.ndim == 1: parameter += noise(*parameter.shape, seed=seed)
    return encoder.eval()


# Counts and shapes

@pytest.mark.parametrize("preset, parameters, features", [("paper", 472_450, 1506), ("msd", 5_848_450, 4194), ("small", 31_146, 288)])
def test_parameters_and_features_to_the_unit(preset, parameters, features):
    """M2, the backbone; and all of them are trained."""
    encoder = Musicnn.preset(preset)
    assert count_parameters(encoder) == count_parameters(encoder, trainable=True) == parameters and encoder.dim == features


def test_three_seconds_are_the_published_numbers():
    """M1."""
    encoder = Musicnn.preset("paper").eval()
    assert encoder.mel(noise(1, CHUNK)).shape == (1, 96, 188) and encoder(noise(2, CHUNK)).clip.shape == (2, 1506)
    assert [tall.conv.kernel_size for tall in encoder.tall] == [(67, 7), (38, 7)]


@pytest.mark.parametrize("seconds, chunks", [(3, 1), (4, 1), (5.99, 1), (6, 2), (20, 6)])
def test_chunks_of_a_clip(seconds, chunks):
    """M1: and what is left over is not heard."""
    encoder, wave = small(), noise(2, round(16_000 * seconds))
    heard = encoder(wave)
    assert isinstance(encoder, Encoder) and heard.layers.shape == (2, 1, chunks, 288)
    torch.testing.assert_close(heard.clip, heard.layers[:, 0].mean(1))
    torch.testing.assert_close(encoder(wave[:, :chunks * CHUNK]).layers, heard.layers, rtol=0, atol=0)


@pytest.mark.parametrize("samples", [0, 46_400, 47_999])
def test_less_than_a_chunk_is_refused(samples):
    with pytest.raises(ValueError, match=f"got {samples} samples, wanted at least 48000"): small()(torch.zeros(1, samples))


@pytest.mark.parametrize("changes", [dict(tall=0), dict(long=0), dict(channels=-1), dict(n_mels=7)])
def test_sizes_without_a_network_are_refused(changes):
    with pytest.raises(ValueError, match="wanted at least 1, 1, 1 and 8"): Musicnn(**changes)


def test_the_zoo_builds_it_again(tmp_path):
    encoder = zoo.load_encoder("musicnn:small", seed=5)
    zoo.save_encoder(tmp_path / "it.safetensors", encoder)
    torch.testing.assert_close(zoo.load_encoder(tmp_path / "it.safetensors")(music(1, CHUNK)).clip, encoder(music(1, CHUNK)).clip, rtol=0, atol=0)


# The picture

def theirs(wave: torch.Tensor, n_mels: int) -> torch.Tensor:
    audio = compat.torchaudio().transforms
    picture, decibels = audio.MelSpectrogram(16_000, 512, f_max=8000., n_mels=n_mels), audio.AmplitudeToDB(top_db=80.)
    return torch.stack([decibels(picture(row)) for row in wave])


def quiet_and_loud() -> torch.Tensor: return torch.cat([1e-4 * music(2, CHUNK), music(2, CHUNK), torch.zeros(1, CHUNK)])


def same_picture(front: nn.Module, n_mels: int) -> None:
    torch.testing.assert_close(front(quiet_and_loud()), theirs(quiet_and_loud(), n_mels), atol=2e-3, rtol=0)


@pytest.mark.parametrize("n_mels", [48, 96])
def test_picture_is_torchaudios(n_mels):
    """The mutation: our own LogMel with the same numbers, whose bands are levelled and whose edges are padded with silence."""
    same_picture(room._Decibels(n_mels), n_mels)
    with pytest.raises(AssertionError): same_picture(LogMel(16_000, 512, 256, n_mels, scale="htk"), n_mels)


def test_picture_is_drawn_in_single_precision():
    front, wave = room._Decibels(48), music(1, CHUNK)
    with torch.autocast("cpu", torch.bfloat16): lowered = front(wave)
    assert lowered.dtype == torch.float32 and torch.equal(lowered, front(wave))


# The network

def by_the_book(encoder: Musicnn, wave: torch.Tensor) -> torch.Tensor:
    """In the order of the specification: everything normalised, rectified, and pooled last; nothing moved past a filter."""
    def norm(module, x, weight=None, bias=None):
        affine = (module.weight, module.bias) if weight is None else (weight, bias)
        return F.batch_norm(x, module.running_mean, module.running_var, *affine, module.training)
    x = norm(encoder.norm, theirs(wave, encoder.settings["n_mels"])[:, None], encoder.scale, encoder.shift)
    found = [F.max_pool2d(y := norm(tall.norm, tall.conv(x)).relu(), (y.shape[2], 1)).squeeze(2) for tall in encoder.tall]
    found += [norm(layer, conv(x.mean(2))).relu() for conv, layer, _ in encoder.long]
    every = [torch.cat(found, 1)]
    for number, (conv, layer, _) in enumerate(encoder.further):
        new = norm(layer, conv(every[-1])).relu()
        every.append(new + every[-1] if number else new)
    every = torch.cat(every, 1)
    return torch.cat([every.max(-1)[0], every.mean(-1)], 1)


@torch.no_grad()
def same_network(encoder: Musicnn) -> None:
    torch.testing.assert_close(encoder.encode(music(3, CHUNK)), by_the_book(encoder, music(3, CHUNK)), atol=1e-3, rtol=1e-3)


def test_network_is_the_specifications(): same_network(settled())


def without_shift(monkeypatch, right=room._Tall.forward):
    monkeypatch.setattr(room._Tall, "forward", lambda self, x, scale, shift: right(self, x, scale, 0 * shift))


def without_scale(monkeypatch, right=room._Tall.forward):
    monkeypatch.setattr(room._Tall, "forward", lambda self, x, scale, shift: right(self, x, 0 * scale + 1, shift))


def edges_like_the_middle(monkeypatch, right=F.conv1d):
    def careless(x, weight, bias, *more, padding=None):
        return right(x, weight, bias, *more) if padding is None else right(F.pad(x, (padding, padding), mode="replicate"), weight, bias)
    monkeypatch.setattr(F, "conv1d", careless)


MUTATIONS = {"the offset is not what filters answer to": without_shift, "the factor is not in the filters": without_scale,
             "a constant beyond the edges": edges_like_the_middle}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_way_past_the_filters_is_noticed(mutation, monkeypatch):
    encoder = settled()
    MUTATIONS[mutation](monkeypatch)
    with pytest.raises(AssertionError): same_network(encoder)


def test_gradients_are_the_specifications():
    """Training mode, in double precision; factor and offset of the first normalisation included."""
    encoder, wave = settled().double().train(), music(3, CHUNK).double()
    picture = theirs(wave.float(), 48)[:, None].double()
    encoder.mel.forward = lambda chunks: picture[:, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "theirs", lambda *_: picture[:, 0])
        ours, books = (torch.autograd.grad(network(wave).sin().sum(), [*encoder.parameters()])
                       for network in (encoder.encode, lambda wave: by_the_book(encoder, wave)))
    for name, a, b in zip(dict(encoder.named_parameters()), ours, books): torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6, msg=name)
    norms_undo_biases = [name for name in dict(encoder.named_parameters()) if name.endswith(("conv.bias", ".0.bias"))]
    assert all(gradient.abs().max() > 0 for gradient, name in zip(ours, dict(encoder.named_parameters())) if name not in norms_undo_biases)


def test_nothing_in_front_of_the_filters_is_trained():
    encoder, seen = small().train(), []
    encoder.norm.register_forward_hook(lambda module, given, found: seen.append(found.requires_grad))
    assert encoder(noise(2, CHUNK)).clip.requires_grad and seen == [False]


# Chunks

def apart(encoder: Musicnn) -> None:
    """M3: a soft chunk beside loud ones, by itself and in a batch."""
    wave = music(3, 2 * CHUNK)
    wave[0, :CHUNK] *= 1e-4
    together = encoder(wave).layers[:, 0].flatten(0, 1)
    for chunk, vector in zip(wave.reshape(6, CHUNK), together):
        torch.testing.assert_close(encoder(chunk[None]).clip[0], vector, atol=1e-4, rtol=1e-4)


def one_floor_for_all(power: torch.Tensor) -> torch.Tensor:
    return to_db(power.transpose(0, 1).flatten(1)[None])[0].unflatten(1, (len(power), -1)).transpose(0, 1)


def test_a_chunk_does_not_depend_on_others(monkeypatch):
    """The mutations: one loudest point for the whole batch, as torchaudio draws it; and a network left in training mode."""
    encoder = settled()
    apart(encoder)
    with pytest.raises(AssertionError): apart(settled().train())
    monkeypatch.setattr(room, "to_db", one_floor_for_all)
    monkeypatch.setattr("musicssl.features.mel.PIECE", 2**30) # the batch in one piece
    with pytest.raises(AssertionError): apart(encoder)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    wave, lengths = music(3, 3 * CHUNK), torch.tensor([3 * CHUNK, 2 * CHUNK - 1, CHUNK])
    return wave.where(torch.arange(3 * CHUNK) < lengths[:, None], torch.nan), lengths


def same_padded(encoder: Musicnn) -> None:
    wave, lengths = padded()
    together, counts = encoder(wave, lengths), [3, 1, 1]
    for row, (clip, length, count) in enumerate(zip(wave, lengths, counts)):
        alone = encoder(clip[None, :length])
        torch.testing.assert_close(together.layers[row, :, :count], alone.layers[0], atol=1e-4, rtol=1e-4, equal_nan=False)
        torch.testing.assert_close(together.clip[row], alone.clip[0], atol=1e-4, rtol=1e-4, equal_nan=False)
        assert not together.layers[row, :, count:].any()


def test_padding_is_not_heard(monkeypatch):
    """The mutation: it is."""
    encoder = settled()
    same_padded(encoder)
    monkeypatch.setattr(room, "_whole", lambda wave, lengths, n_samples: None)
    with pytest.raises(AssertionError): same_padded(encoder)


def test_padding_teaches_no_normalisation():
    wave, lengths = padded()
    with_padding, without = small().train(), small().train()
    with_padding(wave, lengths).clip.sum().backward()
    without(torch.cat([wave[0].reshape(3, CHUNK), wave[1:, :CHUNK]]))
    for (name, a), b in zip(with_padding.named_buffers(), without.buffers()): torch.testing.assert_close(a, b, msg=name)
    assert all(parameter.grad.isfinite().all() for parameter in with_padding.parameters())


@pytest.mark.parametrize("lengths, words", [
    ([CHUNK], r"lengths of shape \(1,\) for 2 rows"), ([CHUNK, CHUNK - 1], "wanted 48000 samples, one chunk, to 96000"),
    ([CHUNK, 2 * CHUNK + 1], "wanted 48000 samples, one chunk, to 96000")])
def test_lengths_that_fit_no_batch_are_refused(lengths, words):
    with pytest.raises(ValueError, match=words): small()(noise(2, 2 * CHUNK), torch.tensor(lengths))


def test_silence_is_finite():
    encoder = small().train()
    heard = encoder(torch.zeros(2, CHUNK)).clip
    heard.sum().backward()
    assert heard.isfinite().all() and all(parameter.grad.isfinite().all() for parameter in encoder.parameters())
