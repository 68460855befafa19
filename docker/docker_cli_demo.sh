#!/bin/sh
# Run the terminal demo in a container that is removed at the end.
set -eu
DEMO=cli
TITLE="terminal demo"
PAGE=
. "$(dirname "$0")/common.sh"

start "$@"
