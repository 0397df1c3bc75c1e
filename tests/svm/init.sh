#!/bin/busybox sh
# The first process of a test host: loads the drivers, mounts the root and the project, and hands over. The kernel
# has it in its environment what the disks are called (disks=/dev/vd).
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
for module in /lib/load/*.ko; do
	/bin/busybox insmod "$module" || echo "host: $module cannot be loaded"
done
if ! /bin/busybox mount -t ext4 -o noatime,noinit_itable "${disks}a" /root ||
	! /bin/busybox mount -t ext4 -o noatime,noinit_itable "${disks}b" /root/project; then
	echo "host: the disks of this host cannot be mounted"
	/bin/busybox poweroff -f
fi
for place in proc sys dev; do
	/bin/busybox mount --move "/$place" "/root/$place"
done
export disks
exec /bin/busybox switch_root /root /project/run
