"""Shared test settings: one thread per process, so that results and run times do not depend on the machine."""
from __future__ import annotations

import cv2
import pytest
import torch

from engine.log import LOG

torch.set_num_threads(1)
cv2.setNumThreads(1)


@pytest.fixture(autouse=True)
def no_log_of_an_earlier_test():
    """Programs that run inside the test process set up the log; the next test begins without it."""
    yield
    for handler in LOG.handlers[:]:
        LOG.removeHandler(handler)
        handler.close()
