#!/usr/bin/env bash
# Run a command with the standard AWS variables set to a real S3 server: Ceph's gateway over one monitor and one
# in-memory store, on loopback, from Debian's packages, in a temporary folder.
# usage: tests/ceph.sh COMMAND [ARGUMENT ...]
set -euo pipefail

packages="radosgw ceph-mon ceph-osd ceph-mgr ceph-common"
if ! command -v radosgw >/dev/null; then
    if [ "$(id -u)" != 0 ]; then
        echo "Ceph's gateway is missing, and installing it needs root: apt-get install $packages" >&2
        exit 1
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages
fi

free_ports() {
    python3 - <<'PY'
import socket
sockets = [socket.socket() for _ in range(3)]
for s in sockets:
    s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))
PY
}
read -r gateway_port mon_v2_port mon_v1_port < <(free_ports)

folder=$(mktemp -d)
stop() {
    for file in "$folder"/*.pid; do
        [ -f "$file" ] && kill "$(cat "$file")" 2>/dev/null || true
    done
    sleep 1
    rm -rf "$folder"
}
trap stop EXIT

cd "$folder"
mkdir mon osd mgr rgw
cat >ceph.conf <<CONF
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon host = [v2:127.0.0.1:$mon_v2_port,v1:127.0.0.1:$mon_v1_port]
public addr = 127.0.0.1
auth allow insecure global id reclaim = true
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 4294967296
mon allow pool size one = true
mon data avail crit = 1
mon max pg per osd = 1000
run dir = $folder
admin socket = $folder/\$name.asok
log file = $folder/\$name.log
keyring = $folder/keyring
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:$gateway_port
CONF
ceph="ceph -c $folder/ceph.conf --connect-timeout 20"
ceph-authtool --create-keyring keyring --gen-key -n mon. --cap mon 'allow *'
ceph-authtool keyring --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
monmaptool --create --fsid "$(sed -n 's/^fsid = //p' ceph.conf)" \
    --addv a "[v2:127.0.0.1:$mon_v2_port,v1:127.0.0.1:$mon_v1_port]" monmap
ceph-mon -c ceph.conf --mkfs -i a --monmap monmap --keyring keyring --mon-data mon
ceph-mon -c "$folder/ceph.conf" -i a --mon-data "$folder/mon" --pid-file "$folder/mon.pid"
osd=$(cat /proc/sys/kernel/random/uuid)
$ceph osd new "$osd"
$ceph auth get-or-create osd.0 mon 'allow profile osd' mgr 'allow profile osd' osd 'allow *' -o osd/keyring
$ceph auth get-or-create mgr.x mon 'allow profile mgr' osd 'allow *' -o mgr/keyring
$ceph auth get-or-create client.rgw mon 'allow *' osd 'allow *' mgr 'allow *' -o rgw/keyring
ceph-osd -c ceph.conf -i 0 --mkfs --osd-uuid "$osd" --osd-data osd --keyring osd/keyring
$ceph osd crush add osd.0 1.0 root=default
ceph-osd -c "$folder/ceph.conf" -i 0 --osd-data "$folder/osd" --keyring "$folder/osd/keyring" --pid-file "$folder/osd.pid"
ceph-mgr -c "$folder/ceph.conf" -i x --mgr-data "$folder/mgr" --keyring "$folder/mgr/keyring" --pid-file "$folder/mgr.pid"
radosgw -c "$folder/ceph.conf" -n client.rgw --keyring "$folder/rgw/keyring" --rgw-data "$folder/rgw" \
    --pid-file "$folder/rgw.pid"
for _ in $(seq 60); do
    curl -s "http://127.0.0.1:$gateway_port" >/dev/null && break
    sleep 1
done
radosgw-admin -c ceph.conf user create --uid=test --display-name=test --access-key=test --secret=testtest >/dev/null
echo "Ceph's gateway answers at port $gateway_port"
cd - >/dev/null

export AWS_ENDPOINT_URL="http://127.0.0.1:$gateway_port" AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=testtest
export AWS_DEFAULT_REGION=default
"$@"
