"""Prints the constants of pytorch.rs and schedule.rs: `python crates/train/tests/train/pytorch.py` with torch and transformers.

The model is that of model.rs, in f32: a table, a linear layer with a low-rank adapter, RMSNorm, an output matrix.
"""

import math

import torch
import torch.nn.functional as F
import transformers

VOCAB, HIDDEN, INNER, RANK, ALPHA, EPS = 11, 8, 6, 2, 6.0, 1e-5


def values(shape, salt, factor=0.5, offset=0.0):
    n = math.prod(shape)
    return torch.tensor([offset + factor * math.sin(0.7 * i + salt) for i in range(n)], dtype=torch.float64).float().view(shape)


def documents(step):
    for document in range(4):
        length = 3 + (step + document) % 4
        ids = [(7 * i + 3 * step + 5 * document) % VOCAB for i in range(length)]
        targets = [(ids[i] * 3 + document) % VOCAB if (i + step) % 3 else -100 for i in range(length)]
        yield ids, targets


def train():
    base, bias = values((INNER, HIDDEN), 3.0), values((INNER,), 4.0)
    table = values((VOCAB, HIDDEN), 1.0).requires_grad_()
    head = values((VOCAB, INNER), 2.0).requires_grad_()
    norm = values((INNER,), 5.0, 0.1, 1.0).requires_grad_()
    lora_a = values((RANK, HIDDEN), 6.0).requires_grad_()
    lora_b = values((INNER, RANK), 7.0, 0.1).requires_grad_()
    parameters = {"table": table, "lora_a": lora_a, "lora_b": lora_b, "norm": norm, "head": head}
    # As transformers' Trainer: norms do not decay.
    groups = [
        {"params": [table, lora_a, lora_b, head], "weight_decay": 0.1},
        {"params": [norm], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-2, betas=(0.8, 0.95), eps=1e-6)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 3, 20)
    losses, norms = [], []
    for step in range(20):
        ids = torch.tensor([i for d in documents(step) for i in d[0]])
        targets = torch.tensor([t for d in documents(step) for t in d[1]])
        x = F.embedding(ids, table)
        x = F.linear(x, base, bias) + ALPHA / RANK * F.linear(F.linear(x, lora_a), lora_b)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * norm
        loss = F.cross_entropy(F.linear(x, head), targets)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), 0.8).item())
        optimizer.step()
        schedule.step()
    print("LOSSES", losses)
    print("NORMS", norms)
    for name, parameter in parameters.items():
        print(name, parameter.detach().flatten()[:4].tolist(), parameter.double().square().sum().item())


def rates(get, *steps):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-4)
    schedule = get(optimizer, *steps)
    print(get.__name__, steps, end=" ")
    out = []
    for _ in range(12):
        out.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    print(out)


if __name__ == "__main__":
    train()
    for steps in [(3, 10), (0, 10), (10, 8)]:
        rates(transformers.get_cosine_schedule_with_warmup, *steps)
        rates(transformers.get_linear_schedule_with_warmup, *steps)
        rates(transformers.get_constant_schedule_with_warmup, steps[0])
    polynomial = transformers.get_polynomial_decay_schedule_with_warmup
    rates(polynomial, 3, 10)
    rates(lambda o, w, t: polynomial(o, w, t, lr_end=2e-5, power=2.5), 3, 10)
    for warmup, decay in [(3, 4), (0, 10), (2, 1)]:
        rates(lambda o, w, d: transformers.get_wsd_schedule(o, w, d, num_training_steps=10), warmup, decay)
