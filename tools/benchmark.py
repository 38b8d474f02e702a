#!/usr/bin/env python3
"""What things cost on this machine, fast forms beside plain ones in one run.

    python tools/benchmark.py step                                  # plain, fast and bf16 in turn
    python tools/benchmark.py step --projector enhanced --against HEAD~1 --variants fast --json step.json
    python tools/benchmark.py criterion --variants plain fast --variant 'half=--amp bf16'
    python tools/benchmark.py {contrast,loader,eval,methods,slow-forms} --help

Every variant is a process of its own with its own flags of train_kd.py (eval: of eval.py). The processes work in turn,
A B A B ..., one at a time, so that a machine that slows down slows all of them. --short: a few seconds.
"""
from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from tools.bench.cases import BASELINES, COMPARISONS, form_jobs, job, method_jobs
from tools.bench.options import Common, Compared, Contrast, Criterion, Eval, Loader, Methods, SlowForms, Step
from tools.bench.report import best_rates, figures, form_table, method_table, variant_table
from tools.bench.turns import Plan, Refused, Worker, measure
from utils.cli import ArgumentParser, read_options, run_main
from utils.errors import UserError
from utils.files import check_target, write_json
from utils.machine import machine

BENCHMARKS: dict[str, type[Common]] = {"step": Step, "criterion": Criterion, "contrast": Contrast, "loader": Loader,
                                       "eval": Eval, "methods": Methods, "slow-forms": SlowForms}


def parse(argv: list[str]) -> tuple[str, Common]:
    """(which benchmark, its options)."""
    first = ArgumentParser(prog="benchmark.py", description=__doc__.split("\n")[0], usage="%(prog)s WHAT [options]")
    about = "; ".join(f"{name}: {group.__doc__}" for name, group in BENCHMARKS.items())
    first.add_argument("what", choices=tuple(BENCHMARKS), help=about)
    name = first.parse_args(argv[:1]).what
    parser = ArgumentParser(prog=f"benchmark.py {name}", description=BENCHMARKS[name].__doc__)
    parser.add_options(parser, BENCHMARKS[name])
    parsed = parser.parse_args(argv[1:])
    if parsed.short:
        parser.set_defaults(**BENCHMARKS[name].SHORT)
        parsed = parser.parse_args(argv[1:])
    return name, read_options(vars(parsed), BENCHMARKS[name])


def make_plan(options: Common) -> Plan:
    """How the turns go: on a GPU a step is short, and its memory is given back between the turns."""
    gpu, seconds = options.device == "cuda", options.seconds or float("inf")
    if isinstance(options, Compared):
        return Plan(options.repeats, options.steps or (10 if gpu else 1), warm=2 if gpu else 0, first=3 if gpu else 1,
                    fresh=options.fresh, flops=not isinstance(options, Loader), seconds=seconds)
    return Plan(options.repeats, options.steps, fresh=True, flops=False, strict=isinstance(options, SlowForms),
                seconds=seconds)


def compare(options: Compared, folder: Path) -> dict[str, Any]:
    """Measure every case of a comparison of variants and print its table."""
    plan, measured, rounds = make_plan(options), [], []
    with ExitStack() as alive:
        peak = alive.enter_context(Worker(job("peak", options, small=options.short))) if plan.flops else None
        for case in COMPARISONS[type(options)](options, folder):
            results, rates = measure(case.jobs, plan, peak)
            measured.append((case, results))
            rounds += rates
    best, cases = best_rates(rounds), []
    for case, results in measured:
        base = next(iter(results.values()))
        shown = {name: figures(one, base, best) for name, one in results.items()}
        print(f"{case.title}\n\n{variant_table(shown)}\n")
        cases.append({"title": case.title, "variants": {
            name: {**one, "flags": case.jobs[name]["flags"]} for name, one in shown.items()}})
    if best:
        print("machine peak, measured between the turns: "
              + ", ".join(f"{rate / 1e9:.4g} GFLOP/s in {name}" for name, rate in best.items()))
    return {"peak": best, "cases": cases}


def compare_methods(options: Methods, folder: Path) -> dict[str, Any]:
    """Measure every method beside both baselines and print the table."""
    results, _ = measure(method_jobs(options, folder), make_plan(options))
    for name in BASELINES:
        if isinstance(results[name], Refused):
            raise UserError(f"the baseline {name!r} could not be measured: {results[name]}")
    print(f"{options.teacher} -> {options.student}, {options.dataset}, crop {options.crop[0]}x{options.crop[1]}, batch "
          f"{options.batch}\n\n{method_table(results, BASELINES)}")
    for name, one in results.items():
        if isinstance(one, Refused):
            print(f"\n{name}: not measured: {one}")
    return {"methods": {name: {"refused": str(one)} if isinstance(one, Refused) else asdict(one)
                        for name, one in results.items()}}


def compare_forms(options: SlowForms, folder: Path) -> dict[str, Any]:
    """Measure five losses beside their slow forms and print the table."""
    jobs = form_jobs(options)
    results, _ = measure({name: one for pair in jobs.values() for name, one in pair.items()}, make_plan(options))
    pairs = {name: [results[one] for one in pair] for name, pair in jobs.items()}
    print(f"heads of {options.teacher} and {options.student}, {options.dataset}, crop {options.crop[0]}x"
          f"{options.crop[1]}, batch {options.batch}\n\n{form_table(pairs)}")
    return {"losses": {name: {"slow": asdict(slow), "this": asdict(this)} for name, (slow, this) in pairs.items()}}


def main(argv: list[str] | None = None) -> int:
    """Measure and print Markdown tables. Returns the exit code."""
    name, options = parse(sys.argv[1:] if argv is None else argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: expected a GPU that torch can use, there is none")
    if options.json is not None:
        check_target(Path(options.json), "--json", is_folder=False)
    run = {Methods: compare_methods, SlowForms: compare_forms}.get(type(options), compare)
    about = machine(options.device) | {"threads": options.threads or torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        result = run(options, Path(folder))
    print(f"\n{about['gpu'] or about['cpu']}, {about['threads']} threads, torch {about['torch']}; "
          f"medians of at most {options.repeats} turns")
    if options.json is not None:
        settings = {key: value for key, value in asdict(options).items() if key != "json"}
        write_json(Path(options.json), {"benchmark": name, "machine": about, "settings": settings, **result})
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
