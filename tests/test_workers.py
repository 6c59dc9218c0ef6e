"""Heads, windows and pairs; M-12 is the number of the paper's specification."""
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from torch.testing import assert_close

import musicssl.objectives.workers as room
from musicssl.augment import draw_seeds, fold_in
from musicssl.encoders.base import count_parameters
from musicssl.features.targets import TARGETS
from musicssl.objectives.workers import GROUPS, WORKERS, RegressionHead, WaveformHead, chosen, cut, gim_pairs, lim_pairs, new_head, pair_loss
from musicssl.objectives.workers import spc_pairs, strangers


def generator(seed=0): return torch.Generator().manual_seed(seed)
def seeds(n, seed=0): return draw_seeds(n, generator(seed))
def frames(rows=8, dim=5, n=60, seed=0): return torch.randn(rows, dim, n, generator=generator(seed))
def even(values, first, last): # over all whole numbers from first to last
    counts = torch.bincount(values - first, minlength=last - first + 1)
    return len(counts) == last - first + 1 and (first == last or chisquare(counts.numpy()).pvalue > 1e-4)


# Heads

@pytest.mark.parametrize("dim, outputs, context", [(100, 20, 1), (256, 21_525, 1), (64, 12, 3)])
def test_a_regression_head_has_one_hidden_layer(dim, outputs, context):
    head = RegressionHead(dim, outputs, context=context)
    assert count_parameters(head) == 256 * dim * context + 256 + 256 + 256 * outputs + outputs
    x = frames(2, dim, 20)
    inside = F.pad(x, (context // 2, context // 2)).unfold(2, context, 1)                                # (B, D, N, context)
    hidden = torch.einsum("bdnc,hdc->bhn", inside, head[0].weight) + head[0].bias[:, None]
    by_hand = torch.einsum("bhn,oh->bon", hidden.where(hidden > 0, .25 * hidden), head[2].weight[:, :, 0]) + head[2].bias[:, None]
    assert_close(head(x), by_hand, atol=1e-5, rtol=1e-4)


def test_the_waveform_head_of_pase():
    head = WaveformHead(100)
    layers = [100 * 512 * 30 + 512, 512 * 256 * 30 + 256, 256 * 128 * 30 + 128]
    assert count_parameters(head) == sum(layers) + 512 + 256 + 128 + (128 * 64 + 64 + 64) + (64 + 1)
    assert [layer.stride[0] for layer in head if isinstance(layer, torch.nn.ConvTranspose1d)] == [4, 4, 10]


@pytest.mark.parametrize("hop", [1, 30, 64, 100, 160, 162, 256, 320])
def test_as_many_samples_as_frames_hold_and_in_their_place(hop):
    head = WaveformHead(3, hop, .125)
    for n in (1, 2, 9): assert head(frames(2, 3, n)).shape == (2, 1, n * hop)
    moved = (head(torch.eye(21)[10].expand(1, 3, 21)) - head(torch.zeros(1, 3, 21)))[0, 0].nonzero()[:, 0]
    assert abs((moved.min() + moved.max()).item() / 2 - 10.5 * hop + .5) <= 1 + .2 * hop, "what a frame moves lies around it"


# Windows

def test_windows_start_anywhere_and_depend_on_their_row_alone():
    wave, many = torch.arange(12.).expand(20_000, -1), seeds(20_000)
    assert even(cut(wave, many, 5)[:, 0].long(), 0, 7)
    assert torch.equal(cut(wave, many, 5)[7:9], cut(wave[7:9], many[7:9], 5))
    assert torch.equal(cut(wave, many, 5).diff(dim=1), torch.ones(20_000, 4))
    assert not torch.equal(cut(wave, many, 5), cut(wave, fold_in(many, "context"), 5))


def within(starts, lengths, n): return bool((starts + n <= lengths.clamp_min(n)).all())


def test_windows_keep_to_what_is_sound():
    wave, lengths = torch.arange(12.).expand(6000, -1), torch.tensor([4, 5, 6, 9, 11, 12]).repeat(1000)
    starts = cut(wave, seeds(6000), 5, lengths)[:, 0].long()
    assert within(starts, lengths, 5) and all(even(starts[place::6], 0, max(0, n - 5)) for place, n in enumerate([4, 5, 6, 9, 11, 12]))
    assert not within(cut(wave, seeds(6000), 5)[:, 0].long(), lengths, 5), "the mutation: lengths that nobody heeds"


def test_a_window_longer_than_the_wave():
    with pytest.raises(ValueError, match="got 12 samples, wanted at least a window of 13"): cut(torch.zeros(2, 12), seeds(2), 13)


# M-12: who is set against whom

RECORDINGS = [3, 3, 1, 3, 2, 2, 1, 3]


def never_of_ones_own(choose):
    names = torch.tensor(RECORDINGS)
    return all((names[choose(seeds(8, seed))] != names).all() for seed in range(300))


@pytest.mark.parametrize("kind", [list, torch.tensor, lambda ids: [f"song {n}" for n in ids]])
def test_strangers_are_of_other_recordings(kind):
    assert never_of_ones_own(lambda many: strangers(kind(RECORDINGS), many))


def test_mutations_ids_unheeded_and_a_shift_by_one():
    assert not never_of_ones_own(lambda many: strangers(None, many))
    assert not never_of_ones_own(lambda many: torch.arange(8).roll(1))


def test_all_strangers_are_equally_likely():
    drawn = torch.stack([strangers(RECORDINGS, fold_in(seeds(8), step)) for step in range(4000)])
    for row, name in enumerate(RECORDINGS):
        others = [other for other, theirs in enumerate(RECORDINGS) if theirs != name]
        counts = torch.bincount(drawn[:, row], minlength=8)
        assert counts[others].sum() == 4000 and chisquare(counts[others].numpy()).pvalue > 1e-4


@pytest.mark.parametrize("ids, rows", [([5, 5, 5], 3), (None, 1), (["a"], 1)])
def test_one_recording_alone_has_no_strangers(ids, rows):
    with pytest.raises(ValueError, match="wanted two recordings at least"): strangers(ids, seeds(rows))


# M-12: LIM and GIM

@pytest.mark.parametrize("make", [lim_pairs, gim_pairs])
def test_half_of_the_pairs_are_true(make):
    anchor, context, strange = frames(seed=1), frames(seed=2), frames(seed=3)
    true, false = make(anchor, context, strange).chunk(2)
    means = [x.mean(-1, keepdim=True) if make is gim_pairs else x for x in (anchor, context, strange)]
    for pairs, other in ((true, means[1]), (false, means[2])): assert torch.equal(pairs[:, :5], means[0]) and torch.equal(pairs[:, 5:], other)
    answers = RegressionHead(10, 1)(make(anchor, context, strange))
    labels = torch.cat([torch.ones_like(answers[:8]), torch.zeros_like(answers[8:])])
    assert labels.mean() == .5
    assert_close(pair_loss(answers), F.binary_cross_entropy_with_logits(answers, labels))
    assert pair_loss(answers) != pair_loss(answers.flip(0)), "the mutation: true and false exchanged"


def moved_by_shuffling(make):
    "How much the loss changes when the context's frames change places."
    torch.manual_seed(0)
    judge, (anchor, context, strange) = RegressionHead(10, 1).double(), [frames(seed=seed).double() for seed in (1, 2, 3)]
    shuffled = context[:, :, torch.randperm(60, generator=generator())]
    return abs(pair_loss(judge(make(anchor, context, strange))) - pair_loss(judge(make(anchor, shuffled, strange)))).item()


def test_shuffling_the_context_leaves_gim_and_changes_lim():
    assert moved_by_shuffling(gim_pairs) < 1e-12 and moved_by_shuffling(lim_pairs) > 1e-5


@pytest.mark.parametrize("name", ["lim", "gim", "spc"])
def test_who_knows_nothing_pays_ln_2(name):
    losses = []
    for seed in range(20):
        torch.manual_seed(seed)
        x = [frames(64, 5, 60, 3 * seed + n) for n in range(3)]
        pairs = spc_pairs(x[0], seeds(64, seed)) if name == "spc" else {"lim": lim_pairs, "gim": gim_pairs}[name](*x)
        losses.append(pair_loss(new_head(name, 5, 160)(pairs)).item())
    assert abs(sum(losses) / 20 - math.log(2)) < .01


# SPC

def clocks(rows, n): return torch.arange(float(n)).expand(rows, 1, n)


def keeps_apart(picked):
    "Rows of a frame and five others: 16 or more frames away, five in a row, after it in the first half and before it in the second."
    now, five, half = picked[:, 0], picked[:, 1:], len(picked) // 2
    after, before = five[:half, 0] - now[:half], now[half:] - five[half:, -1]
    return bool((five.diff(dim=1) == 1).all() and after.min() >= 16 and before.min() >= 16 and torch.equal(now[:half], now[half:]))


@pytest.mark.parametrize("n", [41, 42, 60, 200])
def test_future_and_past(n):
    picked = spc_pairs(clocks(20_000, n), seeds(20_000))[..., 0].long()
    assert keeps_apart(picked) and picked.min() == 0 and picked.max() == n - 1 and even(picked[:20_000, 0], 20, n - 21)
    for now in {20, n - 21}:
        rows = picked[:20_000, 0] == now
        assert even(picked[:20_000][rows, 1], now + 16, n - 5) and even(picked[20_000:][rows, 1], 0, now - 20)


def test_mutation_too_near(monkeypatch):
    monkeypatch.setattr(room, "_SPC_APART", 12)
    assert not keeps_apart(spc_pairs(clocks(2000, 60), seeds(2000))[..., 0].long())


def test_channels_stay_together():
    x, time = frames(3, 4, 50), spc_pairs(clocks(3, 50), seeds(3))[..., 0].long()
    for place, pair in enumerate(spc_pairs(x, seeds(3))[..., 0]): assert torch.equal(pair.view(4, 6), x[place % 3][:, time[place]])


# The register

def test_groups():
    assert all(chosen(name) == members and len(set(members)) == len(members) for name, members in GROUPS.items())
    assert set(GROUPS["all"]) == set(GROUPS["speech"]) | set(GROUPS["music"]) and set(GROUPS["all"]) < set(GROUPS["every"])
    assert set(GROUPS["speech+prosody"]) - set(GROUPS["speech"]) == {"prosody"} and len(GROUPS["every"]) == 14
    assert {name for name, worker in WORKERS.items() if worker.kind == "regression"} == set(TARGETS)


@pytest.mark.parametrize("workers, words", [("pitch", "no worker 'pitch'"), (["lps", "x", "y"], "'x', 'y'"), ([], "at least one"),
                                            (["lps"] * 2, "each once")])
def test_unknown_workers(workers, words):
    with pytest.raises(ValueError, match=words): chosen(workers)


@pytest.mark.parametrize("name", WORKERS)
def test_every_worker_has_a_head(name):
    head = new_head(name, 6, 162, 7, .25)
    wanted = {"waveform": (2, 1, 50 * 162), "regression": (2, 7, 50), "pairs": (2, 7, 50)}[WORKERS[name].kind]
    x = frames(2, 6 * WORKERS[name].beside, 50).requires_grad_()
    head(x).square().sum().backward()
    assert head(x).shape == wanted and (x.grad != 0).any(1).all() and all((p.grad != 0).any() for p in head.parameters())
