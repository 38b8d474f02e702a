"""Stored scores: what comes back, and what is noticed."""
from __future__ import annotations

import pickle

import pytest
import torch

from dataset.scores import Scores, make_scores, open_scores
from utils.errors import UserError

SPLIT = {"images": 3, "names": "n", "pixels": "p", "sizes": "s"}
DATA = {"dataset": "d", "classes": ["a", "b"], "splits": {"train": SPLIT}}
ABOUT = {"teacher": {"name": "t", "weights": "w"}, "data": DATA, "crop": [16, 24], "images": 3, "precision": "float32",
         "taps": {"logits": 7, "aux": 3}, "size": [2, 3], "dtype": "float32", "top_k": 0}


def scores_like(count: int = 6) -> torch.Tensor:
    return 3 * torch.randn(count, 10, 2, 3, generator=torch.Generator().manual_seed(0))


def filled(folder, numbers=range(6), **changes) -> Scores:
    folder.mkdir(exist_ok=True)
    scores = make_scores(folder, "train", {**ABOUT, **changes})
    scores.reserve()
    scores.write(list(numbers), scores_like()[list(numbers)])
    return scores


@pytest.mark.parametrize(("dtype", "within"), [("float32", 0), ("float16", 2**-10)])
def test_what_is_stored_comes_back(tmp_path, dtype, within) -> None:
    filled(tmp_path, dtype=dtype)
    scores = pickle.loads(pickle.dumps(open_scores(tmp_path, "train", ABOUT)))
    for number, wanted in enumerate(scores_like()):
        found = scores.read(number // 2, number % 2 == 1).float()
        torch.testing.assert_close(found, wanted, rtol=within, atol=1e-3 * within)
    assert not scores.missing()


def test_the_highest_classes_keep_their_scores_and_the_others_their_sum(tmp_path) -> None:
    scores = filled(tmp_path, top_k=2)
    for number, wanted in enumerate(scores_like()):
        for found, whole in zip(*(x.split([7, 3]) for x in (scores.read(number // 2, number % 2 == 1), wanted)),
                                strict=True):
            values, classes = whole.topk(2, dim=0)
            assert torch.equal(found.gather(0, classes), values)
            rest = torch.ones_like(whole, dtype=torch.bool).scatter(0, classes, False)
            torch.testing.assert_close(found.softmax(0).gather(0, classes), whole.softmax(0).gather(0, classes))
            assert all(len(set(found[:, i, j][rest[:, i, j]].tolist())) == 1 for i in range(2) for j in range(3))
    assert scores.size < Scores(tmp_path, "train", ABOUT).size


def test_an_interrupted_call_goes_on_and_damage_is_mended(tmp_path) -> None:
    filled(tmp_path, [0, 1, 4])
    with pytest.raises(UserError, match=r"3 of 6 scores are there; tools/cache_teacher.py with the same flags"):
        open_scores(tmp_path, "train", ABOUT)
    scores = make_scores(tmp_path, "train", ABOUT)
    scores.reserve()
    assert scores.missing() == [2, 3, 5]
    scores.write(scores.missing(), scores_like()[scores.missing()])
    changed = bytearray(scores.records.read_bytes())
    changed[4 * scores.size + 7] ^= 1
    scores.records.write_bytes(changed)
    found = open_scores(tmp_path, "train", ABOUT)
    with pytest.raises(UserError, match="train.scores: the scores of image 2 are damaged; tools/cache_teacher.py"):
        found.read(2, False)
    assert found.missing() == [4]
    scores.records.write_bytes(changed[:-3])
    with pytest.raises(UserError, match="6 of 6 scores are there"):
        open_scores(tmp_path, "train", ABOUT)


@pytest.mark.parametrize(("changes", "expected"), [
    ({"teacher": {"name": "t", "weights": "v"}}, r"scores of another teacher \(t, weights w\), not of t, v"),
    ({"teacher": {"name": "t", "weights": "w", "taps": "logits=a"}},
     "scores of a teacher without --teacher-taps, not with --teacher-taps logits=a"),
    ({"crop": [16, 16]}, "scores of crops of 16x24, not 16x16"),
    ({"data": {**DATA, "splits": {"train": {**SPLIT, "images": 2}}}}, "scores of other data: train: 3 -> 2 images"),
])
def test_scores_of_something_else(tmp_path, changes, expected) -> None:
    filled(tmp_path)
    for use in (open_scores, make_scores):
        with pytest.raises(UserError, match=f"train.json: .*{expected}"):
            use(tmp_path, "train", {**ABOUT, **changes})
    with pytest.raises(UserError, match=r"something else \(another dtype\)"):
        make_scores(tmp_path, "train", {**ABOUT, "dtype": "float16"})


def test_passes_of_a_lower_precision_are_not_those_of_a_higher(tmp_path) -> None:
    filled(tmp_path / "half", precision="bf16")
    with pytest.raises(UserError, match="passes in bf16, not in float32"):
        open_scores(tmp_path / "half", "train", ABOUT)
    filled(tmp_path / "whole")
    open_scores(tmp_path / "whole", "train", {**ABOUT, "precision": "bf16"})


@pytest.mark.parametrize(("content", "expected"), [(None, "not found"), ("{", "cannot be read"), ("[]", "not a descr"),
                                                   ('{"format": "teacher scores 1"}', "not a description")])
def test_files_that_are_none(tmp_path, content, expected) -> None:
    if content is not None:
        (tmp_path / "train.json").write_text(content)
    with pytest.raises(UserError, match=expected):
        open_scores(tmp_path, "train", ABOUT)


def test_scores_that_do_not_fit_the_precision(tmp_path) -> None:
    scores = filled(tmp_path, [], dtype="float16")
    with pytest.raises(UserError, match="not finite in float16; expected --dtype float32"):
        scores.write([0], 1e6 * scores_like(1))
    assert scores.missing() == [0, 1, 2, 3, 4, 5]
