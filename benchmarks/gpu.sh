#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the tests, then the table. Logs and JSON go to the folder that OUT names, or to
# benchmarks/results. Uses the python that PYTHON names, in which numbanorm[cuda], torch and pytest must be installed.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-$PWD/benchmarks/results}" PYTHONUNBUFFERED=1
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT"

"$python" -c "import numbanorm; numbanorm.show_config()" > "$OUT/config.txt" 2>&1
"$python" -m pytest -m gpu -q -p no:cacheprovider tests/cuda tests/gpu 2>&1 | tee "$OUT/gpu-tests.log"
tests=$?
"$python" benchmarks/gpu.py "$@" 2> "$OUT/gpu-benchmark.err" | tee "$OUT/gpu-benchmark.log"
table=$?
tail -n 3 "$OUT/gpu-benchmark.err" >&2
echo "tests: exit status $tests, benchmark: exit status $table"
[ "$tests" -eq 0 ] && [ "$table" -eq 0 ]
