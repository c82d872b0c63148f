#!/usr/bin/env bash
# SAC and STSAC with the actor (full Hessian; Gauss-Newton) or the critic as leader, Figure 3 (i) to (l).
# Variables and options: matrix.sh.
: "${ENVS=HalfCheetah-v4 Hopper-v4 Reacher-v4 Walker2d-v4}" "${STEPS=1000000}"
script=stsac.py
table="\
sac          --leader none
stsac-al     --leader actor
stsac-al-gn  --leader actor --curvature gauss-newton
stsac-cl     --leader critic"
flags_of() { :; } # no task has flags of its own

. "$(dirname "$0")/matrix.sh"
