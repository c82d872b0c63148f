#!/bin/sh
# SAC and STSAC with the actor (full Hessian; Gauss-Newton) or the critic as leader, Figure 3 (i) to (l).
# Variables and options: matrix.sh.
: "${ENVS=HalfCheetah-v4 Hopper-v4 Reacher-v4 Walker2d-v4}" "${STEPS=1000000}"
: "${VARIANTS=sac stsac-al stsac-al-gn stsac-cl}"

flags() { # environment, variant
  case $2 in
    sac) echo --leader none ;;
    stsac-al) echo --leader actor ;;
    stsac-al-gn) echo --leader actor --curvature gauss-newton ;;
    stsac-cl) echo --leader critic ;;
    *) unknown "$2" ;;
  esac
}

. "$(dirname "$0")/matrix.sh"
launch stsac.py "$@"
