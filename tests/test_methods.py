"""What every registered method has to satisfy. A new file in ``losses/`` is tested here without being named.

Random maps stand for the outputs of two networks; ``test_method_runs.py`` trains real ones.
"""
from __future__ import annotations

import inspect
import io
import re

import pytest
import torch
from helpers import ROOT
from method_cases import (
    CLASSES,
    STUDENT,
    TEACHER,
    Case,
    batch,
    build,
    check_gradients,
    images_like,
    labels,
    outputs,
    own_terms,
    run,
    smallest_crop,
    train,
    values,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.settings import build_parser
from losses.core import Batch, Distiller, NetInfo, methods
from models.output import SegOutput
from utils.errors import UserError
from utils.options import options_of

NAMES = list(methods())


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def crop(name) -> tuple[int, int]:
    return smallest_crop(name)


class TestDescription:
    def test_the_class_says_what_it_is(self, name) -> None:
        cls = methods()[name]
        assert cls.title and cls.paper and cls.cost and 1990 < cls.year < 2100
        assert cls.terms and all(t.help for t in cls.terms)
        assert set((*cls.needs.student, *cls.needs.teacher)) <= set(SegOutput._fields)

    def test_every_option_has_help_and_those_of_a_trial_exist(self, name) -> None:
        actions = {a.dest: a for a in build_parser()._actions}
        assert set(methods()[name].trial) <= set(actions)
        for group in build_parser()._action_groups:
            if group.title == f"method {name}":
                assert all(a.help for a in group._group_actions)

    @pytest.mark.parametrize("dataset", ["citys", "ade20k", "coco_stuff_164k", "voc", "camvid", "toy_streets"])
    def test_the_preset_of_every_data_set_switches_a_term_on(self, name, dataset) -> None:
        assert own_terms(name, Case(name, (512, 512), dataset=dataset).active)

    def test_a_stage_before_training_has_a_quick_form(self, name) -> None:
        cls = methods()[name]
        assert cls.prepare is Distiller.prepare or cls.trial

    def test_a_default_is_stated_once(self, name) -> None:
        """Parser and Options agree, a preset restates no default, and no function or class has one of its own."""
        cls, parser = methods()[name], build_parser()
        own = {one.name: one.default for one in options_of(cls.Options)}
        for option, default in own.items():
            given = parser.get_default(option)
            assert (tuple(given) if isinstance(given, list) else given) == default, option
        for key, entry in (*cls.preset.items(), *cls.rows.items()):
            for setting, value in entry.items():
                restated = setting.startswith("lambda_") or value != parser.get_default(setting)
                assert restated or key != "*", f"{key}: {setting}"
        module = inspect.getmodule(cls)
        for thing in vars(module).values():
            if getattr(thing, "__module__", "") == module.__name__ and callable(thing) and thing is not cls.Options:
                for parameter in inspect.signature(thing).parameters.values():
                    full = {parameter.name, f"{name}_{parameter.name}"} & set(own)
                    stated = parameter.default is not inspect.Parameter.empty
                    assert not (full and stated) or parameter.default == own[full.pop()], (thing, parameter.name)

    def test_every_term_weighs_nothing_unless_asked_for(self, name) -> None:
        if name not in ("kd", "afdcd"):  # the defaults of the reference's parser
            assert all(t.weight == 0 for t in methods()[name].terms)


class TestForward:
    def test_terms_and_gradients_of_the_preset(self, name, crop) -> None:
        distiller = build(name, crop)
        student, teacher = outputs(STUDENT, crop), outputs(TEACHER, crop, seed=1)
        terms = run(distiller, student, teacher, labels(crop))
        assert set(terms) == own_terms(name, Case(name, crop).active)
        check_gradients(name, distiller, student, teacher, terms)

    def test_every_term_alone(self, name) -> None:
        for term in methods()[name].terms:
            if term.scales_task:
                continue
            alone = frozenset([term.name])
            crop = smallest_crop(name, alone)
            distiller = build(name, crop, terms=alone)
            student, teacher = outputs(STUDENT, crop), outputs(TEACHER, crop, seed=1)
            terms = run(distiller, student, teacher, labels(crop))
            assert {term.name} <= set(terms) <= {t.name for t in methods()[name].terms}
            check_gradients(name, distiller, student, teacher, {term.name: terms[term.name]})

    def test_it_reads_only_the_taps_that_it_declares(self, name, crop) -> None:
        distiller = build(name, crop)
        student, teacher = outputs(STUDENT, crop), outputs(TEACHER, crop, seed=1)
        wanted = run(distiller, student, teacher, labels(crop))
        needs = Case(name, crop).needs
        only = [SegOutput(**{t: v if t in taps else None for t, v in maps._asdict().items()})
                for maps, taps in ((student, needs.student), (teacher, needs.teacher))]
        assert values(run(build(name, crop), *only, labels(crop))) == values(wanted)

    @pytest.mark.parametrize("widths", ["equal", "student wider"])
    def test_other_widths(self, name, crop, widths) -> None:
        pair = {"equal": (TEACHER, TEACHER), "student wider": (TEACHER, STUDENT)}[widths]
        where = {"student": pair[0], "teacher": pair[1], "flags": ("--m-ocd", "8")}
        distiller = build(name, crop, **where)
        student, teacher = outputs(pair[0], crop), outputs(pair[1], crop, seed=1)
        check_gradients(name, distiller, student, teacher, run(distiller, student, teacher, labels(crop)))

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("group", [0, 2])
    def test_other_batches_and_groups(self, name, crop, batch, group) -> None:
        distiller = build(name, crop, flags=("--group-size", str(group)))
        student, teacher = outputs(STUDENT, crop, batch), outputs(TEACHER, crop, batch, seed=1)
        terms = run(distiller, student, teacher, labels(crop, batch))
        check_gradients(name, distiller, student, teacher, terms)

    def test_groups_of_two_give_what_processes_of_two_images_give(self, name, crop) -> None:
        """The loss of four images is the mean of the losses of their halves, but for random or remembering methods."""
        distiller = build(name, crop).double()
        student, teacher = (outputs(i, crop, 4, n, torch.float64) for n, i in enumerate((STUDENT, TEACHER)))
        target = labels(crop, 4)

        def loss(rows: slice, seed: int = 0) -> dict[str, float]:
            halves = [SegOutput(*(t[rows] for t in maps)) for maps in (student, teacher)]
            return values(run(distiller, *halves, target[rows], seed=seed))

        before = {k: v.clone() for k, v in distiller.state_dict().items() if isinstance(v, torch.Tensor)}
        whole, again = loss(slice(0, 4)), loss(slice(0, 4), seed=1)
        after = distiller.state_dict()
        if whole != again or any(not torch.equal(v, after[k]) for k, v in before.items()):
            pytest.skip("depends on random numbers or on earlier steps")
        first, second = loss(slice(0, 2)), loss(slice(2, 4))
        for term, value in whole.items():
            assert value == pytest.approx((first[term] + second[term]) / 2, rel=1e-9), term

    def test_parts_of_a_batch_give_what_the_whole_gives(self, name) -> None:
        """As gradient accumulation needs it, batch norm aside, of every term that is not said to need it whole."""
        for term in methods()[name].terms:
            alone = frozenset([term.name])
            crop = smallest_crop(name, alone)
            if term.scales_task or build(name, crop, terms=alone).whole_batch:
                continue
            maps = [outputs(i, crop, 4, n, torch.float64) for n, i in enumerate((STUDENT, TEACHER))]
            target, found = labels(crop, 4), []
            for count in (1, 2):
                distiller, generator = build(name, crop, terms=alone).double(), torch.Generator().manual_seed(0)
                for module in distiller.modules():
                    if isinstance(module, torch.nn.BatchNorm2d):
                        module.eval()
                total = 0.0
                for rows in torch.arange(4).chunk(count):
                    student, teacher = (SegOutput(*(t[rows] for t in of)) for of in maps)
                    images = images_like(maps[0], target)[rows]
                    total += distiller(Batch(student, teacher, target[rows], images, 5), generator)[term.name].item()
                found.append(total / count)
            assert found[1] == pytest.approx(found[0], rel=1e-9), (
                f"{term.name}: two halves of a batch do not give what the whole gives; a method that needs the whole "
                "sets whole_batch = True (docs/extending.md)")

    def test_odd_sizes(self, name, crop) -> None:
        odd = (crop[0] + 11, crop[1] + 37)
        distiller = build(name, odd)
        student, teacher = outputs(STUDENT, odd), outputs(TEACHER, odd, seed=1)
        check_gradients(name, distiller, student, teacher, run(distiller, student, teacher, labels(odd)))

    @pytest.mark.parametrize("ignore_label", [-1, 255])
    def test_pixels_without_a_label(self, name, crop, ignore_label) -> None:
        distiller = build(name, crop, ignore_label=ignore_label)
        for ignored in (0.7, 1.0):
            student, teacher = outputs(STUDENT, crop), outputs(TEACHER, crop, seed=1)
            target = labels(crop, ignored=ignored, ignore_label=ignore_label)
            assert (target == ignore_label).any()
            check_gradients(name, distiller, student, teacher, run(distiller, student, teacher, target))
            distiller.after_step(0)

    def test_the_value_of_the_ignore_label_does_not_matter(self, name, crop) -> None:
        found = [run(build(name, crop, ignore_label=ignore), outputs(STUDENT, crop), outputs(TEACHER, crop, seed=1),
                     labels(crop, ignore_label=ignore)) for ignore in (-1, 255)]
        assert values(found[0]) == values(found[1])

    def test_equal_maps_are_finite(self, name, crop) -> None:
        distiller = build(name, crop, student=TEACHER, flags=("--m-ocd", "8"))
        student, teacher = outputs(TEACHER, crop), outputs(TEACHER, crop)
        check_gradients(name, distiller, student, teacher, run(distiller, student, teacher, labels(crop)))

    def test_maps_of_zeros_are_finite(self, name, crop) -> None:
        distiller = build(name, crop)
        student, teacher = outputs(STUDENT, crop), outputs(TEACHER, crop)
        with torch.no_grad():
            for maps in (*student, *teacher):
                maps.zero_()
        check_gradients(name, distiller, student, teacher, run(distiller, student, teacher, labels(crop)))


class TestPrecision:
    @pytest.mark.parametrize("of_teacher", [torch.bfloat16, torch.float32], ids=str)
    def test_autocast_gives_finite_float32(self, name, crop, of_teacher) -> None:
        distiller = build(name, crop)
        student, teacher = (outputs(i, crop, seed=n, dtype=dtype) for n, (i, dtype) in
                            enumerate(((STUDENT, torch.bfloat16), (TEACHER, of_teacher))))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            terms = run(distiller, student, teacher, labels(crop))
        assert all(v.dtype == torch.float32 for v in terms.values())
        check_gradients(name, distiller, student, teacher, terms)

    def test_float64_stays_float64_and_agrees_with_float32(self, name, crop) -> None:
        found = {}
        for dtype in (torch.float32, torch.float64):
            distiller = build(name, crop).to(dtype)
            maps = (outputs(i, crop, seed=n, dtype=dtype) for n, i in enumerate((STUDENT, TEACHER)))
            found[dtype] = run(distiller, *maps, labels(crop))
        for term, exact in found[torch.float64].items():
            assert exact.dtype == torch.float64
            torch.testing.assert_close(found[torch.float32][term].double(), exact, rtol=1e-5, atol=1e-7)


class TestRandomness:
    def test_only_the_given_generator_counts(self, name, crop) -> None:
        found = []
        for other in (1, 2):
            distiller = build(name, crop)
            student, teacher = outputs(STUDENT, crop), outputs(TEACHER, crop, seed=1)
            torch.manual_seed(other)
            found.append(values(run(distiller, student, teacher, labels(crop))))
        assert found[0] == found[1]

    def test_the_default_generator_is_left_alone(self, name, crop) -> None:
        distiller = build(name, crop)
        before = torch.get_rng_state()
        run(distiller, outputs(STUDENT, crop), outputs(TEACHER, crop, seed=1), labels(crop))
        assert torch.equal(before, torch.get_rng_state())


class TestState:
    def test_a_restored_method_goes_on_exactly(self, name, crop) -> None:
        first = build(name, crop)
        train(first, crop, range(2))
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = build(name, crop, seed=1)
        second.load_state_dict(torch.load(file, weights_only=True))
        assert train(second, crop, range(2, 4)) == train(first, crop, range(2, 4))

    def test_it_can_be_built_without_memory(self, name, crop) -> None:
        case = Case(name, crop)
        with torch.device("meta"):
            described = case.build()
        real = build(name, crop)
        shapes = [{k: v.shape for k, v in d.named_parameters()} for d in (described, real)]
        assert shapes[0] == shapes[1]

    def test_what_it_leaves_out_of_ddp_exists(self, name, crop) -> None:
        distiller = build(name, crop)
        known = {n for n, _ in (*distiller.named_parameters(), *distiller.named_buffers())}
        assert distiller.unsynchronized() <= known


class TestDevices:
    def test_the_step_never_asks_the_device_for_a_value(self, name, crop) -> None:
        """Fake tensors have no values: every such question (``item``, ``if tensor``, boolean masks) is an error."""
        case = Case(name, crop)
        with FakeTensorMode():
            distiller = case.build()
            student, teacher = outputs(STUDENT, crop), outputs(TEACHER, crop)
            target = torch.zeros((2, *crop), dtype=torch.int64)
            terms = run(distiller, student, teacher, target)
            sum(terms.values()).backward()

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_the_step_does_not_synchronise_with_the_gpu(self, name, crop) -> None:
        distiller = build(name, crop).cuda()
        train(distiller, crop, range(2), device="cuda")
        student, teacher = outputs(STUDENT, crop, device="cuda"), outputs(TEACHER, crop, seed=1, device="cuda")
        target, generator = labels(crop, device="cuda"), torch.Generator("cuda").manual_seed(0)
        images = images_like(student, target)
        torch.cuda.set_sync_debug_mode("error")
        try:
            terms = distiller(batch(student, teacher, target, images=images), generator)
            sum(terms.values()).backward()
            distiller.after_step(0)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_no_file_but_of_kernels_names_a_device(self) -> None:
        for path in sorted(set((ROOT / "losses").rglob("*.py")) - set((ROOT / "losses" / "kernels").iterdir())):
            found = re.search(r"\.cuda\(|[\"']cuda", path.read_text())
            assert found is None, f"{path.name}: {found.group()}"


class TestRefusals:
    @pytest.mark.parametrize("role", ["student", "teacher"])
    def test_a_missing_tap_is_named_beside_those_on_offer(self, name, crop, role) -> None:
        whole = {"student": STUDENT, "teacher": TEACHER}
        for tap in getattr(Case(name, crop).needs, role):
            kept = {t: c for t, c in whole[role].channels.items() if t != tap}
            lacking = {role: NetInfo("odd-net", kept, CLASSES)}
            try:
                distiller = build(name, crop, **lacking)
            except UserError as error:
                assert tap in str(error) and "odd-net" in str(error), error
                assert all(re.search(rf"\b{t}\b", str(error)) for t in kept), error
            else:  # it has something to put in its place
                assert tap not in getattr(Case(name, crop, **lacking).needs, role)
                student, teacher = (outputs({**whole, **lacking}[r], crop, seed=n) for n, r in enumerate(whole))
                terms = run(distiller, student, teacher, labels(crop))
                check_gradients(name, distiller, student, teacher, terms)

    def test_another_class_count_is_refused_or_does_not_matter(self, name, crop) -> None:
        more = NetInfo("odd-net", {**TEACHER.channels, "logits": CLASSES + 1, "aux": CLASSES + 1}, CLASSES + 1)
        student, teacher = outputs(STUDENT, crop), outputs(more, crop, seed=1)
        try:
            distiller = build(name, crop, teacher=more)
            terms = run(distiller, student, teacher, labels(crop))
        except UserError as error:
            assert re.search(r"\b5\b", str(error)) and re.search(r"\b6\b", str(error)), error
        else:
            check_gradients(name, distiller, student, teacher, terms)

    def test_maps_of_another_size_are_refused_or_do_not_matter(self, name, crop) -> None:
        distiller = build(name, crop)
        student, teacher = outputs(STUDENT, crop), outputs(TEACHER, (crop[0], crop[1] + 8), seed=1)
        try:
            terms = run(distiller, student, teacher, labels(crop))
        except UserError as error:
            assert str(crop[1] // 8) in str(error) and str(crop[1] // 8 + 1) in str(error), error
        else:
            check_gradients(name, distiller, student, teacher, terms)
