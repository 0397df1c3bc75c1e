#!/bin/busybox sh
# The first process of the SVM host: loads the drivers, mounts the root and the project, and hands over.
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
for module in /lib/load/*.ko; do
	/bin/busybox insmod "$module" || echo "svm: $module cannot be loaded"
done
if ! /bin/busybox mount -t ext4 -o noatime,noinit_itable /dev/vda /root ||
	! /bin/busybox mount -t ext4 -o noatime,noinit_itable /dev/vdb /root/project; then
	echo "svm: the disks of this host cannot be mounted"
	/bin/busybox poweroff -f
fi
for place in proc sys dev; do
	/bin/busybox mount --move "/$place" "/root/$place"
done
exec /bin/busybox switch_root /root /project/run
