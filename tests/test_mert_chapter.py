"""Chapter 5: settings field by field, no number of the paper, students alike but for their teachers, teachers made once, nothing read about held-out clips."""
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from musicssl import report, settings, zoo
from musicssl.encoders.base import count_parameters
from musicssl.experiments import mert as chapter
from musicssl.objectives.mert import MERTPretext, span_mask

RECIPE = settings.read("paper", chapter.PAPER, chapter.Recipe)
TEST = {**asdict(settings.read("test", chapter.PAPER, chapter.Recipe)), "seed": 0, "arm": "rvq+cqt"}


# ------------------------------------------------------------------------------------------------------------ settings

@pytest.fixture(scope="module")
def built():
    """What the `paper` profile builds with EnCodec's eight codebooks, and its training recipe."""
    config = {**asdict(RECIPE), "arm": "rvq+cqt", "seed": 0}
    codes = type("Codes", (), {"sizes": (1024,) * 8, "source": "any"})()
    corpus = type("Corpus", (), {"store": [np.zeros(120_000, np.int16)] * 64, "ids": lambda self, split: np.arange(64)})()
    return chapter.new_objective(config, codes), chapter.pretraining(config, corpus, None)[1]


def fields(objective, engine):
    """What is built, under the names of the table."""
    encoder, mixture, cqt = objective.encoder, objective.mixture, objective.teachers.cqt
    how = encoder.settings
    convolutions = [part for part in encoder.front.modules() if isinstance(part, torch.nn.Conv1d)]
    row = lambda values: " ".join(map(str, values))
    masks = objective.masks
    return {"sample_rate": encoder.sample_rate, "crop": encoder.n_samples, "frame_rate": encoder.sample_rate / encoder.hop, "normalise": "yes" if how["normalise"] else "no",
            "conv.kernels": row(part.kernel_size[0] for part in convolutions), "conv.strides": row(part.stride[0] for part in convolutions),
            "conv.channels": convolutions[-1].out_channels, "feature_grad": how["feature_grad"], "pos.kernel": how["pos_kernel"], "pos.groups": how["pos_groups"],
            "layers": len(encoder.blocks), "dim": encoder.dim, "heads": how["heads"], "ffn": how["ffn"], "norm": how["norm"],
            "encoder_parameters": count_parameters(encoder), "dropout": how["dropout"], "attention_dropout": how["attention_dropout"],
            "layerdrop": encoder.layerdrop, "codebooks": len(objective.teachers.sizes), "codes": objective.teachers.sizes[0],
            "extra_rows": len(objective.code_head.tables[0]) - objective.teachers.sizes[0], "code_dim": objective.code_head.tables[0].shape[1],
            "temperature": objective.code_head.temperature, "cqt.bins": cqt.n_bins, "cqt.bins_per_octave": round(1 / np.log2(float(cqt.centres[1] / cqt.centres[0]))),
            "cqt.f_min": float(cqt.centres[0]), "cqt_weight": objective.cqt_weight, "penalty_weight": objective.penalty_weight, "mask.share": masks["share"],
            "mask.span": masks["span"], "mask.min_spans": masks["min_spans"], "mixture.p": mixture.p, "mixture.pieces": row(mixture.segments),
            "mixture.length": row(mixture.length), "optimiser": engine.optimizer, "weight_decay": engine.weight_decay, "learning_rate": engine.lr,
            "warmup_steps": engine.warmup_steps, "steps": engine.steps, "schedule": engine.schedule, "clip_norm": engine.clip_norm,
            "precision": engine.precision, "batch": RECIPE.batch * engine.accumulate, "teacher.mfcc": RECIPE.clusters}


def differing(ours):
    """Fields that are not as the table says: ours where we chose, else the code's."""
    table = report.hyperparameters("mert")
    wanted = {field: table.loc[field, "C"] or table.loc[field, "O"] for field in ours}
    same = lambda a, b: str(a) == b or not isinstance(a, str) and float(a) == pytest.approx(float(b), rel=1e-6)
    return {field: (value, wanted[field]) for field, value in ours.items() if not same(value, wanted[field])}


def test_every_setting_is_its_sources(built): assert not differing(fields(*built))


def test_the_comparison_of_settings_can_fail(built):
    """Mutation: a recipe with another rate."""
    assert list(differing(fields(built[0], replace(built[1], lr=1e-3)))) == ["learning_rate"]


def test_everything_in_the_table_is_compared_or_said_to_be_ours(built):
    unseen = set(report.hyperparameters("mert").index) - set(fields(*built))
    assert unseen == {"beta_2", "epsilon", "corpus"}


def test_no_number_of_the_paper_is_printed():
    told = report.reported("mert")
    assert set(told["mark"]) == {"S", "U"} and set(told["printed"]) == {"not verified"} and told["value"].isna().all()
    assert not report.hyperparameters("mert")["P"].any(), "nobody has read the paper's settings"


# ------------------------------------------------------------------------------------------------------------- the grid

@pytest.mark.parametrize("profile", ["test", "laptop", "paper"])
def test_arms_have_equal_budgets(profile):
    runs = {config["arm"]: {name: value for name, value in config.items() if name != "arm"} for config in chapter.grid(profile)}
    assert set(runs) == set(chapter.RUNS) == set(chapter.ARMS) | {"random", "teacher mfcc", "teacher rvq", "teacher cqt"}
    teaching = {field for _, fields in chapter.TEACHERS.values() for field in fields}
    budget = {arm: {name: value for name, value in runs[arm].items() if name not in teaching} for arm in chapter.ARMS}
    assert all(one == budget["rvq+cqt"] and one["steps"] for one in budget.values())
    assert not teaching & set(runs["cqt"]) and not {"clusters"} & set(runs["rvq"]) and not {"codec", "codec_steps"} & set(runs["mfcc"])
    assert not set(runs["random"]) & {*chapter._game, *teaching}, "another recipe does not repeat the read-out of random weights"


def test_students_differ_in_nothing_but_their_teachers(corpus):
    told = {arm: chapter.new_objective(config := {**TEST, "arm": arm}, chapter.codes_for(config, corpus)) for arm in chapter.ARMS}
    first = chapter.new_encoder(TEST).state_dict()
    assert all(torch.equal(first[name], value) for one in told.values() for name, value in one.encoder.state_dict().items()), "all start as the random twin"
    assert {arm: (bool(one.teachers.sizes), one.teachers.cqt is not None) for arm, one in told.items()} == {
        "rvq+cqt": (True, True), "rvq": (True, False), "cqt": (False, True), "mfcc": (True, False)}
    assert told["rvq+cqt"].teachers.sizes == told["rvq"].teachers.sizes != told["mfcc"].teachers.sizes == (TEST["clusters"],)
    assert {one.mixture.p for one in told.values()} == {TEST["mixture"]} and len({str(one.masks) for one in told.values()}) == 1


# --------------------------------------------------------------------------------------------------------- the teachers

@pytest.fixture(scope="module")
def corpus(): return chapter.load_corpus(TEST)


def test_a_teacher_is_made_once_and_from_training_clips(corpus, tmp_path, monkeypatch):
    made, heard = [], []
    monkeypatch.setattr(settings, "cache_dir", lambda: tmp_path)
    wave = corpus.wave
    monkeypatch.setattr(corpus, "wave", lambda ids, *where: (heard.extend(np.asarray(ids)), wave(ids, *where))[1])
    for name, (make, fields) in list(chapter.TEACHERS.items()):
        def counted(config, corpus, folder, name=name, make=make): return made.append(name) or make(config, corpus, folder)
        monkeypatch.setitem(chapter.TEACHERS, name, (counted, fields))
    twice = [chapter.open_teacher({**TEST, "seed": seed}, name, corpus) for name in chapter.TEACHERS for seed in (0, 7)]
    assert made == list(chapter.TEACHERS) and set(heard) <= set(corpus.ids("train"))
    sound = wave([int(corpus.ids("test")[0])])
    assert torch.equal(twice[0](sound), twice[1](sound)) and torch.equal(twice[2](sound), twice[3](sound)), "every seed learns from the same teachers"
    chapter.open_teacher({**TEST, "clusters": TEST["clusters"] + 1}, "mfcc", corpus)
    assert made[-1] == "mfcc" and len(made) == 3, "another recipe, another teacher"


def test_another_process_of_a_group_can_make_a_teacher_alone(corpus, tmp_path, monkeypatch):
    """As torchrun's second process would: no word to the first."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert chapter.train_codec(TEST, corpus, tmp_path).sizes and not torch.distributed.is_initialized()


def test_codes_are_those_of_the_sound(corpus):
    codes, teacher = chapter.open_codes(TEST, "rvq", corpus), chapter.open_teacher(TEST, "rvq", corpus)
    clip = int(corpus.ids("train")[0])
    with torch.no_grad(): now = teacher(corpus.wave([clip]).to(next(teacher.buffers()).device))[0].cpu()
    assert np.array_equal(codes[clip], now[:len(codes[clip])]) and codes.sizes == teacher.sizes
    batches, _ = chapter.pretraining(TEST, corpus, codes)
    assert batches(0).codes.shape == (TEST["batch"], 192, len(codes.sizes))


def test_the_floor_is_the_teacher_itself(corpus):
    teacher, encoder = chapter.open_teacher(TEST, "rvq", corpus).cpu(), chapter.new_encoder(TEST)
    floor = zoo.check_encoder(chapter.TeacherAlone(teacher, encoder))
    wave = corpus.wave([0, 1], 0, encoder.n_samples)
    shares = floor(wave).clip.split(list(teacher.sizes), 1)
    counted = torch.bincount(teacher(wave)[1, :, 1], minlength=teacher.sizes[1]) / 192
    assert torch.allclose(shares[1][1], counted.float(), atol=1e-6)
    cqt = chapter.new_objective({**TEST, "arm": "cqt"}, None).teachers.cqt
    assert torch.allclose(zoo.check_encoder(chapter.TeacherAlone(cqt, encoder))(wave).clip, cqt(wave).mean(2))


# ------------------------------------------------------------------------------------------------------------- the marks

def test_held_out_windows_never_change(corpus):
    codes = chapter.open_codes(TEST, "rvq", corpus)
    first, again = chapter.held_out(TEST, corpus, codes), chapter.held_out({**TEST, "seed": 5, "arm": "cqt"}, corpus, None)
    assert torch.equal(first.wave, again.wave) and torch.equal(first.seeds, again.seeds) and again.codes is None
    assert set(first.ids.tolist()) <= set(corpus.ids("valid")) and torch.equal(first.codes.cpu(), codes.cut(first.ids, [0] * len(first), 61_440))


def test_the_guesser_knows_training_clips_alone(corpus):
    """Mutation: a guesser that counts the held-out codes pays less than one that counts others."""
    config = TEST
    codes = chapter.open_codes(config, "rvq", corpus)
    objective, batch = chapter.new_objective(config, codes), chapter.held_out(config, corpus, codes)
    told = chapter.guesser(objective, batch, corpus, codes)
    seen = codes.cut(corpus.ids("train"), [0] * len(corpus.ids("train")), 61_440).flatten(0, 1)
    now, slow = batch.codes.flatten(0, 1).cpu(), []
    for book, size in enumerate(codes.sizes):
        count = [1 + int((seen[:, book] == code).sum()) for code in range(size)]
        slow.append(-np.mean([np.log(count[code] / sum(count)) for code in now[:, book].tolist()]))
    assert told["code_loss"] == pytest.approx(sum(slow)) and 0 < told["chance"] < 1
    peeking = type("Corpus", (), {"ids": lambda self, split: batch.ids.numpy(), "wave": corpus.wave})()
    assert chapter.guesser(objective, batch, peeking, codes)["code_loss"] < told["code_loss"]
    assert chapter.guesser(objective, batch, peeking, codes)["cqt_loss"] < told["cqt_loss"]


def test_the_picture_is_what_was_masked(corpus):
    codes = chapter.open_codes(TEST, "rvq", corpus)
    objective, batch = chapter.new_objective(TEST, codes), chapter.held_out(TEST, corpus, codes)
    kept = chapter.example(objective, batch)
    frames = kept["masked"].shape[0]
    assert objective.training and np.array_equal(kept["codes"], batch.codes[0, :frames].cpu()) and kept["said"].shape == kept["cqt"].shape == (84, frames)
    assert not (kept["masked"] & ~span_mask(frames, batch.seeds[:1])[0].numpy()).any() and kept["masked"].any()
    assert isinstance(objective, MERTPretext) and np.allclose(kept["cqt"], objective.teachers.cqt(batch.wave)[0, :, :frames].cpu(), atol=.01)


def test_usage_counts():
    codes = type("Codes", (), {"sizes": (4, 2), "cut": lambda self, ids, starts, samples: torch.tensor([[[0, 1], [1, 1], [2, 1], [2, 1]]])})()
    told = chapter.usage(codes, np.arange(1), 4)
    assert [book["used"] for book in told] == [.75, .5] and [book["perplexity"] for book in told] == pytest.approx([2 ** 1.5, 1.])
