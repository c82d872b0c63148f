#!/bin/sh
# AC and STAC with m = 1 and m = 80 critic steps, Figure 3 (a) to (d), with the released code's grid for CartPole:
# actor's learning rate 0.1, critic's 0.01, noise 0.05 on both gradients, 200 batches; λ as in Appendix E.
# A variant is ARM-mM or, with another rate of the actor, ARM-lrRATE-mM; its arms are
#     ac, stac-al (a start state is every visited one), stac-al-initial, stac-al-batch, stac-al-gn (every, Gauss-Newton)
# ARMS, RATES and UNROLLS make all their variants, for a comparison at each arm's best rate (rates.py draws it):
#     ENVS=CartPole-v1 ARMS="ac stac-al" RATES="0.01 0.1" UNROLLS="1 80" benchmark/stac_ac.sh
# Variables and options: matrix.sh.
: "${ENVS=CartPole-v1 Reacher-v4 Hopper-v4 Walker2d-v4}" "${STEPS=800000}"
: "${VARIANTS=ac-m1 ac-m80 stac-al-m1 stac-al-m80 ac-lr0.2-m1 ac-lr0.2-m80}"
if [ "${ARMS=}" ]; then
  VARIANTS=$(for m in $UNROLLS; do for rate in $RATES; do for arm in $ARMS; do echo "$arm-lr$rate-m$m"; done; done; done)
fi

flags() { # environment, variant
  case $2 in *-m[0-9]*) ;; *) unknown "$2" ;; esac
  arm=${2%-m[0-9]*}
  case $arm in *-lr[0-9]*) rate=${arm##*-lr} ;; *) rate=0.1 ;; esac
  case ${arm%-lr[0-9]*} in
    ac) echo --leader none ;;
    stac-al) echo --leader actor ;;
    stac-al-initial | stac-al-batch) echo --leader actor --start-states "$(echo "$arm" | cut -d- -f3)" ;;
    stac-al-gn) echo --leader actor --curvature gauss-newton ;;
    *) unknown "$2" ;;
  esac
  case $1 in CartPole-*) echo --lam 0 ;; *) echo --lam 500 ;; esac
  echo --policy-lr "$rate" --critic-lr 0.01 --grad-noise 0.05 --unroll "${2##*-m}"
}

. "$(dirname "$0")/matrix.sh"
launch stac_ac.py "$@"
