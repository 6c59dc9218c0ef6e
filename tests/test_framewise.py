"""One frame every ten milliseconds: shapes, counts to the unit, and every frame where its sound is."""
import pytest
import torch
from torch import nn

from musicssl import zoo
from musicssl.audio import Batch
from musicssl.encoders import framewise as room
from musicssl.encoders.base import Encoder, count_parameters
from musicssl.encoders.framewise import LogMelCNN, LogMelTransformer, SampleCNNFrames
from musicssl.encoders.samplecnn import SampleCNN
from musicssl.features.mel import LogMel
from musicssl.meter import flops

KINDS = [SampleCNNFrames, LogMelCNN, LogMelTransformer]
COUNTS = {(SampleCNNFrames, "full"): (512, 2_368_512), (SampleCNNFrames, "small"): (128, 149_760),
          (LogMelCNN, "full"): (256, 765_312), (LogMelCNN, "small"): (128, 192_192),
          (LogMelTransformer, "full"): (256, 3_176_192), (LogMelTransformer, "small"): (128, 273_536)}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return .1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(kind: type, **changes) -> nn.Module:
    torch.manual_seed(0)
    return kind.preset("small", **changes).eval()


@torch.no_grad()
def settled(kind: type) -> nn.Module:
    """Its normalisations know noise, as after training."""
    encoder = small(kind)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d): module.momentum = None # the plain mean of what was heard
    encoder.train()(noise(4, 32_000, seed=9))
    return encoder.eval()


# Frames

@torch.no_grad()
def whole_hops(kind: type, length: int) -> None:
    encoder = small(kind)
    heard = encoder(noise(2, length))
    assert encoder.hop == (162 if kind is SampleCNNFrames else 160)
    assert heard.layers.shape == (2, 3 if kind is LogMelTransformer else 1, length // encoder.hop, 128)
    torch.testing.assert_close(heard.clip, heard.layers[:, -1].mean(1))


@pytest.mark.parametrize("length", [162, 16_000, 16_159, 32_000, 33_333, 100_000])
@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_whole_hops(kind, length):
    """M-1's lengths, and some that no hop divides."""
    whole_hops(kind, length)


@torch.no_grad()
def on_time(kind: type) -> None:
    """Where the frames stand that a click changes: their middle, by energy, and the one that changes most."""
    encoder, at = settled(kind), torch.tensor([3000, 5077, 8080, 11_111, 16_001, 20_003, 24_241, 29_000])
    quiet = noise(1, 32_000).repeat(len(at), 1)
    changed = (encoder(quiet + nn.functional.one_hot(at, 32_000)).layers[:, -1] - encoder(quiet).layers[:, -1]).square().mean(-1)
    expected = (at - (81 if kind is SampleCNNFrames else 0)) / encoder.hop # a pooled frame covers its hop, a window stands around its sample
    strong = changed.where(changed > .01 * changed.amax(1, keepdim=True), 0)
    middle = (strong * torch.arange(changed.shape[1])).sum(1) / strong.sum(1)
    assert (middle - expected).mean().abs() < .5 and (changed.argmax(1) - expected).abs().max() < 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_click_is_in_its_frame(kind): on_time(kind)


def untrimmed(monkeypatch):
    monkeypatch.setattr(room._Picture, "forward", lambda self, wave: self.level(self.mel(wave)))


def first_dropped(monkeypatch):
    monkeypatch.setattr(room._Picture, "forward", lambda self, wave: self.level(self.mel(wave)[..., 1:]))


@pytest.mark.parametrize("mutation, check", [(untrimmed, lambda kind: whole_hops(kind, 32_000)), (first_dropped, on_time)])
@pytest.mark.parametrize("kind", [LogMelCNN, LogMelTransformer])
def test_a_frame_too_many_or_too_early_is_noticed(kind, mutation, check, monkeypatch):
    """The mutations: the picture keeps its extra frame; the first is dropped instead of the last."""
    mutation(monkeypatch)
    with pytest.raises(AssertionError): check(kind)


@pytest.mark.parametrize("kind, reach", [(SampleCNNFrames, 3 + 4 * (3 + 9 + 27) + 3 * 81 + 6 * 2 * 162), (LogMelCNN, 1024 + 10 * 160)])
def test_how_far_a_frame_hears(kind, reach):
    """The samples a frame depends on, by gradient: within what can be counted, and most of it; the transformer has no such bound."""
    encoder, wave = settled(kind), noise(1, 32_000).requires_grad_()
    encoder(wave).layers[0, 0, 100].sum().backward()
    heard = wave.grad[0].nonzero().flatten()
    middle = 100 * encoder.hop + (80.5 if kind is SampleCNNFrames else 0)
    assert (heard - middle).abs().max() <= reach / 2 and .9 * reach < heard.max() - heard.min() + 1 <= reach
    wave = noise(1, 32_000).requires_grad_()
    settled(LogMelTransformer)(wave).layers[0, -1, 100].square().sum().backward()
    assert wave.grad[0, 200:-200].ne(0).float().mean() > .99


# Networks

@pytest.mark.parametrize("kind, preset", COUNTS)
def test_parameters_to_the_unit(kind, preset):
    encoder = kind.preset(preset)
    assert (encoder.dim, count_parameters(encoder)) == COUNTS[kind, preset] and count_parameters(encoder, trainable=True) == count_parameters(encoder)


def test_samplecnns_weights_fit():
    """The same blocks under the same names; with pooling taken away from where SampleCNN goes on pooling, the same frames."""
    paper, frames = SampleCNN(width=1/4).eval(), small(SampleCNNFrames)
    frames.load_state_dict(paper.state_dict())
    for number, block in enumerate(paper.blocks):
        if number == 4: block[2] = nn.MaxPool1d(2)
        if 4 < number < 10: block[2] = nn.Identity()
    wave = noise(2, 16_000)
    assert torch.equal(frames(wave).layers[:, 0], paper.blocks(wave[:, None]).transpose(1, 2))


def test_the_picture_is_log_mel():
    """Without a level of its own it is the spectrogram of the features' room, less its last frame; then mean 0 and spread 1."""
    picture, wave = room._Picture().eval(), noise(3, 16_000)
    mel = LogMel(16_000, n_fft=1024, hop=160, n_mels=64, log="ln", eps=1e-5)(wave)[..., :100]
    torch.testing.assert_close(picture(wave), mel, rtol=1e-4, atol=1e-4)
    levelled = picture.train()(wave)
    assert levelled.mean((0, 2)).abs().max() < 1e-4 and (levelled.var((0, 2), unbiased=False) - 1).abs().max() < 1e-3


def test_layers_are_stacked_as_they_follow():
    """Each of the transformer's layers is the next block on the one before, which is where the others stand too."""
    encoder = small(LogMelTransformer)
    layers = encoder(noise(2, 16_000)).layers
    for number, block in enumerate(encoder.blocks): torch.testing.assert_close(layers[:, number + 1], block(layers[:, number]))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_everything(kind):
    encoder = small(kind).train()
    (encoder(noise(2, 16_000)).layers[:, -1] * noise(100, 128)[:16_000 // encoder.hop]).sum().backward()
    assert all(p.grad is not None and p.grad.any() and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_in_eval_rows_are_alone_and_nothing_is_drawn(kind):
    encoder, wave = settled(kind), noise(3, 16_000)
    before = torch.get_rng_state()
    together = encoder(wave)
    assert torch.equal(together.layers, encoder(wave).layers) and torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(together.layers[1:2], encoder(wave[1:2]).layers, atol=1e-4, rtol=1e-4)


def test_dropout_only_where_wanted():
    wave = noise(2, 16_000)
    for changes, same in (({}, False), (dict(dropout=0.), True), (dict(dropout=0., attention_dropout=.5), False)):
        encoder = small(LogMelTransformer, **changes).train()
        assert torch.equal(encoder(wave).clip, encoder(wave).clip) is same


@pytest.mark.parametrize("kind", KINDS)
def test_other_precisions(kind):
    """Double agrees with single to rounding, bfloat16 under autocast roughly, and silence is finite in all."""
    wave = noise(2, 16_000)
    for given in (wave, 0 * wave):
        encoder = settled(kind)
        exact = encoder(given).layers
        with torch.autocast("cpu", torch.bfloat16): rough = encoder(given).layers
        double = encoder.double()(given.double()).layers
        assert exact.isfinite().all() and rough.isfinite().all() and double.dtype == torch.float64
        torch.testing.assert_close(double.float(), exact, atol=1e-3, rtol=1e-3)
        if given is wave: assert (rough - exact).norm() < .2 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_brings_it_back(kind, tmp_path):
    encoder = zoo.check_encoder(settled(kind))
    assert isinstance(encoder, Encoder)
    zoo.save_encoder(tmp_path / "it.safetensors", encoder)
    back = zoo.load_encoder(tmp_path / "it.safetensors")
    assert type(back) is kind and back.settings == encoder.settings and torch.equal(back(noise(1, 8000)).layers, encoder(noise(1, 8000)).layers)


def test_names_are_not_those_of_the_handmade():
    for name, kind in (("samplecnn_frames", SampleCNNFrames), ("logmel_cnn", LogMelCNN), ("logmel_transformer", LogMelTransformer)):
        assert type(zoo.load_encoder(f"{name}:small")) is kind and list(kind.presets()) == ["full", "small"]
    assert not isinstance(zoo.load_encoder("logmel"), tuple(KINDS))


@pytest.mark.parametrize("build, words", [
    (lambda: SampleCNNFrames(.3), "got width 0.3, wanted one that makes 128 channels"), (lambda: LogMelCNN(-1), "got width -1, .* 64 channels"),
    (lambda: LogMelTransformer(dim=100, heads=8), "got 4 layers of width 100 with 8 heads"), (lambda: LogMelTransformer(0), "got 0 layers"),
    (lambda: small(SampleCNNFrames)(noise(1, 161)), "got 161 samples, wanted at least 162"),
    (lambda: small(LogMelCNN)(noise(1, 159)), "got 159 samples, wanted at least 160"),
    (lambda: small(LogMelTransformer)(noise(1, 1, 16_000)), r"shape \(1, 1, 16000\), wanted \(B, T\)"),
    (lambda: LogMelCNN.preset("large"), "it has full, small")])
def test_what_does_not_fit_is_refused(build, words):
    with pytest.raises(ValueError, match=words): build()


class Sum(nn.Module):
    """What it takes to be trained."""
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, batch): return {"loss": self.encoder(batch.wave).clip.square().mean()}


@pytest.mark.parametrize("kind", KINDS)
def test_arithmetic_can_be_counted(kind):
    """Arithmetic can be counted without computing it: two operations a weight and frame at least, and twice that backward."""
    assert flops(Sum(small(kind)), Batch(wave=noise(2, 16_000))) > 3 * 2 * .9 * 200 * COUNTS[kind, "small"][1]
