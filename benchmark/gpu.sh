#!/bin/sh
# All that a machine with one GPU can tell, in one command of at most nine minutes, without a network:
#
#     benchmark/gpu.sh WHEELS OUT
#
# WHEELS: a folder with the wheels that the machine lacks, beside its own PyTorch with CUDA. For Python 3.12 on Linux:
#     python -m pip download --dest WHEELS --only-binary :all: --no-deps --python-version 3.12 \
#         --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux2014_x86_64 \
#         gymnasium mujoco tyro tensorboard tensorboard-data-server tqdm stable-baselines3 pytest farama-notifications \
#         docstring-parser shtab typeguard glfw pyopengl etils absl-py cloudpickle markdown grpcio protobuf werkzeug \
#         iniconfig pluggy pygments rich markdown-it-py mdurl markupsafe packaging typing-extensions imageio pillow zipp \
#         importlib-resources fsspec pandas python-dateutil matplotlib contourpy cycler fonttools kiwisolver pyparsing six
# (none for a machine that has all: WHEELS is then an empty folder). OUT: a folder for the results; docs/gpu.md says what
# they mean. Each part has its own time limit, and one that fails does not stop the next: OUT/summary.txt says how each ended.
#
# DEVICE=cpu runs all of it on a CPU, as far as that goes; UPDATES, ROUNDS and STEPS make it shorter, as in tests/test_throughput.py.
set -u
[ $# -eq 2 ] || { echo "usage: benchmark/gpu.sh WHEELS OUT" >&2; exit 2; }
: "${DEVICE=cuda}" "${UPDATES=200}" "${ROUNDS=3}" "${STEPS=3000}" "${PYTHON=python3}"
wheels=$(cd "$1" && pwd) || exit
mkdir -p "$2" || exit
out=$(cd "$2" && pwd)
cd "$(dirname "$0")/.." || exit
cuda=--cuda
[ "$DEVICE" = cuda ] || cuda=--no-cuda
export OMP_NUM_THREADS=1
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

# The scripts' checkpoint after a minute, as a run's state is what an update's cost depends on: its name, script, flags.
checkpoint() {
  name=$1
  script=$2
  shift 2
  part "checkpoint-$name" 60 "$PYTHON" "$script.py" --env-id Walker2d-v4 --leader none --total-timesteps "$STEPS" \
    --start-steps 1000 --eval-every "$STEPS" --eval-episodes 1 --run-dir "$out/$name" $cuda "$@"
}

# Updates per second: the name of the table, its time limit, flags of throughput.py.
throughput() {
  name=$1
  limit=$2
  shift 2
  part "$name" "$limit" "$PYTHON" benchmark/throughput.py --updates "$UPDATES" --rounds "$ROUNDS" "$@"
}

if [ -n "$(ls "$wheels")" ]; then
  "$PYTHON" -m venv --system-site-packages "$out/venv" || exit
  PYTHON=$out/venv/bin/python
  part install 60 "$PYTHON" -m pip install --no-index --no-deps "$wheels"/*.whl
fi
part machine 30 "$PYTHON" -m torch.utils.collect_env

# 1. What has to hold on a GPU
GPU_TEST_DEVICE=$DEVICE part tests 150 "$PYTHON" -m pytest -q -rs tests/test_gpu.py ${PYTEST_FLAGS-}

# 2. Updates per second, the most telling first
walker=$out/sac/checkpoint.pt
wide=$out/sac-1024/checkpoint.pt
checkpoint sac stsac
throughput eager 60 "$walker" $cuda --no-compile --sb3
throughput cuda-graphs 90 "$walker" $cuda --no-eager --no-compile --cuda-graphs --only none "actor, Gauss-Newton" "critic"
throughput compiled 60 "$walker" $cuda --no-eager --only none "actor, Gauss-Newton"
throughput cpu 40 "$walker" --no-compile --only none "actor, Gauss-Newton" "actor, Hessian, preconditioned"
checkpoint sac-1024 stsac --hidden 1024 1024
throughput wide 40 "$wide" $cuda --no-compile --batch-size 1024 --sb3
throughput wide-cuda-graphs 60 "$wide" $cuda --no-eager --no-compile --cuda-graphs --batch-size 1024 \
  --only none "actor, Gauss-Newton"
throughput wide-cpu 30 "$wide" --no-compile --batch-size 1024 --only none "actor, Gauss-Newton"
throughput batch-1024 20 "$walker" $cuda --no-compile --batch-size 1024
throughput wide-batch-100 20 "$wide" $cuda --no-compile

# 3. Where the time goes
part profile 60 "$PYTHON" benchmark/throughput.py "$walker" $cuda --no-compile --updates 20 --rounds 1 \
  --only none "actor, Gauss-Newton" --profile "$out/profile-tables.txt"

# Then the contestants that take long to compile
throughput compiled-hessian 70 "$walker" $cuda --no-eager --cuda-graphs --only none "actor, Hessian, preconditioned" critic
throughput compiled-plain 90 "$walker" $cuda --no-eager --cuda-graphs --only none "actor, Hessian, plain, 10 products"

# 4. Seeds side by side, while there is time
for seeds in 1 2 4 8; do
  [ $(($(date +%s) - begin)) -lt 500 ] || break
  for seed in $(seq "$seeds"); do
    throughput "seeds-$seeds-$seed" 25 "$walker" $cuda --no-compile --only none "actor, Gauss-Newton" &
  done
  wait
done
rm -rf "$out/venv" "$out/sac" "$out/sac-1024"
echo "done after $(($(date +%s) - begin)) s: $out"
