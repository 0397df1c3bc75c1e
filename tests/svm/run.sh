#!/bin/sh
# A test host's second half, on the project disk: what a system needs around the job, the job, and its results.
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up
# passt takes its addresses from the interface with the default route (RFC 5737: these lead nowhere).
ip link add uplink type dummy && ip address add 192.0.2.2/24 dev uplink && ip link set uplink up
ip route add default via 192.0.2.1
hostname host
echo 1 > /proc/sys/vm/overcommit_memory
export HOME=/root LANG=C.UTF-8 PATH=/project/bin:/usr/sbin:/usr/bin TMPDIR=/var/tmp TERM="${TERM:-linux}"
export PYTHONPATH=/project/site:/opt/site:/project
export PYVMM_CACHE=/var/cache/pyvmm PYVMM_GUESTS=/project/guests-built
mkdir -p /results
cd /project
if [ -e /dev/kvm ]; then
	/project/job
	echo $? > /results/status
else
	echo "this host has no /dev/kvm: its kernel's KVM module did not load" | tee /results/failure
fi
sync
# The results are a tar archive on a disk of their own.
tar -c -C /results . | dd of="${disks}c" bs=64k conv=fsync 2>/dev/null
# Setting the line's modes waits until all that was printed has left it.
stty -F /dev/console sane
busybox poweroff -f
