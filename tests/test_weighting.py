"""Every mechanism against its formula, and whether a weight acts; M-7 to M-11 and M-16 are the numbers of the paper's specification."""
import itertools
import math

import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import chisquare
from torch import nn
from torch.testing import assert_close

import musicssl.objectives.weighting as room
from musicssl.optim import OPTIMIZERS, new_optimizer
from musicssl.objectives.weighting import WEIGHTINGS, MGDA, Adaptive, Dropout, DWA, GradNorm, HyperVolume, InitialScale, RandomHalf, Softmax, Sum
from musicssl.objectives.weighting import Uncertainty, Weighting, min_norm, new_weighting, scale_gradient


K = 4
KINDS = ["regression", "classification", "regression", "regression"]
OPTIONS = {"sum": {"static": [1., .5, 0., 2.]}, "initial_scale": {"steps": 3}, "dwa": {"window": 2}, "gradnorm": {"lr": .1},
           "adaptive": {"rate": .5}}


def generator(seed=0): return torch.Generator().manual_seed(seed)
def made(name, **options): return new_weighting(name, KINDS, **{**OPTIONS.get(name, {}), **options})


def history(steps, seed=0, k=K):
    "Losses of different scales that fall at different speeds, with noise (steps, k)."
    t, speed = torch.arange(steps)[:, None], torch.linspace(.3, .01, k)
    return 3. ** -torch.arange(k) * torch.exp(-speed * t) * (1 + .1 * torch.rand(steps, k, generator=generator(seed)))


def grams(steps, seed=1, k=K):
    g = torch.randn(steps, k, 7, generator=generator(seed)) * 3. ** -torch.arange(k)[:, None] + .1
    return g @ g.mT


def weights_of(mechanism, steps, start=0):
    losses, gram = history(start + steps), grams(start + steps)
    return torch.stack([mechanism.weigh(losses[t], gram[t], seed=t) for t in range(start, start + steps)])


# M-7: a weight acts, on the encoder alone

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.heads = nn.Linear(5, 3).double(), nn.ModuleList(nn.Linear(3, 2).double() for _ in range(K))
        self.x, self.y = torch.randn(8, 5, generator=generator(2)).double(), torch.randn(K, 8, 2, generator=generator(3)).double()

    def losses(self, heard):
        return torch.stack([(head(x) - y).square().mean() for head, x, y in zip(self.heads, heard, self.y)])


def gradients(net, weights, scaled):
    "Of encoder and heads, as a training step finds them: the weights are written when the losses are known."
    net.zero_grad()
    e, slots = net.encoder(net.x), torch.ones(K).double()
    losses = net.losses([scaled(e, slots[k]) for k in range(K)])
    slots.copy_(weights)
    losses.sum().backward()
    return [[p.grad.clone() for p in part.parameters()] for part in (net.encoder, net.heads)]


def by_loss(net, weights, scaled):
    "The mutation: the losses are weighted, and so are the gradients of the heads."
    net.zero_grad()
    (weights * net.losses([net.encoder(net.x)] * K)).sum().backward()
    return [[p.grad.clone() for p in part.parameters()] for part in (net.encoder, net.heads)]


def check_acts(weights, scaled, find=gradients):
    net = Net()
    single = [torch.autograd.grad(net.losses([net.encoder(net.x)] * K)[k], list(net.encoder.parameters())) for k in range(K)]
    found, heads = find(net, weights, scaled)
    assert_close(found, [sum(w * g for w, g in zip(weights.tolist(), each)) for each in zip(*single)])
    assert_close(heads, list(torch.autograd.grad(net.losses([net.encoder(net.x)] * K).sum(), list(net.heads.parameters()))))


def discarded(x, weight):
    "PASE: the function is called and what it returns is dropped."
    scale_gradient(x, weight)
    return x


def early(x, weight): return scale_gradient(x, weight.clone())                      # reads the weight before it is written


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_mechanism_really_acts(name):
    "And PASE's discarded scaling is noticed with each: its weights are far from equal."
    weights = weights_of(made(name), 9)[-1].double()
    assert (weights - weights.mean()).abs().max() > .01
    check_acts(weights, scale_gradient)
    for mutant in (discarded, early):
        with pytest.raises(AssertionError): check_acts(weights, mutant)


def test_zero_removes_two_doubles():
    net, ones = Net(), torch.ones(K).double()
    for k in range(K):
        at = {w: gradients(net, ones.where(torch.arange(K) != k, w), scale_gradient)[0] for w in (0., 1., 2.)}
        only = gradients(net, (torch.arange(K) == k).double(), scale_gradient)[0]
        for none, one, two, own in zip(at[0.], at[1.], at[2.], only): assert_close([one - none, two - none], [own, 2 * own])
    assert all((g == 0).all() for g in gradients(net, 0 * ones, scale_gradient)[0])
    assert all((g != 0).any() for g in gradients(net, 0 * ones, discarded)[0])


def test_heads_learn_whatever_the_weights():
    check_acts(torch.tensor([0., 3., .5, 1.]).double(), scale_gradient)
    with pytest.raises(AssertionError): check_acts(torch.tensor([0., 3., .5, 1.]).double(), scale_gradient, by_loss)


def test_scaling_keeps_values_and_types():
    x = torch.randn(3, dtype=torch.bfloat16).requires_grad_()
    y = scale_gradient(x, torch.tensor(.5))
    assert y.dtype == x.dtype and torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, .5))


# What holds for all

@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_are_numbers_without_a_gradient(name):
    mechanism = made(name)
    losses = history(1)[0].double().requires_grad_()
    weights = mechanism.weigh(losses, grams(1)[0].double(), seed=0)
    assert weights.shape == (K,) and weights.dtype == torch.float64 and not weights.requires_grad and (weights >= 0).all()
    assert (mechanism.penalty(losses.detach()) is None) == (name != "uncertainty")


@pytest.mark.parametrize("name", ["dwa", "gradnorm", "softmax", "hypervolume", "adaptive", "mgda"])
def test_those_who_share_hand_out_k(name):
    assert_close(weights_of(made(name), 12).sum(1), torch.full((12,), float(K)))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_in_evaluation_nothing_moves(name):
    mechanism = made(name)
    last = weights_of(mechanism, 2)[-1]
    before = {key: value.clone() for key, value in mechanism.state_dict().items()}
    mechanism.eval()
    found = mechanism.weigh(history(9)[8])
    assert_close(found, torch.ones(K) if name in ("dropout", "random_half") else last)
    assert_close(dict(mechanism.state_dict()), before, rtol=0, atol=0)
    mechanism.train()
    weights_of(mechanism, 3, start=2)
    moved = any((value != before[key]).any() for key, value in mechanism.state_dict().items())
    assert moved == (name not in ("sum", "dropout", "random_half", "uncertainty")), "the comparison sees what moves"


def careless(self, losses, gram=None, seed=0):
    "The mutation: all is remembered."
    with torch.no_grad(): weights = self._next(losses, gram, seed)
    self.weights.copy_(weights)
    return weights


@pytest.mark.parametrize("mutated", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["initial_scale", "dwa", "gradnorm", "adaptive"])
def test_a_step_that_is_not_finite_is_forgotten(name, bad, mutated, monkeypatch):
    if mutated: monkeypatch.setattr(Weighting, "weigh", careless)
    mechanism, undisturbed, past = made(name), made(name), 0 if name == "gradnorm" else 2
    for one in (mechanism, undisturbed) if past else (): weights_of(one, past)
    losses = history(1)[0]
    losses[1] = bad
    mechanism.weigh(losses, grams(1)[0])
    same = torch.equal(weights_of(mechanism, 4, past), weights_of(undisturbed, 4, past))
    assert same != mutated


@pytest.mark.parametrize("name", ["gradnorm", "mgda"])
def test_gradients_that_are_not_finite_are_forgotten(name):
    mechanism, undisturbed = made(name), made(name)
    for one in (mechanism, undisturbed): weights_of(one, 3)
    mechanism.weigh(history(1)[0], torch.full((K, K), math.nan))
    assert torch.equal(weights_of(mechanism, 4, 3), weights_of(undisturbed, 4, 3)) and mechanism.weights.isfinite().all()


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_resumed_mechanism_goes_on_as_if_nothing_had_happened(name):
    "M-16; the mutation: its state is forgotten."
    mechanism = made(name)
    if name == "uncertainty": mechanism.log_variance.data.copy_(torch.arange(K))
    weights_of(mechanism, 5)
    saved = {key: value.clone() for key, value in mechanism.state_dict().items()}
    straight = weights_of(mechanism, 7, 5)
    resumed, forgetful = made(name), made(name)
    resumed.load_state_dict(saved)
    assert torch.equal(weights_of(resumed, 7, 5), straight)
    remembers = name in ("initial_scale", "uncertainty", "dwa", "gradnorm", "adaptive")
    assert torch.equal(weights_of(forgetful, 7, 5), straight) != remembers


# M-8: uncertainty

def settled(name="adam", weight_decay=0., steps=800):
    "s after gradient descent on fixed losses (4, 0.25) of two regressions, beside another parameter that decays."
    both = nn.ModuleDict({"other": nn.Linear(1, 1), "weighting": Uncertainty(["regression"] * 2)})
    optimizer = new_optimizer(name, both, .03, weight_decay)
    for _ in range(steps):
        (both["weighting"].penalty(torch.tensor([4., .25])) + 0 * both["other"].weight.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return both


def test_the_optimum_is_the_log_of_the_loss():
    both = settled()
    s, price = both["weighting"].log_variance.detach(), both["weighting"].penalty(torch.tensor([4., .25])).item()
    assert_close(s, torch.tensor([1.386, -1.386]), atol=1e-3, rtol=0)
    assert abs(price - 1) < 1e-6
    assert_close(both["weighting"].weigh(torch.ones(2)), torch.tensor([.125, 2.]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("mutated", [False, True])
def test_no_decay_reaches_the_variances(mutated, monkeypatch):
    "The mutation: the mechanism does not say so."
    if mutated: monkeypatch.setattr(Uncertainty, "no_decay", ())
    both = settled("adamw", weight_decay=.5)
    off = (both["weighting"].log_variance.detach() - torch.tensor([4., .25]).log()).abs().max()
    assert (off > .05) == mutated and both["other"].weight.abs().item() < 1e-4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_variances_are_in_every_optimiser_apart(name):
    both = nn.ModuleDict({"other": nn.Linear(1, 1), "weighting": made("uncertainty")})
    groups = new_optimizer(name, both, 1e-2, .1).param_groups
    assert [([id(p) for p in group["params"]], group["weight_decay"], group["lr"]) for group in groups] == [
        ([id(p) for p in both["other"].parameters()], .1, 1e-2), ([id(both["weighting"].log_variance)], 0., 1e-2)]


def test_decay_and_speed_together():
    both = nn.ModuleDict({"other": nn.Linear(1, 1), "weighting": made("uncertainty")})
    both.lr_factors = {"weighting": 10.}
    one, two = new_optimizer("adamw", both, 1e-2, .1).param_groups
    assert (one["lr_factor"], one["weight_decay"]) == (1., .1) and (two["lr_factor"], two["lr"], two["weight_decay"]) == (10., .1, 0.)
    both["weighting"].log_variance.requires_grad_(False)
    (only,) = new_optimizer("adamw", both, 1e-2, .1).param_groups
    assert len(only["params"]) == 2


def test_what_is_spared_must_be_there():
    linear = nn.Linear(1, 1)
    linear.no_decay = ("bais",)
    with pytest.raises(ValueError, match=r"got no_decay for \['bais'\]"): new_optimizer("adam", linear, 1e-2)
    with pytest.raises(ValueError, match=r"got no_decay for \['0.bais'\]"): new_optimizer("adam", nn.Sequential(linear), 1e-2)


def test_the_likelihoods_behind_the_price():
    "A Gaussian's for regressions; a softmax's with temperature, whose normaliser Kendall et al. approximate, for cross-entropies: exact at s = 0."
    mechanism, residuals = Uncertainty(["regression"]), torch.randn(50, generator=generator())
    for s in (-1., 0., 2.):
        mechanism.log_variance.data.fill_(s)
        gauss = -torch.distributions.Normal(0., math.exp(s / 2)).log_prob(residuals).mean()
        assert_close(mechanism.penalty(residuals.square().mean()[None]).detach() + .5 * math.log(2 * math.pi), gauss)
    mechanism = Uncertainty(["classification"])
    loss = torch.tensor([.7])
    assert_close(mechanism.penalty(loss).detach(), loss[0])
    assert_close(mechanism.weigh(loss), torch.ones(1))


def test_the_price_has_the_gradient_of_the_weighted_loss():
    "The weights are those that the price gives the losses."
    mechanism, losses = made("uncertainty"), history(1)[0].requires_grad_()
    mechanism.log_variance.data.copy_(torch.randn(K, generator=generator()))
    assert_close(torch.autograd.grad(mechanism.penalty(losses), losses)[0], mechanism.weigh(losses))


# M-9: dynamic weight average

def dwa_by_the_book(losses, window, temperature):
    "One call at a time from the whole past; nothing is carried."
    rows = []
    for t in range(len(losses)):
        epochs = losses[:t // window * window].view(-1, window, losses.shape[1]).mean(1)
        ratio = epochs[-1] / epochs[-2] if len(epochs) >= 2 else torch.zeros(losses.shape[1])
        power = [math.exp(r / temperature) for r in ratio.tolist()]
        rows.append([losses.shape[1] * p / sum(power) for p in power])
    return torch.tensor(rows)


def check_dwa(mechanism):
    for window, temperature in ((1, 2.), (3, 2.), (4, .5)):
        losses, one = history(20), mechanism(KINDS, window, temperature)
        found = torch.stack([one.weigh(now) for now in losses])
        assert_close(found, dwa_by_the_book(losses, window, temperature))
        assert (found[:2 * window] == 1).all() and (found[2 * window:] != 1).any()


class Hasty(DWA):
    "The mutation: the losses of this very step count."
    def _next(self, losses, gram, seed):
        super()._next(losses, gram, seed)
        ratio = self.means[0] / self.means[1].clamp_min(1e-12)
        return torch.where(self.heard < 2 * self.window, 1., room._of_k((ratio / self.temperature).softmax(0)))


class LastOnly(DWA):
    "The mutation: a window is its last step."
    def _next(self, losses, gram, seed):
        self.total.zero_()
        return super()._next(self.window * losses, gram, seed)


def test_dwa_is_its_formula(): check_dwa(DWA)


@pytest.mark.parametrize("mutant", [Hasty, LastOnly])
def test_the_formula_notices(mutant):
    with pytest.raises(AssertionError): check_dwa(mutant)


def test_dwa_values_of_the_specification():
    two, pairs = ["regression"] * 2, lambda *rows: [torch.tensor(row) for row in rows]
    found = [DWA(two, window=1), DWA(two, window=1)]
    for loss in pairs([2., 2.], [1., 2.]): assert (found[0].weigh(loss) == 1).all()
    assert_close(found[0].weigh(torch.ones(2)), torch.tensor([.8756, 1.1244]), atol=5e-5, rtol=0)
    for loss in pairs([8., .2], [4., .1]): found[1].weigh(loss)
    assert_close(found[1].weigh(torch.ones(2)), torch.ones(2))


# M-10: initial scale

def after_warm_up(mechanism, steps):
    losses = torch.tensor([200., 3., .004, 1.]) * (1 + .02 * torch.randn(60, K, generator=generator()))
    weights = torch.stack([mechanism.weigh(now) for now in losses])
    return weights[steps - 1:], (weights * losses)[steps:]


def test_weighted_losses_start_at_one():
    weights, weighted = after_warm_up(InitialScale(KINDS, 10), 10)
    assert (weights == weights[0]).all() and abs(weighted[:5].mean(0) - 1).max() < .05
    weights, weighted = after_warm_up(Sum(KINDS), 10)
    assert abs(weighted[:5].mean(0) - 1).max() > .5, "the mutation: no scaling"


def test_initial_scale_is_the_mean_of_the_first_steps():
    losses, one = history(30), InitialScale(KINDS, 7)
    for now in losses: weights = one.weigh(now)
    assert_close(weights, 1 / losses[:7].mean(0))
    with pytest.raises(AssertionError): assert_close(weights, 1 / losses[:8].mean(0))


# M-11: MGDA

def length(shares, vectors): return (shares.float() @ vectors).norm().item()


def test_two_gradients():
    same, opposite = torch.tensor([[.6, .8], [.6, .8]]), torch.tensor([[0., 1.], [0., -1.]])
    assert_close(min_norm(same @ same.T).float() @ same, same[0])
    assert_close(min_norm(opposite @ opposite.T), torch.tensor([.5, .5]).double())
    assert length(min_norm(opposite @ opposite.T), opposite) < 1e-6
    assert_close(MGDA(["regression"] * 2).weigh(torch.ones(2), opposite @ opposite.T), torch.ones(2))


def frank_wolfe(gram, steps=3000):
    "Sener and Koltun's algorithm 2."
    shares = torch.full((len(gram),), 1 / len(gram)).double()
    for _ in range(steps):
        towards = torch.eye(len(gram)).double()[(gram @ shares).argmin()] - shares
        shares += towards * (-(shares @ gram @ towards) / (towards @ gram @ towards).clamp_min(1e-15)).clamp(0, 1)
    return shares


@pytest.mark.parametrize("k, n", [(2, 5), (3, 2), (5, 50), (14, 100), (14, 6)])
def test_nobody_finds_a_shorter_mixture(k, n):
    "Also where more vectors than dimensions leave the answer open. Peers: Frank and Wolfe's method, and scipy's general one."
    for seed, scale in ((0, 1.), (1, 1e-4), (2, 1e3)):
        vectors = scale * (torch.randn(k, n, generator=generator(seed)) + .3)
        gram = (vectors @ vectors.T).double()
        shares = min_norm(gram)
        assert shares.min() >= 0 and abs(shares.sum() - 1) < 1e-9
        ours, unit = length(shares, vectors), (gram / gram.trace() * k).numpy()
        peer = minimize(lambda c: c @ unit @ c, torch.full((k,), 1 / k).numpy(), jac=lambda c: 2 * unit @ c, method="SLSQP", bounds=[(0, 1)] * k,
                        constraints={"type": "eq", "fun": lambda c: c.sum() - 1}, options={"maxiter": 500, "ftol": 1e-14})
        best = min(length(torch.from_numpy(peer.x), vectors), length(frank_wolfe(gram), vectors))
        assert ours <= best + 1e-5 * scale and ours >= .98 * best - 1e-2 * scale


def check_helps_everybody(weigh):
    for seed in range(20):
        g = torch.randn(5, 30, generator=generator(seed)).double() * 10. ** torch.randn(5, 1, generator=generator(seed)).double() + .5
        weights = weigh(g @ g.T)
        d = weights.double() @ g
        progress = g @ d / g.norm(dim=1)
        assert (progress > -1e-6 * d.norm()).all()
        heard = weights > 1e-6 * weights.max()
        assert_close(progress[heard], progress[heard].mean().expand(int(heard.sum())), rtol=1e-4, atol=0)


def pases(gram):
    "The mutation: solved for unit gradients, applied to raw losses."
    norms = gram.diagonal().sqrt()
    return min_norm(gram / torch.outer(norms, norms))


def test_mgda_helps_everybody_alike():
    check_helps_everybody(lambda gram: MGDA(["regression"] * 5).weigh(torch.ones(5).double(), gram))
    with pytest.raises(AssertionError): check_helps_everybody(pases)


def test_who_has_no_gradient_is_not_asked():
    g = torch.tensor([[1., 0.], [0., 0.], [0., 2.]])
    three = MGDA(["regression"] * 3)
    assert_close(three.weigh(torch.ones(3), g @ g.T), torch.tensor([2., 0., 1.]))
    assert_close(three.weigh(torch.ones(3), torch.zeros(3, 3)), torch.ones(3))


# GradNorm

@pytest.mark.parametrize("alpha", [0., .12, 1.5])
def test_gradnorm_descends_the_loss_of_the_paper(alpha):
    "Slopes by autograd, the targets held fixed."
    one, start, later, gram = GradNorm(KINDS, alpha, lr=.01), history(1)[0], history(30)[29], grams(1)[0]
    one.weigh(start, gram)
    w = one.weights.clone().requires_grad_()
    pulls, left = w * gram.diagonal().sqrt(), later / start
    wanted = (pulls.mean() * (left / left.mean())**alpha).detach()
    slope, = torch.autograd.grad((pulls - wanted).abs().sum(), w)
    stepped = w.detach() * torch.exp(-.01 * slope.sign())
    assert_close(one.weigh(later, gram), K * stepped / stepped.sum())


def pulls_at_rest(alpha, left, lr=.01):
    one, norms = GradNorm(KINDS, alpha, lr), torch.tensor([5., 1., .2, 1.])
    one.weigh(torch.ones(K), torch.outer(norms, norms))
    for _ in range(1500): weights = one.weigh(left, torch.outer(norms, norms))
    return weights * norms


def test_gradnorm_comes_to_rest_where_it_should():
    left = torch.tensor([.2, .4, .8, .6])
    equal, slow = pulls_at_rest(0., left), pulls_at_rest(1., left)
    assert_close(equal / equal.mean(), torch.ones(K), atol=.03, rtol=0)
    assert_close(slow / slow.mean(), left / left.mean(), atol=.05, rtol=0)
    with pytest.raises(AssertionError): assert_close(equal / equal.mean(), left / left.mean(), atol=.05, rtol=0)


# Softmax, hyper-volume, adaptive

def test_softmax_is_its_formula():
    losses = history(1)[0]
    power = [math.exp(.7 * loss) for loss in losses.tolist()]
    assert_close(Softmax(KINDS, .7).weigh(losses), torch.tensor([K * p / sum(power) for p in power]))


def test_hyper_volume_is_the_gradient_of_its_logarithms():
    losses = history(1)[0].double().requires_grad_()
    slope, = torch.autograd.grad(-torch.log(1.3 * losses.detach().max() - losses + 1e-6).sum(), losses)
    assert_close(HyperVolume(KINDS, 1.3).weigh(losses), (K * slope / slope.sum()))
    assert_close(HyperVolume(KINDS).weigh(torch.zeros(K)), torch.ones(K))


def adaptive_by_the_book(losses, rate, temperature, sign=1):
    gain, rows = [0.] * losses.shape[1], []
    for t, now in enumerate(losses.tolist()):
        better = [sign * (was - is_) for was, is_ in zip(losses[t - 1].tolist(), now)] if t else [0.] * len(now)
        gain = [rate * r + (1 - rate) * q for r, q in zip(better, gain)]
        power = [math.exp(temperature * q) for q in gain]
        rows.append([len(now) * p / sum(power) for p in power])
    return torch.tensor(rows)


def test_adaptive_is_its_formula():
    losses, one = history(20), Adaptive(KINDS, .3, 5.)
    found = torch.stack([one.weigh(now) for now in losses])
    assert_close(found, adaptive_by_the_book(losses, .3, 5.))
    with pytest.raises(AssertionError): assert_close(found, adaptive_by_the_book(losses, .3, 5., sign=-1))


# Dropout and random half

def draws(mechanism, steps=2500): return torch.stack([mechanism.weigh(torch.ones(len(mechanism.kinds)), seed=step) for step in range(steps)])


def fair(thrown, p):
    "Every worker at its rate, every two independent."
    together = (thrown.T @ thrown / len(thrown)).fill_diagonal_(p * p)
    return bool(abs(thrown.mean(0) - p).max() < .04 and abs(together - p * p).max() < .04 and set(thrown.unique().tolist()) <= {0., 1.})


@pytest.mark.parametrize("p", [.3, .5, .9])
def test_each_worker_has_a_throw_of_its_own(p):
    assert fair(draws(Dropout(KINDS, p)), p)


def test_a_shared_throw_is_noticed():
    "The mutation is PASE's fault: all regression workers share one."
    thrown, shared = draws(Dropout(KINDS)), [kind == "regression" for kind in KINDS]
    thrown[:, shared] = thrown[:, :1]
    assert not fair(thrown, .5)


@pytest.mark.parametrize("k", [2, 5, 7])
def test_all_halves_are_equally_likely(k):
    drawn = draws(RandomHalf(["regression"] * k), 1000)
    subsets = [mask for mask in itertools.product((0., 1.), repeat=k) if sum(mask) in (k // 2, (k + 1) // 2)]
    place = {mask: number for number, mask in enumerate(subsets)}
    counts = torch.zeros(len(subsets))
    for row in drawn.tolist(): counts[place[tuple(row)]] += 1
    assert chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("name", ["dropout", "random_half"])
def test_draws_are_a_matter_of_the_seed(name):
    one, other = made(name), made(name)
    draws(one, 10)
    seeds = [torch.tensor(seed) for seed in range(20)]
    assert torch.equal(torch.stack([one.weigh(torch.ones(K), seed=seed) for seed in seeds]), draws(other, 20)), "not of what came before"
    assert len(set(map(tuple, draws(other, 20).tolist()))) > 3


# Refusals

@pytest.mark.parametrize("make, message", [
    (lambda: new_weighting("equal", KINDS), "got weighting 'equal', wanted one of sum, initial_scale, .*mgda"),
    (lambda: new_weighting("dwa", KINDS, static=[1.] * K), "static weights for 'dwa'"),
    (lambda: Sum(KINDS, [1.]), r"got static weights \[1.0\], wanted 4"), (lambda: Sum(KINDS, [1., 1., 1., -1.]), "at least 0"),
    (lambda: Sum([]), "kinds of nobody"), (lambda: Sum(["ranking"]), r"got kinds \['ranking'\]"),
    (lambda: InitialScale(KINDS, 0), "got 0 steps"), (lambda: DWA(KINDS, 0), "got window 0"), (lambda: DWA(KINDS, temperature=0.), "temperature 0.0"),
    (lambda: Adaptive(KINDS, 0.), "got rate 0.0"), (lambda: Softmax(KINDS, -1.), "temperature -1.0"), (lambda: HyperVolume(KINDS, 1.), "delta 1.0"),
    (lambda: Dropout(KINDS, 0.), "got p = 0.0"), (lambda: GradNorm(KINDS, lr=0.), "got lr 0.0"),
    (lambda: Sum(KINDS).weigh(torch.ones(3)), r"losses of shape \(3,\), wanted \(4,\)"),
    (lambda: MGDA(KINDS).weigh(torch.ones(K)), r"got no gram, MGDA wants \(4, 4\)"),
    (lambda: GradNorm(KINDS).weigh(torch.ones(K), torch.ones(3, 3)), r"got gram \(3, 3\), GradNorm wants \(4, 4\)")])
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message): make()


def test_a_mechanism_that_says_nothing():
    with pytest.raises(NotImplementedError, match="Weighting does not say"): Weighting(KINDS).weigh(torch.ones(K))


@pytest.mark.gpu
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_gpu_finds_the_same_weights(name):
    here, there = made(name), made(name).cuda()
    losses, gram = history(12), grams(12)
    for t in range(12):
        found = there.weigh(losses[t].cuda(), gram[t].cuda(), seed=t)
        assert_close(found.cpu(), here.weigh(losses[t], gram[t], seed=t), rtol=1e-4, atol=1e-5)
