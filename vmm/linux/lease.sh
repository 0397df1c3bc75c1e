#!/bin/sh
# What udhcpc runs when something happens to its lease; see vmm/linux/initramfs.py.
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
ip addr replace "$ip/$mask" dev "$interface"
[ -n "$router" ] && ip route replace default via "${router%% *}" dev "$interface"
for server in $dns; do
	echo "nameserver $server"
done >/etc/resolv.conf
