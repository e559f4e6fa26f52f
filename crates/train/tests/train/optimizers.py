"""Writes optimizers.txt: `python crates/train/tests/train/optimizers.py > crates/train/tests/train/optimizers.txt` with torch.

Twenty steps of one matrix under given gradients, by the optimisers of PyTorch and transformers and, in f64, for Lion by algorithm 2 of its paper and for 8-bit
moments by what bitsandbytes describes (its own runs on cards). A line is a name, a number of steps, and the matrix behind them, or elements of it that stand
equally far apart.
"""

import math

import torch
from transformers.optimization import Adafactor

ROWS, COLUMNS, STEPS, SHOWN = 7, 5, 20, (1, 2, 10, 20)


def start(shape=(ROWS, COLUMNS)):
    values = [0.5 * math.sin(0.7 * i + 1.0) for i in range(shape[0] * shape[1])]
    return torch.tensor(values, dtype=torch.float64).view(shape)


def gradient(step, shape=(ROWS, COLUMNS)):
    values = [math.sin(1.3 * i + 0.9 * step) + 0.3 * math.cos(0.4 * i * step) for i in range(shape[0] * shape[1])]
    return torch.tensor(values, dtype=torch.float64).view(shape)


def rate(step):
    return 0.05 * (1 - step / 40)


def show(name, step, parameter, stride=1):
    if step + 1 in SHOWN:
        print(name, step + 1, *(repr(v) for v in parameter.flatten().tolist()[::stride]))


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


def dynamic_map(signed):
    """The 256 values of an 8-bit number: seven decades below 1, each of twice as many values as the one below it, with 0 and 1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1, dtype=torch.float64)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (exponent - 6)
        values += middles.tolist() + ([-v for v in middles.tolist()] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float64)


def in_8_bits(moment, values, block=256):
    """What is left of a moment: the nearest values of each block's largest magnitude."""
    flat, kept = moment.flatten(), []
    middles = (values[1:] + values[:-1]) / 2
    for first in range(0, len(flat), block):
        part = flat[first : first + block]
        largest = part.abs().max()
        kept.append(values[torch.searchsorted(middles, part / largest)] * largest if largest > 0 else part)
    return torch.cat(kept).view(moment.shape)


def adamw8bit(shape=(64, 65), beta1=0.8, beta2=0.95, eps=1e-6, decay=0.1):
    parameter, m, v = start(shape), torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    assert len(signed) == len(unsigned) == 256
    for step in range(STEPS):
        g, lr = gradient(step, shape), rate(step)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        corrected_m, corrected_v = m / (1 - beta1 ** (step + 1)), v / (1 - beta2 ** (step + 1))
        parameter = parameter * (1 - lr * decay) - lr * corrected_m / (corrected_v.sqrt() + eps)
        m, v = in_8_bits(m, signed), in_8_bits(v, unsigned)
        show("adamw8bit", step, parameter, stride=65)


run("adamw", lambda p: torch.optim.AdamW(p, lr=1.0, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1))
run("sgd", lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, weight_decay=0.1))
run("nesterov", lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, weight_decay=0.1, nesterov=True))
run("plain", lambda p: torch.optim.SGD(p, lr=1.0, weight_decay=0.1))
lion()
adamw8bit()
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
