"""CIRKD: relations of pixels across images (Yang et al., "Cross-Image Relational Knowledge Distillation for Semantic
Segmentation", CVPR 2022).

With s and t the pixel vectors of student and teacher at unit length, tau = 0.1:
``cirkd_batch``: mean over the ordered image pairs (i, j) of a group and the pixels p of i of
    KL(softmax(t_i[p] . t_j / tau) || softmax(s_i[p] . s_j / tau)), the softmaxes over the pixels of j.
``cirkd_pixel``, ``cirkd_region``: mean over the labeled pixels of KL(softmax(t . v / tau) || softmax(s . v / tau)),
    where s is projected to the teacher's width and v are vectors of the teacher kept in queues per class: single
    pixels, and class means of whole images.
"""
from __future__ import annotations

from torch import Generator, Tensor

from losses.core import Batch, Distiller, Needs, NetInfo, RunFacts, Term, memory, register
from losses.core.memory import HEADS, Draws, MemoryRelations, MemorySettings, RelationOptions
from losses.core.queues import queue_names
from losses.core.relations import minibatch_pixel_loss
from utils.randomness import step_generator

__all__ = ["CIRKD", "Draws", "MemoryRelations", "MemorySettings", "minibatch_pixel_loss"]


@register("cirkd")
class CIRKD(Distiller):
    """The head maps of both networks through ``minibatch_pixel_loss`` and ``MemoryRelations``. Every GPU and training
    state holds 22000 queued vectors per class: 0.43 GB for 19 classes of width 256, 3.4 GB for 150, 4.1 GB for 182."""
    title = "cross-image relations; queues take 0.43 GB (19 classes) to 4.1 GB (182 classes)"
    paper = "Yang et al., Cross-Image Relational Knowledge Distillation for Semantic Segmentation"
    year = 2022
    terms = (Term("cirkd_batch", 0.0, "weight of CIRKD's pixel relations between the images of a group"),
             Term("cirkd_pixel", 0.0, "weight of CIRKD's relations with queued pixels (0.39 GB for 19 classes, 3-4 GB "
                                      "for 150 or more)", needs_labels=True),
             Term("cirkd_region", 0.0, "weight of CIRKD's relations with queued class means (0.04 GB for 19 classes)",
                  needs_labels=True))
    Options = RelationOptions
    needs = HEADS
    cost = "relations of all positions between two images and to about 5000 queue vectors"
    # the released scripts; for VOC the author's answer on the repository (0.1 falls behind the baseline there)
    preset = {"*": {"lambda_kd": 1.0, "lambda_cirkd_batch": 1.0, "lambda_cirkd_pixel": 0.1, "lambda_cirkd_region": 0.1},
              "voc": {"lambda_cirkd_pixel": 0.01, "lambda_cirkd_region": 0.01}}
    rows = {"*": {"compat": "reference"}}

    def __init__(self, options: RelationOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> None:
        """Raises UserError when a queue is too short."""
        super().__init__()
        self.memory = memory.build_memory(self.method, options, run, student, teacher)
        self.batch_options, self.seed = memory.build_batch(self.method, options, run), run.seed
        self.whole_batch = bool(queue_names(self))

    @classmethod
    def requires(cls, options: RelationOptions, run: RunFacts, student: NetInfo, teacher: NetInfo | None) -> Needs:
        return memory.relation_needs(cls.method, options, run)

    def forward(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        """``generator`` differs between processes and is not used: what enters the queues has to be the same on all of
        them. (The slots that they compare with are not: ``draw_slots``.)"""
        heads, losses = (batch.student.head, batch.teacher.head), {}
        if self.batch_options is not None:
            losses["cirkd_batch"] = minibatch_pixel_loss(*heads, **self.batch_options)
        if self.memory is not None:
            shared = step_generator(batch.target.device, self.seed, self.method, batch.step)
            labeled = batch.with_labels()
            queued = self.memory(labeled.student.head, labeled.teacher.head, labeled.target, generator=shared)
            losses |= {f"cirkd_{name}": value for name, value in queued.items()}
        return losses

    def unsynchronized(self) -> set[str]:
        return queue_names(self)

    def diagnostics(self) -> dict[str, Tensor]:
        """``pixel_queue_filled``, ``region_queue_filled``: share of the slots written since the start."""
        return memory.queue_diagnostics(self.memory)
