#!/usr/bin/env bash
# Suites, benches and profiles on an NVIDIA card, from programs that need no Rust there.
#
#   bash benches/gpu.sh build [DIR]   here: builds the programs into DIR (target/gpu), to be copied to the other machine as a whole
#   bash DIR/gpu.sh run [RESULTS]     there: runs them and leaves everything in RESULTS (./results)
#
# The programs are for x86-64 Linux with the C library of this machine or a later one. There they need NVIDIA's driver, NVRTC and
# CUDA's headers (CUDA_PATH), and for comparisons a python3 with PyTorch (PYTHON=..), transformers and peft. What is missing is
# reported as not run. Exit status: 1 if something that ran has failed.
set -u

DEVICE=${DEVICE:-cuda:0}
PYTHON=${PYTHON:-python3}
PROGRAMS="bench profile suites"

build() {
    local root out target
    root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
    out=${1:-$root/target/gpu}
    target=${CARGO_TARGET_DIR:-$root/target}
    cd "$root" || exit 1
    local bins=()
    for program in $PROGRAMS; do bins+=(--bin "$program"); done
    UNSLOTH_COMMIT=$(git rev-parse HEAD 2> /dev/null || echo unknown) \
        cargo build --release --package unsloth-benches --features cuda "${bins[@]}" || exit 1
    mkdir -p "$out" || exit 1
    for program in $PROGRAMS; do cp "$target/release/$program" "$out/" || exit 1; done
    cp benches/gpu.sh benches/peers/torch_peer.py "$out/" || exit 1
    echo "programs: $out"
    echo "needs: $(ldd --version 2> /dev/null | head -n 1 | grep -o '[0-9.]*$' | sed 's/^/glibc /') or later"
}

failed=0

# step NAME COMMAND..: runs a command with its output in RESULTS/NAME.log.
step() {
    local name=$1
    shift
    echo "$name: $*"
    if "$@" > "$results/$name.log" 2>&1; then
        echo "$name: passed"
    else
        echo "$name: FAILED, see $results/$name.log"
        tail -n 3 "$results/$name.log"
        failed=1
    fi
}

run() {
    local here
    here=$(cd "$(dirname "$0")" && pwd) || exit 1
    results=${1:-$PWD/results}
    mkdir -p "$results" || exit 1
    # The smallest suite opens the device, compiles kernels and runs them: without a card its error says what is missing.
    if ! "$here/suites" --device "$DEVICE" --filter reduce > "$results/device.log" 2>&1 && grep -q '^error: ' "$results/device.log"; then
        local reason
        reason=$(sed -n 's/^error: //p' "$results/device.log" | tail -n 1)
        for what in suites "operators and steps" profiles PyTorch; do echo "$DEVICE $what: not run ($reason)"; done | tee "$results/not-run.txt"
        exit 0
    fi
    nvidia-smi -q > "$results/nvidia-smi.txt" 2>&1 || echo "nvidia-smi: not run (not found)"
    step suites "$here/suites" --device "$DEVICE" --json "$results/suites.json"
    local peer=()
    if "$PYTHON" -c 'import torch; assert torch.cuda.is_available()' 2> /dev/null; then
        peer=(--peer torch --python "$PYTHON")
    else
        echo "PyTorch: not run ($PYTHON has no PyTorch with CUDA)"
    fi
    step bench "$here/bench" --device "$DEVICE" --out "$results/bench" "${peer[@]}"
    for dtype in f32 bf16; do
        for checkpointing in none every:1; do
            local name=profile-$dtype-${checkpointing/:/}
            step "$name" "$here/profile" --device "$DEVICE" --shape Llama-3.2-1B --dtype "$dtype" --checkpointing "$checkpointing" \
                --batch 4 --seq 2048 --out "$results/$name"
        done
    done
    echo "results: $results"
    exit $failed
}

case "${1:-}" in
    build) build "${@:2}" ;;
    run) run "${@:2}" ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
