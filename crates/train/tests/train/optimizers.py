"""Writes optimizers.txt: `python crates/train/tests/train/optimizers.py > crates/train/tests/train/optimizers.txt` with torch.

Twenty steps of one matrix under given gradients, by the optimisers of PyTorch and transformers and, for Lion, by algorithm 2 of its paper in f64. A line
is a name, a number of steps, and the matrix behind them.
"""

import math

import torch
from transformers.optimization import Adafactor

ROWS, COLUMNS, STEPS, SHOWN = 7, 5, 20, (1, 2, 10, 20)


def start(shape=(ROWS, COLUMNS)):
    return torch.tensor([0.5 * math.sin(0.7 * i + 1.0) for i in range(ROWS * COLUMNS)], dtype=torch.float64).view(shape)


def gradient(step, shape=(ROWS, COLUMNS)):
    values = [math.sin(1.3 * i + 0.9 * step) + 0.3 * math.cos(0.4 * i * step) for i in range(ROWS * COLUMNS)]
    return torch.tensor(values, dtype=torch.float64).view(shape)


def rate(step):
    return 0.05 * (1 - step / 40)


def show(name, step, parameter):
    if step + 1 in SHOWN:
        print(name, step + 1, *(repr(v) for v in parameter.flatten().tolist()))


def run(name, make, shape=(ROWS, COLUMNS)):
    parameter = torch.nn.Parameter(start(shape))
    optimizer = make([parameter])
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        parameter.grad = gradient(step, shape)
        optimizer.step()
        show(name, step, parameter.detach())


def lion(beta1=0.9, beta2=0.99, decay=0.1):
    parameter, m = start(), torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    for step in range(STEPS):
        g, lr = gradient(step), rate(step)
        c = beta1 * m + (1 - beta1) * g
        parameter = parameter - lr * (torch.sign(c) + decay * parameter)
        m = beta2 * m + (1 - beta2) * g
        show("lion", step, parameter)


run("adamw", lambda p: torch.optim.AdamW(p, lr=1.0, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1))
run("sgd", lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, weight_decay=0.1))
run("nesterov", lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, weight_decay=0.1, nesterov=True))
run("plain", lambda p: torch.optim.SGD(p, lr=1.0, weight_decay=0.1))
lion()
run("adafactor", lambda p: Adafactor(p, lr=1.0, weight_decay=0.1, scale_parameter=False, relative_step=False))
run("adafactor_scaled", lambda p: torch.optim.Adafactor(p, lr=1.0, weight_decay=0.1, eps=(1e-30, 1e-3)))


class InF64(torch.Tensor):
    """A gradient that stays f64 where PyTorch's Muon takes it to bf16."""

    def to(self, *args, **kwargs):
        kwargs["dtype"] = torch.float64
        return torch.Tensor.to(self, **kwargs)


def muon(p, **options):
    return torch.optim.Muon(p, lr=1.0, weight_decay=0.1, **options)


iterate = torch.optim._muon._zeropower_via_newtonschulz
torch.optim._muon._zeropower_via_newtonschulz = lambda g, *rest: iterate(g.as_subclass(InF64), *rest).as_subclass(torch.Tensor)
run("muon", muon)
wide = (COLUMNS, ROWS)
run("muon_wide", lambda p: muon(p, nesterov=False, adjust_lr_fn="match_rms_adamw"), wide)
run("muon_unclamped", lambda p: muon(p, adjust_lr_fn="spectral_unclamped"), wide)
