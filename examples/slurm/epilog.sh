#!/bin/bash
# An epilog for slurm.conf (Epilog=/etc/slurm/tracelet-epilog.sh): delivers what a job's runs left on the node's own disk.
#
# SLURM runs it as root on each node when a job has ended. A run's folder is its owner's alone, and root's files in it
# would be closed to him: so it becomes the job's user first. It never says anything but 0: an epilog that fails takes
# the node out of service.
set -u

: "${SLURM_JOB_UID:?SLURM sets it}"
user=${SLURM_JOB_USER:-$(id -nu "$SLURM_JOB_UID" 2>/dev/null || echo "$SLURM_JOB_UID")}
group=${SLURM_JOB_GID:-$(id -g "$SLURM_JOB_UID" 2>/dev/null || echo "$SLURM_JOB_UID")}
home=$(getent passwd "$SLURM_JOB_UID" | cut -d: -f6)
spool=${SPOOL:-/scratch/$user/tracelet} # as TRACELET_DIR in the job
programs=${PROGRAMS:-/opt/tracelet/bin:/usr/local/bin:/usr/bin:/bin} # where `tracelet` is
[ -d "$spool" ] || exit 0

# The node takes no new job while this runs: 60 s, and what is left then waits for the next epilog, or a person.
# The addresses stand in the runs; tokens stand in a file of the user's own, which his shell reads, not root's.
timeout --kill-after=10 60 \
    setpriv --reuid "$SLURM_JOB_UID" --regid "$group" --clear-groups \
    env --ignore-environment HOME="${home:-/}" PATH="$programs" \
    /bin/bash -c '
        [ -r "$HOME/.config/tracelet/credentials" ] && set -a && . "$HOME/.config/tracelet/credentials"
        exec tracelet ship --dir "$1" --timeout 50s
    ' tracelet-epilog "$spool"
exit 0
