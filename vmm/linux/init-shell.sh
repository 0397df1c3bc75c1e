#!/bin/busybox sh
# First process of the default initramfs: a shell on the console, and the machine ends with it.
# Every fork and exec counts: where guest kernel code is emulated, one takes the better part of a second.

# All of /etc/fstab in one process.
/bin/busybox mount -a
for module in /lib/load/*.ko; do
	[ -e "$module" ] && /bin/busybox insmod "$module"
done
[ -e /etc/up ] && . /etc/up
read -r _ _ release _ </proc/version
echo "Linux $release is up; the machine powers off when this shell exits."

# It becomes the shell, which takes part in /etc/shell: a poweroff that is sent to the first process reaches it.
# -c makes the console its controlling terminal: job control and Ctrl-C work.
export ENV=/etc/shell
exec /bin/busybox setsid -c /bin/busybox sh
