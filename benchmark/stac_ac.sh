#!/bin/sh
# AC and STAC with m = 1 and m = 80 critic steps, Figure 3 (a) to (d), with the released code's grid for CartPole:
# actor's learning rate 0.1, critic's 0.01, noise 0.05 on both gradients, 200 batches; λ as in Appendix E.
# ac-2x is a control that the paper has not: plain actor-critic, twice the actor's learning rate.
# Variables and options: matrix.sh.
: "${ENVS=CartPole-v1 Reacher-v4 Hopper-v4 Walker2d-v4}" "${STEPS=800000}"
: "${VARIANTS=ac-m1 ac-m80 stac-al-m1 stac-al-m80 ac-2x-m1 ac-2x-m80}"

flags() { # environment, variant
  case $2 in
    ac-2x-m[0-9]*) echo --leader none --policy-lr 0.2 ;;
    ac-m[0-9]*) echo --leader none --policy-lr 0.1 ;;
    stac-al-m[0-9]*) echo --leader actor --policy-lr 0.1 ;;
    *) unknown "$2" ;;
  esac
  case $1 in CartPole-*) echo --lam 0 ;; *) echo --lam 500 ;; esac
  echo --critic-lr 0.01 --grad-noise 0.05 --unroll "${2##*-m}"
}

. "$(dirname "$0")/matrix.sh"
launch stac_ac.py "$@"
