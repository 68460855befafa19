#!/bin/sh
# The terminal demo in a container, which is removed at the end.
set -eu
DEMO=cli
TITLE="terminal demo"
PAGE=
. "$(dirname "$0")/common.sh"

start "$@"
