# How a matrix of environments × variants × seeds becomes runs. The launchers stac_ac.sh, stddpg.sh and stsac.sh source
# it; each says with `flags` what its variants are.
#
#     benchmark/stsac.sh                    makes every run of the matrix that is not finished yet
#     benchmark/stsac.sh --dry-run          prints their commands, one a line
#     WORKERS=4 SEEDS="1 2 3" ENVS="Hopper-v4 Walker2d-v4" VARIANTS="sac stsac-al" STEPS=300000 benchmark/stsac.sh
#     FLAGS="--lam 100" VARIANTS=stsac-al benchmark/stsac.sh     # a new experiment, stsac-al-lam-100
#     SCRIPT=benchmark/stsac_mean.py TAG=-mean VARIANTS=stsac-al-gn benchmark/stsac.sh     # with another script
#
# Runs land in the folder `runs` of the working directory, like those of the scripts themselves. What is finished, begun
# and locked is launch.py's business.
set -fu
: "${SEEDS=1 2 3 4 5}" "${WORKERS=1}" "${FLAGS=}" "${PYTHON=python}"
# flags make another experiment, so they belong to its name; TAG="" or another TAG if they do not, or read badly
: "${TAG=$(printf %s "$FLAGS" | tr -s ' -' '-')}"
export WORKERS PYTHON

# The runs, one a line, seed by seed: with the first seed every panel of the figure has a curve.
matrix() { # script
  for seed in $SEEDS; do
    for env in $ENVS; do
      for variant in $VARIANTS; do
        game=$(flags "$env" "$variant") || exit
        echo "$1" --env-id "$env" --exp-name "$variant$TAG" --seed "$seed" --total-timesteps "$STEPS" $game $FLAGS \
          --save-model
      done
    done
  done
}

unknown() { # variant
  echo "$(basename "$0"): error: unknown variant '$1'" >&2
  exit 2
}

launch() { # script, arguments of the launcher
  runs=$(matrix "${SCRIPT-$1}") || exit
  shift
  exec "$PYTHON" "$(dirname "$0")/launch.py" "$@" <<EOF
$runs
EOF
}
