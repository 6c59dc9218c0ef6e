"""Timing side by side: in every round each candidate runs once, in shuffled order, so that a machine's moods meet all of them alike.

What is reported is a ratio within a round: its median over the rounds, its smallest and its largest value. Nothing is timed before the
candidates have been shown to agree. An absolute time says more about the machine than about the code and appears only as a remark.
"""
import importlib.metadata
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch


class Disagreement(AssertionError):
    """Candidates do not compute the same thing, so their times say nothing."""


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes, until its work on a GPU has ended too."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def paired(
    candidates: dict[str, Callable[[], object]], # by name; one call is one round's work
    rounds: int | None = None, # None: 7, or 3 where a round takes more than 10 s
    measure: Callable[[Callable[[], object]], Any] = seconds, # what to take down of a call
) -> dict[str, list]: # by name, one measurement per round; row k of all of them is round k
    """Measure candidates round by round in shuffled order, after one round to warm up."""
    warm_up = seconds(lambda: [measure(work) for work in candidates.values()])
    rounds = rounds or (3 if warm_up > 10 else 7)
    taken = {name: [] for name in candidates}
    for number in range(rounds):
        for name in random.Random(number).sample(list(candidates), len(candidates)): taken[name].append(measure(candidates[name]))
    return taken


@dataclass(frozen=True)
class Row:
    """A ratio, round by round, and what it should be."""
    id: str # of the target: P16
    what: str # what stands against what
    ratio: float # median over the rounds
    min: float # over the rounds
    max: float # over the rounds
    rounds: int # how many
    at_least: float | None = None # the target, where much is good
    at_most: float | None = None # the target, where little is good
    note: str = "" # absolute figures, as a remark

    @property
    def margin(self) -> float:
        """By how much the target is met: 1 just so, less than 1 not; infinite without a target."""
        if self.at_least is not None: return self.ratio / self.at_least
        return float("inf") if self.at_most is None else self.at_most / max(self.ratio, 1e-12)


def row(id: str, what: str, over: list[float], under: list[float] | None = None, **more) -> Row:
    """A line of the table from one figure per round, or from two lists whose figures are divided round by round."""
    ratios = over if under is None else [a / b for a, b in zip(over, under, strict=True)]
    return Row(id, what, statistics.median(ratios), min(ratios), max(ratios), len(ratios), **more)


def header(*packages: str) -> str:
    """Machine, threads and versions."""
    found = []
    for name in ("numpy", "torch", *packages):
        try: found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError: found.append(f"{name} is not installed: its rows are missing")
    machine = [f"{platform.machine()} {platform.system()}", *([torch.cuda.get_device_name()] if torch.cuda.is_available() else [])]
    return ", ".join([*machine, f"{torch.get_num_threads()} thread(s)", f"Python {platform.python_version()}", *found])


def table(rows: list[Row]) -> str:
    """The rows for people."""
    lines = [("id", "what", "ratio", "min", "max", "n", "target", "", "remark")]
    for r in rows:
        target = f">= {r.at_least:g}" if r.at_least is not None else "" if r.at_most is None else f"<= {r.at_most:g}"
        lines.append((r.id, r.what, *(f"{x:.3g}" for x in (r.ratio, r.min, r.max)), str(r.rounds), target,
                      "" if not target else "met" if r.margin >= 1 else "MISSED", r.note))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def as_json(rows: list[Row]) -> str:
    """The rows for programs: by target, the ratio nearest to missing it, and all rows."""
    ids = dict.fromkeys(r.id for r in rows)
    nearest = {id: min((r for r in rows if r.id == id), key=lambda r: r.margin) for id in ids}
    return json.dumps({id: {"ratio": r.ratio, "min": r.min, "max": r.max, "what": r.what, "met": r.margin >= 1,
                            "rows": [asdict(other) for other in rows if other.id == id]} for id, r in nearest.items()}, indent=1)
