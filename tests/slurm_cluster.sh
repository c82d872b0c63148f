#!/usr/bin/env bash
# Runs a command with a Slurm cluster that is this machine alone, and stops the cluster when the command ends:
#
#     tests/slurm_cluster.sh bash -c 'sbatch --wrap hostname; squeue'
#
# Needs slurm-wlm and munge (Debian's names). All it makes is in a temporary folder, all it starts is its child; the
# user need not be root, and a Slurm that the machine has already is left alone.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
work=$(mktemp -d)
chmod 755 "$work"
mkdir "$work/state" "$work/spool"
host=$(hostname -s)
export SLURM_CONF=$work/slurm.conf

stop() {
  trap - EXIT
  scancel --user "$(id -un)" 2>/dev/null || true
  for _ in $(seq 50); do [ -z "$(squeue -h 2>/dev/null)" ] && break || sleep 0.2; done
  for pid in $(jobs -p | tac); do kill "$pid" 2>/dev/null || true; done # slurmd, slurmctld, munged
  wait || true
  rm -rf "$work"
}
trap stop EXIT
trap 'exit 130' INT TERM

port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

cat >"$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
SlurmctldPort=$(port)
SlurmdPort=$(port)
AuthInfo=socket=$work/munge.socket
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
# as little of the kernel as possible, for containers: no cgroups
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
# two tasks at a time, also on a machine with one CPU
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
KillWait=5
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
END

head -c 64 /dev/urandom >"$work/munge.key"
chmod 600 "$work/munge.key"
munged --foreground --force --key-file "$work/munge.key" --socket "$work/munge.socket" --pid-file "$work/munge.pid" \
  --seed-file "$work/munge.seed" --log-file "$work/munge.log" 2>"$work/munged.log" &
slurmctld -D -f "$SLURM_CONF" >"$work/slurmctld.log" 2>&1 &
slurmd -D -f "$SLURM_CONF" -N "$host" >"$work/slurmd.log" 2>&1 &

for _ in $(seq 100); do
  if [ "$(sinfo -h -o %T 2>/dev/null)" = idle ]; then
    "$@"
    exit
  fi
  sleep 0.2
done
echo "slurm_cluster.sh: error: the cluster does not start" >&2
tail -n 20 "$work"/*.log >&2
exit 1
