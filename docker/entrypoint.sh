#!/bin/sh
# What a container runs: `cli`, `web` or `api` with arguments for that demo, or any other command as it is.
#
# The servers listen on every address of the container. Who reaches these is decided outside, by the ports that are
# published; the scripts beside this one publish for the machine alone.
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
