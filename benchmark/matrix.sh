# Makes a run for each environment, variant and seed. The launchers source it; each has a table of its variants.
#
#     benchmark/stsac.sh                  makes each run to its end; what was begun carries on
#     benchmark/stsac.sh --dry-run        prints the commands, one a line
#     WORKERS=4 SEEDS="1 2 3" ENVS="Hopper-v4 Walker2d-v4" VARIANTS="sac stsac-al" STEPS=300000 benchmark/stsac.sh
#     FLAGS="--lam 100" VARIANTS=stsac-al benchmark/stsac.sh     # a new experiment, stsac-al-lam-100
#     SCRIPT=benchmark/stsac_mean.py TAG=-mean VARIANTS=stsac-al-gn benchmark/stsac.sh     # with another script
#
# In the working directory, a run has the folder runs/ENVIRONMENT__EXPERIMENT__SEED and its output in runs/logs. The
# scripts lock their folders, so launchers may share a matrix. For bash 3.2, and the xargs of Linux, macOS and BSD.
set -fu
: "${SEEDS=1 2 3 4 5}" "${WORKERS=1}" "${FLAGS=}" "${PYTHON=python}" "${SCRIPT=$script}"
: "${VARIANTS=$(cut -d ' ' -f 1 <<<"$table")}"
: "${TAG=$(printf %s "$FLAGS" | tr -s ' -' '-')}" # flags make another experiment, so they belong to its name

stop() {
  echo "$(basename "$0"): error: $*" >&2
  exit 1
}

# Seed by seed: with the first seed every panel of the figure has its curves.
commands() {
  for seed in $SEEDS; do
    for env in $ENVS; do
      for variant in $VARIANTS; do
        flags=$(awk -v variant="$variant" '$1 == variant { $1 = ""; print }' <<<"$table")
        [[ $flags ]] || stop "unknown variant '$variant'"
        for flag in $FLAGS; do
          flag=${flag%%=*}
          [[ $flag != --* || "$flags " != *" ${flag//_/-} "* ]] ||
            stop "$flag must not be in FLAGS: it is what makes $variant"
        done
        run=${env//[^A-Za-z0-9_.-]/-}__$variant${TAG}__$seed
        echo $program --run-dir "runs/$run" --env-id "$env" --exp-name "$variant$TAG" --seed "$seed" \
          --total-timesteps "$STEPS" $(flags_of "$env") $flags $FLAGS --save-model
      done
    done
  done
}

# Makes the run of one command, of which the fourth word is the folder, and says how it ended.
make_run() {
  trap exit HUP INT TERM # critical: only after the command has ended. So none is left when the launcher ends
  run=${4#runs/}
  log=runs/logs/$run.log
  exec 2>>"$log" </dev/null
  echo "$ $*" >&2
  OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 "$@" >&2
  case $? in
    0) echo "finished: $run" ;;
    75) echo "left to another process: $run" ;; # EX_TEMPFAIL
    *) echo "failed: $run ($(tail -n 1 "$log"); see $log)" ;;
  esac
}

# Passes on what the runs say, and names those that failed.
report() {
  trap '' HUP INT TERM
  failed=
  while read -r line; do
    echo "$line"
    [[ $line != failed:* ]] || failed+=" $(cut -d ' ' -f 2 <<<"$line")"
  done
  [[ ! $failed ]] || stop "failed:$failed"
}

[[ $STEPS =~ ^[0-9]+$ ]] || stop "STEPS must be a number, not '$STEPS'"
[[ $WORKERS =~ ^[1-9][0-9]*$ ]] || stop "WORKERS must be at least 1, not '$WORKERS'"
[[ $SCRIPT == "$script" || $TAG ]] || stop "another SCRIPT makes other experiments: it needs a TAG"
for flag in $FLAGS; do
  case ${flag//_/-} in
    --run-dir* | --env-id* | --exp-name* | --seed* | --total-timesteps* | --*save-model* | --evaluate*)
      stop "$flag must not be in FLAGS" ;;
  esac
done
program=$(printf '%q %q' "$PYTHON" "$(cd "$(dirname "$0")/.." && pwd)/$SCRIPT")
matrix=$(commands) || exit
case ${1-} in
  --task) matrix=$(sed -n "$((${2?needs a number} + 1))p" <<<"$matrix") || exit ;; # one run, by its number from 0
  "" | --dry-run) ;;
  *) stop "unknown option '$1'" ;;
esac
[[ $matrix ]] || stop "no runs"
[[ ${1-} != --dry-run ]] || { echo "$matrix" && exit; }
mkdir -p runs/logs
export -f make_run
set -m # critical: all that is started from here is one job, and `kill` ends it as a whole
trap 'kill %1; wait; echo "$(basename "$0"): interrupted; the same command carries on" >&2; exit 130' HUP INT TERM
{ xargs -L 1 -P "$WORKERS" bash -c 'make_run "$@"' bash <<<"$matrix" || echo "failed: xargs"; } | report &
wait $!
