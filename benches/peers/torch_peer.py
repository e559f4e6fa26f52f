#!/usr/bin/env python3
"""PyTorch as a peer of `cargo xtask bench --peer torch`: does the same tasks in turn with it.

Reads a JSON object a line and answers with one:
  {"cmd": "prepare", "name": .., "task": {"op": .., "part": .., sizes .., "dtype": ..}}  ->  {"ok": true} or {"error": reason}
  {"cmd": "sample", "name": ..}                                                       ->  {"seconds": of one run}
  {"cmd": "clear"}: all tasks are forgotten                                           ->  {"ok": true}
Prints {"torch": version, ..} when it is ready. Each task is written as a user of PyTorch writes it: functional operators, autograd for
backward passes (timed alone, on a graph that is kept), transformers + PEFT for a training step.
"""
import argparse
import json
import os
import sys
import time

parser = argparse.ArgumentParser()
parser.add_argument("--device", default="cpu")
parser.add_argument("--threads", type=int, required=True)
arguments = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
# Threads that spin between samples would take the cores of the program that is measured in turn.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

torch.set_num_threads(arguments.threads)
torch.manual_seed(0)
DEVICE = torch.device(arguments.device)
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
EPS = 1e-5
# Larger than caches: summed between samples, so that inputs come from memory as they do on the other side.
EVICTION = torch.ones(64 << 20, dtype=torch.uint8).view(torch.int64) if DEVICE.type == "cpu" else None


def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)


def random(*shape, dtype, grad=False):
    return (torch.rand(*shape, device=DEVICE) - 0.5).to(dtype).requires_grad_(grad)


def backward(outputs, inputs):
    """A function that runs the backward pass alone."""
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    seeds = [torch.rand_like(output) - 0.5 for output in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, seeds, retain_graph=True)


def forward_or_backward(part, function, inputs):
    if part.startswith("forward"):
        def run():
            with torch.no_grad():
                return function()
        return run
    return backward(function(), [x for x in inputs if x.requires_grad])


def linear(task, dtype):
    rows, inner, columns = task["rows"], task["in_features"], task["out_features"]
    x, dy = random(rows, inner, dtype=dtype), random(rows, columns, dtype=dtype)
    weight = random(columns, inner, dtype=dtype)
    return {
        "forward": lambda: F.linear(x, weight),
        "input gradient": lambda: dy @ weight,
        "weight gradient": lambda: dy.t() @ x,
    }[task["part"]]


def lora_linear(task, dtype):
    rows, inner, columns = task["rows"], task["in_features"], task["out_features"]
    x, weight = random(rows, inner, dtype=dtype, grad=True), random(columns, inner, dtype=dtype)
    # As PEFT has it: adapters in f32 under half precision are cast on use.
    a = random(task["rank"], inner, dtype=torch.float32, grad=True)
    b = random(columns, task["rank"], dtype=torch.float32, grad=True)
    function = lambda: F.linear(x, weight) + task["scale"] * F.linear(F.linear(x.to(a.dtype), a), b).to(dtype)
    return forward_or_backward(task["part"], function, [x, a, b])


def attention(task, dtype):
    heads, kv_heads, dim = task["num_heads"], task["num_kv_heads"], task["head_dim"]
    q = random(1, heads, task["seq_q"], dim, dtype=dtype, grad=True)
    k, v = (random(1, kv_heads, task["seq_k"], dim, dtype=dtype, grad=True) for _ in range(2))
    causal = task["seq_q"] == task["seq_k"]
    attend = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=heads != kv_heads)

    def function():
        if task["kernel"] is None:
            return attend()
        with sdpa_kernel(getattr(SDPBackend, task["kernel"])):
            return attend()

    part = "forward" if task["part"] == "cached" else task["part"]
    return forward_or_backward(part, function, [q, k, v])


def rms_norm(task, dtype):
    size = task["hidden_size"]
    x = random(task["rows"], size, dtype=dtype, grad=True)
    residual = random(task["rows"], size, dtype=dtype)
    weight = random(size, dtype=dtype, grad="dweight" in task["part"])

    def function():
        y = x + residual if "residual" in task["part"] else x
        return F.rms_norm(y, (size,), weight, EPS)

    return forward_or_backward(task["part"], function, [x, weight])


def layer_norm(task, dtype):
    size = task["hidden_size"]
    x = random(task["rows"], size, dtype=dtype, grad=True)
    residual = random(task["rows"], size, dtype=dtype)
    weight, bias = (random(size, dtype=dtype, grad="parameters" in task["part"]) for _ in range(2))

    def function():
        y = x + residual if "residual" in task["part"] else x
        return F.layer_norm(y, (size,), weight, bias, EPS)

    return forward_or_backward(task["part"], function, [x, weight, bias])


def rope(task, dtype):
    tokens, dim = task["tokens"], task["head_dim"]
    q = random(tokens, task["num_heads"], dim, dtype=dtype, grad=True)
    k = random(tokens, task["num_kv_heads"], dim, dtype=dtype, grad=True)
    cos, sin = (random(tokens, 1, dim, dtype=dtype) for _ in range(2))
    turn = lambda x: torch.cat((-x[..., dim // 2:], x[..., : dim // 2]), -1)
    function = lambda: [x * cos + turn(x) * sin for x in (q, k)]
    return forward_or_backward(task["part"], function, [q, k])


def glu(task, dtype):
    part, activation = task["part"].split()
    gate, up = (random(task["rows"], task["columns"], dtype=dtype, grad=True) for _ in range(2))
    activations = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu_erf": F.gelu}
    return forward_or_backward(part, lambda: activations[activation](gate) * up, [gate, up])


def cross_entropy(task, dtype):
    logits = random(task["tokens"], task["vocab_size"], dtype=dtype, grad=True)
    targets = torch.arange(task["tokens"], device=DEVICE) * 7919 % task["vocab_size"]
    return forward_or_backward(task["part"], lambda: F.cross_entropy(logits.float(), targets), [logits])


def linear_cross_entropy(task, dtype):
    x = random(task["tokens"], task["hidden_size"], dtype=dtype, grad=True)
    weight = random(task["vocab_size"], task["hidden_size"], dtype=dtype)
    targets = torch.arange(task["tokens"], device=DEVICE) * 7919 % task["vocab_size"]
    loss = lambda: F.cross_entropy(F.linear(x, weight).float(), targets)
    if task["part"] == "loss":
        return forward_or_backward("forward", loss, [x])
    return lambda: torch.autograd.grad(loss(), x)


def embedding(task, dtype):
    table = random(task["vocab_size"], task["hidden_size"], dtype=dtype, grad=True)
    ids = torch.arange(task["tokens"], device=DEVICE) * 7919 % task["vocab_size"]
    return forward_or_backward(task["part"], lambda: F.embedding(ids, table), [table])


def elementwise(task, dtype):
    a, b = (random(task["rows"], task["columns"], dtype=dtype) for _ in range(2))
    total = torch.zeros(task["rows"], task["columns"], device=DEVICE)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    return {
        "add": lambda: a + b,
        "mul": lambda: a * b,
        "scale": lambda: a * 0.3,
        "accumulate": lambda: total.add_(a),
        "cast": lambda: a.to(other),
        "copy": lambda: a.clone(),
        "fill_zero": lambda: a.zero_(),
    }[task["part"]]


def adamw(task, dtype):
    param = random(task["rows"], task["columns"], dtype=dtype, grad=True)
    param.grad = random(task["rows"], task["columns"], dtype=dtype)
    return torch.optim.AdamW([param], lr=1e-4, weight_decay=0.01, fused=True).step


def train_step(task, dtype):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(task["folder"], dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=task["rank"], lora_alpha=16, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=targets)
    model = get_peft_model(model.to(DEVICE), config)
    if task["checkpointing"]:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (1, task["seq_len"]), device=DEVICE)

    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def decode(task, dtype):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(task["folder"], dtype=dtype, attn_implementation="sdpa").to(DEVICE).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, task["prompt"]), device=DEVICE)

    @torch.inference_mode()
    def run():
        """Seconds of the tokens behind the first: the prompt's own pass does not count."""
        output = model(input_ids=ids, use_cache=True)
        token, past = output.logits[:, -1:].argmax(-1), output.past_key_values
        wait()
        start = time.perf_counter()
        for _ in range(task["new"] - 1):
            output = model(input_ids=token, past_key_values=past, use_cache=True)
            token, past = output.logits[:, -1:].argmax(-1), output.past_key_values
        wait()
        return time.perf_counter() - start

    run.is_clocked = True
    return run


TASKS = {
    task.__name__: task
    for task in (linear, lora_linear, attention, rms_norm, layer_norm, rope, glu, cross_entropy,
                 linear_cross_entropy, embedding, elementwise, adamw, train_step, decode)
}


def sample(run):
    if EVICTION is not None:
        EVICTION.sum()
    wait()
    if getattr(run, "is_clocked", False):
        return run()
    start = time.perf_counter()
    run()
    wait()
    once = time.perf_counter() - start
    if DEVICE.type != "cuda" or once > 0.01:
        return once
    # Many calls before waiting, as on the other side.
    repeat = max(1, min(100, int(0.01 / max(once, 1e-9))))
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    wait()
    return (time.perf_counter() - start) / repeat


def answer(message):
    print(json.dumps(message), flush=True)


answer({"torch": torch.__version__, "threads": torch.get_num_threads(), "device": str(DEVICE)})
prepared = {}
for line in sys.stdin:
    request = json.loads(line)
    try:
        if request["cmd"] == "prepare":
            task = request["task"]
            run = TASKS[task["op"]](task, TYPES[task["dtype"]])
            run()
            prepared[request["name"]] = run
            answer({"ok": True})
        elif request["cmd"] == "clear":
            prepared = {}
            answer({"ok": True})
        else:
            answer({"seconds": sample(prepared[request["name"]])})
    except Exception as error:  # the other side goes on without this task
        prepared.pop(request.get("name"), None)
        answer({"error": f"{type(error).__name__}: {error}"[:300]})
