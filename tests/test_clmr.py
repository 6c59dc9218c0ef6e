"""CLMR's loss and objective where a lesson would be too long: derivatives, extremes, chunks, modes, presets."""
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from musicssl.audio import Batch
from musicssl.augment import RandomCrop, clmr_chain, clmr_views, draw_seeds
from musicssl.encoders.base import Embedding
from musicssl.encoders.samplecnn import SampleCNN
from musicssl.objectives.clmr import CLMR, PUBLISHED, nt_xent, published_nt_xent, similarity
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


@pytest.mark.parametrize("chunk", [None, 3, 7])
@pytest.mark.parametrize("temperature", [.1, .5, 2.])
def test_gradient_is_the_derivative(temperature, chunk):
    z = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator()).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: nt_xent(*z, temperature, chunk), (z,))


def test_gradient_turns_but_does_not_stretch():
    z = torch.randn(2, 8, 5, dtype=torch.float64, generator=generator()).requires_grad_()
    gradient, = torch.autograd.grad(nt_xent(*z), z)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close((gradient * z).sum(-1), torch.zeros(2, 8, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("chunk", [None, 5])
def test_tiny_temperature_and_huge_embeddings_stay_finite(chunk):
    z = (1e18 * torch.randn(2, 16, 8, generator=generator())).requires_grad_()
    loss = nt_xent(*z, temperature=1e-3, chunk=chunk)
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


# In chunks

def with_gradient(loss, z): return [loss.detach(), *torch.autograd.grad(loss, z)]


def noisy_pairs(songs, dtype=torch.float32):
    z_i, z_j = torch.randn(2, songs, 64, dtype=dtype, generator=generator())
    return torch.stack([z_i, z_i + z_j]).requires_grad_()


@pytest.mark.parametrize("chunk", [1, 7, 48, 95])
def test_chunks_change_nothing(chunk):
    z = noisy_pairs(48, torch.float64)
    for ours, whole in zip(with_gradient(nt_xent(*z, chunk=chunk), z), with_gradient(nt_xent(*z), z)):
        torch.testing.assert_close(ours, whole, atol=1e-14, rtol=1e-12)


def test_large_batches_come_in_chunks_of_their_own_accord():
    """The mutation: the whole matrix, asked for; the largest piece of memory betrays it."""
    z, pieces = noisy_pairs(600), {}
    for chunk in (None, 1200):
        with torch.profiler.profile(profile_memory=True) as profile: loss, gradient = with_gradient(nt_xent(*z, chunk=chunk), z)
        pieces[chunk] = [loss, gradient, max(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")]
    (loss, gradient, largest), (whole, its_gradient, matrix) = pieces.values()
    assert largest == 256 * 1200 * 4 and matrix == 1200 * 1200 * 4
    assert abs(loss - whole) / whole < 1e-6 and (gradient - its_gradient).norm() / its_gradient.norm() < 1e-5


def test_small_batches_are_bit_equal_to_one_cross_entropy():
    """Records were made with these operations in this order. The mutation: chunks, which add up otherwise."""
    z = noisy_pairs(48)
    unit = F.normalize(torch.cat([*z]), dim=1)
    plain = F.cross_entropy((unit @ unit.T / .5).fill_diagonal_(-torch.inf), torch.arange(96).roll(48))
    wanted, found, in_chunks = (with_gradient(loss, z) for loss in (plain, nt_xent(*z), nt_xent(*z, chunk=17)))
    assert all(map(torch.equal, found, wanted)) and not all(map(torch.equal, in_chunks, wanted))


def test_chunks_leave_autocast(monkeypatch):
    """The mutation: autocast stays on."""
    z = noisy_pairs(48)
    exact = with_gradient(nt_xent(*z), z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradient(nt_xent(*z, chunk=17), z)
        monkeypatch.setattr(torch, "autocast", lambda *given, **more: nullcontext())
        with pytest.raises(RuntimeError, match="BFloat16"): nt_xent(*z, chunk=17)
    loss, gradient = (((a - b).norm() / b.norm()).item() for a, b in zip(found, exact))
    assert loss < 1e-6 and gradient < 1e-5


def test_without_gradient_only_the_loss_is_computed(monkeypatch):
    z, products = noisy_pairs(48), []
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: products.append(a) or product(a, b))
    loss = nt_xent(*z, chunk=48)
    assert len(products) == 6 and loss.requires_grad
    with torch.no_grad(): again = nt_xent(*z, chunk=48)
    assert len(products) == 8 and torch.equal(loss, again)


def test_the_gradient_in_chunks_refuses_to_be_differentiated():
    """It holds the gradient as numbers; differentiating them would silently give another loss's second derivative."""
    z = noisy_pairs(4)
    with pytest.raises(RuntimeError, match="got create_graph=True"): torch.autograd.grad(nt_xent(*z, chunk=3), z, create_graph=True)
    gradient, = torch.autograd.grad(nt_xent(*z), z, create_graph=True)
    gradient.square().sum().backward()


@pytest.mark.parametrize("chunk", [0, -1])
def test_no_chunk_is_refused(chunk):
    with pytest.raises(ValueError, match=f"got chunks of {chunk} rows, wanted at least 1"): nt_xent(*noisy_pairs(4), chunk=chunk)


# As it was published

def as_v1_had_it(z_i, z_j, temperature, ranks):
    """Version 1 step by step, one number at a time: gather, look half the list further, mask as if there were one device, cut into rows."""
    n, own = len(z_i), len(z_i) // ranks
    z = [row / row.norm() for device in range(ranks) for views in (z_i, z_j) for row in views[device * own:(device + 1) * own]]
    likeness = [[one @ other / temperature for other in z] for one in z]
    masked = {(i, i) for i in range(2 * n)} | {(i, own + i) for i in range(n)} | {(own + i, i) for i in range(n)}
    let_through = [likeness[i][k] for i in range(2 * n) for k in range(2 * n) if (i, k) not in masked]
    loss, width = 0., 2 * n - 2
    for i in range(2 * n):
        partner = likeness[i][i + n if i < n else i - n]
        loss += torch.stack([partner, *let_through[i * width:(i + 1) * width]]).logsumexp(0) - partner
    return loss / (2 * n)


def pretended(loss, z, ranks, rows):
    """What `ranks` devices arrive at together: each gathers all rows, passes back the gradient of its own, and DDP takes the mean."""
    total = torch.zeros_like(z)
    for device in range(ranks):
        seen = torch.cat([part if n == device else part.detach() for n, part in enumerate(z.split(rows, dim=1))], dim=1)
        total += torch.autograd.grad(loss(*seen), z)[0] / ranks
    return total


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_version_1_equals_the_code_step_by_step(ranks):
    z = noisy_pairs(12, torch.float64)
    loss, gradient = with_gradient(published_nt_xent(*z, .2, "v1", ranks), z)
    torch.testing.assert_close(loss, as_v1_had_it(*z, .2, ranks).detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient, pretended(lambda *views: as_v1_had_it(*views, .2, ranks), z, ranks, 12 // ranks), atol=1e-12, rtol=0)


def test_one_device_makes_no_mistake_and_two_do():
    z = noisy_pairs(12, torch.float64)
    true = with_gradient(nt_xent(*z), z)
    for version in PUBLISHED:
        for ours, wanted in zip(with_gradient(published_nt_xent(*z, version=version), z), true):
            torch.testing.assert_close(ours, wanted, atol=1e-14, rtol=1e-12)
    assert abs(published_nt_xent(*z, version="v1", ranks=2) - true[0]) > .5


def test_the_mispaired_gradient_points_away():
    """Eight songs in sixteen dimensions, as measured for the two mistakes: cosine -0.21 with wrong partners alone, -0.14 with the wrong mask too."""
    z_i, z_j = torch.randn(2, 8, 16, dtype=torch.float64, generator=generator())
    z = torch.stack([z_i, z_i + z_j]).requires_grad_()
    joined = z.view(2, 2, 4, 16).transpose(0, 1).reshape(2, 8, 16)
    true, alone, both = (torch.autograd.grad(loss, z)[0].flatten() for loss in (nt_xent(*z), nt_xent(*joined), published_nt_xent(*z, ranks=2)))
    assert F.cosine_similarity(alone, true, dim=0) == pytest.approx(-.21, abs=.01)
    assert F.cosine_similarity(both, true, dim=0) == pytest.approx(-.14, abs=.01)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_gather_s_gradient_is_too_short_by_the_number_of_devices(ranks):
    """Exactly: the loss of the text, its gradient over W; by pretended devices as well. The mutation: a gather that sums."""
    z = noisy_pairs(8, torch.float64)
    (loss, gradient), (whole, true) = (with_gradient(one, z) for one in (published_nt_xent(*z, version="simclr", ranks=ranks), nt_xent(*z)))
    assert torch.equal(loss, whole)
    torch.testing.assert_close(gradient, true / ranks, atol=0, rtol=1e-12)
    torch.testing.assert_close(gradient, pretended(nt_xent, z, ranks, 8 // ranks), atol=1e-14, rtol=1e-12)
    assert (gradient - true).norm() > .4 * true.norm()


def test_version_2_asks_each_device_for_itself():
    z = noisy_pairs(8, torch.float64)
    apart = [nt_xent(*z[:, rows]) for rows in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(published_nt_xent(*z, version="v2", ranks=2), sum(apart) / 2, atol=1e-14, rtol=0)
    assert published_nt_xent(torch.ones(8, 3), torch.ones(8, 3), version="v2", ranks=4).item() == pytest.approx(math.log(3))


def test_the_switch_changes_the_loss_and_nothing_else():
    """Same views, same embeddings; without the switch, to the bit what it always was."""
    torch.manual_seed(0)
    plain = CLMR(Listener(), clmr_chain(n_samples=512), projection_dim=4)
    z = [plain.project(view) for view in clmr_views(noise(), plain.chain, generator(3))]
    found = {None: plain(Batch(wave=noise(), generator=generator(3)))}
    for version in PUBLISHED:
        objective = CLMR(Listener(), plain.chain, projection_dim=4, published=version, ranks=3)
        objective.load_state_dict(plain.state_dict())
        found[version] = objective(Batch(wave=noise(), generator=generator(3)))
        assert torch.equal(found[version]["loss"], published_nt_xent(*z, version=version, ranks=3))
        assert torch.equal(found[version]["positive_similarity"], found[None]["positive_similarity"])
    assert torch.equal(found[None]["loss"], nt_xent(*z)) and found["v1"]["loss"] != found[None]["loss"] != found["v2"]["loss"]


@pytest.mark.parametrize("asked, message", [({"published": "v3"}, "got published='v3', wanted None or one of v1, v2, simclr"),
                                            ({"ranks": 2}, "got 2 ranks, wanted 1, or more for a published loss"), ({"published": "v1", "ranks": 0}, "got 0 ranks")])
def test_switches_there_are_not(asked, message):
    with pytest.raises(ValueError, match=message): CLMR(Listener(), RandomCrop(512), **asked)
    with pytest.raises(ValueError, match="wanted one of v1, v2, simclr"): published_nt_xent(*noisy_pairs(4), version="text")
    with pytest.raises(ValueError, match="got 4 songs for 3 devices, wanted as many on each"): published_nt_xent(*noisy_pairs(4), ranks=3)


@pytest.mark.parametrize("version", PUBLISHED)
def test_published_losses_leave_autocast(version):
    z = noisy_pairs(48)
    exact = published_nt_xent(*z, version=version, ranks=4)
    with torch.autocast("cpu", dtype=torch.bfloat16): assert abs(published_nt_xent(*z, version=version, ranks=4) - exact) < 1e-6


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
