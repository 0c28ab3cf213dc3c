#!/usr/bin/env bash
# A training on a TPU pod of Google Cloud: creates the pod, installs, trains on all hosts.
#
#   experiments/launch/tpu_pod.sh NAME ZONE v5p-128 --config=configs/racm3_2b7.py \
#     --workdir=/mnt/shared/racm3_2b7 --config.memory_path=/mnt/shared/memory
#
# The type of a v5p counts cores, two per chip: v5p-128 has 64 chips; v5litepod-64 and
# v6e-64 count chips. All hosts must see the work directory. SPOT=1 uses spot machines:
# on preemption, the training saves and ends with status 75; the same command creates
# the pod again and resumes. DRY_RUN=1 prints the commands.
set -euo pipefail

if (($# < 4)); then
  sed -n '2,10p' "$0"
  exit 2
fi
name=$1 zone=$2 type=$3
shift 3

case $type in
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  v6e-*) image=v2-alpha-tpuv6e ;;
  *)
    echo "unknown TPU type $type: give v5litepod-N, v5p-N or v6e-N" >&2
    exit 2
    ;;
esac

run() {
  if [[ ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpu=(gcloud compute tpus tpu-vm)
spot=()
[[ ${SPOT:-} ]] && spot=(--spot)
if [[ ${DRY_RUN:-} ]] || ! "${tpu[@]}" describe "$name" --zone="$zone" &>/dev/null; then
  run "${tpu[@]}" create "$name" --zone="$zone" --accelerator-type="$type" \
    --version="$image" "${spot[@]}"
fi
run "${tpu[@]}" scp --recurse --worker=all --zone="$zone" \
  setup.py README.md racm3_jax configs "$name:racm3/"
install="cd racm3 && pip install -q -e '.[tpu]'"
train=$(printf '%q ' racm3 train "$@")
run "${tpu[@]}" ssh "$name" --zone="$zone" --worker=all \
  --command="$install && PATH=\$HOME/.local/bin:\$PATH $train"
