"""The network and the training steps of examples/mnist in PyTorch, for mnist_step.py, which starts this.

Needs nothing but PyTorch and numpy. Written as PyTorch prefers it: broadcasts where Paddle is faster with products.
"""

import copy
import json
import math
import resource
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNet(nn.Module):
    """As examples/mnist/unet.py."""

    def __init__(self, image_size: int, width: int, depth: int):
        super().__init__()
        fine, coarse, deep = (image_size // 2) ** 2, (image_size // 4) ** 2, 4 * width
        self.size = image_size
        self.embedding = Embedding(deep)
        self.enter = nn.Linear(4, width, bias=False)
        self.first = Block(fine, width, deep)
        self.down = nn.Linear(deep, deep, bias=False)
        self.middle = nn.ModuleList([Block(coarse, deep, deep) for _ in range(depth)])
        self.up = nn.Linear(deep, deep, bias=False)
        self.last = Block(fine, width, deep)
        self.leave = nn.Linear(width, 4, bias=False)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, target_t: Tensor) -> Tensor:
        b, n = x.shape[0], self.size // 4
        e = self.embedding(t, target_t, label)
        patches = x.reshape(b, n, 2, 2, n, 2, 2).permute(2, 5, 1, 4, 0, 3, 6).reshape(4 * n * n, b, 4)
        fine = self.first(self.enter(patches), e)
        h = self.down(torch.cat(fine.chunk(4), -1))
        for block in self.middle:
            h = block(h, e)
        h = fine + torch.cat(self.up(h).chunk(4, -1), 0)
        h = self.leave(self.last(h, e))
        return h.reshape(2, 2, n, n, b, 2, 2).permute(4, 2, 0, 5, 3, 1, 6).reshape(b, 1, self.size, self.size)


class Embedding(nn.Module):
    def __init__(self, channels: int, frequencies: int = 16, classes: int = 11):
        super().__init__()
        self.times = nn.Linear(4 * frequencies, channels)
        self.labels = nn.Embedding(classes, channels)
        self.out = nn.Linear(channels, channels)
        self.register_buffer("frequencies", 2 * math.pi / 4 * 2 ** (torch.arange(frequencies) / 2), persistent=False)

    def forward(self, t: Tensor, target_t: Tensor, label: Tensor) -> Tensor:
        angles = [time[:, None] * self.frequencies for time in (t, t - target_t)]
        waves = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)
        return F.silu(self.out(F.silu(self.times(waves) + self.labels(label))))


class Block(nn.Module):
    def __init__(self, positions: int, channels: int, embedding: int):
        super().__init__()
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.mix_in = nn.Parameter(torch.randn(positions, positions) / math.sqrt(positions))
        self.mix_out = nn.Parameter(torch.randn(positions, positions) * 0.1 / math.sqrt(positions))
        self.expand = nn.Linear(channels, 2 * channels, bias=False)
        self.contract = nn.Linear(2 * channels, channels, bias=False)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        s, b, c = h.shape
        scale, shift = self.modulation(e).chunk(2, 1)
        x = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * (1 + scale) + shift
        mixed = (self.mix_out @ F.relu(self.mix_in @ x.reshape(s, b * c))).reshape(s, b, c)
        return h + mixed + self.contract(F.relu(self.expand(x)))


def wide(t: Tensor) -> Tensor:
    return t[:, None, None, None]


class Steps:
    """distill/objectives/rcgm.py and the split form of twinflow.py, for the settings that examples/mnist uses."""

    def __init__(self, settings: dict):
        torch.manual_seed(0)
        self.model = UNet(settings["image_size"], settings["width"], settings["depth"])
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3, (0.9, 0.99), weight_decay=1e-3)
        b, size = settings["batch_size"], settings["image_size"]
        self.x, self.label = torch.rand(b, 1, size, size) * 2 - 1, torch.arange(b) % 10
        self.settings = settings["objectives"]

    def __call__(self, name: str) -> float:
        started = time.perf_counter()
        settings = {"order": 1, "delta": 0.01, "clamp": 1.0, "loss": "barron", "enhanced_ratio": 0.0}
        settings |= {"consistency_ratio": 1.0, "time_weighting": True, **self.settings[name]}
        label = torch.where(torch.rand(len(self.label)) < 0.1, 10, self.label)
        loss = (self.rcgm if name == "rcgm" else self.twinflow)(label, settings)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if math.isfinite(float(norm)):
            self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.reference.parameters()), list(self.model.parameters()), 0.01)
        return time.perf_counter() - started

    def regression(self, prediction: Tensor, goal: Tensor, s: dict) -> Tensor:
        error = (prediction - goal).square().flatten(1).mean(1)
        return error if s["loss"] == "l2" else error / (1e-3 * torch.sqrt(error.detach() / 1e-6 + 1))

    def weight(self, t: Tensor, target_t: Tensor, s: dict) -> Tensor | float:
        return torch.tan((1 - (t.abs() - target_t.abs())) * (math.pi / 2.5)) + 1 if s["time_weighting"] else 1.0

    def supervision(self, noisy: Tensor, velocity: Tensor, t: Tensor, label: Tensor, s: dict) -> Tensor:
        if s["enhanced_ratio"]:
            difference = self.reference(noisy, t, label, t) - self.reference(noisy, t, torch.full_like(label, 10), t)
            velocity = velocity + s["enhanced_ratio"] * difference
        return velocity

    @torch.no_grad()
    def goal(
        self, noisy: Tensor, velocity: Tensor, prediction: Tensor, t: Tensor, target_t: Tensor, label: Tensor, s: dict
    ) -> Tensor:
        velocity = self.supervision(noisy, velocity, t, label, s)
        middle = torch.maximum(t - s["delta"], target_t)
        x, moved = noisy + wide(middle - t) * velocity, 0.0
        for n in range(s["order"]):
            now, after = (middle + (target_t - middle) * (k / s["order"]) for k in (n, n + 1))
            move = wide(after - now) * self.reference(x, now, label, after)
            x, moved = x + move, moved - move
        first = t - middle
        inverse = torch.where(first > 0, 1 / first.clamp(min=1e-12), 1.0)
        stretch = torch.where(first > 0, (t - target_t) * inverse, 1.0)
        correction = wide(stretch) * prediction - wide(inverse) * moved - velocity
        return prediction - (correction if s["clamp"] is None else correction.clamp(-s["clamp"], s["clamp"]))

    def rcgm(self, label: Tensor, s: dict) -> Tensor:
        t, noise = torch.rand(len(label)), torch.randn_like(self.x)
        target_t = t - torch.rand_like(t) * t * s["consistency_ratio"]
        noisy = self.x + wide(t) * (noise - self.x)
        prediction = self.model(noisy, t, label, target_t)
        goal = self.goal(noisy, noise - self.x, prediction.detach(), t, target_t, label, s)
        return (self.regression(prediction, goal, s) * self.weight(t, target_t, s)).mean()

    def twinflow(self, label: Tensor, s: dict) -> Tensor:
        b, parts = len(label), {"e2e": 1, "mul": 1, "any": 1, "adv": 1, **s.get("parts", {})}
        total, ends, stop = sum(parts.values()), {}, 0.0
        for name in ("e2e", "mul", "any", "adv"):
            start, stop = stop, stop + parts[name] * b / total
            ends[name] = slice(round(start), round(stop))
        e2e, mul, adv = ends["e2e"], ends["mul"], ends["adv"]
        t, noise, fake_noise = torch.rand(b), torch.randn_like(self.x), torch.randn_like(self.x)
        way = torch.rand(b) * t
        begin, end = t.clone(), t - way * s["consistency_ratio"]
        begin[e2e], end[e2e] = 1.0, 0.0
        end[mul] = t[mul] - way[mul] * 0.05
        begin[adv], end[adv] = -t[adv], -t[adv]
        data = self.x.clone()
        with torch.no_grad():
            one, zero = torch.ones(b), torch.zeros(b)
            fake_noise = fake_noise[adv]
            data[adv] = fake_noise - self.model(fake_noise, one[adv], label[adv], zero[adv])
        noisy = data + wide(begin.abs()) * (noise - data)
        prediction = self.model(noisy, begin, label, end)
        rows = slice(0, ends["any"].stop)
        goal, weight = noise - data, torch.ones(b)
        velocity = goal[rows]
        goal[rows] = self.goal(noisy[rows], velocity, prediction[rows].detach(), begin[rows], end[rows], label[rows], s)
        weight[rows] = weight[rows] * self.weight(begin[rows], end[rows], s)
        loss = (self.regression(prediction, goal, s) * weight).mean()
        own = prediction[e2e]
        with torch.no_grad():
            fake, at = noise[e2e] - own, torch.rand(len(own))
            noisy = fake + wide(at) * (torch.randn_like(fake) - fake)
            correction = self.model(noisy, -at, label[e2e], -at) - self.model(noisy, at, label[e2e], at)
            if s["clamp"] is not None:
                correction = correction.clamp(-s["clamp"], s["clamp"])
            goal = own - correction
        return loss + s.get("rectify_weight", 0.5) * self.regression(own, goal, s).sum() / b

    @torch.no_grad()
    def check(self, path: str) -> float:
        """Largest difference to the velocity in the file, with its weights (Paddle's layout: Linear is [in, out])."""
        case, model = np.load(path), copy.deepcopy(self.model)
        linear = {f"{name}.weight" for name, each in model.named_modules() if isinstance(each, nn.Linear)}
        state = {n: torch.from_numpy(case[n].T.copy() if n in linear else case[n]) for n in model.state_dict()}
        model.load_state_dict(state)
        x, t, label, velocity = (torch.from_numpy(case[name]) for name in ("x", "t", "label", "velocity"))
        return float((model(x, t, label, 0.5 * t) - velocity).abs().max())


def main() -> None:
    torch.set_num_threads(int(sys.argv[2]))
    steps = Steps(json.loads(sys.argv[1]))
    for line in sys.stdin:
        match line.split():
            case ["step", name]:
                answer = steps(name)
            case ["check", path]:
                answer = steps.check(path)
            case ["memory"]:
                answer = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
