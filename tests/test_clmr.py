"""CLMR's loss and objective where a lesson would be too long: derivatives, extremes, modes, presets."""
import math

import pytest
import torch

from musicssl.audio import Batch
from musicssl.augment import RandomCrop, clmr_chain, clmr_views, draw_seeds
from musicssl.encoders.base import Embedding
from musicssl.encoders.samplecnn import SampleCNN
from musicssl.objectives.clmr import CLMR, nt_xent, similarity
from musicssl.objectives.supervised import Supervised


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(songs=6, samples=3000, seed=0):
    return torch.randn(songs, samples, generator=generator(seed)) / 10


class Listener(torch.nn.Module):
    "An encoder that keeps what it was given."
    sample_rate, hop, dim, n_samples = 8000, 512, 4, 512

    def __init__(self):
        super().__init__()
        self.heard = []

    def forward(self, wave):
        self.heard.append(wave)
        clip = wave.unfold(-1, 128, 128)[:, :4].square().mean(-1)
        return Embedding(layers=clip[:, None, None], clip=clip)


@pytest.mark.parametrize("temperature", [.1, .5, 2.])
def test_gradient_is_the_derivative(temperature):
    z = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator()).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: nt_xent(*z, temperature), (z,))


def test_gradient_turns_but_does_not_stretch():
    z = torch.randn(2, 8, 5, dtype=torch.float64, generator=generator()).requires_grad_()
    gradient, = torch.autograd.grad(nt_xent(*z), z)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close((gradient * z).sum(-1), torch.zeros(2, 8, dtype=torch.float64), atol=1e-12, rtol=0)


def test_tiny_temperature_and_huge_embeddings_stay_finite():
    z = (1e18 * torch.randn(2, 16, 8, generator=generator())).requires_grad_()
    loss = nt_xent(*z, temperature=1e-3)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_are_compared_in_float32(half):
    z_i, z_j = torch.randn(2, 48, 64, generator=generator())
    z_j = z_i + .2 * z_j
    with torch.autocast("cpu", dtype=half):
        assert similarity(z_i.to(half), z_j.to(half)).dtype == torch.float32
        assert abs(nt_xent(z_i.to(half), z_j.to(half), .5) - nt_xent(z_i, z_j, .5)) < 1e-3
        similar = similarity(z_i.to(half), z_j.to(half))
    assert (similar.diagonal() - 1).abs().max() < 1e-6, "cosines of a view with itself betray a product in half precision"


def test_silence_is_finite():
    clmr = CLMR.preset("toy").train()
    loss = clmr(Batch(wave=torch.zeros(4, 2000), generator=generator()))["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(math.log(7))
    assert all(p.grad.isfinite().all() for p in clmr.parameters())


def test_views_are_the_chain_s_and_differ():
    clmr = CLMR(Listener(), clmr_chain(n_samples=512), projection_dim=4)
    clmr(Batch(wave=noise(), generator=generator(3)))
    expected = clmr_views(noise(), clmr.chain, generator(3))
    assert all(torch.equal(heard, view) for heard, view in zip(clmr.encoder.heard, expected, strict=True))
    assert not torch.equal(*expected)


def test_views_are_drawn_in_evaluation_mode_too():
    clmr = CLMR(Listener(), clmr_chain(n_samples=512), projection_dim=4)
    train, evaluation = (mode(Batch(wave=noise(), generator=generator(3)))["loss"] for mode in (clmr.train(), clmr.eval()))
    assert train == evaluation and all(heard.shape == (6, 512) for heard in clmr.encoder.heard)


def test_second_views_may_have_a_chain_of_their_own():
    clmr = CLMR(Listener(), clmr_chain(n_samples=512), projection_dim=4, chain_j=RandomCrop(512))
    clmr(Batch(wave=noise().abs() + 1e-3, generator=generator()))
    first, second = clmr.encoder.heard
    assert (second > 0).all() and (first < 0).any()


def test_nothing_but_the_passed_generator_is_random():
    torch.manual_seed(0)
    clmr, before = CLMR(Listener(), clmr_chain(n_samples=512), projection_dim=4), torch.get_rng_state()
    one = clmr(Batch(wave=noise(), generator=generator(5)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert one["loss"] == clmr(Batch(wave=noise(), generator=generator(5)))["loss"]


def test_positive_similarity_is_reported_not_trained():
    clmr = CLMR.preset("toy").eval()
    losses = clmr(Batch(wave=noise(), generator=generator()))
    z_i, z_j = (clmr.project(view) for view in clmr_views(noise(), clmr.chain, generator()))
    assert losses["positive_similarity"] == pytest.approx(similarity(z_i, z_j).diagonal(6).mean().item(), abs=1e-5)
    assert not losses["positive_similarity"].requires_grad


def test_it_overfits_one_batch():
    torch.manual_seed(0)
    clmr = CLMR.preset("toy")
    tones = torch.sin(2 * math.pi * torch.tensor([110., 330., 700., 1300.])[:, None] * torch.arange(3000) / 8000)
    adam = torch.optim.Adam(clmr.parameters(), 3e-3)
    for _ in range(40):
        losses = clmr(Batch(wave=tones, generator=generator(1)))
        adam.zero_grad()
        losses["loss"].backward()
        adam.step()
    assert losses["loss"] < math.log(1 + 6 * math.exp(-2)) + .1 and losses["positive_similarity"] > .95


@pytest.mark.parametrize("name", ["paper", "code_v1", "code_v2", "8k-quarter", "toy"])
def test_presets_are_consistent(name):
    settings, clmr = CLMR.presets()[name], CLMR.preset(name)
    assert clmr.chain.transforms[0].n_samples == clmr.encoder.n_samples
    assert clmr.head[2].weight.shape == (settings["projection_dim"], clmr.encoder.dim)
    assert clmr.temperature == settings["temperature"] == .5
    weight = clmr.encoder.blocks[4][0].weight
    bound = (6 if settings["init"] == "kaiming" else 1) / (weight[0].numel())
    assert weight.abs().max().item() == pytest.approx(bound ** .5, rel=.01)


def test_presets_cannot_be_changed_from_outside():
    SampleCNN.presets()["paper"]["width"] = .5
    assert "width" not in SampleCNN.presets()["paper"]


def test_changes_replace_what_the_preset_says():
    clmr = CLMR.preset("paper", encoder="toy", temperature=.1, chain=RandomCrop(1536))
    assert clmr.encoder.n_samples == 1536 and clmr.temperature == .1 and isinstance(clmr.chain, RandomCrop)


def test_supervised_sees_one_crop_and_its_own_labels():
    tagger = Supervised(Listener(), n_classes=2, dropout=0.)
    batch = Batch(wave=noise(), labels=torch.eye(2).repeat(3, 1), generator=generator(4))
    loss = tagger(batch)["loss"]
    piece, _ = RandomCrop(512).augment(noise(), draw_seeds(6, generator(4)))
    assert torch.equal(tagger.encoder.heard[0], piece)
    probability = tagger.logits(piece).sigmoid()
    assert loss.item() == pytest.approx(-torch.where(batch.labels > 0, probability, 1 - probability).log().mean().item(), rel=1e-5)
