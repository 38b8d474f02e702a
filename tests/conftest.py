"""Shared test settings: one thread per process, so that results and run times do not depend on the machine."""
from __future__ import annotations

import cv2
import pytest
import torch

from engine.log import LOG

torch.set_num_threads(1)
cv2.setNumThreads(1)


@pytest.fixture(autouse=True)
def nothing_of_an_earlier_test():
    """Programs that run inside the test process set up the log and the CPU; the next test begins without that."""
    yield
    torch.set_flush_denormal(False)
    for handler in LOG.handlers[:]:
        LOG.removeHandler(handler)
        handler.close()


#: The files that take longest. Begun first: at the end no worker waits for another one's long file.
LONGEST = ("test_method_runs", "test_reproduce", "test_training_golden", "test_simulated_step", "test_distributed",
           "test_benchmark", "test_methods", "test_lad", "test_speed", "test_signals", "test_shutdown",
           "test_afdcd_golden", "test_eval_cli", "test_networks", "test_adversarial", "test_package")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
