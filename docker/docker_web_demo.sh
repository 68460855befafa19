#!/bin/sh
# Run the browser demo in a container in the background.
set -eu
DEMO=web
TITLE="web demo"
PAGE=
. "$(dirname "$0")/common.sh"

start "$@"
