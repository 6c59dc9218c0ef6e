"""Reports are pure functions of records and of the reported numbers, and never leave half a file."""
import csv
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from musicssl import files, report, settings
from musicssl.probe import Interval
from musicssl.records import Record

REPORTED = settings.root() / "data" / "reported"
INTERVAL = Interval(.35, .3, .4, kind="percentile bootstrap over tracks", draws=np.zeros(3))


def record(seed, **about):
    provenance = {"seconds": 30., "hardware": {"cpu": "a CPU", "cores": 4, "device": "cpu"}, "commit": "a" * 40, "dirty": False}
    return Record(key=str(seed), config={"seed": seed, "clips": 10, "seconds": 5.}, metrics={}, provenance={**provenance, **about})


def test_every_reported_number_has_a_place_and_a_mark():
    rows = list(csv.DictReader(open(REPORTED / "clmr.csv", encoding="utf8", newline="")))
    assert {"item", "row", "metric", "value", "unit", "table", "source", "mark", "verified"} <= set(rows[0])
    for row in rows:
        assert all(row[c] for c in ("item", "row", "metric", "value", "table", "source", "data"))
        assert row["mark"] and set(row["mark"].split(",")) <= set("PTRNIU") and row["verified"] in ("yes", "no")
        assert row["unit"] != "%" or 5 < float(row["value"]) < 100
        assert row["mark"] != "U" or row["verified"] == "no"
    assert len({(r["item"], r["row"], r["data"], r["metric"]) for r in rows}) == len(rows)


@pytest.mark.parametrize("item, row, metric, value", [
    ("T1", "CLMR, linear probe", "pr_auc", 35.6), ("T1", "CLMR, MLP probe", "roc_auc", 89.3), ("T1", "SampleCNN, supervised", "pr_auc", 34.38),
    ("T3", "batch 96", "pr_auc", 35.11), ("T4", "10,000 epochs, MLP probe", "pr_auc_clip", 70.03), ("T5", "8 kHz", "roc_auc", 84.78),
    ("T6", "temperature 0.3", "pr_auc", 30.35), ("F3", "crop + filter", "pr_auc", 33.32), ("F4", "filter, p = 0.8", "pr_auc", 33.5),
    ("F5", "CLMR, linear probe, 1 % of labels", "pr_auc", 33.12), ("F5", "supervised, 1 % of labels", "pr_auc", 24.81)])
def test_reported_values(item, row, metric, value):
    frame = report.reported("clmr", item=item, data="MTAT")
    assert frame[(frame["row"] == row) & (frame["metric"] == metric)]["value"].item() == value


def test_counts_of_reported_items():
    counts = report.reported("clmr").groupby("item").size()
    assert counts[["T3", "T4", "T5", "T6", "F3", "F4", "F5", "F6"]].tolist() == [12, 24, 12, 12, 8, 15, 14, 14]


def test_hyperparameters_keep_the_sources_apart():
    table = report.hyperparameters("clmr")
    assert table.index.is_unique and {"P", "T", "C1", "C2", "unit", "note"} <= set(table)
    assert table.loc["projection_dim", ["C1", "C2"]].tolist() == ["128", "64"]
    assert table.loc["temperature", "C2"] == "0.5" and table.loc["probe.lr", ["T", "C2"]].tolist() == ["0.0003", "0.001"]
    assert (table["P"] == "").all()


@pytest.mark.parametrize("mark, verified", [("U", "yes"), ("T", "no"), ("T", "")])
def test_a_number_nobody_verified_is_not_a_number(tmp_path, mark, verified):
    pd.DataFrame([{"item": "T1", "row": "a", "metric": "pr_auc", "value": "12.3", "unit": "%", "data": "d", "table": "t", "source": "s",
                   "mark": mark, "verified": verified, "note": ""}]).to_csv(tmp_path / "x.csv", index=False)
    frame = report.reported("x", tmp_path)
    assert frame["printed"].item() == "not verified" and frame["value"].isna().all()
    shown = report.beside(pd.DataFrame({"row": ["a"], "PR-AUC (%)": [INTERVAL]}), frame, {"PR-AUC (%)": "pr_auc"})
    assert "12.3" not in shown.to_csv() and shown.loc[0, "this run · PR-AUC (%)"] == "35.0 [30.0, 40.0]"


def test_footer_says_everything():
    line = report.footer([record(0), record(3, dirty=True)], "laptop", INTERVAL)
    for part in ("scale: laptop", "10 clips of 5 s", "2 runs, seeds 0, 3", "95% percentile bootstrap over tracks", "4 cores of a CPU", "1.0 minutes",
                 "aaaaaaa", "aaaaaaa+changes"):
        assert part in line
    assert "\n" not in line
    assert "NVIDIA" in report.footer([record(0, hardware={"cpu": "a CPU", "cores": 4, "device": "NVIDIA X"})], "gpu")


def save_all(folder):
    frame = pd.DataFrame({"row": ["a | b", "c <d>"], "this run · PR-AUC": [INTERVAL, None], "paper · PR-AUC": ["35.6", "not verified"]})
    report.save_table(frame, folder / "clmr_table10", "How to <read> it.", "foot", "Ten", "nbs/papers/1_clmr.ipynb", {"profile": folder.name})
    report.save_table(frame, folder / "clmr_table2", "How to read it.", "foot", "Two", about={"profile": folder.name})
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    report.save_figure(fig, folder / "clmr_figure1", frame[["row"]], "Caption & more.", "foot " * 60, "One")
    assert not fig.texts
    plt.close(fig)
    report.save_claims([report.claim("C1", "A beats B", INTERVAL, folder.name)], folder / "clmr_claims", "foot")


def test_reports_are_pure_functions(tmp_path):
    for name in ("one/laptop", "two/laptop"):
        save_all(tmp_path / name)
        report.summary_page(tmp_path / name, "page")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name / "laptop").iterdir()} for name in ("one", "two"))
    assert first == second and len(first) == 4 + 4 + 3 + 4 + 1


@pytest.mark.parametrize("profile, marked", [("smoke", True), ("test", True), ("laptop", False)])
def test_small_scales_are_marked_row_by_row(tmp_path, profile, marked):
    save_all(tmp_path / profile)
    table = pd.read_csv(tmp_path / profile / "clmr_table2.csv", keep_default_na=False)
    assert ("scale" in table) == marked
    assert not marked or table["scale"].tolist() == [profile, "–"]
    verdict = pd.read_csv(tmp_path / profile / "clmr_claims.csv")["this run · verdict"].item()
    assert verdict == ("not evaluated" if marked else "supported")


@pytest.mark.parametrize("low, high, verdict", [(.01, .2, "supported"), (-.2, -.01, "contradicted"), (-.1, .1, "undecided"), (0., .1, "undecided"),
                                                (float("nan"), float("nan"), "undecided")])
def test_verdicts(low, high, verdict):
    assert report.claim("C1", "A beats B", Interval((low + high) / 2, low, high), "laptop").verdict == verdict
    assert report.claim("C1", "A beats B", Interval((low + high) / 2, low, high), "smoke").verdict == "not evaluated"


class Balanced(HTMLParser):
    """Counts what is open; void elements aside."""
    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "link", "br"): self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_sound_ordered_and_self_contained(tmp_path):
    folder = tmp_path / "laptop"
    save_all(folder)
    (folder / "notebooks").mkdir()
    (folder / "notebooks" / "1_clmr.ipynb").write_text("{}")
    files.write_json(folder / "records" / "clmr" / "x.json", {"key": "x"})
    files.write_json(folder / ".doit.json", {"task": 1})
    page = report.summary_page(folder, "A <page>").read_text(encoding="utf8")
    reader = Balanced()
    reader.feed(page)
    assert not reader.open and "c <d>" in reader.text and "A <page>" in reader.text
    assert re.findall(r'<figure id="(.*?)"', page) == ["clmr-claims", "clmr-table2", "clmr-table10", "clmr-figure1"]
    links = re.findall(r'(?:src|href)="([^#"]+)"', page)
    assert "notebooks/1_clmr.ipynb" in links and all((folder / link).is_file() for link in links)
    assert "http" not in page and "<script" not in page


def test_page_of_nothing_and_of_missing_pictures(tmp_path):
    assert "Nothing has been made" in report.summary_page(tmp_path, "empty").read_text(encoding="utf8")
    save_all(tmp_path / "laptop")
    (tmp_path / "laptop" / "clmr_figure1.png").unlink()
    assert "The picture is missing" in report.summary_page(tmp_path / "laptop", "x").read_text(encoding="utf8")


def test_page_says_which_figures_are_older_than_a_failed_run(tmp_path):
    save_all(tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "1_clmr.failed.ipynb").write_text("{}")
    assert "failed; this is what was there before" in report.summary_page(tmp_path, "x").read_text(encoding="utf8")


def test_a_failing_save_leaves_the_old_file(tmp_path):
    save_all(tmp_path / "laptop")
    before = (tmp_path / "laptop" / "clmr_figure1.png").read_bytes()

    class Broken(plt.Figure):
        def savefig(self, path, **how):
            path.write_bytes(b"half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        report.save_figure(Broken(), tmp_path / "laptop" / "clmr_figure1", pd.DataFrame({"x": [1]}), "", "")
    assert (tmp_path / "laptop" / "clmr_figure1.png").read_bytes() == before
    assert not [p for p in (tmp_path / "laptop").rglob("*") if p.name.startswith(".tmp")]


def test_a_legend_at_the_edge_stays_clear_of_the_footer(tmp_path):
    """Tight saving moves the edges; without pinning, the legend lands on the footer's two lines."""
    fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    ax.plot([1, 2], label="x")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", facecolor="magenta", framealpha=1., frameon=True)
    picture = plt.imread(report.save_figure(fig, tmp_path / "clmr_figure1", pd.DataFrame({"x": [1]}), "", "foot " * 60))
    magenta = (np.abs(picture[..., :3] - [1, 0, 1]) < .02).all(-1).any(1)
    assert magenta.any() and np.flatnonzero(magenta).max() < len(picture) - .3 * fig.dpi * picture.shape[1] / (6 * fig.dpi)
    plt.close(fig)
