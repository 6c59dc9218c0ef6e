"""Fine-tuning: what is frozen does not move, what learns moves at its rate, and a run is what its labels and settings make of it."""
import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from musicssl import train
from musicssl.audio import Batch
from musicssl.data.loader import Arrays
from musicssl.encoders.base import Embedding
from musicssl.encoders.samplecnn import SampleCNN
from musicssl.optim import new_optimizer
from musicssl.probe import finetune
from musicssl.probe.finetune import FineTune, answer, fine_tune, freeze, recipe, stages, unfreeze


class Ear(nn.Module):
    """Two blocks with statistics and dropout between, and a weight of the network's own; hears level and brightness of short windows."""
    sample_rate, hop, dim, n_samples = 1000, 50, 16, 200

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.scale = nn.Parameter(torch.ones(1))
        self.front = nn.Sequential(nn.Conv1d(1, 16, 50, 50), nn.BatchNorm1d(16), nn.ReLU())
        self.rest = nn.Dropout(.1)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv1d(16, 16, 1), nn.BatchNorm1d(16), nn.ReLU()) for _ in range(2)])
        self.out = nn.BatchNorm1d(16, affine=False)                       # statistics without weights

    def forward(self, wave):
        x = self.rest(self.front(self.scale * wave[:, None]))
        layers = []
        for block in self.blocks: layers.append(x := block(x))
        x = self.out(x)
        return Embedding(torch.stack(layers, 1).transpose(2, 3), x.mean(2))


def corpus_of(waves):
    store = Arrays(waves, sample_rate=1000)
    return SimpleNamespace(store=store, sample_rate=1000, fingerprint=store.fingerprint, wave=lambda ids: torch.stack([waves[int(i)] for i in ids]))


def sounds(n=60, seed=0):
    """Sines of four frequencies and any loudness: a class, a key, tags, numbers and a tempo that can be heard."""
    rng = np.random.default_rng(seed)
    which, loud = rng.integers(4, size=n), rng.uniform(.1, .9, n)
    phase, time = rng.uniform(0, 6, n), np.arange(400) / 1000
    waves = torch.tensor(loud[:, None] * np.sin(2 * np.pi * (23 + 61 * which[:, None]) * time + phase[:, None]), dtype=torch.float32)
    labels = {"class": which, "key": which * 6, "tags": np.stack([which > 1, which % 2 == 1], 1).astype(int),
              "number": np.stack([loud * 1000, which], 1).astype(float), "tempo": 60. * 2 ** which}
    return corpus_of(waves), labels


CORPUS, LABELS = sounds()
TRAIN, VALID = np.arange(0, 32), np.arange(32, 60)
OUTPUTS = {"class": 4, "key": 24, "tags": 2, "number": 2, "tempo": 1}


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(module, before):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def tuned(folder, kind="class", keep=None, seed=0, steps=6, kind_of=FineTune, corpus=CORPUS, labels=None, lr=1e-2, encoder_lr=.05, **options):
    torch.manual_seed(seed)
    objective = kind_of(Ear(seed), kind, OUTPUTS[kind], encoder_lr=encoder_lr)
    if keep is not None: freeze(objective.encoder, keep)
    before = state(objective.encoder)
    result = fine_tune(objective, corpus, LABELS[kind] if labels is None else labels, TRAIN, VALID, recipe(steps, lr=lr, seed=seed), folder,
                       batch_size=16, progress=False, **options)
    return objective, result, moved(objective.encoder, before)


# Depth

def test_stages_are_counted_from_sound_to_answer():
    assert stages(Ear()) == ["front", "blocks.0", "blocks.1"]
    assert stages(SampleCNN.preset("toy")) == [f"blocks.{n}" for n in range(11)]
    wrapped = nn.Module()
    wrapped.net = Ear()
    assert stages(wrapped) == [f"net.{name}" for name in stages(Ear())]
    assert stages(nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))) == ["0", "2"]
    assert stages(nn.Linear(2, 2)) == [""]


def learning(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("keep, wanted", [(0, ()), (1, ("blocks.1.",)), (2, ("blocks.0.", "blocks.1.")), (3, ("",)),
                                          (["front", "blocks.1.0"], ("front.", "blocks.1.0.")), (["scale"], None)])
def test_freezing_keeps_what_it_is_told_whatever_was_before(keep, wanted):
    ear = Ear()
    if wanted is None:
        with pytest.raises(ValueError, match=r"got \['scale'\], wanted names of submodules"): freeze(ear, keep)
        assert learning(ear) == set(dict(ear.named_parameters()))
        return
    freeze(ear, ["blocks.0"])
    told = freeze(ear, keep)
    assert set(told) == learning(ear) == {name for name, _ in ear.named_parameters() if name.startswith(wanted)}
    unfreeze(ear)
    assert learning(ear) == set(dict(ear.named_parameters())) and not any(hasattr(part, "frozen") for part in ear.modules())


def test_what_was_never_free_is_not_freed():
    ear = Ear()
    ear.front[0].weight.requires_grad_(False)
    freeze(ear, 1)
    unfreeze(ear)
    assert set(dict(ear.named_parameters())) - learning(ear) == {"front.0.weight"}


@pytest.mark.parametrize("keep", [-1, 4])
def test_stages_there_are_not(keep):
    with pytest.raises(ValueError, match=f"got keep = {keep}, wanted 0 to 3 stages"): freeze(Ear(), keep)


# Frozen parts rest, bit for bit

class Careless(FineTune):
    """The mutation: `train` as PyTorch has it, so that frozen parts go into training mode."""
    def train(self, mode=True): return nn.Module.train(self, mode)


def check_rest(folder, keep, kind_of):
    torch.manual_seed(0)
    before = state(Ear(0))
    objective, result, _ = tuned(folder, keep=keep, kind_of=kind_of)
    train.load_weights(result.folder / "step-00000006" / "model.safetensors", objective)       # the last weights, not the best
    changed = moved(objective.encoder, before)
    allowed = {name for name in state(objective.encoder) if keep and name.startswith(("blocks.1.", "out."))}
    assert changed <= allowed, f"moved: {sorted(changed - allowed)}"
    return changed


@pytest.mark.parametrize("keep", [0, 1])
def test_frozen_parts_do_not_move(tmp_path, keep):
    """Weights, running means and counters; with one block free, that block does move, and so does the way behind it."""
    changed = check_rest(tmp_path / "run", keep, FineTune)
    assert bool(changed) is bool(keep) and (not keep or {"blocks.1.0.weight", "blocks.1.1.running_mean"} <= changed)
    with pytest.raises(AssertionError, match="moved: .*front.1.running_mean"): check_rest(tmp_path / "careless", keep, Careless)


def test_modes():
    objective = FineTune(Ear(), "class", 4)
    freeze(objective.encoder)
    assert not any(part.training for part in objective.train().encoder.modules()) and objective.head.training
    freeze(objective.encoder, 1)
    at_work = {name for name, part in objective.train().encoder.named_modules() if part.training}
    assert at_work == {"", "blocks", "blocks.1", "blocks.1.0", "blocks.1.1", "blocks.1.2"}
    unfreeze(objective.encoder)
    assert all(part.training for part in objective.train().modules()) and not any(part.training for part in objective.eval().modules())


def test_a_frozen_encoder_sounds_the_same_in_training():
    objective, wave = FineTune(Ear(), "class", 4), CORPUS.wave(range(5))
    quiet = objective.eval().encoder(wave).clip
    freeze(objective.encoder)
    assert torch.equal(objective.train().encoder(wave).clip, quiet)
    unfreeze(objective.encoder)
    assert not torch.equal(objective.train().encoder(wave).clip, quiet)


# Losses

def by_hand(kind, raw, labels):
    total = 0.
    for row, label in zip(raw.tolist(), np.asarray(labels).tolist()):
        if kind in ("class", "key"): total += math.log(sum(map(math.exp, row))) - row[int(label)]
        elif kind == "tags": total += sum(math.log(1 + math.exp(-a if y else a)) for a, y in zip(row, label)) / len(row)
        elif kind == "number": total += sum((a - y)**2 for a, y in zip(row, label)) / len(row)
        else: total += (row[0] - math.log2(label))**2
    return total / len(raw)


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_losses_are_their_formulas(kind, head):
    objective = FineTune(Ear(), kind, OUTPUTS[kind], head=head).eval()
    wave, labels = CORPUS.wave(range(8)), torch.as_tensor(LABELS[kind][:8]).float()
    wanted = by_hand(kind, objective.raw(wave).detach(), labels)
    for shape in (labels, labels.reshape(8, -1)): assert_close(objective(Batch(wave=wave, labels=shape))["loss"].item(), wanted, rtol=1e-5, atol=1e-6)


def test_knowing_nothing_costs_what_it_must():
    for kind, cost in {"class": math.log(4), "key": math.log(24), "tags": math.log(2)}.items():
        objective = FineTune(Ear(), kind, OUTPUTS[kind], head="linear")
        for p in objective.head.parameters(): nn.init.zeros_(p)
        assert_close(objective(Batch(wave=CORPUS.wave(range(8)), labels=torch.as_tensor(LABELS[kind][:8]).float()))["loss"].item(), cost)


def test_a_layer_may_be_read():
    objective = FineTune(Ear(), "class", 4, pool=0, head="linear").eval()
    wave = CORPUS.wave(range(3))
    assert_close(objective.raw(wave), objective.head(objective.encoder(wave).layers[:, 0].mean(1)))


# Answers

def check_answers(kind, answer):
    objective = FineTune(Ear(), kind, OUTPUTS[kind])
    objective.centre.fill_(2.)
    objective.spread.fill_(.5)
    found = answer(objective.train(), CORPUS, [7, 3, 3])
    assert objective.training
    for row, i in zip(found, [7, 3, 3]):
        wave = CORPUS.wave([i])[0]
        each = [objective.eval().raw(wave[None, a:a + 200])[0].double() for a in (0, 200)]
        if kind == "tags": wanted = sum(map(torch.sigmoid, each)) / 2
        elif kind in ("class", "key"): wanted = sum(each) / 2
        else: wanted = sum(2 + raw / 2 for raw in each) / 2
        if kind == "tempo": wanted = 2 ** wanted[0]
        assert_close(torch.as_tensor(row), wanted.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_answers_are_means_over_windows(kind):
    for batch in (1, 3, 64): check_answers(kind, lambda *given, batch=batch: answer(*given, batch=batch))


def test_windows_may_vote():
    objective = FineTune(Ear(), "class", 4)
    votes = answer(objective, CORPUS, range(10), rule="vote")
    assert set(votes.ravel()) <= {0., .5, 1.} and (votes.sum(1) == 1).all()
    with pytest.raises(ValueError, match="got rule 'loudest' for class"): answer(objective, CORPUS, [0], rule="loudest")


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_means_notice_a_window_left_out(kind):
    first_window = SimpleNamespace(wave=lambda ids: CORPUS.wave(ids)[:, :200], sample_rate=1000)
    with pytest.raises(AssertionError): check_answers(kind, lambda objective, corpus, ids: answer(objective, first_window, ids))


def test_clips_of_any_length():
    waves = [torch.randn(length) for length in (200, 650, 420)]
    objective, ragged = FineTune(Ear(), "class", 4), SimpleNamespace(wave=lambda ids: waves[ids[0]][None], sample_rate=1000)
    together = answer(objective, ragged, [0, 1, 2])
    assert_close(together, np.concatenate([answer(objective, ragged, [i]) for i in range(3)]), rtol=1e-6, atol=1e-8)
    objective.n_samples = None                               # whole clips: none is padded to another's length
    assert_close(answer(objective, ragged, [0, 1, 2]), np.concatenate([answer(objective, ragged, [i]) for i in range(3)]), rtol=0, atol=0)
    objective.n_samples = 500
    with pytest.raises(ValueError, match="a clip of 200 samples gives no segment"): answer(objective, ragged, [0])


# Rates

def check_rates(new_optimizer, folder, monkeypatch):
    """One update by the engine is one by hand: the head at the rate of the recipe, the encoder at a tenth."""
    ours = FineTune(Ear(), "class", 4, dropout=0., encoder_lr=.1)
    ours.encoder.rest.p = 0.
    theirs, batch = copy.deepcopy(ours), Batch(wave=CORPUS.wave(range(8)), labels=torch.as_tensor(LABELS["class"][:8]).float(), ids=list(range(8)))
    config = train.TrainConfig(3, lr=1e-2, optimizer="adamw", weight_decay=.01, schedule="linear")
    monkeypatch.setattr(train, "new_optimizer", new_optimizer)
    train.fit(ours, lambda number: batch, config, folder, progress=False)
    slow, fast = (torch.optim.AdamW(part.parameters(), weight_decay=.01) for part in (theirs.encoder, theirs.head))
    for step in range(3):
        theirs.train()(batch)["loss"].backward()
        for optimizer, factor in ((slow, .1), (fast, 1.)):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 3) * factor
            optimizer.step()
            optimizer.zero_grad()
    assert_close(state(ours), state(theirs), rtol=1e-6, atol=1e-8)


def test_the_encoder_learns_at_its_own_rate(tmp_path, monkeypatch):
    check_rates(new_optimizer, tmp_path / "right", monkeypatch)

    def forgetful(*given):                                   # the mutation: the factor is not noted, so that the engine overwrites the rate
        optimizer = new_optimizer(*given)
        for group in optimizer.param_groups: del group["lr_factor"]
        return optimizer
    with pytest.raises(AssertionError): check_rates(forgetful, tmp_path / "forgetful", monkeypatch)


# Runs

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tuned(tmp_path_factory.mktemp("whole"), steps=8)


def test_an_interrupted_run_ends_the_same(whole, tmp_path):
    tuned(tmp_path, steps=8, until=3)
    objective, result, _ = tuned(tmp_path, steps=8)
    assert result.resumed == 3 and [row["loss"] for row in result.history] == [row["loss"] for row in whole[1].history]
    assert_close(state(objective), state(whole[0]), rtol=0, atol=0)


def other_labels(kind, ids):
    labels = LABELS[kind].copy()
    labels[ids] = labels[ids][::-1]
    return labels


CHANGES = {"labels to learn from": {"labels": other_labels("class", TRAIN)}, "labels that decide": {"labels": other_labels("class", VALID)},
           "frozen parts": {"keep": 1}, "rate of the encoder": {"encoder_lr": .5}}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_run_is_not_continued(tmp_path, change, monkeypatch):
    tuned(tmp_path, until=2)
    with pytest.raises(train.Mismatch): tuned(tmp_path, **change)
    if "keep" in change: return                              # the optimiser's moments would be refused as well
    fit = train.fit                                          # the mutation: nothing noted about the run
    monkeypatch.setattr(finetune.train, "fit", lambda *given, about, **options: fit(*given, **options))
    tuned(tmp_path / "unnoted", until=2)
    tuned(tmp_path / "unnoted", **change)


def check_blind(labels_of, folder):
    """Labels of other clips may be anything: the run is the same to the last bit."""
    kind = "number"
    clips, labels = sounds(70, seed=1)
    ends = []
    for name, poison in (("clean", None), ("poisoned", 1e9)):
        given = labels[kind].copy()
        if poison: given[60:] = poison
        objective, result, _ = tuned(folder / name, kind, corpus=clips, labels=labels_of(given), steps=3)
        ends.append((state(objective), [row["loss"] for row in result.history]))
    assert_close(*ends, rtol=0, atol=0)


def test_labels_of_other_clips_are_not_read(tmp_path, monkeypatch):
    check_blind(lambda labels: labels, tmp_path / "blind")
    standardise = finetune._standardise                      # the mutation: numbers standardised with everybody's statistics
    def peek(labels):
        monkeypatch.setattr(finetune, "_standardise", lambda objective, known: standardise(objective, labels))
        return labels
    with pytest.raises(AssertionError): check_blind(peek, tmp_path / "peeking")


def test_statistics_are_those_of_the_training_labels(tmp_path):
    objective, _, _ = tuned(tmp_path / "number", "number", steps=1)
    assert_close(objective.centre, torch.as_tensor(LABELS["number"][TRAIN].mean(0)).float())
    assert_close(objective.spread, torch.as_tensor(LABELS["number"][TRAIN].std(0)).float())
    objective, _, _ = tuned(tmp_path / "tempo", "tempo", steps=1)
    assert_close(objective.centre, torch.as_tensor(np.log2(LABELS["tempo"][TRAIN]).mean()).float().reshape(1))


def test_one_constant_number_is_no_division_by_zero(tmp_path):
    labels = np.full((60, 2), 7.)
    labels[VALID] = LABELS["number"][VALID]
    objective, result, _ = tuned(tmp_path, "number", labels=labels, steps=2)
    assert (objective.spread == 1).all() and all(math.isfinite(row["loss"]) for row in result.history)


def test_the_best_weights_are_kept(tmp_path):
    """A rate that grows too high: the last weights are not the best ones, and it stops before the last step."""
    objective, result, _ = tuned(tmp_path, "number", steps=60, lr=.3, encoder_lr=1., patience=4)
    values = {row["step"]: row["r2"] for row in result.validation}
    best = max(values.values())
    assert values[result.best_step] == best == finetune.score("r2", LABELS["number"][VALID], answer(objective, CORPUS, VALID))
    assert len(result.history) < 60 and result.validation[-1]["r2"] < best


def test_a_metric_that_falls_is_stopped_where_it_is_lowest(tmp_path):
    _, result, _ = tuned(tmp_path, "tempo", steps=6, metric="tempo_error")
    values = {row["step"]: row["tempo_error"] for row in result.validation}
    assert values[result.best_step] == min(values.values()) < max(values.values())


HEARD = [("class", "accuracy", .95), ("key", "accuracy", .95), ("tags", "pr_auc", .95), ("number", "r2", .7), ("tempo", "acc1", .4)]


@pytest.mark.parametrize("kind, metric, least", HEARD)
def test_what_can_be_heard_is_learned(tmp_path, kind, metric, least):
    """And nothing is learned from shuffled labels that helps with clips that were not heard."""
    for name, labels in (("true", LABELS[kind]), ("shuffled", LABELS[kind][np.random.default_rng(0).permutation(60)])):
        _, result, _ = tuned(tmp_path / name, kind, labels=labels, steps=120, lr=2e-2, encoder_lr=1., patience=1000, metric=metric)
        best = max(row[metric] for row in result.validation)
        assert best > least if name == "true" else best < least - .2, f"{kind}, {name}: {best}"


# Refusals

def test_what_makes_no_sense():
    with pytest.raises(ValueError, match="got kind 'beats', wanted one of tags, class, key, number, tempo"): FineTune(Ear(), "beats")
    with pytest.raises(ValueError, match="got head 'mpl', wanted linear or mlp"): FineTune(Ear(), "class", 4, head="mpl")
    with pytest.raises(ValueError, match="needs batch.labels, got None"): FineTune(Ear(), "class", 4)(Batch(wave=torch.zeros(2, 200)))
    with pytest.raises(ValueError, match=r"labels of shape \(2, 3\), wanted \(2, 2\)"):
        FineTune(Ear(), "tags", 2)(Batch(wave=torch.zeros(2, 200), labels=torch.zeros(2, 3)))


def test_sound_at_another_rate(tmp_path):
    objective = FineTune(Ear(), "class", 4)
    for rate, message in ((2000, "got audio at 2000 Hz, Ear expects 1000 Hz"), (1000, "keeps no sound at its 1000 Hz")):
        corpus = SimpleNamespace(store=SimpleNamespace(sample_rate=2000), sample_rate=rate, fingerprint="x", wave=CORPUS.wave)
        with pytest.raises(ValueError, match=message): fine_tune(objective, corpus, LABELS["class"], TRAIN, VALID, recipe(1), tmp_path)


def test_mixtures_of_precision_and_accumulation(tmp_path):
    objective = FineTune(Ear(), "class", 4)
    config = recipe(2, precision="bf16-mixed", accumulate=2)
    result = fine_tune(objective, CORPUS, LABELS["class"], TRAIN, VALID, config, tmp_path, batch_size=8, progress=False)
    assert [row["clips"] for row in result.history] == [16, 16] and all(math.isfinite(row["loss"]) for row in result.history)
    assert F.cross_entropy(objective.raw(CORPUS.wave(range(4))), torch.zeros(4).long()).dtype == torch.float32
