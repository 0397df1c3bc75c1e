#!/bin/busybox sh
# First process of a session's initramfs: takes commands from the console and prints the output of each, and a line
# "pyvmm: TOKEN STATUS", the token being the asker's. See vmm/linux/session.py.

for module in /lib/load/*.ko; do
	[ -e "$module" ] && /bin/busybox insmod "$module"
done
/bin/busybox mount -a
[ -e /etc/up ] && . /etc/up
# What busybox's poweroff, reboot and halt send the first process.
trap 'exec /bin/busybox poweroff -f' USR2
trap 'exec /bin/busybox reboot -f' TERM
trap 'exec /bin/busybox halt -f' USR1
# What is typed is not shown, lines may be long, and the guest's newline stays a newline.
/bin/busybox stty -echo -icanon -onlcr

# Each in a subshell: neither its directory, its variables nor its exit are the next one's.
run() {
	(eval "$2") </dev/null 2>&1
	echo "pyvmm: $1 $?"
}

echo "pyvmm: ready"
while read -r line; do
	eval "$line"
done
