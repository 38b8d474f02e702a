"""From measured turns to figures, tables and the JSON file."""
from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tools.bench.turns import Measured
from tools.markdown import table


def best_rates(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """{precision: FLOP/s} of the machine: the best of all rounds."""
    return {name: max(r[name] for r in rounds) for name in rounds[0]} if rounds else {}


def figures(one: Measured, base: Measured, peak: Mapping[str, float]) -> dict[str, Any]:
    """What is reported of a variant. base: the one it is compared with; peak: FLOP/s of the machine by precision.

    speedup: ratio of the medians, above 1 where this one is faster; cpu_speedup: of the medians of CPU time. memory:
    bytes, the most at any time; work_memory: what came on top of what was held before the first step; the ratios are
    below 1 where this one needs less."""
    median = statistics.median(one.seconds)
    work_memory, base_memory = one.peak - one.idle, base.peak - base.idle
    rate = one.flops / median if one.flops else None
    limit = peak.get(one.precision)
    return {
        "seconds": one.seconds, "median": median, "min": min(one.seconds), "max": max(one.seconds),
        "speedup": statistics.median(base.seconds) / median, "cpu_seconds": one.cpu_seconds,
        "cpu_speedup": statistics.median(base.cpu_seconds) / statistics.median(one.cpu_seconds),
        "images_per_second": one.images / median if one.images else None,
        "memory": one.peak, "work_memory": work_memory, "memory_ratio": one.peak / base.peak,
        "work_memory_ratio": work_memory / base_memory if base_memory > 0 else None, "flops": one.flops or None,
        "flops_per_second": rate, "precision": one.precision, "threads": one.threads,
        "share_of_peak": rate / limit if rate and limit else None}


#: header, key of :func:`figures`, how it is shown, factor
COLUMNS = (("s/step", "median", ".3g", 1), ("least", "min", ".3g", 1), ("most", "max", ".3g", 1),
           ("speed-up", "speedup", ".2f", 1), ("of CPU time", "cpu_speedup", ".2f", 1),
           ("img/s", "images_per_second", ".3g", 1), ("memory (MB)", "memory", ".0f", 1e-6),
           ("beyond start (MB)", "work_memory", ".0f", 1e-6), ("ratio", "work_memory_ratio", ".2f", 1),
           ("GFLOP", "flops", ".4g", 1e-9), ("GFLOP/s", "flops_per_second", ".4g", 1e-9),
           ("of peak", "share_of_peak", ".0%", 1))


def variant_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of one case; columns without any figure are left out."""
    columns = [column for column in COLUMNS if any(r[column[1]] is not None for r in results.values())]
    rows = [[name, *("-" if r[key] is None else format(r[key] * factor, form) for _, key, form, factor in columns)]
            for name, r in results.items()]
    return table(["variant", *(column[0] for column in columns)], rows)


def method_table(results: Mapping[str, Measured | Exception], baselines: Sequence[str]) -> str:
    """The methods relative to the two baselines; a row of dashes for one that was refused."""
    header = ["method", "parameters (M)", "state (MB)", "memory (MB)", *(f"beyond {x}" for x in baselines), "s/step",
              *(f"x {x}" for x in baselines)]
    bases, rows = [results[name] for name in baselines], []
    for name, one in results.items():
        if isinstance(one, Exception):
            rows.append([name, *["-"] * (len(header) - 1)])
            continue
        memory = (one.facts["state"], one.peak, *(one.peak - base.peak for base in bases))
        median = statistics.median(one.seconds)
        rows.append([name, f"{one.facts['parameters'] / 1e6:.2f}", *(f"{size / 1e6:.0f}" for size in memory),
                     f"{median:.3g}", *(f"{median / statistics.median(base.seconds):.2f}" for base in bases)])
    return table(header, rows)


def form_table(results: Mapping[str, Sequence[Measured]]) -> str:
    """The losses and their slow forms: forward and backward of one loss, memory beyond its inputs."""
    header = ["loss", "slow form (s)", "this form (s)", "speed-up", "slow form (MB)", "this form (MB)"]
    rows = []
    for name, pair in results.items():
        slow, fast = (statistics.median(one.seconds) for one in pair)
        rows.append([name, f"{slow:.3g}", f"{fast:.3g}", f"{slow / fast:.1f}x",
                     *(f"{(one.peak - one.idle) / 1e6:.0f}" for one in pair)])
    return table(header, rows)
