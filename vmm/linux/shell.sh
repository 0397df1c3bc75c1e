# What an interactive shell of the default initramfs reads first (ENV).

# busybox's own send the first process a signal (USR2, TERM, USR1). These also work in the background of a shell.
poweroff() { /bin/busybox poweroff -f; }
reboot() { /bin/busybox reboot -f; }
halt() { /bin/busybox halt -f; }

# The first process: the signals of programs that call them, and the end of the shell.
if [ $$ -eq 1 ]; then
	trap 'exec /bin/busybox poweroff -f' USR2 EXIT
	trap 'exec /bin/busybox reboot -f' TERM
	trap 'exec /bin/busybox halt -f' USR1
fi
