#!/bin/sh
# Has what tests start for real, where Debian's packages can be installed: SLURM, sshd, OpenMPI, MPICH, file systems.
#
# Only what is missing is installed, and no service of it is started: a test starts its own, with its own files and
# ports, and none of /etc is needed. Where this is not root on a Debian or Ubuntu, it says what to install.
set -eu

# A program that the tests start, and the package of Debian that has it.
wanted="
munged munge
slurmctld slurmctld
slurmd slurmd
srun slurm-client
sshd openssh-server
ssh openssh-client
ssh-keygen openssh-client
setpriv util-linux
unshare util-linux
umount mount
mke2fs e2fsprogs
filefrag e2fsprogs
mpirun.openmpi openmpi-bin
mpirun.mpich mpich
mkfs.xfs xfsprogs
mkfs.btrfs btrfs-progs
sshfs sshfs
fusermount3 fuse3
sftp-server openssh-sftp-server
"

# Services are in sbin, which is not on everybody's PATH.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin:/usr/lib/openssh"

missing=$(
    echo "$wanted" | while read -r program package; do
        [ -z "$program" ] || command -v "$program" >/dev/null || echo "$package"
    done | sort -u | tr '\n' ' '
)
if [ -z "$missing" ]; then
    echo "SLURM, sshd, OpenMPI, MPICH and the file systems are there"
    exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "Not there: $missing(names of Debian's packages). The tests that start them are skipped without." >&2
    echo "On Debian or Ubuntu: sudo make launchers. Elsewhere: SLURM with munge, OpenSSH's server, OpenMPI, MPICH, the tools of ext4," >&2
    echo "XFS and btrfs, sshfs, util-linux." >&2
    exit 1
fi

# A package starts its service unless policy-rc.d forbids it; one of this machine's own is put back afterwards.
policy=/usr/sbin/policy-rc.d
own=$policy.own-before-tracelet
[ -e "$own" ] || [ ! -e "$policy" ] || mv "$policy" "$own"
restore() {
    rm -f "$policy"
    [ ! -e "$own" ] || mv "$own" "$policy"
}
trap restore EXIT
trap 'exit 130' INT TERM HUP
printf '#!/bin/sh\nexit 101\n' >"$policy"
chmod 755 "$policy"

echo "Installing $missing(a minute)"
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086  # packages are words
install() {
    apt-get install --yes --quiet=2 --no-install-recommends -o DPkg::Lock::Timeout=120 $missing >/dev/null
}
# The lists of packages may be missing or old; to read them anew takes longer than to install.
install 2>/dev/null || { apt-get update --quiet=2 && install; }

# Nor at the next start of this machine: who wanted an sshd here has had one before.
for package in $missing; do
    case $package in
        openssh-server) service=ssh ;;
        munge | slurmctld | slurmd) service=$package ;;
        *) continue ;;
    esac
    if command -v systemctl >/dev/null; then
        systemctl disable --quiet "$service.service" >/dev/null 2>&1 || echo "$service starts at the next boot" >&2
    elif command -v update-rc.d >/dev/null; then
        update-rc.d "$service" disable >/dev/null 2>&1 || echo "$service starts at the next boot" >&2
    fi
done
