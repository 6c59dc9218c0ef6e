"""Chapter 2: the sources' settings field by field, unread numbers stay unprinted, equal budgets, fair losses, labels that do not leak."""
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from musicssl import report, settings, zoo
from musicssl.audio import Batch
from musicssl.augment import draw_seeds
from musicssl.encoders.base import count_parameters
from musicssl.encoders.frames import FrameTransformer
from musicssl.experiments import musicoder as chapter
from musicssl.features.frames import COLUMNS, MusiCoderFrames
from musicssl.objectives.musicoder import MusiCoder, ccm_mask, frame_budget, span_law
from musicssl.probe import finetune
from musicssl.probe.tasks import TASKS

RECIPE = settings.read("paper", chapter.PAPER, chapter.Recipe)
TEST = {**asdict(settings.read("test", chapter.PAPER, chapter.Recipe)), "seed": 0, "arm": "both"}


# ------------------------------------------------------------------------------------------------------------ settings

@pytest.fixture(scope="module")
def built():
    """What the `paper` profile builds, its training recipe, and its recipe for labels."""
    config = {**asdict(RECIPE), "seed": 0, "arm": "both"}
    corpus = type("Corpus", (), {"sample_rate": 22_050, "store": [np.zeros(300_000, np.int16)] * 8, "ids": lambda self, split: np.arange(8)})()
    return chapter.new_objective(config), chapter.pretraining(config, corpus)[1], finetune.recipe(RECIPE.tune_steps, lr=RECIPE.head_rate)


def fields(objective, engine, tuning):
    encoder, paper = objective.encoder, MusiCoderFrames.preset("paper")
    law, block = span_law(), encoder.blocks[0]
    head = finetune.FineTune(FrameTransformer.preset("tiny"), "tags", 2).head
    frames = objective.encoder.enter.in_features
    return {
        "sample_rate": paper.sample_rate, "hop": paper.hop, "window_samples": 2 * paper.hop, "dimensions": frames,
        **{name: part.stop - part.start for name, part in COLUMNS.items()},
        "cfm.share": frame_budget(torch.tensor(1_000_000)).item() / 1_000_000, "cfm.p": 1 - float(law[1] / law[0]),
        "cfm.shortest": 2, "cfm.longest": 1 + len(law), "loss.delta": objective.delta, "crop": RECIPE.crop,
        "layers": len(encoder.blocks), "dim": encoder.dim, "heads": block.heads, "ffn": block.up.out_features, "dropout": encoder.dropout.p,
        "attention_dropout": block.attention_dropout, "layer_norm_eps": encoder.norm.eps, "encoder_parameters": count_parameters(encoder),
        "head_parameters": count_parameters(objective.head), "weight_decay": engine.weight_decay, "learning_rate": engine.lr,
        "warmup_share": engine.warmup_steps / engine.steps, "batch": RECIPE.batch, "accumulate": engine.accumulate, "clip_norm": engine.clip_norm,
        "steps": engine.steps, "tune.head_rate": tuning.lr, "tune.encoder_rate": min(RECIPE.encoder_rates),
        "tune.warmup_share": tuning.warmup_steps / tuning.steps, "tune.dropout": next(part.p for part in head if isinstance(part, torch.nn.Dropout))}


def test_every_setting_is_its_sources(built):
    table, ours = report.hyperparameters("musicoder"), fields(*built)
    for field, value in ours.items():
        theirs = [table.loc[field, source] for source in ("Q", "S", "D", "C") if table.loc[field, source]]
        assert float(theirs[0]) == pytest.approx(value, rel=1e-9), f"{field}: the source says {theirs[0]}, ours is {value}"
    assert built[1].optimizer == table.loc["optimizer", "C"] and built[1].schedule == table.loc["schedule", "C"]
    assert built[0].ccm_scope == table.loc["ccm.scope", "C"] and built[0].span == "geometric"


def test_the_comparison_of_settings_can_fail(built):
    """Mutation: a recipe with another clipping norm."""
    changed = replace(built[1], clip_norm=1.)
    assert float(report.hyperparameters("musicoder").loc["clip_norm", "C"]) != fields(built[0], changed, built[2])["clip_norm"]


def test_half_the_rate_at_the_same_milliseconds():
    ours, paper = MusiCoderFrames.preset(RECIPE.front), MusiCoderFrames.preset("paper")
    assert ours.hop / ours.sample_rate == pytest.approx(paper.hop / paper.sample_rate)


# ------------------------------------------------------------------------------------------------- what nobody verified

def test_unread_numbers_are_not_printed(tmp_path):
    """T23, and its mutation: a number that somebody typed into a row nobody verified."""
    told = report.reported("musicoder")
    assert set(told["mark"]) == {"U"} and set(told["printed"]) == {"not verified"} and told["value"].isna().all()
    text = (settings.root() / "data/reported/musicoder.csv").read_text().replace("accuracy,,%", "accuracy,94.2,%")
    (tmp_path / "musicoder.csv").write_text(text)
    assert "94.2" in text and set(report.reported("musicoder", tmp_path)["printed"]) == {"not verified"}
    (tmp_path / "musicoder.csv").write_text(text.replace(",U,no,", ",P,yes,"))
    assert "94.2" in set(report.reported("musicoder", tmp_path)["printed"]), "a verified number would be printed"


# ------------------------------------------------------------------------------------------------------------- the grid

@pytest.mark.parametrize("profile", ["test", "laptop", "paper"])
def test_arms_have_equal_budgets(profile):
    runs = {config["arm"]: config for config in chapter.grid(profile) if config["seed"] == 0}
    assert set(runs) == set(chapter.ARMS) and len({config["seed"] for config in chapter.grid(profile)}) >= 1
    game = {arm: {name: runs[arm][name] for name in chapter._game + chapter._network + chapter._sound} for arm in chapter.OBJECTIVES}
    assert all(same == game["both"] for same in game.values())
    labels = [{name: runs[arm][name] for name in chapter._labels + chapter._network + chapter._sound} for arm in ("both", "scratch")]
    assert labels[0] == labels[1], "fine-tuning and training from scratch differ in nothing but their start"
    assert not set(runs["cfm"]) & set(chapter._labels) - {"precision"}, "another batch of labels does not repeat pre-training of arms without labels"


def test_each_arm_hides_what_it_says():
    told = {arm: chapter.new_objective({**TEST, "arm": arm}) for arm in chapter.OBJECTIVES}
    assert {arm: (one.objective, one.span) for arm, one in told.items()} == {
        "both": ("both", "geometric"), "cfm": ("cfm", "geometric"), "ccm": ("ccm", "geometric"), "single": ("cfm", 1)}
    weights = [one.encoder.state_dict() for one in told.values()]
    assert all(torch.equal(first, other) for same in zip(*(w.values() for w in weights)) for first, other in zip(same, same[1:])), "all start alike"


# ------------------------------------------------------------------------------------------------------------ the losses

@pytest.fixture(scope="module")
def corpus(): return chapter.load_corpus(TEST)


def test_the_masks_of_held_out_clips_never_change(corpus):
    first, clips = chapter.held_out(TEST, corpus)
    again, _ = chapter.held_out({**TEST, "seed": 5, "arm": "cfm"}, corpus)
    assert torch.equal(first.seeds, again.seeds) and torch.equal(first.wave, again.wave)
    assert set(clips) <= set(corpus.ids("valid")) and len(clips) == TEST["held_out"]


@pytest.mark.parametrize("arm", chapter.OBJECTIVES)
def test_prices_add_up_to_the_loss(arm):
    """What each predictor pays, summed over kinds and clips, is what the objective reports."""
    objective = chapter.new_objective({**TEST, "arm": arm}).eval()
    wave = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(0)) / 10
    batch = Batch(wave=wave, seeds=draw_seeds(3, torch.Generator().manual_seed(1)))
    price, count = chapter.prices(objective, batch)
    assert price.shape == (3, 4, 3) and count.shape == (4, 3)
    with torch.no_grad(): told = {name: float(value) for name, value in objective(batch).items()}
    paid = dict(zip(chapter.PREDICTORS, price))
    assert paid["network"].sum() / count.sum() == pytest.approx(told["loss"], rel=1e-4)
    assert paid["zero"].sum() / count.sum() == pytest.approx(told["zero_loss"], rel=1e-4)
    if arm != "ccm": assert paid["line"][:3].sum() / count[:3].sum() == pytest.approx(told["interpolation_loss"], rel=1e-4)
    assert (count[3] > 0).any() == (arm in ("both", "ccm")) and (count[:3].sum() > 0) == (arm != "ccm")


def test_what_is_left_as_it_is_is_told_apart():
    """A network that copies its input pays nothing where nothing was changed, and something elsewhere."""
    class Copy(MusiCoder):
        def listen(self, batch):
            masked, _ = super().listen(batch)
            return masked, masked.shown
    objective = Copy(FrameTransformer.preset("tiny", front={"preset": "8k"}), "cfm")
    objective.head = torch.nn.Sequential(torch.nn.Linear(324, 324, bias=False))
    torch.nn.init.eye_(objective.head[0].weight)
    wave = torch.randn(8, 30_000, generator=torch.Generator().manual_seed(0)) / 10
    price, count = chapter.prices(objective, Batch(wave=wave, seeds=draw_seeds(8, torch.Generator().manual_seed(1))))
    share = price.sum(2) / count.sum(1).clip(1)
    zero, replaced, kept = (share[0, chapter.KINDS.index(kind)] for kind in ("set to zero", "replaced", "left as it is"))
    assert count[:3].sum(1).all() and kept < 1e-6 < .1 < min(zero, replaced)
    assert share[0, 0] == pytest.approx(share[1, 0], rel=1e-5), "where zero is shown, copying is the zero predictor"


def test_saved_is_a_share_of_the_others_loss():
    price = np.ones((1, 3, 4, 10))
    price[0, 0], price[0, 2] = .25, .2
    groups = np.arange(10) // 2
    assert chapter.saved(price, "zero", groups).mean == pytest.approx(.75) and chapter.saved(price, "line", groups).high < 0
    noisy = price * np.random.default_rng(0).uniform(.5, 1.5, (1, 3, 1, 10))
    found = chapter.saved(noisy, "zero", groups, ("replaced",))
    assert found.low < found.mean < found.high and found.n == 10


def test_the_picture_s_mask_is_wide_and_narrow_enough():
    hidden = ccm_mask(COLUMNS, chapter.row_seeds(torch.zeros(1, 8), None, torch.tensor([chapter.EXAMPLE]), "MusiCoder"))[0]
    widths = [int(hidden[COLUMNS[name]].sum()) for name in ("mel", "cqt")]
    assert all(10 <= width <= 72 for width in widths), widths


# ------------------------------------------------------------------------------------------------------------ the labels

def test_columns_keep_what_levelling_takes():
    """Twice as loud: the floor hears it, the levelled frames do not."""
    wave = torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0)) / 10
    floor, levelled = zoo.check_encoder(chapter.Columns("8k")), MusiCoderFrames.preset("8k")
    moved = (floor(2 * wave).clip - floor(wave).clip)[:, COLUMNS["mel"]]
    torch.testing.assert_close(moved, torch.full_like(moved, np.log(4)), atol=1e-2, rtol=0)
    same = [levelled(loud * wave)[0][..., COLUMNS["mel"]] for loud in (1, 2)]
    torch.testing.assert_close(*same, atol=1e-2, rtol=0)
    assert floor(wave).clip.shape == (2, 648)


def test_tuning_reads_no_test_label_and_leaves_its_start(corpus, tmp_path):
    task, start = TASKS["scorebox.texture"], chapter.new_encoder(TEST)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    truth = task.truth(corpus)
    poisoned = replace(truth, y=np.where(corpus.split == "test", truth.y.max() - truth.y, truth.y))
    answers = [chapter.tune(start, replace(task, truth=lambda sounds, given=given: given), TEST, corpus, tmp_path / str(k))
               for k, given in enumerate((truth, poisoned))]
    assert np.array_equal(answers[0].said, answers[1].said) and not np.array_equal(answers[0].truth, answers[1].truth)
    assert all(torch.equal(before[name], value) for name, value in start.state_dict().items())
    assert answers[0].tried[0]["encoder_rate"] == TEST["encoder_rates"][0] and set(answers[0].ids) <= set(corpus.ids("test"))
