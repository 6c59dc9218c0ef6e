"""The `paper` profile equals what the sources say, field by field; `data/reported/<paper>_settings.csv` holds both sides' origin."""
import inspect

import numpy as np
import pytest
import torch

from musicssl import probe, report, settings
from musicssl.augment import CLMR_CHAINS
from musicssl.data import magnatagatune, scorebox
from musicssl.encoders.samplecnn import SampleCNN
from musicssl.experiments import clmr
from musicssl.objectives.clmr import CLMR
from musicssl.objectives.supervised import Supervised
from musicssl.optim import OPTIMIZERS

RECIPE = settings.read("paper", "clmr", clmr.Recipe)
SIZES = SampleCNN.preset(RECIPE.encoder)
HEAD = CLMR(SIZES, None, RECIPE.projection_dim).head
FIT = inspect.signature(probe.fit_probe).parameters # what the paper's read-out does not set, its defaults do
READ_OUT = {name: parameter.default for name, parameter in FIT.items()} | clmr.READ_OUTS[RECIPE.read_out]
SUPERVISED = inspect.signature(Supervised).parameters
SGD = OPTIMIZERS[RECIPE.supervised_optimizer].keywords

# What is no number of a recipe, and the test that holds it.
ELSEWHERE = {
    "channels": "tests/test_audio.py", "normalise_audio": "tests/test_magnatagatune.py", "untagged_clips": "tests/test_magnatagatune.py", "crop_start": "tests/test_augment.py",
    "eval_segments": "tests/test_frozen.py", "track_score": "tests/test_readouts.py", "pr_auc_definition": "tests/test_metrics.py", "projection_normalised": "tests/test_clmr.py",
    "gather_negatives": "tests/test_distributed.py", "batch_norm_across_devices": "tests/test_distributed.py", "lars_lr": "tests/test_clmr_chapter.py",
    "lars_weight_decay": "tests/test_clmr_chapter.py", "lars_schedule": "tests/test_optim.py", "lars_warmup": "tests/test_optim.py", "probe.loss": "tests/test_probe.py",
    "probe.optimiser": "tests/test_probe.py", "probe.shuffle": "tests/test_probe.py",
    "label_subset_of": "tests/test_probe.py", "supervised.augment": "tests/test_train.py",
    # the seed of the code is 42; ours are five, for intervals
    "seed": "tests/test_paper_settings.py"}


NUMBERS = [
    ("tags", "C2", len(magnatagatune.TAGS)),
    *((f"{split}_clips", "C2", magnatagatune.SIZES[split]) for split in ("train", "valid", "test")),
    ("encoder_blocks", "T", len(SIZES.blocks)),
    ("encoder_parameters", "T", sum(weight.numel() for weight in SIZES.parameters())),
    ("embedding_dim", "C2", SIZES.dim),
    ("dropout_supervised", "C2", SUPERVISED["dropout"].default),
    ("adam_weight_decay", "C2", clmr.train_config({"seed": 0, "precision": "32-true"}, steps=10, lr=1.).weight_decay),
    ("probe.lr", "C2", READ_OUT["lr"]),
    ("probe.weight_decay", "C2", READ_OUT["weight_decay"]),
    ("probe.batch_size", "C2", READ_OUT["batch"]),
    ("probe.epochs", "C2", READ_OUT["epochs"]),
    ("probe.stop_patience", "C2", READ_OUT["patience"]),
    *((f"probe.parameters_{kind}", "C2", sum(weight.numel() for weight in probe.Probe(512, 50, kind).parameters())) for kind in ("linear", "mlp")),
    ("supervised.momentum", "C2", SGD["momentum"]),
    ("supervised.weight_decay", "C2", RECIPE.supervised_weight_decay),
    ("supervised.plateau_factor", "C2", RECIPE.supervised_factor),
    ("supervised.plateau_patience", "C2", RECIPE.supervised_plateau),
    ("sample_rate", "T", SIZES.sample_rate),
    ("n_samples", "T", SIZES.n_samples),
    ("encoder_kernel", "T", SIZES.blocks[1][0].kernel_size[0]),
    ("projection_dim", "C2", RECIPE.projection_dim),
    ("projection_hidden", "C2", HEAD[0].out_features),
    ("temperature", "T", RECIPE.temperature),
    ("batch_size", "C2", RECIPE.pairs),
    ("adam_lr", "T", RECIPE.learning_rate),
    ("supervised.lr", "C2", RECIPE.supervised_learning_rate),
    ("supervised.stop_patience", "C2", RECIPE.patience),
]


@pytest.mark.parametrize("field, source, ours", NUMBERS)
def test_number_is_the_papers(field, source, ours):
    theirs = report.hyperparameters("clmr").loc[field, source]
    assert float(theirs) == ours, f"{field}: {source} says {theirs}, settings.ini makes it {ours}"


WORDS = [
    ("encoder_widths", "T", " ".join(str(block[0].out_channels) for block in SIZES.blocks)),
    ("pretrain_item", "C1", RECIPE.item),
    ("init", "T", {"kaiming": "Kaiming uniform, convolutions only"}[SIZES.settings["init"]]),
    ("projection_bias", "C2", "no" if HEAD[0].bias is None and HEAD[-1].bias is None else "yes"),
    ("adam_betas", "T", " ".join(map(str, OPTIMIZERS["adam"]([torch.zeros(1)], lr=1.).defaults["betas"]))),
    ("probe.training_segments", "C2", {"clmr_code_v2": "one random crop, drawn once"}[RECIPE.read_out]),
    ("supervised.optimiser", "C2", "SGD, Nesterov" if SGD["nesterov"] else "SGD"),
]


@pytest.mark.parametrize("field, source, ours", WORDS)
def test_word_is_the_papers(field, source, ours):
    theirs = report.hyperparameters("clmr").loc[field, source]
    assert theirs == ours, f"{field}: {source} says {theirs}, ours is {ours}"


def test_every_field_is_held_somewhere():
    """A row that is added to the table needs a test, or a word on where it is held."""
    table = report.hyperparameters("clmr").index
    here = {field for field, *_ in (*NUMBERS, *WORDS)} | {"epochs", "label_fractions", "optimiser", "probe.plateau_factor", "probe.plateau_patience"} | {field for field in table if field.startswith("augment.")}
    assert here | set(ELSEWHERE) == set(table) and not here & set(ELSEWHERE), (set(table) ^ (here | set(ELSEWHERE)), here & set(ELSEWHERE))
    assert all((settings.root() / place).is_file() for place in ELSEWHERE.values())


def test_the_read_out_learns_from_one_crop_of_a_clip_as_version_2_does():
    corpus = scorebox.load(24, 6., 8000)
    encoder = SampleCNN.preset("8k-eighth")
    found = {name: clmr.embed(encoder, corpus, {"seed": 0, "read_out": name})  for name in clmr.READ_OUTS}
    assert [found["clmr_code_v2"][split].shape[1] for split in clmr.SPLITS] == [1, 2, 2]
    assert [found["ours"][split].shape[1] for split in clmr.SPLITS] == [2, 2, 2]


def test_the_rate_of_the_read_out_drops_as_in_version_2():
    """Replayed by PyTorch's own scheduler with the table's numbers, on noise that no read-out can learn."""
    table, draw = report.hyperparameters("clmr")["C2"], np.random.default_rng(0)
    data = lambda n: (draw.normal(size=(n, 1, 8)).astype(np.float32), draw.integers(0, 2, (n, 3)))
    fitted = probe.fit_probe(*data(64), data(32), lr=.1, patience=30)
    theirs = torch.optim.SGD([torch.zeros(1)], lr=.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, factor=float(table["probe.plateau_factor"]), patience=int(table["probe.plateau_patience"]))
    for row in fitted.history:
        assert row["lr"] == pytest.approx(theirs.param_groups[0]["lr"])
        plateau.step(row["valid"])
    assert fitted.history[-1]["lr"] < .02


def test_adam_is_used_where_the_thesis_uses_it():
    assert report.hyperparameters("clmr").loc["optimiser", "T"] == "Adam below batch 96, else LARS"
    assert RECIPE.pairs < 96
    assert clmr.train_config({"seed": 0, "precision": "32-true"}, steps=10, lr=RECIPE.learning_rate).optimizer == "adam"


def test_epochs_are_counted_as_the_code_counts_them():
    epochs, songs = int(report.hyperparameters("clmr").loc["epochs", "T"]), 3923
    assert RECIPE.steps == epochs * (songs // RECIPE.pairs)


def test_label_shares_are_the_papers():
    theirs = report.hyperparameters("clmr").loc["label_fractions", "C1"]
    assert [float(share) / 100 for share in theirs.split()] == list(RECIPE.fractions)


@pytest.mark.parametrize("chain, sources", [("clmr_paper", "TC"), ("clmr_code_v1", ["C1"]), ("clmr_code_v2", ["C2"])])
def test_every_step_of_the_chain_is_its_source_s(chain, sources):
    """The thesis gives no probabilities and no ratio of noise: there the text's chain takes version 2 of the code."""
    table, steps = report.hyperparameters("clmr"), {step.name: step for step in CLMR_CHAINS[chain]().transforms}
    delay = steps["delay"]
    ours = {f"augment.{name}.p": step.p for name, step in steps.items() if name != "crop"}
    for name, pair in {"noise.snr": steps["noise"].snr_db, "gain": steps["gain"].gain_db, "filter.lowpass": steps["filter"].low_pass,
                       "filter.highpass": steps["filter"].high_pass, "pitch": steps["pitch"].cents, "reverb": steps["reverb"].room_size,
                       "delay": (delay.delay_ms[0], delay.delay_ms[1] - (0 if delay.include_last else delay.step_ms))}.items():
        joint = "_" if "." in name else "."
        ours |= {f"augment.{name}{joint}low": pair[0], f"augment.{name}{joint}high": pair[1]}
    ours |= {"augment.delay.step": delay.step_ms, "augment.delay.gain": delay.gain}
    for field, value in ours.items():
        theirs = next(text for source in (["T", "C2"] if sources == "TC" else sources) if (text := table.loc[field, source]))
        assert float(theirs) == value, f"{field}: {chain} has {value}, the source {theirs}"
    assert set(ours) | {"augment.filter.kind"} == {field for field in table.index if field.startswith("augment.")}
