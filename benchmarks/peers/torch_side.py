"""PyTorch's side, as the field's code has it (DC, DSA, DM, MTT); imports neither JAX nor the library.

python -m benchmarks.peers.torch_side CASE [FILE]

With FILE it does what our side did on the inputs that it wrote there, and prints by how much the two differ.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import worker
from benchmarks.peers.worker import CLASSES, SHAPE, Case

Weights = dict[str, np.ndarray]


class ConvNet(nn.Module):
    """The field's ConvNetD3 with instance normalization."""

    def __init__(self, width: int):
        """Draws the weights."""
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (SHAPE[2], width, width):
            layers += [
                nn.Conv2d(channels, width, kernel_size=3, padding=1),
                nn.GroupNorm(width, width, affine=True),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(kernel_size=2, stride=2),
            ]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * (SHAPE[0] // 8) * (SHAPE[1] // 8), CLASSES)

    def embed(self, x: Tensor) -> Tensor:
        """Maps images [n, c, h, w] to the flattened last feature map."""
        return self.features(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images [n, c, h, w] to logits [n, k]."""
        return self.classifier(self.embed(x))

    def load(self, weights: Weights) -> None:
        """Takes over weights of our network, whose images and maps have their channels last."""
        state = {}
        for block in range(3):
            of = f"features.{4 * block}", f"features.{4 * block + 1}"
            state[f"{of[0]}.weight"] = weights[f"conv{block}/kernel"].transpose(3, 2, 0, 1)
            state[f"{of[0]}.bias"] = weights[f"conv{block}/bias"]
            state[f"{of[1]}.weight"], state[f"{of[1]}.bias"] = (weights[f"norm{block}/{x}"] for x in ("scale", "bias"))
        linear = weights["linear/kernel"].reshape(SHAPE[0] // 8, SHAPE[1] // 8, -1, CLASSES)
        state["classifier.weight"] = linear.transpose(3, 2, 0, 1).reshape(CLASSES, -1)
        state["classifier.bias"] = weights["linear/bias"]
        self.load_state_dict({name: torch.tensor(np.ascontiguousarray(leaf)) for name, leaf in state.items()})


# DSA. Parameters have a leading axis: one for all images, or one of each.


def color(x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Shifts brightness, then scales saturation and contrast; parameters [m]."""
    x = x + brightness.view(-1, 1, 1, 1)
    mean = x.mean(dim=1, keepdim=True)
    x = (x - mean) * saturation.view(-1, 1, 1, 1) + mean
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * contrast.view(-1, 1, 1, 1) + mean


def crop(x: Tensor, shift: Tensor, pad: int) -> Tensor:
    """Moves the frame by integers [m, 2], (y, x), within +- pad."""
    n, _, h, w = x.shape
    image = torch.arange(n)[:, None, None]
    rows = torch.arange(h)[None, :, None] + shift[:, 0, None, None] + pad
    columns = torch.arange(w)[None, None, :] + shift[:, 1, None, None] + pad
    padded = F.pad(x, [pad] * 4)
    return padded.permute(0, 2, 3, 1)[image, rows, columns].permute(0, 3, 1, 2)


def cutout(x: Tensor, center: Tensor, size: int) -> Tensor:
    """Erases a square about integers [m, 2], (y, x)."""
    rows = torch.arange(x.shape[2]) - center[:, :1] + size // 2
    columns = torch.arange(x.shape[3]) - center[:, 1:] + size // 2
    erased = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    return x * (~erased)[:, None]


def flip(x: Tensor, mirrored: Tensor) -> Tensor:
    """Mirrors left and right where a bool [m] says so."""
    return torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)


def scale(x: Tensor, factor: Tensor) -> Tensor:
    """Scales the sampling grid by [m, 2], (y, x)."""
    zero = torch.zeros(len(factor))
    return _sampled(x, [[factor[:, 1], zero, zero], [zero, factor[:, 0], zero]])


def rotate(x: Tensor, theta: Tensor) -> Tensor:
    """Rotates by [m], in radians."""
    zero, cos, sin = torch.zeros(len(theta)), torch.cos(theta), torch.sin(theta)
    return _sampled(x, [[cos, -sin, zero], [sin, cos, zero]])


def _sampled(x: Tensor, rows: list[list[Tensor]]) -> Tensor:
    theta = torch.stack([torch.stack(row, -1) for row in rows], 1).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=True), align_corners=True)


def draw(m: int) -> Callable[[Tensor], Tensor]:
    """Draws an operation and its parameters, one for all images or so many."""
    pad, size = SHAPE[0] // 8, SHAPE[0] // 2
    match torch.randint(6, ()).item():
        case 0:
            u = torch.rand(3, m)
            return lambda x: color(x, u[0] - 0.5, 2 * u[1], u[2] + 0.5)
        case 1:
            shift = torch.randint(-pad, pad + 1, (m, 2))
            return lambda x: crop(x, shift, pad)
        case 2:
            center = torch.randint(SHAPE[0] + 1, (m, 2))
            return lambda x: cutout(x, center, size)
        case 3:
            mirrored = torch.rand(m) < 0.5
            return lambda x: flip(x, mirrored)
        case 4:
            factor = 1 / 1.2 + torch.rand(m, 2) * (1.2 - 1 / 1.2)
            return lambda x: scale(x, factor)
        case _:
            theta = (torch.rand(m) * 2 - 1) * math.radians(15)
            return lambda x: rotate(x, theta)


class Peer:
    """What is timed, one method for each task; all return the loss or the logits, and leave behind what they learn.

    Args:
        case: Sizes and variant.
        start: Weights of the network in place of random ones.
        target: Of the expert.
    """

    def __init__(self, case: Case, start: Weights | None = None, target: Weights | None = None):
        self.case, self.start = case, start
        self.layout = torch.channels_last if case.variant == "channels last" else torch.contiguous_format
        self.net = self.network()
        call = torch.compile(self.net) if case.variant == "compiled" else self.net
        self.call: Callable[[Tensor], Tensor] = call
        inputs = worker.inputs(case)
        shown = inputs | {"images": inputs["images"] / 255}
        self.images, self.syn = (
            torch.tensor((shown[name] - worker.MEAN) / worker.STD, dtype=torch.float32).permute(0, 3, 1, 2)
            for name in ("images", "syn")
        )
        self.images, self.syn = self.fed(self.images), self.fed(self.syn).requires_grad_()
        self.labels = torch.arange(len(self.images)) % CLASSES
        self.of_class = [torch.nonzero(self.labels == label)[:, 0] for label in range(CLASSES)]
        self.pixels = torch.optim.SGD(
            [self.syn], lr=worker.PIXEL_LR.get(case.task, 0.0), momentum=worker.PIXEL_MOMENTUM
        )
        self.lr = torch.tensor(worker.STUDENT_LR, requires_grad=True)
        self.rate = torch.optim.SGD([self.lr], lr=worker.STUDENT_LR_LR, momentum=0.5)
        self.first = [p.detach().clone() for p in self.net.parameters()]
        expert = self.network()
        if target is not None:
            expert.load(target)
        self.target = [p.detach() for p in expert.parameters()]

    def network(self) -> ConvNet:
        """Returns a fresh network, or that of the start."""
        net = ConvNet(self.case.width)
        if self.start is not None:
            net.load(self.start)
        return net.to(memory_format=self.layout)

    def fed(self, x: Tensor) -> Tensor:
        """Brings images into the layout of the variant."""
        return x.contiguous(memory_format=self.layout)

    def augment(self, m: int) -> Callable[[Tensor], Tensor]:
        """Draws an augmentation, or mirrors."""
        return draw(m) if self.case.augment else lambda x: flip(x, torch.ones(m, dtype=torch.bool))

    def forward(self) -> Tensor:
        """Computes logits."""
        with torch.inference_mode():
            return self.call(self.images)

    def training_step(self) -> Tensor:
        """Trains for the steps of a call, with the reference's drop of the rate at half of them."""
        steps, lr = self.case.train_steps, worker.LR
        settings: dict[str, float] = {"momentum": worker.MOMENTUM, "weight_decay": worker.WEIGHT_DECAY}
        optimizer = torch.optim.SGD(self.net.parameters(), lr=lr, **settings)
        for step in range(steps):
            if step == (steps + 1) // 2:
                optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1 * lr, **settings)
            index = torch.randperm(len(self.images))[: self.case.batch]
            loss = F.cross_entropy(self.call(self.fed(self.images[index])), self.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.detach()

    def distribution_matching(self) -> Tensor:
        """Takes one step of the synthetic images, against a fresh network."""
        net = self.network().requires_grad_(False)
        loss = torch.zeros(())
        for own, syn in zip(self.of_class, self.syn.split(self.case.syn), strict=True):
            real = self.images[own[torch.randperm(len(own))[: self.case.real]]]
            augment = self.augment(1)
            target = net.embed(self.fed(augment(real))).detach().mean(0)
            loss = loss + torch.sum((target - net.embed(self.fed(augment(syn))).mean(0)) ** 2)
        self.pixels.zero_grad()
        loss.backward()
        self.pixels.step()
        return loss.detach()

    def unrolled_student(self) -> Tensor:
        """Takes one step of the synthetic images and of the rate, by the gradient through all steps of a student."""
        labels = torch.arange(CLASSES).repeat_interleave(self.case.student)
        names = [name for name, _ in self.net.named_parameters()]
        weights = [p.clone().requires_grad_() for p in self.first]
        for _ in range(self.case.student_steps):
            x = self.fed(self.augment(len(self.syn))(self.syn))
            logits = torch.func.functional_call(self.net, dict(zip(names, weights, strict=True)), x)
            grads = torch.autograd.grad(F.cross_entropy(logits, labels), weights, create_graph=True)
            weights = [p - self.lr * g for p, g in zip(weights, grads, strict=True)]
        left, apart = (
            torch.stack([torch.sum((p - t) ** 2) for p, t in zip(which, self.target, strict=True)]).sum()
            for which in (weights, self.first)
        )
        loss = left / apart
        self.pixels.zero_grad()
        self.rate.zero_grad()
        loss.backward()
        self.pixels.step()
        self.rate.step()
        return loss.detach()


def _task(case: Case, peer: Peer) -> Callable[[], Tensor]:
    return getattr(peer, case.task.replace(" ", "_"))


def build(case: Case) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Makes the call of a case."""
    torch.set_num_threads(case.cores)
    torch.manual_seed(worker.SEED)
    about = {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
    return _task(case, Peer(case)), about


def differences(case: Case, ours: dict[str, np.ndarray]) -> dict[str, float]:
    """Does all that our side did; returns the norm of each difference, as a share of that of the result."""
    found: dict[str, float] = {}

    def compare(what: str, theirs: Tensor, expected: np.ndarray) -> None:
        found[what] = float(np.linalg.norm(theirs.detach().numpy() - expected) / np.linalg.norm(expected))

    def part(name: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(f"{name}/"): value for key, value in ours.items() if key.startswith(f"{name}/")}

    for task in worker.TASKS:
        peer = Peer(case._replace(task=task), part("start"), part("trained"))
        before = peer.syn.detach().clone()
        value = _task(peer.case, peer)()
        if task == "training step":
            trained = [(p - s).flatten() for p, s in zip(peer.net.parameters(), peer.first, strict=True)]
            expected = [(t - s).flatten() for t, s in zip(peer.target, peer.first, strict=True)]
            compare(task, torch.cat(trained), torch.cat(expected).numpy())
        else:
            compare(task, value, ours[task])
        if task in worker.OUTER_STEPS:
            # Ours learns pixels in [0, 1], the reference what networks see.
            gradient = (before - peer.syn.detach()) / worker.PIXEL_LR[task] / worker.STD
            compare(f"{task}, gradient", gradient.permute(0, 2, 3, 1), ours[f"{task}, gradient"])
    x, parameters = torch.tensor(worker.inputs(case)["syn"]).permute(0, 3, 1, 2), part("parameters")
    for operation in (color, crop, cutout, flip, scale, rotate):
        own = parameters[operation.__name__]
        args = [torch.tensor(p) for p in (own if operation is color else [own])]
        whole = {crop: [SHAPE[0] // 8], cutout: [SHAPE[0] // 2]}.get(operation, [])
        compare(operation.__name__, operation(x, *args, *whole).permute(0, 2, 3, 1), ours[operation.__name__])
    return found


if __name__ == "__main__":
    asked = Case(*json.loads(sys.argv[1]))
    if len(sys.argv) > 2:
        with np.load(sys.argv[2], allow_pickle=False) as file:
            print(json.dumps(differences(asked, dict(file))))
    else:
        worker.serve(asked, build)
