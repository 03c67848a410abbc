#!/usr/bin/env bash
# All benchmarks of docs/performance.md on one GPU, with a table for each run. The last lines need the most memory.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/gpu}
mkdir -p "$out"
measure() {
    name=$1
    shift
    python benchmarks/performance.py "$@" --device cuda --dtype bfloat16 --output "$out/$name.json" | tee "$out/$name.md"
}
python -m pytest -q -m gpu tests | tee "$out/tests.txt"
measure train_compiled train --lengths 1024 --batch_sizes 16 --compile
measure train_eager train --lengths 1024 --batch_sizes 16
measure generate_compiled generate gpt2 --lengths 1024 --batch_sizes 8 --num_steps 1 8 64 --compile
measure sample sample --lengths 1024 --batch_sizes 1 8 32 --num_steps 1 32 --attn_implementations eager
measure head head --lengths 1024 --batch_sizes 32
measure distill distill --lengths 1024 --batch_sizes 8
measure attention train --lengths 1024 --batch_sizes 16 --attn_implementations sdpa flex_attention --compile
measure vocabulary train --vocab_sizes 27 1000 30522 50258 --lengths 128 1024 --batch_sizes 16
measure batch batch --lengths 1024 --memory 70
