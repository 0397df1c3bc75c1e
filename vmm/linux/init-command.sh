#!/bin/busybox sh
# First process of a command's initramfs: run it, report its exit status, power off. See vmm/linux/initramfs.py.

for module in /lib/load/*.ko; do
	[ -e "$module" ] && /bin/busybox insmod "$module"
done
/bin/busybox mount -a
[ -e /etc/up ] && . /etc/up
. /etc/argv
# What busybox's poweroff, reboot and halt send the first process: done once the command is over.
end=poweroff
trap 'end=poweroff' USR2
trap 'end=reboot' TERM
trap 'end=halt' USR1
echo "pyvmm: command"
"$@" </dev/null
status=$?
echo "pyvmm: exit status $status"

# isa-debug-exit, port 0xf4 = 244; the machine ends on this write if it has the device.
if [ "$status" -ne 0 ] && [ $end = poweroff ] && [ -c /dev/port ]; then
	printf "\\$(printf %o "$status")" | /bin/busybox dd of=/dev/port bs=1 seek=244 conv=notrunc 2>/dev/null
fi
exec /bin/busybox "$end" -f
