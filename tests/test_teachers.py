"""What teachers say: the nearest centre, one code per hop, the same from a file; and what is refused."""
import json
import sys

import pytest
import torch
from torch import nn

from musicssl import compat
from musicssl.checkpoint import Mismatch, save_weights
from musicssl.data.codes import prepare_codes, teacher_fingerprint
from musicssl.data.loader import Arrays
from musicssl.features.mel import LogMel
from musicssl.teachers import kmeans as library
from musicssl.teachers.codec import RVQVAE, CodecTeacher
from musicssl.teachers.kmeans import FEATURES, EncodecTeacher, KMeansTeacher, Teacher, check_teacher, load_teacher, save_teacher


@pytest.fixture(scope="module")
def waves():
    """Four seconds each of six gliding tones in noise."""
    t = torch.arange(96_000) / 24_000
    generator = torch.Generator().manual_seed(0)
    return torch.stack([.2 * torch.sin(2 * torch.pi * (110 + 60 * k + 50 * k * t) * t) + .02 * torch.randn(96_000, generator=generator) for k in range(6)])


@pytest.fixture(scope="module")
def teacher(waves): return KMeansTeacher(("logmel", "chroma", "mfcc"), (30, 20, 10)).fit(waves)


# ------------------------------------------------------------------------------------------------------------ k-means


def test_codes_are_the_nearest_centres(teacher, waves):
    codes = teacher(waves[:2])
    for column, book in zip(codes.unbind(-1), teacher.books):
        frames = (book.feature(waves[:2]).mT - book.mean) / book.std
        distance = (frames[:, :, None] - book.centres).double().square().sum(-1)
        assert torch.equal(column, distance.argmin(-1)) and len(column.unique()) > len(book.centres) / 4
    book = teacher.books[0] # mutation: without the centres' lengths it is another question
    x = (book.feature(waves[:2]) - book.mean[:, None]) / book.std[:, None]
    assert not torch.equal((book.centres @ x).argmax(-2), codes[..., 0])


def test_centres_are_where_k_means_leaves_them(teacher, waves):
    """Hardly a frame is nearer to another code's mean than to its own centre's; frames drawn at random as centres are worse."""
    for book in teacher.books:
        frames = ((book.feature(waves).mT - book.mean) / book.std).flatten(0, 1)
        def spread(centres): return float(torch.cdist(frames, centres).amin(1).square().mean())
        drawn = frames[torch.randperm(len(frames), generator=torch.Generator().manual_seed(1))[:len(book.centres)]]
        assert spread(book.centres) < .9 * spread(drawn) and spread(book.centres) < .9 * frames.square().sum(1).mean()


def test_equal_waves_and_seed_give_an_equal_teacher(waves):
    first, again, batches, other = (KMeansTeacher("mfcc", (10,)).fit(sound, seed) for sound, seed in
                                    ((waves, 0), (waves, 0), (list(waves.split(8)), 0), (waves, 1)))
    assert len({teacher_fingerprint(one) for one in (first, again, batches)}) == 1 and teacher_fingerprint(other) != teacher_fingerprint(first)


def test_every_clip_is_heard_and_not_more_of_it_than_asked(waves, monkeypatch):
    found = {}
    monkeypatch.setattr(library._Book, "fit", lambda book, frames, seed: found.update({book.name: frames}))
    KMeansTeacher("mfcc").fit(torch.cat([waves, waves[:, :2400].repeat(1, 40)]), per_clip=50)
    KMeansTeacher("chroma").fit([waves[:, :4000], waves], per_clip=50)
    assert found["mfcc"].shape == (600, 39) and found["chroma"].shape == (6 * 13 + 300, 264)


def test_mfcc_are_huberts_with_both_slopes(waves):
    frames = FEATURES["mfcc"][2](24_000, 320)(waves[:1])
    slopes = compat.torchaudio().functional.compute_deltas(frames[:, :13])
    assert frames.shape == (1, 39, 301)
    torch.testing.assert_close(frames[:, 13:26, 2:-2], slopes[..., 2:-2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(frames[:, 26:, 4:-4], compat.torchaudio().functional.compute_deltas(slopes)[..., 4:-4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FEATURES)
def test_a_frame_does_not_depend_on_what_is_far_away(name, waves):
    quiet = .01 * waves[:1, :48_000]
    with_bang = torch.cat([quiet, 90 * quiet], 1)
    def change(make): return float(torch.sub(*(make(24_000, 320)(sound)[..., :140] for sound in (quiet, with_bang))).abs().max())
    assert change(FEATURES[name][2]) < 1e-3
    assert change(lambda rate, hop: LogMel(rate, 2048, hop, 229, top_db=40.)) > 10 # mutation: a floor that hangs on the clip's loudest point


@pytest.mark.parametrize("samples", [24_000, 24_001, 24_319, 61_440, 120_000, 122_880])
def test_there_is_a_code_for_every_frame_of_the_student(samples, teacher):
    codes = teacher(torch.zeros(1, samples))
    assert codes.shape == (1, 1 + samples // 320, 3) and codes.shape[1] >= (samples - 400) // 320 + 1


def test_half_precision_does_not_change_codes(teacher, waves):
    with torch.autocast("cpu", dtype=torch.bfloat16): codes = teacher(waves[:2])
    assert torch.equal(codes, teacher(waves[:2]))


def test_what_cannot_be_clustered_is_refused(waves):
    with pytest.raises(RuntimeError, match="has no clusters yet"): KMeansTeacher()(waves)
    with pytest.raises(ValueError, match="got 60 frames for 100 clusters of mfcc"): KMeansTeacher().fit(waves, per_clip=10)
    with pytest.raises(ValueError, match=r"got the features \['mfcc', 'cqt'\]"): KMeansTeacher(("mfcc", "cqt"))
    with pytest.raises(ValueError, match="got 2 sizes for 1 features"): KMeansTeacher("mfcc", (10, 10))
    assert [KMeansTeacher.preset(name).sizes for name in ("mert_v0", "hubert")] == [(300, 200), (100,)]


def test_its_codes_on_disk_are_its_codes(teacher, waves, tmp_path):
    clips = Arrays(waves.numpy(), sample_rate=24_000)
    codes = prepare_codes(teacher, clips, tmp_path, progress=False)
    assert codes.sizes == (30, 20, 10) and codes.hop == 320 and codes.teacher == teacher_fingerprint(teacher)
    assert torch.equal(codes.cut(range(6), [0] * 6, 96_000), teacher(waves)[:, :300])


# ----------------------------------------------------------------------------------------------------------- contract


def made(give, **attributes):
    return type("Made", (nn.Module,), {"forward": lambda self, wave: give(len(wave), wave.shape[1]),
                                       **{"sample_rate": 24_000, "hop": 320, "sizes": (4,), **attributes}})()


def zeros(*shape): return torch.zeros(*shape, dtype=torch.int64)


@pytest.mark.parametrize("other, what", [
    (nn.Linear(2, 2), "got a Linear, wanted a module with sample_rate"),
    (made(lambda b, t: zeros(b, 75, 2)), r"gave \(2, 75, 2\) of torch.int64 for two waveforms, wanted \(2, N, 1\)"),
    (made(lambda b, t: zeros(b, 75)), r"gave \(2, 75\)"),
    (made(lambda b, t: torch.zeros(b, 75, 1)), "of torch.float32"),
    (made(lambda b, t: zeros(b, 73, 1)), "gave 73 codes for a second, wanted 75"),
    (made(lambda b, t: zeros(b, 75, 1) + 4), "gave codes from 4 to 4"),
    (made(lambda b, t: zeros(b, 75, 1) - 1), "gave codes from -1 to -1"),
])
def test_what_is_no_teacher_is_refused(other, what):
    with pytest.raises(ValueError, match=what): check_teacher(other)


def test_what_keeps_the_contract_is_a_teacher(teacher):
    for count in (74, 75, 76): check_teacher(made(lambda b, t: zeros(b, count, 1)))
    assert isinstance(check_teacher(teacher), Teacher) and not teacher.training


# --------------------------------------------------------------------------------------------------------------- files


def test_a_teacher_comes_back_from_its_file(teacher, waves, tmp_path):
    save_teacher(tmp_path / "t.safetensors", teacher, {"corpus": "tones"})
    again = load_teacher(tmp_path / "t.safetensors")
    assert torch.equal(again(waves), teacher(waves)) and teacher_fingerprint(again) == teacher_fingerprint(teacher) and not again.training


def test_our_own_codec_is_opened_by_name(waves, tmp_path):
    teacher = CodecTeacher(RVQVAE.preset("tiny"))
    for book in teacher.codec.quantiser.buffers():
        book.normal_(generator=torch.Generator().manual_seed(0)) if book.is_floating_point() else book.fill_(True) # as if it had been trained
    save_teacher(tmp_path / "t.safetensors", teacher)
    again = load_teacher(tmp_path / "t.safetensors")
    assert torch.equal(again(waves[:1]), teacher(waves[:1])) and teacher_fingerprint(again) == teacher_fingerprint(teacher)


def test_files_that_are_no_teachers_are_refused(teacher, tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(ValueError, match="there is no file"): load_teacher(path)
    save_weights(path, teacher)
    with pytest.raises(Mismatch, match="is no teacher's file"): load_teacher(path)
    settings = {**teacher.settings, "sizes": [30, 20, 11]}
    save_weights(path, teacher, {"teacher": {"name": "kmeans", "settings": settings}})
    with pytest.raises(Mismatch, match=r"books.2.centres: got \(10, 39\) float32, wanted \(11, 39\) float32"): load_teacher(path)
    save_weights(path, teacher, {"teacher": {"name": "kmeans", "settings": {"colour": "red"}}})
    with pytest.raises(Mismatch, match="wants a teacher that cannot be built here.*colour"): load_teacher(path)
    with pytest.raises(ValueError, match="got a Linear, wanted one of kmeans"): save_teacher(path, nn.Linear(2, 2))
    unfitted = KMeansTeacher()
    save_teacher(path, unfitted)
    with pytest.raises(RuntimeError, match="has no clusters yet"): load_teacher(path)


# ------------------------------------------------------------------------------------------------------------- EnCodec


@pytest.fixture(scope="module")
def encodec(tmp_path_factory):
    """A folder with a small EnCodec of random weights, as transformers writes it."""
    folder, transformers = tmp_path_factory.mktemp("encodec"), compat.transformers("encodec")
    torch.manual_seed(0)
    config = transformers.EncodecConfig(num_filters=4, hidden_size=16, num_lstm_layers=1)
    model = transformers.EncodecModel(config)
    for layer in model.quantizer.layers: layer.codebook.embed.normal_(std=.01)
    model.save_pretrained(folder)
    return folder


def changed(folder, to, **settings):
    """A copy of the folder with other settings."""
    for file in folder.iterdir(): (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **settings}))
    return to


def test_encodecs_codes_are_nearest_neighbours_of_what_is_left(encodec, waves):
    teacher = check_teacher(EncodecTeacher(encodec))
    assert teacher.sizes == (1024,) * 8 and (teacher.sample_rate, teacher.hop) == (24_000, 320)
    codes = teacher(waves[:2, :9600])
    with torch.no_grad(): rest = teacher.model.encoder(waves[:2, None, :9600]).mT
    for column, layer in zip(codes.unbind(-1), teacher.model.quantizer.layers):
        distance = (rest[:, :, None] - layer.codebook.embed).square().sum(-1)
        assert torch.equal(column, distance.argmin(-1))
        rest = rest - layer.codebook.embed[column]
    assert len(codes.unique()) > 16


@pytest.mark.parametrize("samples", [320, 321, 640, 24_000, 61_440])
def test_encodec_has_a_code_for_every_begun_hop(samples, encodec):
    assert EncodecTeacher(encodec)(torch.zeros(1, samples)).shape == (1, -(-samples // 320), 8)


def test_encodec_is_saved_whole(encodec, waves, tmp_path):
    folder = changed(encodec, tmp_path)
    teacher = EncodecTeacher(folder, bandwidth=3.)
    save_teacher(tmp_path / "t.safetensors", teacher)
    for file in ("config.json", "model.safetensors"): (folder / file).unlink()
    again = load_teacher(tmp_path / "t.safetensors")
    assert again.sizes == (1024,) * 4 and torch.equal(again(waves[:1]), teacher(waves[:1])) and teacher_fingerprint(again) == teacher_fingerprint(teacher)


def test_folders_without_such_an_encodec_are_refused(encodec, tmp_path):
    with pytest.raises(ValueError, match="there is no config.json"): EncodecTeacher(tmp_path)
    for settings, what in (({"model_type": "bert"}, "of the kind bert, wanted encodec"), ({"normalize": True}, "normalises: True"),
                           ({"chunk_length_s": 1.}, "pieces of 1.0 s"), ({"hidden_size": 8}, "does not fit EnCodec|size mismatch|mismatched")):
        with pytest.raises(Exception, match=what): EncodecTeacher(changed(encodec, tmp_path, **settings))
    with pytest.raises(ValueError, match="got 7 kbit/s, wanted one of"): EncodecTeacher(encodec, bandwidth=7)


def test_missing_weights_are_not_made_up(encodec, tmp_path):
    """transformers itself fills them with random numbers and a warning: that is the mutation."""
    import safetensors.torch
    folder = changed(encodec, tmp_path)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.startswith("encoder") and name.endswith("bias"))
    safetensors.torch.save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Mismatch, match=f"does not fit EnCodec: .*missing_keys.*{name}"): EncodecTeacher(folder)
    compat.transformers("encodec").EncodecModel.from_pretrained(folder)


def test_without_transformers_it_says_what_to_install(encodec, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'musicssl\[encodec\]'"): EncodecTeacher(encodec)
