#!/usr/bin/env bash
# Build the image with docker, podman or buildah, whichever works here.
#   docker/build.sh                                                  slidestream:latest
#   docker/build.sh slidestream:cpu --build-arg TORCH_BACKEND=cpu    whatever follows the name is handed on
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:-slidestream}
shift || true
revision=$(git rev-parse HEAD 2> /dev/null || true)
options=(-t "$name" -f docker/Dockerfile --build-arg "REVISION=$revision" "$@" .)

if docker info > /dev/null 2>&1; then
  DOCKER_BUILDKIT=1 exec docker build "${options[@]}"
elif podman info > /dev/null 2>&1; then
  exec podman build --layers --format docker "${options[@]}"  # the OCI format has no HEALTHCHECK
elif buildah info > /dev/null 2>&1; then
  exec buildah bud --layers --format docker "${options[@]}"
fi
echo "neither docker nor podman nor buildah works here" >&2
exit 1
