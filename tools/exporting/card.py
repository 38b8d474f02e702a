"""What the files of a run say about the network that leaves, and the model card made of it. Nothing is made up: what
they do not say is called unknown."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataset import get_dataset_spec
from engine.results import SCORES, digest, read_log, read_result, result_path
from engine.settings import Settings, from_saved
from engine.trained import Trained, read_run_config
from losses.core import methods
from models.outside import portable
from tools.finished import find_log
from tools.markdown import table
from utils.files import sha256

UNKNOWN = "not known"


def read_record(trained: Trained) -> dict[str, Any]:
    """What the configuration, log and result of a run say of a training, as JSON values; {} for a file of no run.

    scores: {split: {figure: fraction}} of these very weights, {} where neither log nor result has them."""
    config = read_run_config(trained.file)
    if not config:
        return {}
    settings = from_saved(config, f"{trained.file}: the configuration beside it")
    n, o = settings.networks, settings.optimization
    teacher = {"model": portable(n.teacher_model), "backbone": n.teacher_backbone,
               "weights": _name(n.teacher_pretrained)}
    return {
        "dataset": settings.data.dataset, "method": settings.distillation.method or "afdcd", "terms": settings.active,
        "teacher": teacher if settings.needs_teacher else None,
        "started_from": _name(n.student_pretrained or n.student_pretrained_base),
        "iterations": o.max_iterations, "batch_size": o.batch_size, "crop_size": list(settings.data.crop_size),
        "seed": o.seed, **_scores(trained, settings)}


def _name(path: str | None) -> str | None:
    """A file without the folders of somebody's machine."""
    return None if path is None else Path(path).name


def _scores(trained: Trained, settings: Settings) -> dict[str, Any]:
    """"weights": "best" or "last", "step" of them, and "scores"; from the log, else from the result."""
    is_best = trained.file.stem.endswith("_best_model")
    found = {"weights": "best" if is_best else "last", "step": None, "scores": {}}
    log, result = find_log(trained.file.parent, settings), None
    try:
        if log is not None:
            records = [r for r in read_log(log) if isinstance(r, dict)]
            result = digest(records)
            validated = [r for r in records if r["kind"] == "val"]
            last = {validated[-1]["split"]: result["last"]} if validated else {}
            step = validated[-1]["step"] if validated else None
        elif settings.running.results is not None and result_path(settings).is_file():
            result = read_result(result_path(settings))
            last, step = {}, result["iterations"]
            if result["weights"].get(found["weights"]) != sha256(trained.file):
                return found  # of another run
    except KeyError:  # written by a version that wrote down less
        return found
    if result is None:
        return found
    scores = result["scores"] if is_best else last
    return {**found, "step": result["best_step"] if is_best else step,
            "scores": {split: {key: values[key] for key in SCORES} for split, values in scores.items()}}


def model_card(config: Mapping[str, Any]) -> str:
    """The README.md of an exported folder. config: the content of its ``config.json``."""
    record, name = config["training"], _network(config)
    title = f"{name}, {_dataset(record)}" if record else name
    head = ["---", "pipeline_tag: image-segmentation", "tags:", "- semantic-segmentation",
            "- knowledge-distillation", "---", "", f"# {title}", "",
            f"A semantic-segmentation network of {config['num_class']} classes, output at stride "
            f"{config['output_stride']}; sides of its input: "
            + ("any" if config["input_divisor"] == 1 else f"multiples of {config['input_divisor']}") + ".", ""]
    return "\n".join([*head, *_training(record), *_scores_section(record), *_files(config), *_use(), *_classes(config),
                      *_licence(record)]) + "\n"


def _network(names: Mapping[str, Any]) -> str:
    """Model and backbone; networks of other libraries have no backbone."""
    return "-".join(filter(None, (names["model"], names["backbone"])))


def _dataset(record: Mapping[str, Any]) -> str:
    """As one would print it."""
    name = record["dataset"]
    return "own images (folder format)" if name == "folder" else get_dataset_spec(name).title


def _training(record: Mapping[str, Any]) -> list[str]:
    lines = ["## Training", ""]
    if not record:
        return [*lines, "Not known: the weights came without the files of a run.", ""]
    method, teacher = record["method"], record["teacher"]
    about = methods().get(method)
    terms = ", ".join(f"{name} {weight:g}" for name, weight in record["terms"].items())
    rows = [["data", _dataset(record)],
            ["method", "plain training, no distillation" if about is None
             else f"`{method}` ({about.paper}, {about.year}), weights: {terms}"],
            ["teacher", "none" if teacher is None
             else f"{_network(teacher)}, file {teacher['weights'] or UNKNOWN}"],
            ["started from", record["started_from"] or "random weights"],
            ["length", f"{record['iterations']} iterations of {record['batch_size']} crops of "
                       f"{record['crop_size'][0]}x{record['crop_size'][1]}, seed {record['seed']}"]]
    return [*lines, "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows), ""]


def _scores_section(record: Mapping[str, Any]) -> list[str]:
    lines = ["## Scores", ""]
    if not record or not record["scores"]:
        return [*lines, "Not known: no log or result of the run was found.", ""]
    names = {"mIoU": "mIoU %", "mIoU_present": "of occurring classes", "pixAcc": "pixel accuracy %",
             "mAcc": "mean accuracy %"}
    rows = [[split, *(f"{100 * values[key]:.2f}" for key in names)] for split, values in record["scores"].items()]
    which = {"best": "that scored best on the first split", "last": "after the last iteration"}[record["weights"]]
    return [*lines, f"As the run itself measured them, of the weights {which} (iteration {record['step']}).", "",
            table(["split", *names.values()], rows), ""]


def _files(config: Mapping[str, Any]) -> list[str]:
    rows = [[one["file"], form, f"[{', '.join(map(str, one['input']['shape']))}] {one['input']['dtype']}",
             one["output"]["name"], f"{one['check']['max_difference']:.1e}", f"{100 * one['check']['agreement']:.3f}"]
            for form, one in config["exports"].items()]
    if not rows:
        return []
    header = ["file", "form", "input", "output", "largest difference", "same class %"]
    return ["## Exported forms", "", "Compared with PyTorch on two sizes; differences of logits.", "",
            table(header, rows), ""]


def _use() -> list[str]:
    return ["## Use", "", "```python", "from engine.segmenter import Segmenter  # of the repository that made this",
            "index = Segmenter.from_pretrained(\"FOLDER_OR_HUB_ID\")(\"picture.jpg\")  # [H, W]", "```", ""]


def _classes(config: Mapping[str, Any]) -> list[str]:
    names = config["classes"]
    text = ", ".join(f"{i} {name}" for i, name in enumerate(names)) if names else "Not known."
    return ["## Classes", "", text, ""]


def _licence(record: Mapping[str, Any]) -> list[str]:
    """What the terms may depend on; which they are is for the user to say."""
    teacher = (record.get("teacher") or {}).get("weights")
    parts = [f"the images and labels ({_dataset(record)})" if record else "the images and labels it was trained on",
             *([f"the teacher's weights ({teacher})"] if teacher else []),
             *([f"the weights it started from ({record['started_from']})"] if record.get("started_from") else [])]
    return ["## License", "", "Not stated. The program that wrote this page knows none; say one before you publish. "
            f"The terms of these may matter: {', '.join(parts)}."]
