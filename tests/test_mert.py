"""MERT's masks, prices and objective where a lesson would be too long; the numbers are those of the paper's specification, section 8."""
import math

import pytest
import torch
from lightning_fabric import Fabric
from scipy.stats import chisquare
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import musicssl.objectives.mert as room
from musicssl import meter, zoo
from musicssl.audio import Batch
from musicssl.augment import NoiseMixture, draw_seeds, fold_in, uniform
from musicssl.data.loader import Loader
from musicssl.devices import share
from musicssl.encoders.mert import MERT
from musicssl.features.cqt import CQT
from musicssl.objectives.mert import MERTPretext, Teachers, code_logits, code_price, level, one_codebook, span_mask
from musicssl.optim import lr_at
from musicssl.train import TrainConfig, fit
from musicssl.update import read_batch

import mert_ranks as ranks


def generator(seed=0): return torch.Generator().manual_seed(seed)
def seeds(n, seed=0): return draw_seeds(n, generator(seed))


def tiny(**options):
    torch.manual_seed(0)
    return MERT(**{"n_layers": 2, "dim": 48, "heads": 2, "ffn": 96, "channels": 12, "pos_kernel": 16, "n_samples": 9_600, **options})


def pretext(encoder=None, **options):
    return MERTPretext(encoder or tiny(), **{"teacher": ranks.Teacher(), "cqt": ranks.NOTES, "code_dim": 8, **options})


def sounds(n, samples=9_600, seed=0): return Batch(wave=.3 * torch.randn(n, samples, generator=generator(seed)), seeds=seeds(n, seed))


# 8 and 9: codes

TABLE = torch.tensor([[1., 0], [0, 1], [-1, 0]])


def test_the_hand_case():
    logits = code_logits(torch.tensor([[1., 0], [1, 0]]), TABLE)
    assert_close(logits, torch.tensor([[10., 0, -10]]).expand(2, 3))
    assert_close(code_price(logits, torch.tensor([0, 1]), TABLE), torch.tensor([4.540e-5, 10.0000454]), atol=1e-6, rtol=1e-6)
    assert code_price(code_logits(torch.tensor([[1., 0]]), TABLE[[0, 0]]), torch.tensor([0]), TABLE[[0, 0]]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_equal_to_the_true_one_are_left_out(dtype):
    "Against a loop, with some rows twice and one that differs from another by the sign of a zero."
    table = torch.randn(20, 6, generator=generator()).to(dtype)
    table[[3, 7]], table[11, 0], table[12] = table[5].clone(), 0., table[11]
    table[11, 0], table[12, 0] = 0., -0.
    logits, codes = code_logits(torch.randn(40, 6, generator=generator(1)).to(dtype), table), torch.arange(40) % 20
    wanted = []
    for row, code in zip(logits, codes.tolist()):
        others = [c for c in range(20) if c == code or not torch.equal(table[c], table[code])]
        wanted.append(torch.logsumexp(row[others], 0) - row[code])
    assert_close(code_price(logits, codes, table), torch.stack(wanted))


def test_mutation_twins_that_stay(monkeypatch):
    monkeypatch.setattr(room, "_sums", lambda table: torch.arange(len(table)))
    assert_close(code_price(code_logits(torch.tensor([[1., 0]]), TABLE[[0, 0]]), torch.tensor([0]), TABLE[[0, 0]]), torch.tensor([math.log(2)]))


def test_unequal_rows_are_told_apart_by_their_last_bit():
    table = torch.rand(1028, 64, generator=generator())
    table[1] = table[0]
    table[1, 63] = torch.nextafter(table[0, 63], torch.tensor(2.))
    assert len(room._sums(table).unique()) == 1028


def test_scores_are_in_float32_under_autocast():
    z, table = torch.randn(5, 64, generator=generator()), torch.rand(9, 64, generator=generator(1))
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(code_logits(z, table), code_logits(z.clone(), table))
    assert code_logits(z.bfloat16(), table).dtype == torch.float32


class Same(nn.Module):
    "Eight codebooks that are one, eight times over."
    sample_rate, hop = ranks.RATE, ranks.HOP

    def __init__(self, times):
        super().__init__()
        self.sizes = (5,) * times

    def forward(self, wave): return ranks.Teacher()(wave)[..., :1].expand(-1, -1, len(self.sizes))


def test_codebooks_are_summed():
    one, eight = (pretext(ranks.Small(), teacher=Same(times), cqt=None) for times in (1, 8))
    eight.encoder.load_state_dict(one.encoder.state_dict())
    with torch.no_grad():
        for kind in ("weight", "bias"):
            given = getattr(one.code_head.project, kind)
            getattr(eight.code_head.project, kind).copy_(torch.cat([given] * 8))
        for table in eight.code_head.tables: table.copy_(one.code_head.tables[0])
    parts = [objective(sounds(4)) for objective in (one, eight)]
    assert_close(parts[1]["code_loss"], 8 * parts[0]["code_loss"])
    assert_close(parts[1]["code_accuracy"], parts[0]["code_accuracy"])
    assert abs(parts[1]["code_loss"] - parts[0]["code_loss"]) > 1, "the mutation: a mean over codebooks"


# 10: only hidden frames count

def test_targets_at_visible_frames_do_not_matter():
    objective, some = ranks.objective(), ranks.batch()
    codes, heard = ranks.Teacher()(some.wave), objective.listen(some)
    before, shown = objective(some), ~torch.nn.functional.pad(heard.mask, (0, 1), value=True)
    other = codes.where(~shown[..., None], (codes + 1) % torch.tensor([5, 2]))
    assert not torch.equal(codes, other)
    assert objective(Batch(wave=some.wave, seeds=some.seeds, codes=other))["loss"] == before["loss"]
    hidden = codes.where(shown[..., None], (codes + 1) % torch.tensor([5, 2]))
    assert objective(Batch(wave=some.wave, seeds=some.seeds, codes=hidden))["code_loss"] != before["code_loss"], "the check can fail"


@pytest.mark.parametrize("masked_only", [True, False])
def test_no_gradient_from_visible_frames(monkeypatch, masked_only):
    objective, seen = ranks.objective(masked_only=masked_only), []
    encode = objective.encoder.encode
    def watched(*given):
        layers = encode(*given)
        layers.retain_grad()
        seen.append(layers)
        return layers
    monkeypatch.setattr(objective.encoder, "encode", watched)
    heard = objective.listen(ranks.batch())
    seen.clear()
    objective(ranks.batch())["loss"].backward()
    gradient = seen[0].grad[:, -1]
    assert (gradient[~heard.mask] == 0).all() and (gradient[heard.mask] != 0).any(-1).all()


def test_prices_by_definition():
    "Sum, count and argmax, frame by frame."
    objective, some = ranks.objective(), ranks.batch()
    heard, parts = objective.listen(some), objective(some)
    price, right, error = 0., torch.zeros(2), 0.
    for b, t in heard.mask.nonzero().tolist():
        says = objective.code_head.project(heard.last[b, t]).chunk(2)
        for k, (z, table) in enumerate(zip(says, objective.code_head.tables)):
            logits = nn.functional.cosine_similarity(z[None], table) / .1
            price += nn.functional.cross_entropy(logits, heard.codes[b, t, k])
            right[k] += logits.argmax() == heard.codes[b, t, k]
        error += (objective.cqt_head(heard.last[b, t]) - heard.spectrum[b, t]).square().mean()
    count = heard.mask.sum()
    wanted = {"code_loss": price / count, "cqt_loss": error / count, "penalty": heard.features.square().mean(), "accuracy_0": right[0] / count,
              "accuracy_1": right[1] / count, "code_accuracy": right.mean() / count, "masked": heard.mask.double().mean()}
    wanted["loss"] = wanted["code_loss"] + wanted["cqt_loss"] + 10 * wanted["penalty"]
    assert parts.keys() == wanted.keys()
    for name, value in wanted.items(): assert_close(parts[name], value.double(), atol=1e-6, rtol=1e-6)


# 11: the notes

def test_notes():
    time = torch.arange(120_000) / 24_000
    picture = CQT.preset("mert")(torch.sin(2 * math.pi * 440 * time))
    assert picture.shape == (336, 376) and picture[:, 188].argmax() == 180 and abs(picture[:, 188].max() - 30.6) < .1


def test_silence_costs_a_head_of_zeros_nothing():
    objective = pretext(sizes=(), teacher=None)
    for p in objective.cqt_head.parameters(): nn.init.zeros_(p)
    assert objective(Batch(wave=torch.zeros(2, 9_600), seeds=seeds(2)))["cqt_loss"] == 0
    assert objective(sounds(2))["cqt_loss"] > 0


def test_logarithms_of_the_notes():
    plain, log = (pretext(log_cqt=log).listen(sounds(2)).spectrum for log in (False, True))
    assert_close(log, torch.log(1 + plain)) and plain.max() > .5


# 12: the penalty

def test_the_penalty_and_its_weight():
    objective, some = pretext(cqt=None), sounds(4)
    parts = objective.eval()(some)
    assert_close(parts["penalty"], objective.encoder.front(some.wave).square().mean())
    assert_close(parts["loss"], parts["code_loss"] + 10 * parts["penalty"])
    objective.penalty_weight = 3.
    assert_close(objective(some)["loss"], parts["code_loss"] + 3 * parts["penalty"])


def test_slower_convolutions_leave_the_forward_pass_bit_identical():
    found = {}
    for factor in (1., .1):
        objective = pretext(tiny(feature_grad=factor, dropout=0., attention_dropout=0., layerdrop=0.))
        parts = objective(sounds(4))
        parts["loss"].backward()
        found[factor] = parts["loss"], objective.encoder.front.convolutions[0].weight.grad
    assert found[1.][0] == found[.1][0]
    assert_close(found[.1][1], .1 * found[1.][1], atol=1e-6, rtol=1e-4)


# 13: two processes

@pytest.fixture(scope="module")
def found(as_pair): return as_pair(ranks.run)


def alone(kind):
    fabric = Fabric(accelerator="cpu", devices=1)
    return ranks.step(fabric, fabric.setup_module(ranks.objective(**ranks.options_of(kind))), ranks.batch())


def largest_difference(one, two): return max((a - b).abs().max().item() for a, b in zip(one["gradient"], two["gradient"], strict=True))


@pytest.mark.parametrize("kind", ["all", "one codebook"])
def test_two_processes_with_unequal_counts_equal_one(found, kind):
    one, counts = alone(kind), [len(ranks.objective(**ranks.options_of(kind)).listen(share(ranks.batch(), rank, 2)).at) for rank in range(2)]
    assert abs(counts[0] - counts[1]) > 10, "equal counts would prove nothing"
    assert max(g.abs().max() for g in one["gradient"]) > 1e-3, "nor would a gradient this small"
    for two in found: assert largest_difference(one, two[kind]) < 1e-12
    for name in one["parts"]: assert abs(one["parts"][name] - sum(two[kind]["parts"][name] for two in found) / 2) < 1e-12


@pytest.mark.parametrize("kind", ["all", "one codebook"])
def test_mutation_a_mean_of_means(found, kind): assert largest_difference(alone(kind), found[0][f"{kind}, a mean of means"]) > 1e-4


def test_levelled_masks_depend_on_who_shares_the_batch(found):
    "As the released code has it; the reason for `equal_counts=False`."
    assert largest_difference(alone("levelled"), found[0]["levelled"]) > 1e-4


# 14: masks

@pytest.fixture(scope="module")
def many(): return span_mask(374, seeds(10_000))


def test_shares(many):
    share = many.double().mean(0)
    assert abs(share.mean() - .583) < .003 and share[373] == 0 and abs(share[0] - .162) < .02
    exactly = sum(part * (1 - math.comb(364, n) / math.comb(369, n)) for part, n in ((.16, 59), (.84, 60)))
    assert abs(share[4:-5].mean() - exactly) < .002 and (share[4:-5] - exactly).abs().max() < .025
    assert abs(many.sum(1).double().std() - 9.1) < .5


def test_numbers_of_spans():
    "Spans of one frame do not overlap where places are drawn without replacement: counting frames counts spans."
    counts = span_mask(374, seeds(10_000), share=.8 / 5, span=1).sum(1)
    assert counts.unique().tolist() == [59, 60] and abs((counts == 59).double().mean() - .16) < .02


def test_mutation_places_drawn_with_replacement():
    "The count of distinct places is then off, and the share too."
    begins = torch.zeros(2000, 369).scatter(1, torch.randint(369, (2000, 60), generator=generator()), 1)
    assert not set(begins.sum(1).tolist()) <= {59, 60}


def test_every_place_is_drawn_equally_often():
    first = span_mask(40, seeds(20_000), share=.025, span=1, min_spans=1).double().argmax(1)
    assert chisquare(torch.bincount(first, minlength=39).numpy()).pvalue > 1e-4 and first.max() == 38


def by_hand(n, seed, share=.8, span=5, least=2, fix=False):
    places = n - span + fix
    luck = [uniform(fold_in(seed[None], "places") + place).item() for place in range(places)]
    spans = max(least, math.floor(share * n / span + uniform(fold_in(seed[None], "spans")).item()))
    starts = sorted(range(places), key=luck.__getitem__)[:spans]
    return [any(start <= t < start + span for start in starts) for t in range(n)]


@pytest.mark.parametrize("n", [6, 7, 23, 74])
@pytest.mark.parametrize("fix", [False, True])
@pytest.mark.parametrize("share, span, least", [(.8, 5, 2), (.3, 3, 1), (.05, 4, 3)])
def test_masks_against_a_loop(n, fix, share, span, least):
    some = seeds(20, n)
    assert span_mask(n, some, share, span, least, fix).tolist() == [by_hand(n, seed, share, span, least, fix) for seed in some]


def test_the_last_frame_can_be_reached():
    share = span_mask(374, seeds(3000), fix_last_frame=True).double().mean(0)
    assert share.min() > .1 and abs(share[-1] - share[0]) < .04


def levelled_by_hand(mask, some):
    fewest, kept = int(mask.sum(1).min()), torch.zeros_like(mask)
    for row, seed in enumerate(some):
        at = mask[row].nonzero()[:, 0].tolist()
        for t in sorted(at, key=lambda t: uniform(fold_in(seed[None], "level") + t).item())[:fewest]: kept[row, t] = True
    return kept


def test_levelling(many):
    groups, some = many[:1600].view(100, 16, 374), seeds(1600)
    after = torch.cat([level(group, own) for group, own in zip(groups, some.view(100, 16))])
    counts = after.view(100, 16, 374).sum(2)
    assert (counts == counts[:, :1]).all() and (counts[:, 0] == groups.sum(2).amin(1)).all() and not (after & ~many[:1600]).any()
    assert abs(after.double().mean() - .540) < .005
    assert torch.equal(after[:16], levelled_by_hand(many[:16], some[:16]))


def masks(batch, **options): return ranks.objective(**options).listen(batch).mask


def test_masks_are_those_of_the_row_and_the_step():
    waves = torch.randn(16, 26 * ranks.HOP, generator=generator()).double().numpy()
    plain = Loader(waves, batch_size=8, seed=0)
    read = lambda *where: (lambda batch: Batch(wave=batch.wave.double(), seeds=batch.seeds))(read_batch(plain, *where))
    steps = [masks(read(number, 5), equal_counts=False) for number in range(3)]
    assert not any(torch.equal(one, two) for n, one in enumerate(steps) for two in steps[:n])
    for rank in range(2): assert torch.equal(masks(read(1, 5, rank, 2), equal_counts=False), steps[1][rank::2])
    assert not torch.equal(masks(read(1, 6), equal_counts=False), steps[1]), "another seed"


def test_mutation_one_mask_for_all_is_noticed(monkeypatch):
    monkeypatch.setattr(room, "fold_in", lambda seeds, label: fold_in(torch.zeros_like(seeds), label))
    assert len(masks(ranks.batch()).unique(dim=0)) == 1


def test_one_codebook_for_each_clip():
    objective = ranks.objective(random_codebook=True)
    heard, parts = objective.listen(ranks.batch(40)), objective(ranks.batch(40))
    rows = [set((heard.at[asked] // heard.mask.shape[1]).tolist()) for asked in heard.asked]
    assert not rows[0] & rows[1] and sorted(rows[0] | rows[1]) == list(range(40)) and min(map(len, rows)) > 8
    each = [objective.code_head(heard.last.flatten(0, 1)[heard.at[asked]])[k] for k, asked in enumerate(heard.asked)]
    true = [heard.codes.flatten(0, 1)[heard.at[asked], k] for k, asked in enumerate(heard.asked)]
    prices = [code_price(guess, code, table) for guess, code, table in zip(each, true, objective.code_head.tables)]
    assert_close(parts["code_loss"], torch.cat(prices).mean())
    for k, (guess, code) in enumerate(zip(each, true)): assert_close(parts[f"accuracy_{k}"], (guess.argmax(1) == code).double().mean())
    objective(Batch(wave=ranks.batch(1).wave, seeds=ranks.batch(1).seeds))["loss"].backward()
    assert all(p.grad is not None for p in objective.code_head.parameters() if p.requires_grad), "DDP waits for every gradient"


def test_drawn_codebooks_are_even():
    drawn = one_codebook(torch.arange(8000), 1, seeds(8000), 8)
    assert chisquare([len(rows) for rows in drawn]).pvalue > 1e-4


# 15 and 16: the mixture

def mixing(**options): return pretext(mixture=NoiseMixture(**{"length": (500, 2000), **options}))


def test_the_mixture_changes_what_is_heard_and_nothing_else():
    objective, some = mixing(p=.3), sounds(400, 2_400)
    heard, quiet = objective.listen(some), objective.eval().listen(some)
    share = (heard.wave != some.wave).any(1).double().mean()
    assert abs(share - .3) < 3 * (.3 * .7 / 400) ** .5 and torch.equal(quiet.wave, some.wave)
    for name in ("codes", "spectrum", "mask"): assert torch.equal(getattr(heard, name), getattr(quiet, name))
    assert not torch.equal(heard.features, quiet.features) and torch.equal(objective.train().listen(some).wave, heard.wave)


def test_what_is_mixed_in_are_slices_of_the_others():
    "Found again by correlation: pieces of other clips, as long as asked for."
    some = Batch(wave=torch.randint(1, 2**20, (6, 2_400), generator=generator()).double(), seeds=seeds(6, 3))
    objective = ranks.objective(mixture=NoiseMixture(p=1., segments=(1, 1), length=(500, 900)))
    for row, difference in enumerate(objective.train().listen(some).wave - some.wave):
        at = difference.nonzero()[:, 0]
        piece = difference[at[0]:at[-1] + 1]
        pool = torch.cat([some.wave[:row], some.wave[row + 1:]]).flatten()
        assert 500 <= len(piece) <= 900 and (pool.unfold(0, len(piece), 1) == piece).all(1).sum() == 1


def test_mutation_teachers_who_hear_the_mixture(monkeypatch):
    real, mixture = room.ask, NoiseMixture(1., length=(500, 2000))
    monkeypatch.setattr(room, "ask", lambda teachers, batch: real(teachers, Batch(wave=mixture(batch.wave, seeds=batch.seeds))))
    objective, some = mixing(p=1.), sounds(8)
    assert not torch.equal(objective.listen(some).spectrum, pretext().teachers.cqt(some.wave).mT[:, :29])


def test_a_batch_of_one_is_left_alone():
    objective, some = mixing(p=1.), sounds(1)
    assert torch.equal(objective.listen(some).wave, some.wave) and torch.isfinite(objective(some)["loss"])


# 17: the learning rate

def test_the_learning_rate():
    rate = lambda step: lr_at(step - 1, 400_000, 5e-4, 32_000, "linear") # the rate of an update, counted from 1
    assert_close(torch.tensor([rate(1), rate(16_000), rate(32_000), rate(216_000), rate(400_000)], dtype=torch.float64),
                 torch.tensor([5e-4 / 32_000, 2.5e-4, 5e-4, 2.5e-4, 0.], dtype=torch.float64), atol=2e-9, rtol=0)


# 18: it can learn eight clips by heart

def test_overfitting_eight_clips():
    objective = pretext(tiny(channels=16, dropout=0., attention_dropout=0., layerdrop=0., feature_grad=1.))
    levels = .1 + .9 * torch.rand(8, 6, generator=generator()).repeat_interleave(1_600, 1)
    wave, draw = levels * torch.sin(2 * math.pi * 440 / 24_000 * 2 ** (torch.arange(8)[:, None] / 12) * torch.arange(9_600)), generator(1)
    adam, first = torch.optim.Adam(objective.parameters(), 3e-3), None
    for _ in range(300):
        parts = objective(Batch(wave=wave, generator=draw))
        first = first or parts["cqt_loss"].item()
        if parts["accuracy_0"] > .9 and parts["cqt_loss"] < .5 * first: break
        adam.zero_grad()
        parts["loss"].backward()
        adam.step()
    assert parts["accuracy_0"] > .9 and parts["cqt_loss"] < .5 * first


# 19: through the loop

class Forgetful(MERTPretext):
    "The mutation: masks from a generator that lives in memory."
    def forward(self, batch):
        self.memory = getattr(self, "memory", None) or generator()
        return super().forward(Batch(wave=batch.wave, seeds=draw_seeds(len(batch), self.memory)))


@pytest.mark.parametrize("kind, equal", [(MERTPretext, True), (Forgetful, False)])
def test_resumed_is_bit_equal(tmp_path, kind, equal):
    "With everything that is drawn: dropout, layers left out, mixture, masks, codebooks."
    def new():
        return kind(tiny(layerdrop=.3), ranks.Teacher(), cqt=ranks.NOTES, random_codebook=True, mixture=NoiseMixture(length=(500, 2000)))
    loader = Loader(sounds(16).wave.numpy(), batch_size=8)
    config = TrainConfig(steps=4, lr=1e-3, optimizer="adamw", warmup_steps=1, schedule="linear", clip_norm=1.)
    straight, first, second = new(), new(), new()
    whole_run = fit(straight, loader, config, tmp_path / "straight", progress=False)
    fit(first, loader, config, tmp_path / "halves", progress=False, until=2)
    rest = fit(second, loader, config, tmp_path / "halves", progress=False)
    same = all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), second.state_dict().values(), strict=True))
    losses = [[row["loss"] for row in run.history] for run in (whole_run, rest)]
    assert rest.resumed == 2 and same == (losses[0] == losses[1]) == equal
    if equal: assert zoo.load_encoder(tmp_path / "halves").dim == 48


# Teachers

class Moody(ranks.Teacher):
    "A teacher that notices how it is asked."
    def __init__(self):
        super().__init__()
        self.weight, self.asked = nn.Parameter(torch.ones(1)), []

    def forward(self, wave):
        self.asked.append((self.training, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), wave.dtype))
        return super().forward(wave * self.weight)


def test_a_teacher_is_frozen_and_asked_in_float32():
    teacher = Moody()
    objective = pretext(teacher=teacher).train()
    with torch.autocast("cpu", torch.bfloat16): objective(sounds(2))["loss"].backward()
    assert teacher.asked == [(False, False, False, torch.float32)] and not teacher.weight.requires_grad and objective.training


def test_mutation_a_teacher_that_trains_along(monkeypatch):
    monkeypatch.setattr(Teachers, "train", nn.Module.train)
    teacher = Moody()
    pretext(teacher=teacher).train()(sounds(2))
    assert teacher.asked[0][0], "the check above sees a teacher in training mode"


def test_codes_of_the_batch_go_first():
    objective, some = pretext().eval(), sounds(2)
    given = torch.stack([torch.full((2, 40), 3), torch.ones(2, 40, dtype=torch.long)], 2)
    assert torch.equal(objective.listen(Batch(wave=some.wave, seeds=some.seeds, codes=given)).codes, given[:, :29])


@pytest.mark.parametrize("options, words", [
    ({"teacher": None, "sizes": (), "cqt": None}, "neither codebooks nor a spectrum"),
    ({"sizes": (5, 3)}, r"got sizes \(5, 3\), the teacher writes \(5, 2\)"),
    ({"cqt": {"hop": 512}}, "CQT steps by 512 samples at 24000 Hz, the encoder by 320 at 24000 Hz"),
    ({"cqt": "wide"}, "CQT has no preset 'wide'")])
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(ValueError, match=words): pretext(**options)


def test_a_teacher_at_another_rate_is_refused():
    teacher = ranks.Teacher()
    teacher.sample_rate = 16_000
    with pytest.raises(ValueError, match="Teacher steps by 320 samples at 16000 Hz"): pretext(teacher=teacher)


@pytest.mark.parametrize("codes, words", [
    (None, "got codes None"), (torch.zeros(2, 30, 3), r"got codes \(2, 30, 3\)"), (torch.zeros(2, 30), r"got codes \(2, 30\)"),
    (torch.zeros(2, 28, 2), "got 28 frames of a teacher for each clip, wanted at least the 29")])
def test_codes_that_do_not_fit_are_refused(codes, words):
    objective, some = pretext(teacher=None, sizes=(5, 2)), sounds(2)
    with pytest.raises(ValueError, match=words): objective(Batch(wave=some.wave, seeds=some.seeds, codes=codes))


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="without padding"): pretext()(Batch(seeds=seeds(2)))
    padded = Batch(wave=sounds(2).wave, seeds=seeds(2), lengths=torch.tensor([9_600, 5_000]))
    with pytest.raises(ValueError, match="without padding"): pretext()(padded)
    with pytest.raises(ValueError, match="got clips of 5 frames, wanted more than the 5 of a span"): pretext()(sounds(2, 1_700))


# Switches

@pytest.mark.parametrize("options", [{}, {"random_codebook": True}, {"equal_counts": False}, {"cqt": None}])
def test_guesses_at_hidden_frames_only_or_at_all_come_to_the_same(options):
    found = []
    for masked_only in (True, False):
        objective = ranks.objective(masked_only=masked_only, **options)
        parts = objective(ranks.batch())
        parts["loss"].backward()
        found.append((parts, [p.grad for p in objective.parameters() if p.requires_grad]))
    for name in found[0][0]: assert_close(found[0][0][name], found[1][0][name])
    for one, two in zip(found[0][1], found[1][1]): assert_close(one, two, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("options, parts", [({"cqt": None}, {"code_loss", "code_accuracy", "accuracy_0", "accuracy_1"}),
                                            ({"teacher": None, "sizes": ()}, {"cqt_loss"})])
def test_one_teacher_is_enough(options, parts):
    objective = pretext(**options)
    found = objective(sounds(3))
    found["loss"].backward()
    assert set(found) == {"loss", "penalty", "masked", *parts}
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad), "DDP waits for every gradient"
    codes, notes = objective.guess(objective.listen(sounds(3)))
    assert (codes is None) == ("code_loss" not in parts) and (notes is None) == ("cqt_loss" not in parts)


def test_guesses_for_pictures():
    objective = pretext()
    heard = objective.eval().listen(sounds(3))
    codes, notes = objective.guess(heard)
    assert codes.shape == (3, 29, 2) and notes.shape == (3, 29, 12) == heard.spectrum.shape
    right = (codes == heard.codes)[heard.mask].float().mean(0)
    assert_close(right.mean(), objective(sounds(3))["code_accuracy"])


def test_a_learned_temperature_starts_where_it_should_and_is_capped():
    objective = pretext(temperature=.2, learn_temperature=True)
    assert_close(objective.code_head.temperature, torch.tensor(.2))
    objective(sounds(2))["loss"].backward()
    assert objective.code_head.log_sharpness.grad != 0
    objective.code_head.log_sharpness.data.fill_(9.)
    assert_close(objective.code_head.temperature, torch.tensor(.01))
    assert not pretext().code_head.log_sharpness.requires_grad


def test_sizes_of_the_heads():
    for size, dim, wanted in (("95M", 768, (393_728, 526_336, 258_384)), ("330M", 1024, (1_049_600, 1_052_672, 344_400))):
        encoder = ranks.Small()
        encoder.dim = dim
        objective = MERTPretext.preset(size, encoder=encoder)
        parts = objective.code_head.project, objective.code_head.tables, objective.cqt_head
        assert tuple(sum(p.numel() for p in part.parameters()) for part in parts) == wanted
        assert objective.mixture.length == {"95M": (12_000, 24_000), "330M": (12_000, 36_000)}[size] and objective.mixture.p == .5
    assert [len(table) for table in pretext(extra_rows=0).code_head.tables] == [5, 2]


@pytest.mark.parametrize("name", ["cpu", "tiny"])
def test_small_presets(name):
    objective = MERTPretext.preset(name, teacher=ranks.Teacher())
    assert objective.cqt_head.out_features == 84 and objective.encoder.n_samples == 61_440
    with torch.no_grad(): assert torch.isfinite(objective.eval()(sounds(1, 61_440))["loss"])


def test_half_precision_is_finite_and_scored_in_float32():
    objective, some = pretext().eval(), sounds(4)
    exactly = objective(some)
    with torch.autocast("cpu", dtype=torch.bfloat16): half = objective(some)
    half["loss"].backward()
    assert all(value.dtype == torch.float32 for value in half.values()) and abs(half["loss"] - exactly["loss"]) < .05
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters() if p.grad is not None)


def test_arithmetic_can_be_counted_without_doing_it():
    "Masks are drawn on the CPU, so that nothing waits for the device."
    objective, some = pretext(tiny(dropout=0., attention_dropout=0., layerdrop=0.)), sounds(4)
    counted = meter.flops(objective, some)
    with FlopCounterMode(display=False) as counter: objective(some)["loss"].backward()
    assert counted is not None and abs(counted / counter.get_total_flops() - 1) < .1, "attention's way back differs"


def test_a_plain_teacher_adds_nothing_to_the_weights():
    objective = pretext()
    assert {name.split(".")[0] for name in objective.state_dict()} == {"encoder", "code_head", "cqt_head"}
