"""A teacher's codes on disk: whole, of the right clips and the right teacher, and at the right moment of every crop."""
import numpy as np
import pytest
import torch
from torch import nn

from musicssl.audio import Batch
from musicssl.data import codes as library
from musicssl.data.codes import Codes, import_label_files, prepare_codes, read_label_files, teacher_fingerprint, write_label_files
from musicssl.data.loader import Arrays, Loader
from musicssl.data.store import CorruptStore, UnfinishedStore
from musicssl.devices import share

HOP = 320
LENGTHS = [3000 + 137 * (i * 29 % 90) for i in range(90)] # two chunks, the second one begun


class Clock(nn.Module):
    """Code i is i."""
    sample_rate, hop, sizes = 8000, HOP, (1000,)

    def forward(self, wave): return torch.arange(wave.shape[1] // HOP).expand(len(wave), -1)[..., None]


class Pair(nn.Module):
    """Two codebooks: what the frame's first sample is, and how many clips were heard at once."""
    sample_rate, hop, sizes = 8000, HOP, (2**15, 50)

    def __init__(self, scale=1.):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))
        self.heard, self.breaks_at = 0, None

    def forward(self, wave):
        self.heard += len(wave)
        if self.breaks_at is not None and self.heard > self.breaks_at: raise InterruptedError("the power is off")
        first = (wave[:, ::HOP] * 2**15 * self.scale).long()
        return torch.stack([first, first % 50], -1)


@pytest.fixture(scope="module")
def ramps():
    """Every sample tells where it is."""
    return Arrays([np.arange(n, dtype=np.int16) for n in LENGTHS], sample_rate=8000)


@pytest.fixture(scope="module")
def clock(ramps, tmp_path_factory): return prepare_codes(Clock(), ramps, tmp_path_factory.mktemp("clock"), progress=False)


def files(folder): return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


# ---------------------------------------------------------------------------------------------------------- alignment


def greatest_distance(loader):
    """Samples between where the crop is and where its codes say it is, over two epochs."""
    found = []
    for number in range(2 * len(loader)):
        batch = loader(number)
        at = batch.wave * 2**15
        assert batch.codes.shape == (len(batch), loader.samples // HOP, 1) and batch.codes.dtype == torch.int64
        frames = at[:, :batch.codes.shape[1] * HOP:HOP]
        inside = batch.codes[..., 0] < torch.tensor([LENGTHS[int(i)] // HOP - 1 for i in batch.ids])[:, None] # the last code stands for what is missing
        found.append(((batch.codes[..., 0] * HOP - frames).abs() * inside).max())
    return float(max(found))


def test_codes_are_those_of_the_crop(clock, ramps, monkeypatch):
    loader = Loader(ramps, batch_size=9, crop=2000, codes=clock)
    assert 150 < greatest_distance(loader) <= HOP / 2
    with monkeypatch.context() as patch: # mutation: the label before instead of the nearest
        patch.setattr(library, "round", int, raising=False)
        assert greatest_distance(loader) > HOP / 2
    cut = Codes.cut
    monkeypatch.setattr(Codes, "cut", lambda codes, ids, starts, samples: cut(codes, ids, [0] * len(starts), samples)) # mutation: the clip's first
    assert greatest_distance(loader) > HOP / 2


def test_the_end_of_a_clip(clock):
    last = LENGTHS[0] // HOP - 1
    assert clock.cut([0], [LENGTHS[0] - 2 * HOP], 5 * HOP)[0, :, 0].tolist() == [last - 1 + (LENGTHS[0] % HOP > HOP // 2), *[last] * 4]
    with pytest.raises(IndexError, match=f"clip 0 has {last + 1} codes, got a crop from code {last + 2}"): clock.cut([0], [(last + 2) * HOP], HOP)
    assert clock.cut([], [], 3 * HOP).shape == (0, 3, 1)


def test_a_clip_of_nothing_has_no_codes(tmp_path):
    codes = prepare_codes(Clock(), Arrays([np.zeros(n, np.float32) for n in (960, 0, 640)], 8000), tmp_path, progress=False)
    assert codes.frames.tolist() == [3, 0, 2] and codes[1].shape == (0, 1)
    with pytest.raises(IndexError, match="clip 1 has 0 codes"): codes.cut([1], [0], 320)


@pytest.mark.parametrize("short", ["drop", "pad"])
def test_workers_ranks_and_memory_make_no_difference(clock, ramps, short):
    def told(loader, *share): return [loader(number, *share).codes for number in (0, 1, 7, 3)]
    options = dict(batch_size=10, crop=9000, codes=clock, short=short)
    alone = told(Loader(ramps, **options))
    working, resident = Loader(ramps, **options, workers=1), Loader(ramps, **options, resident="cpu")
    assert all(torch.equal(a, b) for other in (told(working), told(resident)) for a, b in zip(other, alone))
    working.close()
    shares = [told(Loader(ramps, **options), rank, 2) for rank in (0, 1)]
    assert all(torch.equal(torch.stack(pair, 1).flatten(0, 1), whole) for *pair, whole in zip(*shares, alone))


def test_a_batch_moves_and_shares_its_codes():
    batch = Batch(wave=torch.zeros(4, 8), codes=torch.arange(4)[:, None, None])
    assert share(batch, 1, 2).codes.flatten().tolist() == [1, 3] and batch.to("meta").codes.is_meta
    with pytest.raises(ValueError, match="'wave': 4, 'codes': 3"): Batch(wave=torch.zeros(4, 8), codes=torch.zeros(3, 1, 1))


# -------------------------------------------------------------------------------------------------------- preparation


def test_interrupted_preparation_goes_on(ramps, tmp_path):
    teacher = Pair()
    whole = prepare_codes(teacher, ramps, tmp_path / "whole", batch=1, progress=False)
    assert teacher.heard == 90 and whole.frames.tolist() == [-(-n // HOP) for n in LENGTHS]
    teacher = Pair()
    teacher.breaks_at = 70
    with pytest.raises(InterruptedError): prepare_codes(teacher, ramps, tmp_path / "cut", progress=False)
    with pytest.raises(UnfinishedStore, match="stopped after 1 chunks"): Codes(tmp_path / "cut")
    teacher.breaks_at, teacher.heard = None, 0
    resumed = prepare_codes(teacher, ramps, tmp_path / "cut", progress=False)
    assert teacher.heard == 26 and files(tmp_path / "cut") == files(tmp_path / "whole") and resumed.fingerprint == whole.fingerprint
    prepare_codes(teacher, ramps, tmp_path / "cut", progress=False)
    assert teacher.heard == 26 # a finished folder is opened


def test_another_teacher_or_other_clips_do_not_go_on(ramps, tmp_path):
    teacher = Pair()
    teacher.breaks_at = 70
    with pytest.raises(InterruptedError): prepare_codes(teacher, ramps, tmp_path, progress=False)
    with pytest.raises(ValueError, match="was begun with {'teacher'"): prepare_codes(Pair(.5), ramps, tmp_path, progress=False)
    with pytest.raises(ValueError, match="was begun with {'source'"): prepare_codes(Pair(), Arrays(ramps.clips[::-1], 8000), tmp_path, progress=False)
    (tmp_path / "codes.json").unlink() # mutation: nobody said who began
    mixed = prepare_codes(Pair(.5), ramps, tmp_path, progress=False)
    assert mixed[0][1, 0] == 320 and mixed[89][1, 0] == 160


def test_codes_that_have_changed_are_noticed(ramps, tmp_path):
    prepare_codes(Clock(), ramps, tmp_path, progress=False)
    file = tmp_path / "00001.int16"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(CorruptStore, match="chunk 1 has changed"): Codes(tmp_path)[64]
    with pytest.raises(UnfinishedStore, match="no store was built there"): Codes(tmp_path / "nowhere")


def made(give, **attributes):
    """A teacher that says what it is told to."""
    return type("Made", (Clock,), {"forward": lambda self, wave: give(len(wave), wave.shape[1] // HOP), **attributes})()


@pytest.mark.parametrize("teacher, what", [
    (made(lambda b, n: torch.full((b, n, 1), 1000)), "clip 0: codebook 0 has no code 1000, wanted 0 … 999"),
    (made(lambda b, n: torch.full((b, n, 1), -1)), "codebook 0 has no code -1"),
    (made(lambda b, n: torch.zeros(b, n, 1)), "of float32, wanted"),
    (made(lambda b, n: torch.zeros(b, n, 2, dtype=torch.int64)), r"wanted \(N, 1\) whole numbers"),
    (made(lambda b, n: torch.zeros(b, n - 2, 1, dtype=torch.int64)), "codes for 3000 samples, wanted one for every hop of 320"),
    (made(lambda b, n: torch.zeros(b, n, 1, dtype=torch.int64), sizes=(2**15 + 1,)), "wanted at most 32,768"),
    (made(lambda b, n: torch.zeros(b, n, 1, dtype=torch.int64), sample_rate=16_000), "got clips at 8000 Hz, Made hears 16000 Hz"),
])
def test_what_is_no_code_is_refused(teacher, what, ramps, tmp_path):
    with pytest.raises(ValueError, match=what): prepare_codes(teacher, ramps, tmp_path, progress=False)
    assert not (tmp_path / "index.json").exists()


def test_a_teachers_name_holds_all_of_it():
    other = Pair()
    other.hop = 160
    assert teacher_fingerprint(Pair()) == teacher_fingerprint(Pair())
    assert len({teacher_fingerprint(teacher) for teacher in (Pair(), Pair(.5), other, Clock(), Pair().double())}) == 5


def test_codes_of_other_clips_are_refused(clock, ramps):
    with pytest.raises(ValueError, match="codes are of other clips"): Loader(Arrays(ramps.clips[::-1], 8000), batch_size=9, crop=2000, codes=clock)
    assert Loader(ramps, batch_size=9, crop=2000, codes=clock).state()["codes"] == clock.fingerprint


# -------------------------------------------------------------------------------------------------------- label files


NAMES = ["train.codec_0", "train.codec_1"]
SIZES = (2**15, 50)


@pytest.fixture(scope="module")
def labelled(ramps, tmp_path_factory):
    """Codes of two codebooks, and the same as text."""
    folder = tmp_path_factory.mktemp("labels")
    codes = prepare_codes(Pair(), ramps, folder / "codes", progress=False)
    write_label_files(folder, NAMES, (codes[i] for i in range(len(codes))))
    return folder, codes


def test_label_files_there_and_back(labelled, ramps, tmp_path):
    folder, codes = labelled
    assert (folder / NAMES[1]).read_text().splitlines()[0].split() == [str(value) for value in codes[0][:, 1]]
    again = import_label_files(folder, NAMES, SIZES, HOP, ramps, tmp_path)
    assert all(np.array_equal(again[i], codes[i]) for i in range(90)) and again.teacher != codes.teacher
    assert torch.equal(Loader(ramps, batch_size=9, crop=2000, codes=again)(3).codes, Loader(ramps, batch_size=9, crop=2000, codes=codes)(3).codes)
    with pytest.raises(ValueError, match="has 90 lines, wanted one for each of 80 clips"):
        import_label_files(folder, NAMES, SIZES, HOP, Arrays(ramps.clips[:80], 8000), tmp_path / "few")
    with pytest.raises(ValueError, match="codes for 3000 samples, wanted one for every hop of 160"):
        import_label_files(folder, NAMES, SIZES, 160, ramps, tmp_path / "hop")


FAULTS = { # what is done to the second file's lines, and what is said
    "outside": (lambda lines: [*lines[:7], "50" + lines[7][lines[7].find(" "):], *lines[8:]], "line 8: got the label 50, wanted 0 … 49"),
    "negative": (lambda lines: [*lines[:7], "-1" + lines[7][lines[7].find(" "):], *lines[8:]], "line 8: got the label -1, wanted 0 … 49"),
    "longer": (lambda lines: [*lines[:7], lines[7] + " 1", *lines[8:]], "line 8: got .* labels, train.codec_0 has"),
    "empty": (lambda lines: [*lines[:7], "", *lines[8:]], "line 8: got 0 labels, train.codec_0 has"),
    "fewer lines": (lambda lines: lines[:-1], "line 90: the file has ended"),
    "words": (lambda lines: [*lines[:7], lines[7] + " <unk>", *lines[8:]], "line 8: wanted whole numbers"),
    "all unknown": (lambda lines: [" ".join("3" for _ in line.split()) for line in lines], "all [0-9]+ labels are 3; no dictionary"),
}


def spoil(labelled, folder, change):
    for name in NAMES: (folder / name).write_text((labelled[0] / name).read_text())
    (folder / NAMES[1]).write_text("\n".join(change((folder / NAMES[1]).read_text().splitlines())) + "\n")


@pytest.mark.parametrize("fault", FAULTS)
def test_spoilt_label_files_are_refused_by_file_and_line(fault, labelled, tmp_path):
    change, said = FAULTS[fault]
    spoil(labelled, tmp_path, change)
    with pytest.raises(ValueError, match=f"train.codec_1.*{said}"): read_label_files(tmp_path, NAMES, SIZES)


def test_line_by_line_the_dictionary_trap_is_not_seen(labelled, tmp_path):
    """Mutation: without the look at the whole file, labels that are all 3 are read like any others."""
    spoil(labelled, tmp_path, FAULTS["all unknown"][0])
    lines = zip(*((tmp_path / name).read_text().splitlines() for name in NAMES))
    assert all((library._line([tmp_path / name for name in NAMES], 1, pair, SIZES)[:, 1] == 3).all() for pair in lines)


def test_half_written_label_files_do_not_appear(tmp_path):
    def until_it_breaks():
        yield np.zeros((3, 2), int)
        raise InterruptedError
    with pytest.raises(InterruptedError): write_label_files(tmp_path, NAMES, until_it_breaks())
    assert not [path for path in tmp_path.iterdir() if path.name in NAMES]
    with pytest.raises(ValueError, match="zip"): write_label_files(tmp_path, NAMES, [np.zeros((3, 3), int)])
