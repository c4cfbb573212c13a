#!/bin/busybox sh
# The guest's first process: loads the drivers, configures eth0, then runs what arrives on the
# serial port, one numbered line at a time, and ends each with a marker the lab waits for.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs -o size=90%,mode=1777 tmpfs /tmp
dmesg -n 1
while read -r module; do insmod "/lib/modules/$module.ko"; done </lib/modules/order
# Hot-plugged memory is used at once, and for kernel buffers too.
echo online_kernel >/sys/devices/system/memory/auto_online_blocks 2>/dev/null
ip link set lo up
tries=0
while [ ! -e /sys/class/net/eth0 ] && [ $tries -lt 100 ]; do usleep 50000; tries=$((tries + 1)); done
ip address add "$lab_ip" dev eth0
ip link set eth0 up
cd /tmp
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty -echo -onlcr
echo "guest: ready"
while true; do
    read -r number line || continue
    eval "$line" </dev/null
    echo
    echo "@@$number $?@@"
done
