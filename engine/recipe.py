"""What a training may have that the published runs had not: settings for data of one's own. All are off by default."""
from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

from losses.core import methods
from utils.errors import UserError
from utils.options import OptionGroup, flag, option

#: what ``--optimizer adamw`` sets where the command line does not: values of SGD do not fit it
ADAMW = {"lr": 1e-4, "min_lr": 0.0, "weight_decay": 0.01}
#: settings that only SGD has
OF_SGD = ("momentum", "nesterov")


def scalable_terms() -> list[str]:
    """The terms whose size depends on that of the map."""
    return [term.name for cls in methods().values() for term in cls.terms if term.depends_on_map]


@dataclass(frozen=True)
class Recipe(OptionGroup):
    """For data of one's own; the published runs had none of these."""

    epochs: int | None = option(None, "passes over the training images, in place of --max-iterations; --val-per-iters "
                                      "and --save-per-iters are then at most a tenth of the run unless given",
                                at_least=1)
    optimizer: str = option("sgd", f"adamw: lr {ADAMW['lr']:g}, weight decay {ADAMW['weight_decay']:g} but for norms "
                                   "and biases, min lr 0, unless given", choices=("sgd", "adamw"))
    warmup: int = option(0, "first steps in which the learning rate grows linearly to that of the decay", at_least=0)
    class_weights: str | None = option(
        None, "weights of the classes in the student's cross entropies; auto: 1 / ln(1.02 + share of the labeled "
              "pixels) (ENet); or a JSON file, {class name: weight} or a list", metavar="auto|FILE")
    ohem: bool = option(False, "cross entropies of the student of its hard pixels only (online hard example mining)")
    ohem_threshold: float = option(0.7, "a pixel is hard below this probability of its class", above=0, at_most=1,
                                   metavar="P")
    ohem_kept: float = option(0.19, "least share of the labeled pixels that counts (the usual 100,000 of a 512x1024 "
                                    "crop)", above=0, at_most=1, metavar="R")
    scale_weights: tuple[str, ...] | None = option(
        None, "terms whose weight is that of the published map size and is scaled to the run's; none: no term "
              "(default: those whose weight comes from --method)", metavar="TERM")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_weights == ("none",):
            object.__setattr__(self, "scale_weights", ())
        if unknown := [name for name in self.scale_weights or () if name not in scalable_terms()]:
            raise UserError(f"--scale-weights {unknown[0]}: expected none or some of "
                            f"{', '.join(scalable_terms())}, whose size depends on that of the map")


def without_recipe() -> dict[str, object]:
    """{setting: value} of the configurations of before there were these settings."""
    return {**asdict(Recipe()), "scale_weights": [], "class_map": None, "unlabelled": None, "unlabelled_share": 0.5,
            "teacher_scores": None, "stored_scores": None, "random_scale": True}


def recipe_defaults(parsed: Mapping[str, object], given: Collection[str],
                    kept: Collection[str] = ()) -> dict[str, object]:
    """What the recipe sets where the command line does not: {setting: value}. UserError for flags that exclude each
    other. parsed: the settings with the preset of ``--method``. given: those of the command line. kept: those
    of an earlier run's file."""
    values: dict[str, object] = {}
    if "scale_weights" not in given:
        scaled = parsed["scale_weights"]
        if scaled is None:
            scaled = [name for name in scalable_terms() if parsed["method"] is not None and parsed[f"lambda_{name}"]]
        values["scale_weights"] = [name for name in scaled if f"lambda_{name}" not in given]
    if parsed["epochs"] is not None and "max_iterations" in given:
        raise UserError("--epochs and --max-iterations both say how long to train: expected one of them")
    if parsed["optimizer"] == "adamw":
        if wrong := [flag(name) for name in OF_SGD if name in given]:
            raise UserError(f"--optimizer adamw has no {', '.join(wrong)}: it is of SGD")
        values.update({name: value for name, value in ADAMW.items() if name not in given and name not in kept})
    return values


def check_recipe(settings) -> None:
    """UserError for settings of an :class:`engine.settings.Settings` that contradict each other."""
    o, recipe = settings.optimization, settings.recipe
    if recipe.epochs is None and recipe.warmup >= o.max_iterations:
        raise UserError(f"--warmup {recipe.warmup}: expected fewer than the {o.max_iterations} steps of "
                        "--max-iterations")
    if recipe.optimizer == "adamw":
        rates = [name for method in settings.methods for name, value in vars(settings.options[method]).items()
                 if name.endswith("_lr") and value is None]
        if rates:
            raise UserError(f"--optimizer adamw: the stage before training is trained by SGD, for which --lr {o.lr:g} "
                            f"is not meant: expected {flag(rates[0])} too, such as {flag(rates[0])} 0.02")
