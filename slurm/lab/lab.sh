#!/usr/bin/env bash
# A real Slurm of N nodes on one machine, for tests and trials: lab.sh up|down|status|env [DIR]
#                                                               lab.sh kill-node|lose-node|freeze-node|start-node NODE [DIR]
#
#   up           install Debian's packages if they are missing, start the daemons, wait until every node is idle
#   env          print what a shell needs: eval "$(lab.sh env)"; sbatch, srun and scontrol then speak to the lab
#   kill-node    SIGKILL to the slurmd alone: Slurm loses the node, the ranks on it live on
#   lose-node    SIGKILL to all that runs on the node: the machine has gone
#   freeze-node  SIGSTOP to all that runs on the node: the machine hangs, its connections stay open
#   start-node   the node comes back, whichever of the three it was
#   down         end every process of the lab and delete its directory
#
# A node is a pair of namespaces, host name and mounts, held by a process that sleeps: `hostname` says node0, and
# /etc/hosts of the node knows its neighbours. Every process of a job stays in the namespaces of its node, so a node's
# processes can be named without a doubt. Needs root and Debian; nothing outside DIR is edited but for the packages.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

usage="usage: lab.sh up|down|status|env [DIR] or lab.sh kill-node|lose-node|freeze-node|start-node NODE [DIR]"
verb=${1:-}
case $verb in
up | down | status | env) node= ;;
kill-node | lose-node | freeze-node | start-node) node=${2:-} && shift ;;
*) echo "$usage" >&2 && exit 2 ;;
esac
dir=$(realpath -m "${2:-${SLURM_LAB:-/tmp/slurm-lab}}")
num_nodes=${SLURM_LAB_NODES:-4}
num_cpus=${SLURM_LAB_CPUS:-8} # of a node; more than the machine has is fine
num_gpus=${SLURM_LAB_GPUS:-8} # of a node; each is another name of /dev/null
# Seconds. Slurm's own values are made for a cluster: 300, 10, 30, 0 and 120.
slurmd_timeout=${SLURM_LAB_SLURMD_TIMEOUT:-10}  # of silence until a node is down; with the next it is noticed after 17,
message_timeout=${SLURM_LAB_MESSAGE_TIMEOUT:-5} # until a request counts as unanswered; and with 5 and 2 after 9
kill_wait=${SLURM_LAB_KILL_WAIT:-5}             # from SIGTERM to SIGKILL
grace=${SLURM_LAB_GRACE:-10}                    # from the warning of a preemption to SIGTERM
cred_expire=${SLURM_LAB_CRED_EXPIRE:-5}         # until a requeued job may start
export SLURM_CONF=$dir/slurm.conf

refuse() { echo "error: $*" >&2 && exit 2; }

# --- Nodes as namespaces ------------------------------------------------------------------------------------------

holder() { # the process that holds a node's namespaces; fails where there is none
    local pid
    pid=$(cat "$dir/machines/$1" 2>/dev/null) && tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF "lab $dir $1 " && echo "$pid"
}

machine() { # make a node's namespaces, if they are not there
    holder "$1" >/dev/null && return 0
    rm -f "$dir/machines/$1"
    # shellcheck disable=SC2016
    setsid unshare --uts --mount bash -c '
        hostname "$2" && mount --bind "$1/hosts" /etc/hosts && echo $$ >"$1/machines/$2.new" && mv "$1/machines/$2.new" "$1/machines/$2" &&
        exec -a "lab $1 $2" sleep infinity' bash "$dir" "$1" </dev/null >>"$dir/log/start.log" 2>&1 &
    for _ in $(seq 100); do holder "$1" >/dev/null && return 0; sleep 0.02; done
    tail -3 "$dir/log/start.log" >&2
    echo "error: no namespaces for $1" >&2 && exit 1
}

inside() { # run a command on a node
    local pid
    pid=$(holder "$1")
    nsenter --target "$pid" --uts --mount "${@:2}" </dev/null >>"$dir/log/start.log" 2>&1
}

processes() { # all that runs on a node, Slurm's own first: a slurmstepd that outlives a rank would report the rank's death
    local holder pid
    holder=$(holder "$1") || return 0
    { find /proc/[0-9]*/ns/uts -maxdepth 0 -printf '%l %h\n' 2>/dev/null || true; } |
        awk -v node="$(readlink "/proc/$holder/ns/uts")" -v holder="$holder" '
            $1 == node {split($2, part, "/"); if (part[3] != holder) print part[3]}' | while read -r pid; do
        case $(cat "/proc/$pid/comm" 2>/dev/null || true) in slurm*) echo "0 $pid" ;; *) echo "1 $pid" ;; esac
    done | sort -n | cut -d' ' -f2
}

signal() { # SIGNAL NODE: to all that runs there; fails where nothing does
    local pids
    pids=$(processes "$2")
    # shellcheck disable=SC2086
    [ -n "$pids" ] && { kill "-$1" $pids 2>/dev/null || true; }
}

destroy() { # SIGKILL to all on a node until nothing is left; a process may have forked meanwhile
    # All stand still first, as a machine goes in one moment: whoever lived on for a little would see his neighbours die,
    # and srun's second process tells Slurm then to kill the step, on every node.
    signal STOP "$1" && signal STOP "$1" || true
    for _ in $(seq 500); do
        signal KILL "$1" || break
        sleep 0.01
    done
    ! kill -KILL "$(holder "$1")" 2>/dev/null || rm -f "$dir/machines/$1"
}

# --- Slurm --------------------------------------------------------------------------------------------------------

running() { # NODE: does its slurmd run?
    local pid
    pid=$(cat "$dir/run/$1.pid" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = slurmd ] && ! grep -q '^State:.Z' "/proc/$pid/status"
}

installed() {
    local program
    for program in slurmctld slurmd munged sbatch srun; do command -v "$program" >/dev/null || return 1; done
}

install_packages() {
    installed && return 0
    command -v apt-get >/dev/null || refuse "no slurmctld, slurmd or munged, and no apt-get to install them with"
    mkdir -p "$dir/log"
    # The packages would start daemons of their own; in a mount namespace of its own that can be kept from them.
    DEBIAN_FRONTEND=noninteractive unshare --mount bash -c '
        for starter in /usr/sbin/invoke-rc.d /usr/bin/deb-systemd-invoke; do [ ! -e $starter ] || mount --bind /bin/true $starter; done
        install() { apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 slurm-wlm slurm-wlm-basic-plugins munge; }
        install || { apt-get update -qq && install; }' >"$dir/log/apt.log" 2>&1 || true
    installed || refuse "apt-get could not install slurm-wlm and munge: $(grep '^E:' "$dir/log/apt.log" | tail -1)"
}

free_port() { # a base such that the ports of the controller and of all nodes are free
    local base busy
    busy=$(awk '$4 == "0A" {print $2}' /proc/net/tcp /proc/net/tcp6 2>/dev/null | sed 's/.*://')
    while :; do
        base=$((20000 + (RANDOM % 12000)))
        for port in $(seq "$base" $((base + num_nodes))); do
            ! grep -qx "$(printf %04X "$port")" <<<"$busy" || continue 2
        done
        echo "$base" && return
    done
}

write_configuration() {
    local base=$1 last=$((num_nodes - 1)) half=$((num_nodes / 2)) network index
    network=127.$((base / 256)).$((base % 256)) # two labs at once share no address
    mkdir -p "$dir"/{machines,state,spool,log,run,gpus}
    [ -s "$dir/munge.key" ] || { (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key"); }
    { cat /etc/hosts && echo "127.0.0.1 ctl"; } >"$dir/hosts"
    cat >"$dir/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=ctl(127.0.0.1)
SlurmctldPort=$base
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credentials have expired, so tests want a short life.
AuthInfo=socket=$dir/run/munge.socket,cred_expire=$cred_expire

# No cgroups: processes are followed by their parents, and a node may have more CPUs than the machine.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
MpiDefault=none

# As on a GPU cluster: cores and GPUs are what is given out. A GPU has a device file, so that CUDA_VISIBLE_DEVICES is real.
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
TopologyPlugin=topology/tree

# No slurmdbd, as on many small clusters; this file says how each job ended.
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobs.txt
MinJobAge=3600

# Decide at once, and notice a dead node soon.
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=$slurmd_timeout
MessageTimeout=$message_timeout
KillWait=$kill_wait

# A job in "high" takes nodes from jobs in "low": those get the signal of --signal, GraceTime later SIGTERM, and are requeued.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=low  Nodes=ALL Default=YES PriorityTier=1  PreemptMode=REQUEUE GraceTime=$grace
PartitionName=high Nodes=ALL             PriorityTier=10 PreemptMode=OFF

StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/ctl.pid
SlurmdPidFile=$dir/run/%n.pid
SlurmctldLogFile=$dir/log/ctl.log
SlurmdLogFile=$dir/log/%n.log
CONF
    for index in $(seq 0 $last); do
        echo "$network.$((index + 1)) node$index" >>"$dir/hosts"
        echo "NodeName=node$index NodeAddr=$network.$((index + 1)) Port=$((base + 1 + index)) CPUs=$num_cpus RealMemory=16000 Gres=gpu:$num_gpus"
    done >>"$dir/slurm.conf"
    : >"$dir/gres.conf"
    for index in $(seq 0 $((num_gpus - 1))); do
        ln -sf /dev/null "$dir/gpus/gpu$index"
        echo "NodeName=node[0-$last] Name=gpu File=$dir/gpus/gpu$index" >>"$dir/gres.conf"
    done
    {
        [ $half = 0 ] || echo "SwitchName=s0 Nodes=node[0-$((half - 1))]"
        echo "SwitchName=s1 Nodes=node[$half-$last]"
        [ $half = 0 ] || echo "SwitchName=core Switches=s[0-1]"
    } >"$dir/topology.conf"
}

start_node() {
    signal CONT "$1" || true
    running "$1" && return 0
    machine "$1"
    inside "$1" slurmd -N "$1" -f "$dir/slurm.conf"
}

wait_ready() { # until Slurm has heard of each of these nodes
    local want=$# names
    names=$(IFS=, && echo "$*")
    for _ in $(seq 150); do
        [ "$(sinfo -h -N -p low -n "$names" -o %t 2>/dev/null | grep -c '^\(idle\|mix\|alloc\|resv\|comp\)$')" = "$want" ] && return 0
        sleep 0.1
    done
    sinfo -N >&2 || true
    tail -n 3 "$dir"/log/{start,ctl,node*}.log >&2
    echo "error: not ready within 15 s: $names" >&2 && exit 1
}

# --- Verbs --------------------------------------------------------------------------------------------------------

up() {
    local names each
    unshare --uts --mount true 2>/dev/null || refuse "no namespaces for the nodes (unshare --uts --mount is not permitted); in a container, run it with --privileged"
    [ "$cred_expire" -ge 5 ] || refuse "SLURM_LAB_CRED_EXPIRE=$cred_expire: Slurm takes 5 or more, and 120 where it is less"
    install_packages
    if ! holder ctl >/dev/null; then
        write_configuration "${SLURM_LAB_PORT:-$(free_port)}"
        machine ctl
        inside ctl munged --force --key-file="$dir/munge.key" --socket="$dir/run/munge.socket" --pid-file="$dir/run/munged.pid" \
            --log-file="$dir/log/munged.log" --seed-file="$dir/run/munge.seed"
        inside ctl slurmctld -f "$dir/slurm.conf"
    fi
    names=$(sed -n 's/^NodeName=\([^ ]*\).*/\1/p' "$dir/slurm.conf")
    for each in $names; do start_node "$each"; done
    # shellcheck disable=SC2086
    wait_ready $names
}

down() {
    local file pid
    [ -e "$dir" ] || return 0
    [ -d "$dir/machines" ] || [ -f "$dir/log/apt.log" ] || refuse "$dir is not a lab's directory"
    for file in "$dir"/machines/*; do [ ! -e "$file" ] || destroy "$(basename "$file")"; done
    # An srun or salloc that somebody started outside waits for nodes that have gone.
    for pid in $(pgrep -x 'srun|salloc' || true); do
        ! tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF" || kill -KILL "$pid" 2>/dev/null || true
    done
    rm -rf "$dir"
}

[ "$(id -u)" = 0 ] || [ "$verb" = env ] || [ "$verb" = status ] || refuse "lab.sh $verb needs root"
[ "$verb" = up ] || [ "$verb" = down ] || [ -f "$dir/slurm.conf" ] || refuse "no lab in $dir; lab.sh up makes one"
if [ "${verb%-node}" != "$verb" ]; then
    grep -q "^NodeName=$node " "$dir/slurm.conf" || refuse "no node '$node'; there are $(sed -n 's/^NodeName=\([^ ]*\).*/\1/p' "$dir/slurm.conf" | paste -sd ' ')"
fi
case $verb in
up) up ;;
down) down ;;
status) sinfo -N -o '%N %P %T %c %G' && squeue ;;
env) echo "export SLURM_CONF=$SLURM_CONF" ;;
kill-node) if running "$node"; then kill -KILL "$(cat "$dir/run/$node.pid")"; fi ;;
lose-node) destroy "$node" ;;
freeze-node) signal STOP "$node" || true ;;
start-node) start_node "$node" && wait_ready "$node" ;;
esac
