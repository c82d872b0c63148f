#!/usr/bin/env bash
# AC and STAC with m = 1 and m = 80 critic steps, Figure 3 (a) to (d): as in the released code, as in Proposition 1
# (every visited state is an s_0), and the control, AC at twice the rate. The rates and the noise on both gradients are
# the released code's for CartPole, λ is Appendix E's. For other rates FLAGS="--policy-lr 0.4" VARIANTS=stac-released-m1.
# Variables and options: matrix.sh.
: "${ENVS=CartPole-v1 Hopper-v4 Reacher-v4 Walker2d-v4}" "${STEPS=800000}"
script=stac_ac.py
table="\
ac-m1              --unroll 1  --leader none
ac-m80             --unroll 80 --leader none
ac-2x-m1           --unroll 1  --leader none --policy-lr 0.2
ac-2x-m80          --unroll 80 --leader none --policy-lr 0.2
stac-released-m1   --unroll 1  --leader actor --start-states released
stac-released-m80  --unroll 80 --leader actor --start-states released
stac-every-m1      --unroll 1  --leader actor --start-states every
stac-every-m80     --unroll 80 --leader actor --start-states every"

flags_of() { # environment
  case $1 in CartPole-*) echo --lam 0 ;; *) echo --lam 500 ;; esac
  echo --policy-lr 0.1 --critic-lr 0.01 --grad-noise 0.05
}

. "$(dirname "$0")/matrix.sh"
