"""What a reader of a table has to know: settings that differ between its rows, revisions, busy machines."""
from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from engine.results import folder_of_images, revisions, shared_settings, uncommitted
from tools.reporting.figures import SAME_TIME, Clock, had_machine, machine_of
from tools.reporting.groups import PLAIN, Group, Result, Row

#: settings that a table has a row or a sentence for
OF_ROWS = frozenset(("max_iterations", "student_model", "student_backbone", "student_head_width", "dataset"))
WIDTH = 120


def shown(value: Any) -> str:
    """A setting for people: (176, 176) -> '176×176'; of a path its last part, the same on every machine."""
    if isinstance(value, (list, tuple)):
        return "×".join(map(str, value))
    return Path(value).name if isinstance(value, str) else str(value).lower()


def differing(group: Group, rows: Sequence[Row], read: Callable[[Result], Hashable]) -> dict[Hashable, list[str]]:
    """{value: names of the rows that have it} where there is more than one; else empty."""
    found: dict[Hashable, list[str]] = {}
    for row in rows:
        for value in row.values(read):
            found.setdefault(value, []).append(group.name(row))
    return found if len(found) > 1 else {}


def sentence(what: str, values: Mapping[str, Sequence[str]]) -> str:
    """'WHAT: a in x, y; b in z.'"""
    parts = [f"{value} in {', '.join(names)}" for value, names in values.items()]
    return f"{what}: {'; '.join(parts)}."


def warnings(group: Group) -> list[str]:
    """Sentences about what differs between rows that are compared."""
    found = []
    iterations = differing(group, [row for row in group.compared if not is_longer_plain(group, row)],
                           lambda run: run["iterations"])
    if iterations:
        found.append(sentence("iterations differ", iterations))
    for name, default in shared_settings(group.dataset).items():
        if name in OF_ROWS:
            continue
        values = differing(group, group.compared, lambda run, name=name, default=default: shown(
            run["settings"].get(name, default)))
        if values:
            found.append(sentence(f"`{name}` differs", values))
    for split, images in images_read(group).items():
        found.append(sentence(f"the images of `{split}` differ (with the start of a digest)", images))
    files = teacher_files(group)
    if files:
        found.append(sentence("the teacher's file differs (start of its SHA-256)", files))
    if files := files_within_rows(group):
        found.append(sentence("runs of one row learned from different files, not all of which the teacher's row made "
                              "(start of their SHA-256)", files))
    if codes := other_code(group):
        found.append(sentence("runs of one row had different code, not all of it committed", codes))
    changes = changed_on_the_way(group)
    if changes:
        found.append(sentence("settings or code were changed while a run went on", changes))
    return [f"**Warning**, {text}" for text in found]


def other_code(group: Group) -> dict[str, list[str]]:
    """{file: names of the rows} whose runs had different versions of it, one of them in no commit."""
    found: dict[str, list[str]] = {}
    for row in group.compared:
        loose = {name for run in row.runs for name in uncommitted(run)}
        for name in sorted(loose):
            if len({run["sources"][name] for run in row.runs if name in run.get("sources", {})}) > 1:
                found.setdefault(f"`{name}`", []).append(group.name(row))
    return found


def changed_on_the_way(group: Group) -> dict[str, list[str]]:
    """{setting: names of the rows with a run that was resumed with another value of it}."""
    found: dict[str, dict[str, None]] = {}
    for row in group.compared:
        for change in (change for run in row.runs for change in run.get("changed", ())):
            found.setdefault(f"`{change['setting']}`", {})[group.name(row)] = None
    return {setting: list(names) for setting, names in found.items()}


def is_longer_plain(group: Group, row: Row) -> bool:
    """Whether a row is plain training for more iterations than the baseline's, such as as long as a method took."""
    base = group.plain
    return (base is not None and row is not base and row.method == PLAIN
            and min(run["iterations"] for run in row.runs) > max(run["iterations"] for run in base.runs))


def teacher_files(group: Group) -> dict[str, list[str]]:
    """{hash: names of the rows that learned from this file}, where rows of the same teacher and seed differ."""
    by_seed: dict[tuple[str, int], set[str]] = {}
    found: dict[str, list[str]] = {}
    for row in group.compared:
        for run in row.runs:
            if run["teacher"]:
                digest = str(run["teacher"]["sha256"])[:8]
                by_seed.setdefault((row.teacher, run["seed"]), set()).add(digest)
                found.setdefault(digest, []).append(group.name(row))
    return {k: list(dict.fromkeys(v)) for k, v in found.items()} if any(len(v) > 1 for v in by_seed.values()) else {}


def files_within_rows(group: Group) -> dict[str, list[str]]:
    """{hash: rows with their seeds} of rows whose runs learned from several files, where the teacher's training is
    there and did not make all of them."""
    found: dict[str, list[str]] = {}
    for row in group.compared if group.teachers and not group.exact else ():
        seeds: dict[str, list[str]] = {}
        for run in row.runs:
            if run["teacher"]:
                seeds.setdefault(str(run["teacher"]["sha256"])[:8], []).append(str(run["seed"]))
        for digest, numbers in seeds.items() if len(seeds) > 1 else ():
            found.setdefault(digest, []).append(f"{group.name(row)} (seed {', '.join(numbers)})")
    return found


def images_read(group: Group) -> dict[str, dict[str, list[str]]]:
    """{split: {'N images (digest)': names of the rows}} where rows read other images or labels. Results of earlier
    versions do not say.

    The same images may have files of other sizes, or be decoded to other pixels, on another machine: one of the two has
    to be the same."""
    def values(split: str, *parts: str) -> dict[str, list[str]]:
        def read(run: Result) -> str | None:
            images = run["trained_on"]["splits"].get(split) if run.get("trained_on") else None
            return images and f"{images['images']} images ({', '.join(images[part][:7] for part in parts)})"

        found = {value: rows for value, rows in differing(group, group.compared, read).items() if value is not None}
        return found if len(found) > 1 else {}

    splits = dict.fromkeys(split for row in group.compared for run in row.runs
                           for split in (run.get("trained_on") or {}).get("splits", ()))
    found = {split: values(split, "names") or values(split, "sizes") and values(split, "pixels") for split in splits}
    return {split: images for split, images in found.items() if images}


def notes(group: Group) -> list[str]:
    """Sentences about where the scores come from."""
    found = []
    if not group.exact:
        found.append("The teacher's row is a training of its network, not the very file that the students learned "
                     "from.")
    if others := images_of_teachers(group):
        found.append(others)
    commits = differing(group, group.compared, commit)
    loose = {text for row in group.compared for text in row.values(commit) if not text.isalnum()}
    if commits:
        found.append(sentence("Revisions", commits))
    elif loose:
        found.append(f"Revision: {min(loose)}.")
    if any("*" in text for text in loose):
        found.append("With a star: code of training that was changed and not committed.")
    return found


def images_of_teachers(group: Group) -> str | None:
    """A sentence where the teacher may have been scored on other images than the rows, by what settings say."""
    theirs, ours = ({folder_of_images(run["settings"]) for row in rows for run in row.runs}
                    for rows in (group.teachers, group.compared))
    if theirs <= ours:
        return None
    where = [", ".join(sorted(map(str, folders))) for folders in (theirs, ours)]
    return (f"The teacher was trained and scored in {where[0]}, the rows in {where[1]}: its score can be compared "
            "where both have the same images to be scored on.")


def commit(run: Result) -> str:
    """The revision of the code that made a result, or those one after the other, with a star where the code of training
    was changed, and the run's own files that it does not tell."""
    text = " then ".join(f"{(one['commit'] or 'unknown')[:7]}{'*' if one['changed'] else ''}" for one in revisions(run))
    files = [f"{name} {digest[:7]}" for name, digest in sorted(uncommitted(run).items())]
    return f"{text} with {', '.join(files)}" if files else text


def time_notes(group: Group, clock: Clock) -> list[str]:
    """Sentences about the times of a group."""
    rows = (*group.rows, *group.teachers)
    shared = [group.name(row) for row in rows if not all(map(had_machine, row.runs))]
    found = []
    if clock.cpu:
        which = "runs" if len(shared) == len(rows) else f"runs of {', '.join(shared)}"
        found.append("Times are CPU seconds of the training process, without its loading processes, since the "
                     f"{which} may have shared their machine.")
    elif shared:
        found.append(f"busy: other processes ran on the machine of {', '.join(shared)}, or nothing says that none did.")
    uneven = [f"{group.name(row)} {spread:.2f}×" for row in rows
              if (spread := clock.spread(row)) is not None and spread > 1 + SAME_TIME]
    if uneven:
        found.append("Times differ much between the runs of a row, the longest over the shortest: "
                     f"{', '.join(uneven)}.")
    machines = differing(group, rows, lambda run: machine_text(machine_of(run)))
    if machines:
        found.append(sentence("Machines differ", machines))
    return found


def machine_text(machine: tuple) -> str:
    """A machine for people."""
    gpu, cpu, processes, threads = machine
    return f"{gpu or cpu}, {processes} process{'es' if processes > 1 else ''} of {threads} thread" \
           f"{'s' if threads > 1 else ''}"


def bullets(sentences: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(fill(f"- {text}", WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
                     for text in sentences)
