"""The residual quantiser against a referee, a slow loop and itself on two devices."""
import pytest
import torch
from torch.testing import assert_close

import musicssl.teachers.rvq as room
from musicssl.augment import draw_seeds
from musicssl.devices import share
from musicssl.teachers.rvq import ResidualVQ, code_use, draw_inputs, kmeans, nearest, tally

import rvq_ranks as ranks


def generator(seed=0): return torch.Generator().manual_seed(seed)
def seeds(n, seed=0): return draw_seeds(n, generator(seed))
def points(*shape, seed=0): return torch.randn(*shape, generator=generator(seed))


def filled(dim=6, n_codes=20, n_codebooks=4, **options):
    "A quantiser whose codebooks are random, and used as much as one another."
    quantiser = ResidualVQ(dim, n_codes, n_codebooks, **options)
    quantiser.codebooks.copy_(points(n_codebooks, n_codes, dim, seed=9) * .5 ** torch.arange(n_codebooks)[:, None, None])
    quantiser.counts.fill_(3.), quantiser.sums.copy_(3 * quantiser.codebooks), quantiser.started.fill_(True)
    return quantiser


@pytest.fixture
def referee(monkeypatch):
    monkeypatch.setenv("LOGURU_LEVEL", "ERROR")
    return pytest.importorskip("vector_quantize_pytorch").ResidualVQ


def twin(referee, ours, decay):
    theirs = referee(dim=6, num_quantizers=4, codebook_size=20, decay=decay, threshold_ema_dead_code=0, rotation_trick=False)
    for layer, rows, counts, sums in zip(theirs.layers, ours.codebooks, ours.counts, ours.sums):
        for name, value in (("embed", rows), ("cluster_size", counts), ("embed_avg", sums)): getattr(layer._codebook, name).copy_(value[None])
    return theirs


def codebooks_of(theirs): return torch.stack([layer._codebook.embed[0] for layer in theirs.layers])


@pytest.mark.parametrize("decay", [.99, .5])
def test_codes_vectors_loss_gradient_and_tables_are_the_referees(referee, decay):
    ours = filled(decay=decay, revive_below=0)
    theirs, x, y = twin(referee, ours, decay), points(3, 50, 6).requires_grad_(), points(3, 50, 6).requires_grad_()
    for step in range(3):
        heard, (quantised, codes, commitment) = ours(x, seeds(3)), theirs(y)
        assert_close(heard.codes, codes), assert_close(heard.quantised, quantised), assert_close(heard.commitment, commitment.sum())
        assert_close(ours.codebooks, codebooks_of(theirs), atol=1e-5, rtol=1e-5)
    assert_close(torch.autograd.grad(heard.commitment, x, retain_graph=True), torch.autograd.grad(commitment.sum(), y, retain_graph=True))
    slope, steeper = torch.autograd.grad(heard.quantised.square().sum(), x)[0], torch.autograd.grad(quantised.square().sum(), y)[0]
    assert_close(slope, 2 * heard.quantised.detach()), assert_close(steeper, 4 * slope) # theirs goes straight through every codebook anew


@pytest.mark.parametrize("mutation", ["no residual", "no smoothing", "sums of a mean"])
def test_the_referee_notices_mutations(referee, monkeypatch, mutation):
    ours = filled(decay=.5, revive_below=0)
    theirs, x = twin(referee, ours, .5), points(3, 50, 6)
    if mutation == "no residual": monkeypatch.setattr(room, "nearest", lambda flat, rows: nearest(x.flatten(0, 1), rows))
    if mutation == "sums of a mean": monkeypatch.setattr(room, "tally", lambda x, codes, n, gather: tally(x.mean(0).expand_as(x), codes, n, gather))
    if mutation == "no smoothing": ours.counts.mul_(1.05)
    for _ in range(2): (heard, (_, codes, _)) = ours(x, seeds(3)), theirs(x)
    assert not torch.equal(heard.codes, codes) or (ours.codebooks - codebooks_of(theirs)).abs().max() > 1e-3


def test_kmeans_is_that_of_scikit_learn():
    from sklearn.cluster import KMeans
    x, start = points(300, 4), points(7, 4, seed=1)
    theirs = KMeans(7, init=start.numpy(), n_init=1, max_iter=200, tol=0).fit(x.numpy())
    assert_close(kmeans(x, start, 200), torch.from_numpy(theirs.cluster_centers_), atol=1e-4, rtol=1e-4)


# Lots

def split(x, lots, n, cut):
    "The same choice by two devices: each sends its own, and both see all."
    pieces = [(x[:cut], lots[:cut]), (x[cut:], lots[cut:])]
    def sent(own, of):
        own_lots, order = own[1].sort()
        return {"x": own[0][order[:n]], "lots": own_lots[:n]}[of]
    both = {of: torch.stack([sent(piece, of) for piece in pieces]) for of in ("x", "lots")}
    return draw_inputs(*pieces[0], n, gather=lambda mine: both["lots" if mine.ndim == 1 else "x"])


def test_the_same_inputs_win_however_they_are_spread():
    x, lots = points(40, 3), torch.rand(40, generator=generator())
    assert_close(draw_inputs(x, lots, 8), x[lots.argsort()[:8]])
    assert_close(split(x, lots, 8, 20), draw_inputs(x, lots, 8))
    assert not torch.equal(split(x, torch.arange(40.), 8, 20), draw_inputs(x, lots, 8)) # lots that are places


def test_few_inputs_are_repeated():
    x = points(3, 2)
    assert_close(draw_inputs(x, torch.tensor([.5, .1, .9]), 7), x[[1, 0, 2, 1, 0, 2, 1]])


# Life of a codebook

def test_the_first_batch_starts_every_codebook_on_its_own_leftovers():
    x, quantiser = points(8, 40, 6), ResidualVQ(6, 10, 3, decay=.5, revive_below=0)
    quantiser(x, seeds(8))
    untrained, trained = [((x - each.decode(each.eval()(x).codes)).square().mean()) for each in (filled(6, 10, 3), quantiser)]
    assert quantiser.started and trained < .5 * untrained


def test_a_quantiser_that_never_trained_is_refused():
    with pytest.raises(ValueError, match="codebooks are empty"): ResidualVQ(6).eval()(points(1, 2, 6))


def test_dead_rows_become_inputs_and_live_ones_do_not():
    quantiser, x = filled(n_codebooks=1, decay=.1, revive_below=.2), points(2, 30, 6)
    quantiser.codebooks[0, :5] += 100
    before = quantiser.codebooks.clone()
    quantiser(x, seeds(2))
    is_input = (quantiser.codebooks[0][:, None] == x.flatten(0, 1)).all(-1).any(-1)
    assert is_input[:5].all() and not is_input.all()
    lonely = filled(n_codebooks=1, decay=.1, revive_below=0) # the mutation: nothing is revived
    lonely.codebooks.copy_(before), lonely.sums.copy_(3 * before)
    lonely(x, seeds(2))
    assert lonely.codebooks[0, :5].norm(dim=1).min() > 50


def poisoned(quantiser):
    x = points(2, 30, 6)
    x[0, 0, 0] = float("nan")
    quantiser(x, seeds(2))
    return not all(value.isfinite().all() for value in quantiser.state_dict().values())


def test_a_batch_that_is_not_finite_teaches_nothing(monkeypatch):
    quantiser = filled()
    before = quantiser.codebooks.clone()
    assert not poisoned(quantiser) and torch.equal(quantiser.codebooks, before)
    fresh = ResidualVQ(6, 20, 4)
    assert not fresh.started and not poisoned(fresh) and not fresh.started
    monkeypatch.setattr(room, "_all_finite", lambda x, gather: True) # the mutation
    assert poisoned(filled())


def test_all_devices_agree_on_what_is_finite():
    both = lambda mine: torch.stack([mine, torch.zeros_like(mine)])  # the other device's batch is not
    assert room._all_finite(points(3), None) and not room._all_finite(points(3), both)


def test_learning_is_a_function_of_batches_and_seeds_and_survives_a_stop():
    def learned(steps, quantiser):
        for step in steps: quantiser(points(4, 20, 6, seed=step), seeds(4, step))
        return quantiser
    def new(): return ResidualVQ(6, 9, 2, decay=.6, revive_below=.5, dropout=True)

    whole, resumed = learned(range(6), new()), new()
    resumed.load_state_dict(learned(range(3), new()).state_dict())
    learned(range(3, 6), resumed)
    assert all(torch.equal(mine, yours) for mine, yours in zip(whole.state_dict().values(), resumed.state_dict().values()))
    other = new()
    for step in range(6): other(points(4, 20, 6, seed=step), seeds(4, step + 1))
    assert not torch.equal(other.codebooks, whole.codebooks)


def test_dropout_answers_each_clip_with_as_many_codebooks_as_its_seed_says():
    quantiser, x = filled(dropout=True), points(4000, 2, 6)
    frozen = quantiser.codebooks.clone()
    heard = quantiser(x, seeds(4000))
    quantiser.codebooks.copy_(frozen)
    kept = torch.stack([(heard.quantised - quantiser.decode(heard.codes[..., :q])).abs().amax((1, 2)) < 1e-5 for q in range(1, 5)], 1)
    assert kept.any(1).all() and ((kept.double().mean(0) - .25).abs() < .03).all()
    assert_close(quantiser.eval()(x).quantised, quantiser.decode(quantiser(x).codes))


def test_autocast_changes_nothing():
    quantiser, x = filled().eval(), points(2, 30, 6)
    with torch.autocast("cpu", torch.bfloat16): inside = quantiser(x)
    assert inside.quantised.dtype == torch.float32 and torch.equal(inside.codes, quantiser(x).codes)


def test_code_use_counts():
    codes = torch.randint(0, 7, (5, 11, 3), generator=generator())
    share, perplexity = code_use(codes, 9)
    for q in range(3):
        p = torch.bincount(codes[..., q].flatten()).double() / 55
        assert_close(share[q].double(), torch.tensor(len(codes[..., q].unique()) / 9).double(), atol=1e-6, rtol=0)
        assert_close(perplexity[q].double(), (-p * p.where(p > 0, 1).log()).sum().exp(), atol=1e-5, rtol=1e-5)


# Two devices

@pytest.fixture(scope="module")
def pair(as_pair): return as_pair(ranks.run)


def alone(): return ranks.learn(lambda batch: batch)


def test_two_processes_learn_what_one_does(pair):
    whole = alone()
    for rank, found in enumerate(pair):
        mine = found["together"]
        for name, value in whole["state"].items(): assert_close(mine["state"][name], value, atol=1e-10, rtol=1e-10)
        assert_close(mine["codes"], whole["codes"][rank::2]), assert_close(mine["quantised"], whole["quantised"][rank::2])
    assert_close(sum(found["together"]["commitment"] for found in pair) / 2, whole["commitment"])


def test_each_for_itself_is_noticed(pair): # the mutation: no gather
    assert (pair[0]["each for itself"]["state"]["codebooks"] - alone()["state"]["codebooks"]).abs().max() > .1


def test_two_processes_have_the_gradient_of_one_codec(pair):
    model = ranks.codec()
    model(ranks.sounds())
    model(ranks.sounds())["loss"].backward()
    for found in pair:
        assert_close(found["codebooks"], model.quantiser.codebooks, atol=1e-5, rtol=1e-5)
        for name, p in model.named_parameters(): assert_close(found["gradient"][name], p.grad, atol=1e-4, rtol=1e-3)


def test_a_codec_alone_is_noticed(pair): # the mutation: half of the batch
    model, half = ranks.codec(), share(ranks.sounds(), 0, 2)
    model(half)
    assert (pair[0]["codebooks"] - model.quantiser.codebooks).abs().max() > 1e-2
