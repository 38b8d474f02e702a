"""LAD: a teacher that is shown the labels (Qiu et al., "Make a Strong Teacher with Label Assistance: A Novel Knowledge
Distillation Approach for Semantic Segmentation", ECCV 2024).

The teacher, which may be as small as the student, has the labels as a fourth input channel: a code of each pixel's
class (the ignored pixels are a class of their own) plus normal noise of standard deviation sigma, times 100 in units of
a pixel value. While the teacher learns (``stages/label_assisted.py``), every image draws its own codes from N(0, 1)
and sigma is 0.03, so that it has to look at the image too; while the student learns, the codes are fixed and sigma is
0.02. The student's loss is CWD of the logits, the student's resized where the sizes differ. The released student has a
fourth channel of zeros: a student without it.

Public code exists for one network on VOC. Unofficial: codes for any number of classes; a channel in units of the input;
the run's schedule for both stages (released: lr 1e-3 and, as by student_pretrained, a student with trained weights).
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from losses.core import Batch, Distiller, Needs, NetInfo, OptionGroup, Preparation, RunFacts, Term, option, register
from losses.core.labels import labels_at
from losses.core.logit_losses import cwd_loss
from losses.core.objective import resize_maps
from losses.stages.label_assisted import TeacherRecipe, TeacherState, channel_scale, fixed_codes, with_labels
from losses.stages.stage import check_shares, run_stage, stage_settings
from models.segmentation import add_input_channels
from models.weights import is_given, load_weights
from utils.errors import UserError

NOISE = 0.02


@dataclass(frozen=True)
class LADOptions(OptionGroup):
    lad_teacher: str | None = option(None, "label-assisted teacher of an earlier run (default: train one before the "
                                           "student)", metavar="FILE")
    lad_model: str | None = option(None, "its architecture (default: the student's)")
    lad_backbone: str | None = option(None, "its backbone (default: the student's)")
    lad_pretrained_base: str | None = option(
        None, "ImageNet weights of its backbone (default: the student's, for the student's backbone)", metavar="FILE")
    lad_steps: int | None = option(
        None, "steps of the stage that trains it (default: those of the student)", at_least=1, metavar="N")
    lad_batch_size: int | None = option(None, "images per step of that stage, over all processes together (default: as "
                                              "the student)", at_least=1, metavar="N")
    lad_lr: float | None = option(
        None, "learning rate of the first step of that stage (default: the student's)", above=0, metavar="LR")


def own_network(options: LADOptions, run: RunFacts, student: NetInfo) -> nn.Module:
    """The label-assisted network that the options describe, with its weights (none on the meta device or where a state
    will be loaded). UserError: unknown network, weights that do not fit or want other images than the student's."""
    o, wanted = options, student.preprocess
    choice = replace(run.student, model=o.lad_model or run.student.model, pretrained=None, pretrained_base=None,
                     backbone=o.lad_backbone or run.student.backbone, preprocess=wanted, aux=None)
    network = choice.build(run.num_class)
    if not hasattr(network, "pretrained"):
        raise UserError(f"method 'lad' adds an input channel to its own teacher, which {network.name} does not take: "
                        "choose a network of this repository for it", settings=["lad_model", "lad_backbone"])
    if run.resumed or next(network.parameters()).is_meta:
        return add_input_channels(network, 1)
    base = o.lad_pretrained_base or (run.student.pretrained_base if choice.backbone == run.student.backbone else None)
    if not is_given(o.lad_teacher):
        load_weights(network, base, "backbone", preprocess=run.student.preprocess)
    add_input_channels(network, 1)
    if is_given(o.lad_teacher):
        load_weights(network, o.lad_teacher)
    if network.preprocess != wanted:
        raise UserError(f"{o.lad_teacher or base}: LAD's teacher gets the student's images ({wanted}), but these "
                        f"weights want {network.preprocess}: choose weights of the same kind for both")
    return network


@register("lad")
class LAD(Distiller):
    """CWD of the logits from a label-assisted teacher of its own. network: four input channels; frozen, in eval mode,
    in this method's state for a resumed run. settings: of the stage in which it learns, None when it is trained."""
    title = "label-assisted distillation: a teacher of its own that is shown noisy labels (unofficial beyond VOC)"
    paper = "Qiu et al., Make a Strong Teacher with Label Assistance"
    year = 2024
    Options = LADOptions
    terms = (Term("lad", 0.0, "weight of CWD on the logits of LAD's own teacher", needs_labels=True),)
    needs = Needs(student=("logits",))
    preset = {"*": {"lambda_lad": 3.0, "aux_weight": 0.02}}  # the released code, which is for Pascal VOC alone
    rows = {"*": {"lad_model": "deeplabv3"}}
    cost = "a pass of its own teacher, softmaxes of the logits; before training, that of the teacher"
    trial = {"lad_steps": 2, "lad_batch_size": 2}
    stage_options = ("lad_teacher", "lad_pretrained_base", "lad_steps", "lad_batch_size", "lad_lr")

    def __init__(self, options: LADOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> None:
        """Raises UserError as :func:`own_network`, and when the processes cannot share the stage's batches."""
        super().__init__()
        o, self.settings = options, None
        self.network = own_network(o, run, student).eval().requires_grad_(False)
        scale = channel_scale(self.network.preprocess)
        self.register_buffer("codes", fixed_codes(self.network.num_class))
        self.register_buffer("scale", torch.tensor(scale))
        sgd = run.momentum, run.weight_decay, run.poly_power
        self.recipe = TeacherRecipe(*sgd, scale, run.ignore_label, run.group_size)
        if not is_given(o.lad_teacher):
            self.settings = check_shares(stage_settings(
                run, "lad", "teacher", o.lad_steps or run.max_iterations, o.lad_batch_size or run.batch_size,
                o.lad_lr or run.lr, self.network.name, *sgd, train_mode=True, shared_norm=run.sync_bn))
        self._last: tuple[Tensor, Tensor] | None = None

    def prepare(self, stage: Preparation) -> None:
        """Train the network, or take it from the cache (:func:`losses.stages.stage.run_stage`)."""
        stage.log(f"lad: the label-assisted teacher is {self.network.name}"
                  f"{'' if self.settings else ', trained already: the options of its training have no effect'}")
        if self.settings is not None:
            state = TeacherState(self.network, self.settings, self.recipe)
            run_stage(stage, state, self.network, self.settings, role="student")
            state.freeze()
            self.network.eval()

    def train(self, mode: bool = True) -> LAD:
        """As every module, but for the network, which stays in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    def unsynchronized(self) -> set[str]:
        return {name for name, _ in (*self.named_parameters(), *self.named_buffers())}

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        with torch.no_grad():
            assisted = with_labels(batch.images, batch.target, self.codes, NOISE, self.scale, self.recipe.ignore_label,
                                   generator)
            teacher = self.network(assisted)
        student = resize_maps(batch.student, teacher, ("logits",))
        self._last = teacher.logits, labels_at(batch.target, teacher.logits.shape[-2:])
        return {"lad": cwd_loss(student.logits, teacher.logits, method="lad")}

    def diagnostics(self) -> dict[str, Tensor]:
        """teacher_accuracy: share of the last batch's labeled pixels, at logit size, that the assisted teacher gets."""
        if self._last is None:
            return {}
        logits, labels = self._last
        labeled = labels != self.recipe.ignore_label
        right = ((logits.argmax(dim=1) == labels) & labeled).sum()
        return {"teacher_accuracy": right / labeled.sum().clamp(min=1)}
