#!/usr/bin/env bash
# DDPG and STDDPG with the actor (full Hessian; Gauss-Newton) or the critic as leader, Figure 3 (e) to (h).
# Variables and options: matrix.sh.
: "${ENVS=HalfCheetah-v4 Hopper-v4 Reacher-v4 Walker2d-v4}" "${STEPS=1000000}"
script=stddpg.py
table="\
ddpg          --leader none
stddpg-al     --leader actor
stddpg-al-gn  --leader actor --curvature gauss-newton
stddpg-cl     --leader critic"
flags_of() { :; } # no task has flags of its own

. "$(dirname "$0")/matrix.sh"
