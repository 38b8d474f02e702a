"""A teacher of other classes: what its scores become, and what its files say of its classes."""
from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import CAFFE_BGR, NetworkChoice, SegOutput, get_segmentation_model, save_state_dict
from models.class_map import ClassMap, MappedTeacher, common_classes, for_predictions
from models.class_names import KnownClasses, classes_of
from utils.errors import UserError


class Teacher(nn.Module):
    """Gives the logits that it is made of, whatever it is shown."""

    name, preprocess, output_stride, strides = "teacher", CAFFE_BGR, 8, {"logits": 8, "c4": 8}

    def __init__(self, logits: Tensor, aux: Tensor | None = None) -> None:
        super().__init__()
        self.output = SegOutput(logits, aux, None, None, None, torch.ones(1), None)
        self.channels = {"logits": logits.shape[1], "c4": 7}

    def forward(self, x: Tensor) -> SegOutput:
        return self.output


def mapped(logits: Tensor, class_map: ClassMap) -> Tensor:
    return MappedTeacher(Teacher(logits), class_map)(torch.zeros(1)).logits


def test_a_merge_adds_probabilities_and_the_rest_is_shared_out() -> None:
    """Of 0.1, 0.2, 0.3, 0.4 the data set takes 0.2, and 0.1 + 0.4 as one class: 2/7 and 5/7."""
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log().view(1, 4, 1, 1)
    scores = mapped(logits + 3, ClassMap((0, 2), ((1,), (0, 3)), 3, 4)).flatten()
    torch.testing.assert_close(scores.exp(), torch.tensor([0.2, 0.5]).double() * torch.tensor(3.0).double().exp())
    torch.testing.assert_close(scores.softmax(0), torch.tensor([2 / 7, 5 / 7], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classes_that_are_not_merged_keep_their_scores_to_the_last_bit(dtype) -> None:
    logits = torch.randn(2, 5, 3, 4).to(dtype)
    found = mapped(logits, ClassMap((0, 1, 2), ((4,), (0, 2), (3,)), 3, 5))
    assert found.dtype == dtype and torch.equal(found[:, [0, 2]], logits[:, [4, 3]])
    assert torch.equal(found[:, 1], logits[:, [0, 2]].float().logsumexp(1).to(dtype))
    assert torch.equal(mapped(logits, ClassMap(tuple(range(5)), ((3,), (1,), (4,), (0,), (2,)), 5, 5)),
                       logits[:, [3, 1, 4, 0, 2]])


def test_scores_that_no_exponential_holds() -> None:
    logits = torch.tensor([5000.0, 5000.0, -5000.0]).view(1, 3, 1, 1)
    found = mapped(logits, ClassMap((0, 1), ((0, 1), (2,)), 2, 3)).flatten().tolist()
    assert found == pytest.approx([5000.6931, -5000.0])


def test_every_score_and_nothing_else_is_mapped() -> None:
    logits, aux = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    teacher = MappedTeacher(Teacher(logits, aux), ClassMap((1, 2), ((3,), (0,)), 3, 4))
    output = teacher(torch.zeros(1))
    assert torch.equal(output.logits, logits[:, [3, 0]]) and torch.equal(output.aux, aux[:, [3, 0]])
    assert output.c4 is teacher.net.output.c4 and output.head is None
    assert teacher.channels == {"logits": 2, "c4": 7} and teacher.num_class == 2
    assert common_classes(teacher) == (1, 2) and common_classes(teacher.net) is None


def test_predictions_are_of_the_data_set_and_never_of_a_class_that_the_teacher_does_not_know() -> None:
    logits, class_map = 9 * torch.randn(2, 4, 3, 5), ClassMap((1, 3, 4), ((2,), (0, 1), (3,)), 6, 4)
    teacher = MappedTeacher(Teacher(logits), class_map)
    whole = for_predictions(teacher)
    scores = whole(torch.zeros(1)).logits
    assert scores.shape[1] == whole.num_class == 6 and scores.isfinite().all()
    for size in ((3, 5), (16, 16)):  # as it is, and resized
        few, all_of_them = (F.interpolate(x, size, mode="bilinear", align_corners=True)
                            for x in (teacher(torch.zeros(1)).logits, scores))
        assert torch.equal(all_of_them.argmax(1), torch.tensor([1, 3, 4])[few.argmax(1)])
    assert for_predictions(teacher.net) is teacher.net


def test_what_is_learned_from_a_teacher_is_kept_apart_by_its_map() -> None:
    """Caches of stages go by the state of the teacher."""
    logits, maps = torch.zeros(1, 3, 1, 1), (ClassMap((0, 1), ((1,), (0,)), 3, 3), ClassMap((0, 2), ((1,), (0,)), 3, 3),
                                             ClassMap((0, 1), ((0,), (1,)), 3, 3))
    states = [MappedTeacher(Teacher(logits), one).state_dict()["table"].tolist() for one in maps]
    assert len({str(state) for state in states}) == 3


class TestKnownClasses:
    """What is said of a network's classes, without building it."""
    CHOICE = ("deeplab_mobile", "mobilenetv2_w0.25")

    def test_by_the_file_beside_the_weights(self, tmp_path) -> None:
        net, path = get_segmentation_model(*self.CHOICE, 3), tmp_path / "t.pth"
        save_state_dict(net, path)
        assert classes_of(NetworkChoice(*self.CHOICE, str(path))) == KnownClasses(3)
        net.trained_on = {"classes": ["a", "b", "c"]}
        save_state_dict(net, path)
        assert classes_of(NetworkChoice(*self.CHOICE, str(path))) == KnownClasses(3, ("a", "b", "c"))
        assert str(KnownClasses(3, ("a", "b", "c"))) == "3 classes (a, b, c)"

    def test_by_the_shape_of_the_classifier(self, tmp_path) -> None:
        path = tmp_path / "t.pth"
        torch.save(get_segmentation_model(*self.CHOICE, 6).state_dict(), path)
        assert classes_of(NetworkChoice(*self.CHOICE, str(path))) == KnownClasses(6)
        torch.save({"decode_head.conv_seg.weight": torch.zeros(8, 2, 1, 1)}, path)
        assert classes_of(NetworkChoice("mmseg:pspnet_r18-d8", "", str(path))) == KnownClasses(8)

    def test_by_the_description_of_smp(self, tmp_path) -> None:
        choice = NetworkChoice(f"smp:{tmp_path}", "")
        (tmp_path / "config.json").write_text(json.dumps({"classes": 4}))
        assert classes_of(choice) == KnownClasses(4)
        (tmp_path / "config.json").write_text("[")
        with pytest.raises(UserError, match="config.json: not a description"):
            classes_of(choice)

    def test_or_nothing(self) -> None:
        assert classes_of(NetworkChoice("module:a.b:c", "", "t.pth")) == KnownClasses()
        assert classes_of(NetworkChoice(*self.CHOICE)) == KnownClasses()
