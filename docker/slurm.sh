#!/usr/bin/env bash
# slidestream on Slurm: several jobs share the work on one output folder. Where to start it, with the settings of `run`:
#   sbatch --array=1-4 docker/slurm.sh SLIDES OUT -e resnet50 --mpp 0.5
#   IMAGE=slidestream.sif sbatch --array=1-4 docker/slurm.sh SLIDES OUT -e resnet50     in an Apptainer image
# A job that is pre-empted, or whose time is over, stops cleanly, is queued again and goes on where it was.
#SBATCH --job-name=slidestream
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#SBATCH --output=slidestream-%A_%a.log
set -euo pipefail

RESTARTS=50  # after as many something is wrong that another start will not mend
[ $# -ge 2 ] || { echo "usage: sbatch [--array=1-4] docker/slurm.sh SLIDES OUT [settings of run]" >&2; exit 1; }
slides=$1 out=$2
shift 2
# OUT remembers where its slides lie, so they have the same path inside a container as outside.
if [ -n "${IMAGE:-}" ]; then
  [ -d "$slides" ] || { echo "$slides: in a container SLIDES is a folder, which can be bound" >&2; exit 1; }
  slides=$(realpath "$slides") out=$(realpath -m "$out")
  mkdir -p "$out"
  command=(apptainer run --nv --bind "$slides:$slides:ro" --bind "$out" "$IMAGE")
else
  command=(slidestream)
fi

signals=0 child=
# shellcheck disable=SC2329  # the trap calls it
stop() {
  signals=$((signals + 1))
  [ -z "$child" ] || kill -TERM "$child" 2> /dev/null || true
}
trap stop TERM

"${command[@]}" run "$slides" -o "$out" "$@" &
child=$!
while true; do
  before=$signals code=0
  wait "$child" || code=$?
  [ "$signals" -ne "$before" ] || break  # a signal ends `wait`, and not at once what is waited for
done

# 130: stopped cleanly; 143: before it could answer. A pre-empted job is queued again by Slurm itself, hence `|| true`.
if [ "$signals" -gt 0 ] && [[ $code = 130 || $code = 143 ]] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$RESTARTS" ]; then
  job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
  scontrol requeue "${job:-$SLURM_JOB_ID}" || true
fi
exit "$code"
