#!/bin/sh
# Entry point of the container: runs `cli`, `web` or `api` with arguments for that demo, or any other command unchanged.
#
# The servers listen on all addresses of the container. Published ports decide who can reach them; the docker_*.sh
# scripts publish to this machine only.
set -eu
ROOT=$(dirname -- "$0")/..

case ${1:-} in
    cli)
        shift
        set -- python "$ROOT/cli_demo.py" "$@"
        ;;
    web)
        shift
        set -- python "$ROOT/web_demo.py" --server-name 0.0.0.0 --server-port 8000 "$@"
        ;;
    api)
        shift
        set -- python "$ROOT/openai_api.py" --server-name 0.0.0.0 --server-port 8000 "$@"
        ;;
esac
exec "$@"
