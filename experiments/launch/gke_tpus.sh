#!/usr/bin/env bash
# A training on a TPU slice of Google Kubernetes Engine: one pod per host, an indexed job.
#
#   experiments/launch/gke_tpus.sh NAME IMAGE v5p 4x4x4 --config=configs/racm3_2b7.py \
#     --workdir=/mnt/shared/racm3_2b7 --config.memory_path=/mnt/shared/memory
#
# IMAGE has racm3_jax[tpu] and the project's configs. CLAIM names a PersistentVolumeClaim
# that all hosts mount at /mnt/shared (default: racm3). If a host is preempted, the
# training saves and ends; the job restarts it, and it resumes. DRY_RUN=1 prints the
# manifest.
set -euo pipefail

if (($# < 5)); then
  sed -n '2,10p' "$0"
  exit 2
fi
name=$1 image=$2 kind=$3 topology=$4
shift 4

case $kind in
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
  *)
    echo "unknown TPU $kind: give v5e, v5p or v6e" >&2
    exit 2
    ;;
esac
chips=$((${topology//x/*}))
per_host=$((chips < 4 ? chips : 4))
hosts=$((chips / per_host))

# JSON strings are YAML.
arguments=''
for argument in train "$@"; do
  argument=${argument//\\/\\\\}
  arguments+="\"${argument//\"/\\\"}\", "
done

manifest=$(
  cat <<YAML
apiVersion: v1
kind: Service
metadata: {name: $name}
spec:
  clusterIP: None
  selector: {job-name: $name}
---
apiVersion: batch/v1
kind: Job
metadata: {name: $name}
spec:
  completionMode: Indexed
  completions: $hosts
  parallelism: $hosts
  backoffLimit: 1000
  template:
    spec:
      subdomain: $name
      restartPolicy: OnFailure
      terminationGracePeriodSeconds: 120
      nodeSelector:
        cloud.google.com/gke-tpu-accelerator: $accelerator
        cloud.google.com/gke-tpu-topology: $topology
      containers:
      - name: train
        image: $image
        command: [racm3]
        args: [${arguments%, }]
        ports: [{containerPort: 8471}, {containerPort: 8080}]
        resources:
          requests: {google.com/tpu: $per_host}
          limits: {google.com/tpu: $per_host}
        volumeMounts: [{name: shared, mountPath: /mnt/shared}]
      volumes:
      - name: shared
        persistentVolumeClaim: {claimName: ${CLAIM:-racm3}}
YAML
)
if [[ ${DRY_RUN:-} ]]; then
  echo "$manifest"
else
  kubectl apply -f - <<<"$manifest"
fi
