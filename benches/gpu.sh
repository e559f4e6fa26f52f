#!/usr/bin/env bash
# Suites, benches and profiles on an NVIDIA card, from a program that needs no Rust there.
#
#   bash benches/gpu.sh build [DIR]          here: builds the program into DIR (target/gpu), to be copied to the other machine as a whole
#   bash DIR/gpu.sh run [RESULTS [STEP..]]   there: runs the steps (suites, bench, profile: all) and leaves what they find in RESULTS (./results)
#
# PROFILE=dev builds in a fraction of the time and for checks of everything but speed.
#
# The program is for x86-64 Linux with the C library that `build` names, or a later one. There it needs NVIDIA's driver, NVRTC and
# CUDA's headers (CUDA_PATH), and for comparisons a python3 with PyTorch (PYTHON=..), transformers and peft; DEVICE=cuda:1 is another
# card. Exit status: 1 if something that ran has failed, 3 if there is no device to run on, and then RESULTS is not written.
set -u

DEVICE=${DEVICE:-cuda:0}
PYTHON=${PYTHON:-python3}
PROFILE=${PROFILE:-release}
STEPS="suites bench profile"

usage() {
    sed -n '2,11s/^# \{0,1\}//p' "$0"
    exit 2
}

build() {
    local root out target
    root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
    out=${1:-$root/target/gpu}
    target=${CARGO_TARGET_DIR:-$root/target}/${PROFILE/#dev/debug}
    cd "$root" || exit 1
    UNSLOTH_COMMIT=$(git rev-parse HEAD 2> /dev/null || echo unknown) \
        cargo build --profile "$PROFILE" --package unsloth-benches --features cuda --bin benches || exit 1
    mkdir -p "$out" || exit 1
    cp "$target/benches" benches/gpu.sh benches/peers/torch_peer.py "$out/" || exit 1
    # Names of functions are a third of it.
    strip "$out/benches" || echo "strip: not found, the program is larger than it need be"
    echo "program: $out ($(du -sh "$out" | cut -f 1))"
    echo "links: $(objdump -p "$out/benches" | sed -n 's/^ *NEEDED *//p' | tr '\n' ' ')"
    echo "needs: $(objdump -T "$out/benches" | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -n 1 | tr _ ' ') or later"
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

# has STEP: whether it was asked for.
has() {
    [[ " $steps " == *" $1 "* ]]
}

bench() {
    local peer=()
    if "$PYTHON" -c 'import torch; assert torch.cuda.is_available()' 2> /dev/null; then
        peer=(--peer torch --python "$PYTHON")
    else
        echo "PyTorch: not run ($PYTHON has no PyTorch with CUDA)"
    fi
    step bench "$program" bench --device "$DEVICE" --out "$results/bench" "${peer[@]}"
}

profile() {
    local dtype checkpointing
    for dtype in f32 bf16; do
        for checkpointing in none every:1; do
            local name=profile-$dtype-${checkpointing/:/}
            step "$name" "$program" profile --device "$DEVICE" --shape Llama-3.2-1B --dtype "$dtype" \
                --checkpointing "$checkpointing" --batch 4 --seq 2048 --out "$results/$name"
        done
    done
}

run() {
    local what said
    program=$(cd "$(dirname "$0")" && pwd)/benches || exit 1
    results=${1:-$PWD/results}
    steps=${*:2}
    steps=${steps:-$STEPS}
    for what in $steps; do [[ " $STEPS " == *" $what "* ]] || usage; done
    # The smallest suite opens the device, compiles kernels and runs them: without a card its error says what is missing.
    if ! said=$("$program" suites --device "$DEVICE" --filter reduce 2>&1) && grep -q '^error: ' <<< "$said"; then
        for what in $steps; do echo "$what on $DEVICE: not run ($(sed -n 's/^error: //p' <<< "$said" | tail -n 1))" >&2; done
        exit 3
    fi
    mkdir -p "$results" || exit 1
    nvidia-smi -q > "$results/nvidia-smi.txt" 2>&1 || echo "nvidia-smi: not run (not found)"
    has suites && step suites "$program" suites --device "$DEVICE" --json "$results/suites.json"
    has bench && bench
    has profile && profile
    echo "results: $results"
    exit $failed
}

case "${1:-}" in
    build) build "${@:2}" ;;
    run) run "${@:2}" ;;
    *) usage ;;
esac
