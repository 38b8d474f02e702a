"""Shared test settings: one thread per process, so that results and run times do not depend on the machine."""
from __future__ import annotations

import cv2
import torch

torch.set_num_threads(1)
cv2.setNumThreads(1)
