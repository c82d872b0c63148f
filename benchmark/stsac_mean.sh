#!/bin/sh
# A control beside stsac.sh: the actor descends its influence on the average target, see stsac_mean.py.
# Variables and options: matrix.sh.
: "${ENVS=HalfCheetah-v4 Walker2d-v4}" "${STEPS=1000000}" "${VARIANTS=stsac-al-mean}"

flags() { # environment, variant
  case $2 in
    stsac-al-mean) echo --leader actor --curvature gauss-newton ;;
    *) unknown "$2" ;;
  esac
}

. "$(dirname "$0")/matrix.sh"
launch benchmark/stsac_mean.py "$@"
