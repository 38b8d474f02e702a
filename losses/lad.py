"""LAD: a teacher that is shown the labels (Qiu et al., "Make a Strong Teacher with Label Assistance: A Novel Knowledge
Distillation Approach for Semantic Segmentation", ECCV 2024).

The teacher, which may be as small as the student, has the labels as a fourth input channel: a code of each pixel's
class (the ignored pixels are a class of their own) plus normal noise of standard deviation sigma, times 100 in units of
a pixel value. While the teacher learns (``lad_stage.py``), every image draws its own codes from N(0, 1) and sigma is
0.03, so that it has to look at the image too; while the student learns, the codes are fixed and sigma is 0.02. The
student's loss is CWD of the logits. The released student has a fourth channel of zeros: a student without it.

Public code exists for one network on Pascal VOC. Ours: fixed codes for any number of classes; the channel in the units
of a network whose input is not in pixel units; the schedule of the run for both stages, where the released one has a
learning rate of 1e-3 and a student that starts from trained weights (--lr 0.001 --student-pretrained FILE does that).
"""
from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from losses.cwd import cwd_loss
from losses.distiller import BuildContext, Distiller, Preparation, Term, register
from losses.label_channel import channel_scale, fixed_codes, with_labels
from losses.lad_stage import TeacherRecipe, TeacherState
from losses.logits import labels_at
from losses.stage import StageSettings, check_shares, common_words, run_stage
from models import get_segmentation_model
from models.output import SegOutput
from models.segmentation import add_input_channels
from models.weights import is_given, load_weights
from utils.cli import number
from utils.errors import UserError

NOISE = 0.02


def own_network(context: BuildContext) -> nn.Module:
    """The label-assisted network that the options describe, with its weights (none on the meta device or where a state
    will be loaded).

    Raises UserError for unknown networks, and for weights that do not fit or want other images than the student's.
    """
    o, wanted = context.options, context.student.preprocess
    network = get_segmentation_model(model=o.lad_model or o.student_model, num_class=context.num_class,
                                     backbone=o.lad_backbone or o.student_backbone, preprocess=wanted)
    if context.resumed or next(network.parameters()).is_meta:
        return add_input_channels(network, 1)
    same = o.lad_backbone in (None, o.student_backbone)
    base = o.lad_pretrained_base or (o.student_pretrained_base if same else None)
    if not is_given(o.lad_teacher):
        load_weights(network, base, "backbone", preprocess=o.student_preprocess)
    add_input_channels(network, 1)
    if is_given(o.lad_teacher):
        load_weights(network, o.lad_teacher)
    if network.preprocess != wanted:
        raise UserError(f"{o.lad_teacher or base}: LAD's teacher gets the student's images ({wanted}), but these "
                        f"weights want {network.preprocess}: choose weights of the same kind for both")
    return network


@register("lad")
class LAD(Distiller):
    """CWD of the logits from a label-assisted teacher of its own.

    network: four input channels; frozen, in eval mode, and part of this method's state, so that a resumed run has it.
    recipe: scale of the label channel, label of ignored pixels, and how the network learns. settings: of the stage in
    which it does, None when it is trained already.
    """

    title = "label-assisted distillation: a teacher of its own that is shown noisy labels (unofficial beyond VOC)"
    paper = "Qiu et al., Make a Strong Teacher with Label Assistance"
    year = 2024
    terms = (Term("lad", 0.0, "weight of CWD on the logits of LAD's own teacher"),)
    student_taps = ("logits",)
    teacher_taps = ()
    uses_images = True
    # the released code, for Pascal VOC; there is none for other data sets
    preset = {"*": {"lambda_lad": 3.0, "aux_weight": 0.02}}
    cost = "a pass of its own teacher, softmaxes of the logits; before training, that of the teacher"
    quick = {"lad_steps": 2, "lad_batch_size": 2}
    stage_options = ("lad_teacher", "lad_pretrained_base", "lad_steps", "lad_batch_size", "lad_lr")

    def __init__(self, network: nn.Module, recipe: TeacherRecipe,
                 settings: StageSettings | None = None) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("codes", fixed_codes(network.num_class))
        self.register_buffer("scale", torch.tensor(recipe.scale))
        self.recipe, self.settings = recipe, settings
        self._last: tuple[Tensor, Tensor] | None = None

    @classmethod
    def add_arguments(cls, group: argparse._ArgumentGroup) -> None:
        group.add_argument("--lad-teacher", metavar="FILE", default=None,
                           help="label-assisted teacher of an earlier run (default: train one before the student)")
        group.add_argument("--lad-model", default=None, help="its architecture (default: the student's)")
        group.add_argument("--lad-backbone", default=None, help="its backbone (default: the student's)")
        group.add_argument("--lad-pretrained-base", default=None, metavar="FILE",
                           help="ImageNet weights of its backbone (default: the student's, for the student's backbone)")
        group.add_argument("--lad-steps", type=number(int, 1), default=None, metavar="N",
                           help="steps of the stage that trains it (default: --max-iterations)")
        group.add_argument("--lad-batch-size", type=number(int, 1), default=None, metavar="N",
                           help="images per step of that stage, over all processes together (default: --batch-size)")
        group.add_argument("--lad-lr", type=number(float, 0, open_low=True), default=None, metavar="LR",
                           help="learning rate of the first step of that stage (default: --lr)")

    @classmethod
    def build(cls, context: BuildContext) -> LAD:
        """Raises UserError as :func:`own_network`."""
        o = context.options
        network = own_network(context)
        recipe = TeacherRecipe(o.momentum, o.weight_decay, o.poly_power, channel_scale(network.preprocess),
                               context.ignore_label, o.group_size)
        if is_given(o.lad_teacher):
            return cls(network, recipe)
        words = (network.name, o.momentum, o.weight_decay, o.poly_power, *common_words(context))
        settings = StageSettings(o.lad_steps or o.max_iterations, o.lad_batch_size or o.batch_size, o.lad_lr or o.lr,
                                 train_mode=True, seed=o.seed, words=words, save_every=o.save_per_iters, method="lad",
                                 result="teacher", shared_norm=o.sync_bn)
        check_shares(settings)
        return cls(network, recipe, settings)

    def prepare(self, stage: Preparation) -> None:
        """Train the network, or take it from the cache (:func:`losses.stage.run_stage`)."""
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

    def unsynchronised(self) -> set[str]:
        return {name for name, _ in (*self.named_parameters(), *self.named_buffers())}

    def forward(self, student: SegOutput, teacher: SegOutput | None, target: Tensor, step: int,
                generator: torch.Generator | None = None, images: Tensor | None = None) -> dict[str, Tensor]:
        with torch.no_grad():
            taught = self.network(with_labels(images, target, self.codes, NOISE, self.scale,
                                              self.recipe.ignore_label, generator)).logits
        self._last = taught, labels_at(target, taught.shape[-2:])
        return {"lad": cwd_loss(student.logits, taught)}

    def diagnostics(self) -> dict[str, Tensor]:
        """teacher_accuracy: share of the labelled pixels of the last batch, at logit size, that the teacher gets right
        with the help of the labels."""
        if self._last is None:
            return {}
        logits, labels = self._last
        labelled = labels != self.recipe.ignore_label
        right = ((logits.argmax(dim=1) == labels) & labelled).sum()
        return {"teacher_accuracy": right / labelled.sum().clamp(min=1)}
