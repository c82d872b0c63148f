#!/bin/sh
# DDPG and STDDPG with the actor (full Hessian; Gauss-Newton) or the critic as leader, Figure 3 (e) to (h).
# Variables and options: matrix.sh.
: "${ENVS=HalfCheetah-v4 Hopper-v4 Reacher-v4 Walker2d-v4}" "${STEPS=1000000}"
: "${VARIANTS=ddpg stddpg-al stddpg-al-gn stddpg-cl}"

flags() { # environment, variant
  case $2 in
    ddpg) echo --leader none ;;
    stddpg-al) echo --leader actor ;;
    stddpg-al-gn) echo --leader actor --curvature gauss-newton ;;
    stddpg-cl) echo --leader critic ;;
    *) unknown "$2" ;;
  esac
}

. "$(dirname "$0")/matrix.sh"
launch stddpg.py "$@"
