"""One competitor in a process of its own, which times its calls when it is asked to; imports no framework.

A worker is started with its `Case` as the first argument. Each line on its standard input asks for so many calls and is
answered by a list of their seconds, in JSON; the first line has it build and compile what it calls, and its times are
to be thrown away. When the input ends, it says what memory it took.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

OUTER_STEPS = ("distribution matching", "unrolled student")
TASKS = ("forward", "training step", *OUTER_STEPS)
SHAPE, CLASSES = (32, 32, 3), 10
SEED = 0
# DC's, of training, and MTT's, of the student.
LR, MOMENTUM, WEIGHT_DECAY, STUDENT_LR = 0.01, 0.9, 5e-4, 0.01
STUDENT_LR_LR = 1e-5
# DM's and MTT's, of pixels.
PIXEL_LR, PIXEL_MOMENTUM = {"distribution matching": 1.0, "unrolled student": 100.0}, 0.5
MEAN, STD = 0.5, 0.25


class Case(NamedTuple):
    """What a worker calls.

    Attributes:
        task: One of `TASKS`.
        width: Channels of the network.
        cores: Threads, each on a core.
        variant: Of PyTorch's side.
        batch: Images of a forward pass or of a training step.
        train_steps: Training steps of a call.
        held: Real images per class that distribution matching draws from.
        real: Those of a step.
        syn: Synthetic images per class of distribution matching.
        student: Synthetic images per class of the unrolled student, which sees all of them in each step.
        student_steps: Steps of that student.
        augment: DSA as the field has it; else every image is mirrored, in which frameworks can be compared.
    """

    task: str
    width: int
    cores: int
    variant: str = ""
    batch: int = 256
    train_steps: int = 2
    held: int = 1000
    real: int = 256
    syn: int = 86
    student: int = 10
    student_steps: int = 10
    augment: bool = True

    @property
    def steps(self) -> int:
        """Steps of a call, by which its time is divided."""
        return self.train_steps if self.task == "training step" else 1


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Returns the real images, uint8, of class 0, 1, ... in turn, and the synthetic ones, floats, class by class."""
    rng = np.random.default_rng(SEED)
    real = CLASSES * case.held if case.task == "distribution matching" else case.batch
    syn = CLASSES * (case.student if case.task == "unrolled student" else case.syn)
    return {
        "images": rng.integers(0, 256, (real, *SHAPE), np.uint8),
        "syn": rng.random((syn, *SHAPE), np.float32),
    }


def peak_bytes() -> int:
    """Returns the most memory that this process has had so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def serve(case: Case, build: Callable[[Case], tuple[Callable[[], Any], dict[str, Any]]]) -> None:
    """Answers the standard input.

    Args:
        case: What to call.
        build: Makes a function that computes once and waits for the result, and says what else to record.
    """
    before = peak_bytes()
    call: Callable[[], Any] | None = None
    more: dict[str, Any] = {}
    for line in sys.stdin:
        if call is None:
            call, more = build(case)
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            call()
            seconds.append((time.perf_counter() - began) / case.steps)
        print(json.dumps(seconds), flush=True)
    print(json.dumps({"peak_bytes": peak_bytes() - before, **more}), flush=True)
