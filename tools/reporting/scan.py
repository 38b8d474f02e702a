"""The table of a scan of loss weights: what every value gives on the split that chooses."""
from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tools.markdown import spread, table
from tools.reporting.cautions import bullets, warnings
from tools.reporting.groups import Group, Row, chosen_on, where
from tools.reporting.tables import NOTHING, parts, title
from utils.errors import UserError

SUFFIX = "-scan"


@dataclass(frozen=True)
class Trial:
    """One value of a method's weight, as its label writes it, with the scores on the split that chooses, in percent."""
    method: str
    value: str
    row: Row
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.scores)


def trials(group: Group) -> dict[str, list[Trial]]:
    """{method: its trials, by value}. UserError for a label that is not METHOD+VALUE, but for plain runs."""
    found: dict[str, list[Trial]] = {}
    for row in group.shown:
        if row.method == "none":
            continue
        method, _, value = row.label.partition("+")
        try:
            float(value)
        except ValueError:
            raise UserError(f"{where(row.runs[0])}: expected a label METHOD+VALUE in a protocol that ends in "
                            f"{SUFFIX}, such as afdcd+2e-4") from None
        scores = tuple(100 * run["scores"][chosen_on(run)]["mIoU"] for run in row.runs)
        found.setdefault(f"{method} ({row.teacher})" if group.shows_teachers else method, []).append(
            Trial(method, value, row, scores))
    return {name: sorted(own, key=lambda one: float(one.value)) for name, own in found.items()}


def best(own: Sequence[Trial]) -> Trial:
    """The trial that is chosen: the best mean, the smaller value where two are equal."""
    return max(own, key=lambda one: one.mean)


def scanned(own: Sequence[Trial]) -> str:
    """The terms whose weights differ between the trials."""
    weights = [run["active"] for one in own for run in one.row.runs]
    terms = dict.fromkeys(term for each in weights for term in each)
    return ", ".join(term for term in terms if len({each.get(term) for each in weights}) > 1) or NOTHING


def scan(group: Group, brief: bool = False) -> str:
    """A row per method, a column per trial: the value and its score; brief: only what was chosen."""
    found = trials(group)
    if not found:
        raise UserError(f"protocol {group.protocol!r} has no distilled runs: expected labels METHOD+VALUE")
    width = max(map(len, found.values()))
    rows = []
    for name, own in found.items():
        chosen = best(own)
        cells = [f"**{text}**" if one is chosen else text for one in own
                 for text in [f"{one.value}: {spread(one.scores, '.2f')}"]]
        if brief:
            cells = [f"{chosen.value}: {spread(chosen.scores, '.2f')}"]
        rows.append([name, scanned(own), str(len(own)), *cells, *[NOTHING] * (0 if brief else width - len(cells))])
    header = ["method", "weights of", "trials", *(["chosen"] if brief else [f"trial {i + 1}" for i in range(width)])]
    splits = dict.fromkeys(chosen_on(run) for own in found.values() for one in own for run in one.row.runs)
    text = title(group, f"mIoU on {', '.join(splits)} in percent by weight, the chosen one{'' if brief else ' bold'}",
                 brief)
    counts = {len(own) for own in found.values()}
    remarks = [*warnings(group), *(["**Warning**, the methods had different numbers of trials."]
                                   if len(counts) > 1 else [])]
    return parts(text, table(header, rows), bullets(remarks))
