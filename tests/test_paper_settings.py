"""The `paper` profile equals what the sources say, field by field; `data/reported/<paper>_settings.csv` holds both sides' origin."""
import pytest

from musicssl import report, settings
from musicssl.augment import CLMR_CHAINS
from musicssl.encoders.samplecnn import SampleCNN
from musicssl.experiments import clmr
from musicssl.objectives.clmr import CLMR

RECIPE = settings.read("paper", "clmr", clmr.Recipe)
SIZES = SampleCNN.preset(RECIPE.encoder)


@pytest.mark.parametrize("field, source, ours", [
    ("sample_rate", "T", SIZES.sample_rate),
    ("n_samples", "T", SIZES.n_samples),
    ("encoder_kernel", "T", SIZES.blocks[1][0].kernel_size[0]),
    ("projection_dim", "C2", RECIPE.projection_dim),
    ("projection_hidden", "C2", CLMR(SIZES, None, RECIPE.projection_dim).head[0].out_features),
    ("temperature", "T", RECIPE.temperature),
    ("batch_size", "C2", RECIPE.pairs),
    ("adam_lr", "T", RECIPE.learning_rate),
    ("supervised.lr", "C2", RECIPE.supervised_learning_rate),
    ("supervised.stop_patience", "C2", RECIPE.patience),
])
def test_field_is_the_papers(field, source, ours):
    theirs = report.hyperparameters("clmr").loc[field, source]
    assert float(theirs) == ours, f"{field}: {source} says {theirs}, settings.ini makes it {ours}"


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
