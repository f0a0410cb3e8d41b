#!/usr/bin/env bash
# A throw-away Slurm cluster on this computer, for tests: slurm_cluster.sh start|stop FOLDER [NODES]
#
# Needs slurmctld, slurmd, slurm-client and munge; works as root and as a plain user. FOLDER must have a short name,
# because sockets (whose names are limited to 108 bytes) lie below it. Afterwards SLURM_CONF=FOLDER/etc/slurm.conf.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
action=$1 root=$(realpath -m "$2") nodes=${3:-1}
export SLURM_CONF=$root/etc/slurm.conf

write_configuration() {
    local port=$((20000 + RANDOM % 10000)) host user node
    host=$(hostname -s) user=$(id -un)
    mkdir -p "$root"/{etc,key,run,state,log,dev}
    chmod 755 "$root" "$root/run"
    chmod 700 "$root/key"
    head -c 1024 /dev/urandom >"$root/key/munge"
    chmod 400 "$root/key/munge"
    for gpu in 0 1 2 3; do ln -sfn /dev/null "$root/dev/gpu$gpu"; done
    echo "Name=gpu File=$root/dev/gpu[0-3]" >"$root/etc/gres.conf"
    cat >"$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$root/run/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort=$port
SlurmctldPidFile=$root/run/slurmctld.pid
SlurmdPidFile=$root/run/slurmd-%n.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd-%n.log
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool-%n
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
TaskPluginParam=none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=30
MinJobAge=3600
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
END
    for node in $(seq "$nodes"); do # names that resolve without /etc/hosts
        mkdir -p "$root/spool-127.0.0.$((node + 1))"
        echo "NodeName=127.0.0.$((node + 1)) NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + node)) CPUs=32" \
            "RealMemory=4000 Gres=gpu:4 State=UNKNOWN" >>"$SLURM_CONF"
    done
    cat >>"$SLURM_CONF" <<END
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
END
}

launch() { # NAME COMMAND...
    local name=$1
    shift
    setsid "$@" </dev/null >"$root/log/$name.out" 2>&1 &
    echo $! >"$root/run/$name.process"
}

start() {
    local node
    write_configuration
    launch 3-munged munged --foreground --socket="$root/run/munge.sock" --key-file="$root/key/munge" \
        --pid-file="$root/run/munged.pid" --log-file="$root/log/munged.log" --seed-file="$root/key/seed"
    for _ in $(seq 50); do
        [ -S "$root/run/munge.sock" ] && break
        sleep 0.1
    done
    launch 2-slurmctld slurmctld -D
    for node in $(seq "$nodes"); do launch "1-slurmd-$node" slurmd -D -N "127.0.0.$((node + 1))"; done
    for _ in $(seq 200); do
        [ "$(sinfo -h -N -p normal -o %t 2>/dev/null | grep -c '^idle$')" = "$nodes" ] && return
        sleep 0.1
    done
    echo "Slurm did not come up, see $root/log" >&2
    return 1
}

stop() {
    local file
    scancel --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 100); do
        [ -z "$(squeue -h 2>/dev/null)" ] && break
        sleep 0.1
    done
    for file in "$root"/run/*.process; do # the compute nodes first
        kill -9 "$(cat "$file")" 2>/dev/null || true # nothing of it is needed any more
    done
}

"$action"
