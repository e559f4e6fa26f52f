"""Writes loss_scale.txt: `python crates/train/tests/train/loss_scale.py > crates/train/tests/train/loss_scale.txt` with torch.

Each trace is a `torch.amp.GradScaler` on the CPU with one or two optimisers of one parameter each, and what it does with a script of
steps. A line of a script is either the gradients of a step, a letter for each optimiser (`g` good, `i` infinite, `n` NaN), repeated, or
`to SCALE`, an update to that scale. Behind each line stand the scale, the growth tracker and the steps that each optimiser has taken.
"""

import torch

GRADIENTS = {"g": 1.0, "i": float("inf"), "n": float("nan")}

TRACES = {
    "defaults": ((2.0**16, 2.0, 0.5, 2000), ["g*1999", "g*1", "g*3", "i*1", "g*1999", "i*1", "g*1", "n*2", "g*1999", "g*1", "g*2000"]),
    "interval": ((1024.0, 2.0, 0.5, 3), ["g*1", "g*1", "g*1", "i*1", "g*2", "n*1", "g*2", "g*1", "g*3", "i*3", "g*6"]),
    "fractions": ((1000.0, 1.7, 0.3, 2), ["g*1", "g*1", "g*4", "i*1", "g*5", "n*2", "g*3", "i*1", "g*8"]),
    "overflow": ((2.0**126, 2.0, 0.5, 2), ["g*2", "g*2", "g*1", "g*1", "i*1", "g*2"]),
    "vanishing": ((2.0**-130, 4.0, 0.25, 1), ["i*8", "i*2", "i*1", "g*1", "i*2", "g*3"]),
    "two": ((512.0, 2.0, 0.5, 2), ["gg*1", "gi*1", "gg*2", "ng*1", "ii*1", "gg*1", "gg*1"]),
    "by_hand": ((512.0, 2.0, 0.5, 3), ["g*2", "to 48", "g*1", "i*1", "to 3.25", "g*2", "g*1"]),
}


class Counting(torch.optim.SGD):
    """Counts the steps that the scaler lets it take."""

    taken = 0

    def step(self):
        self.taken += 1


def trace(name, config, script):
    initial, growth, backoff, interval = config
    scaler = torch.amp.GradScaler("cpu", initial, growth, backoff, interval)
    count = max(len(line.split("*")[0]) for line in script if not line.startswith("to"))
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(count)]
    optimizers = [Counting([p], lr=1.0) for p in parameters]
    print("trace", name, *[repr(float(c)) for c in config[:3]], interval)
    for line in script:
        if line.startswith("to "):
            scaler.scale(torch.zeros(1))
            scaler.update(float(line[3:]))
        else:
            kinds, times = line.split("*")
            for _ in range(int(times)):
                scaler.scale(torch.zeros(1))
                for i, kind in enumerate(kinds):
                    parameters[i].grad = torch.full((1,), GRADIENTS[kind])
                    scaler.step(optimizers[i])
                scaler.update()
        state = scaler.state_dict()
        print(line, "->", repr(state["scale"]), state["_growth_tracker"], *(o.taken for o in optimizers))


for name, (config, script) in TRACES.items():
    trace(name, config, script)
