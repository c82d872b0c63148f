#!/bin/sh
# All that a machine with one GPU can tell, in one command of at most nine minutes, without a network:
#
#     benchmark/gpu.sh WHEELS OUT
#
# WHEELS: a folder with the wheels that the machine lacks, beside its own PyTorch with CUDA. For Python 3.12 on Linux:
#     python -m pip download --dest WHEELS --only-binary :all: --no-deps --python-version 3.12 \
#         --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux2014_x86_64 \
#         gymnasium mujoco==4.0.0 mujoco-core==4.0.0 tyro stable-baselines3 farama-notifications docstring-parser shtab \
#         typeguard glfw pyopengl imageio importlib-resources cloudpickle etils absl-py packaging
# and, unless it has them, numpy tensorboard tensorboard-data-server protobuf grpcio werkzeug markupsafe markdown
# typing-extensions tqdm pillow; for its tests pytest iniconfig pluggy pygments; for Stable-Baselines3 pandas python-dateutil six
# matplotlib contourpy cycler fonttools kiwisolver pyparsing. (None for a machine that has all: WHEELS is then an
# empty folder.) OUT: a folder for the results; docs/gpu.md says what they mean. Each part has its own time limit, and one
# that fails does not stop the next: OUT/summary.txt says how each ended.
#
# PYTEST_FLAGS="-n 8" runs the tests in eight processes (pytest-xdist, execnet), and in three minutes all of them. DEVICE=cpu
# runs all of it on a CPU, as far as that goes; UPDATES, ROUNDS and STEPS make it shorter, as in tests/test_throughput.py.
set -u
[ $# -eq 2 ] || { echo "usage: benchmark/gpu.sh WHEELS OUT" >&2; exit 2; }
: "${DEVICE=cuda}" "${UPDATES=60}" "${ROUNDS=3}" "${STEPS=3000}" "${PYTHON=python3}"
wheels=$(cd "$1" && pwd) || exit
mkdir -p "$2" || exit
[ -z "$(ls "$2")" ] || { echo "gpu.sh: error: $2 is not empty" >&2; exit 1; }
out=$(cd "$2" && pwd)
cd "$(dirname "$0")/.." || exit
cuda=--cuda
[ "$DEVICE" = cuda ] || cuda=--no-cuda
export OMP_NUM_THREADS=1
if [ "$DEVICE" = cuda ] && ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "gpu.sh: error: PyTorch sees no GPU here (DEVICE=cpu does without)" >&2
  exit 1
fi
begin=$(date +%s)

# A part of the work: its name, its time limit in seconds, its command. What it prints is OUT/name.txt. Nine minutes in all.
part() {
  name=$1
  left=$((540 - $(date +%s) + begin))
  limit=$(($2 < left ? $2 : left))
  shift 2
  if [ "$limit" -lt 5 ]; then
    echo "$name: left out, no time" | tee -a "$out/summary.txt"
    return
  fi
  timeout "$limit" "$@" >"$out/$name.txt" 2>&1
  echo "$name: exit code $? at $(($(date +%s) - begin)) s" | tee -a "$out/summary.txt"
}

# A short run of a script, whose checkpoint and speed are looked at: its name, script, flags.
train() {
  name=$1
  script=$2
  shift 2
  part "train-$name" 90 "$PYTHON" "$script.py" --env-id Walker2d-v4 --total-timesteps "$STEPS" --start-steps 1000 \
    --eval-every "$STEPS" --eval-episodes 1 --run-dir "$out/$name" "$@"
}

# Updates per second: the name of the table, its time limit, flags of throughput.py.
throughput() {
  name=$1
  limit=$2
  shift 2
  part "$name" "$limit" "$PYTHON" benchmark/throughput.py --updates "$UPDATES" --rounds "$ROUNDS" "$@"
}

# Steps a second of whole runs, over the second half of the steps, from what TensorBoard got: their folders.
steps_per_second='
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
for folder in sys.argv[1:]:
    run = EventAccumulator(folder).Reload()
    events = run.Scalars("charts/SPS") if "charts/SPS" in run.Tags()["scalars"] else []
    if len(events) < 2:
        print(f"{folder}: not far enough")
        continue
    begin, end = events[(len(events) - 1) // 2], events[-1]
    print(f"{folder}: {(end.step - begin.step) / (end.wall_time - begin.wall_time):.0f} steps a second")
'

if [ -n "$(ls "$wheels")" ]; then
  part install 60 "$PYTHON" -m pip install --no-index --no-deps --no-compile --target "$out/site" "$wheels"/*.whl
  export PYTHONPATH="$out/site${PYTHONPATH+:$PYTHONPATH}"
fi
part machine 30 "$PYTHON" -m torch.utils.collect_env

# 1. What has to hold on a GPU
GPU_TEST_DEVICE=$DEVICE part tests 180 "$PYTHON" -m pytest -v -rs tests/test_gpu.py ${PYTEST_FLAGS-}

# 2. Updates per second, the most telling first. A run's state is what an update's cost depends on
walker=$out/sac/checkpoint.pt
wide=$out/sac-1024/checkpoint.pt
train sac stsac --leader none $cuda
throughput eager 100 "$walker" $cuda --no-compile --sb3
throughput modes 120 "$walker" $cuda --cuda-graphs --only none "actor, Gauss-Newton"
throughput cpu 40 "$walker" --no-compile --only none "actor, Gauss-Newton"
train sac-1024 stsac --leader none $cuda --hidden 1024 1024
throughput wide 40 "$wide" $cuda --no-compile --batch-size 1024 --sb3 --only none "actor, Gauss-Newton"
throughput wide-cpu 60 "$wide" --no-compile --batch-size 1024 --only none "actor, Gauss-Newton" --updates 3

# 3. Steps per second of whole runs: what a user meets. On the GPU one after the other, on the CPU side by side
train actor stsac --leader actor --curvature gauss-newton $cuda
train compiled-none stsac --leader none $cuda --compile
train compiled-actor stsac --leader actor --curvature gauss-newton $cuda --compile
for leader in none actor; do
  train "cpu-$leader" stsac --leader "$leader" --curvature gauss-newton --no-cuda &
  train "cpu-compiled-$leader" stsac --leader "$leader" --curvature gauss-newton --no-cuda --compile &
done
wait
part steps 30 "$PYTHON" -c "$steps_per_second" "$out/sac" "$out/actor" "$out"/compiled-* "$out"/cpu-*

# 4. The contestants that take longer to compile
throughput wide-modes 60 "$wide" $cuda --no-eager --cuda-graphs --batch-size 1024 --only none "actor, Gauss-Newton"
throughput modes-hessian 90 "$walker" $cuda --no-compile --cuda-graphs --only none "actor, Hessian, preconditioned" critic

# 5. Where the time goes; larger batches, wider networks
part profile 60 "$PYTHON" benchmark/throughput.py "$walker" $cuda --no-compile --updates 20 --rounds 1 \
  --only none "actor, Gauss-Newton" --profile "$out/profile-tables.txt"
throughput batch-1024 30 "$walker" $cuda --no-compile --batch-size 1024 --only none "actor, Gauss-Newton"
throughput wide-batch-100 30 "$wide" $cuda --no-compile --only none "actor, Gauss-Newton"

# 6. Seeds side by side
for seeds in 1 2 4 8; do
  for seed in $(seq "$seeds"); do
    throughput "seeds-$seeds-$seed" 30 "$walker" $cuda --no-compile --only none &
  done
  wait
done

# 7. What takes longest to compile
throughput modes-plain 90 "$walker" $cuda --no-compile --cuda-graphs --only none "actor, Hessian, plain, 10 products"
rm -rf "$out/site" "$out"/sac* "$out/actor" "$out"/compiled-* "$out"/cpu-*
echo "done after $(($(date +%s) - begin)) s: $out"
