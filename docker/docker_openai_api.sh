#!/bin/sh
# Run the OpenAI-compatible server in a container in the background.
set -eu
DEMO=api
TITLE="OpenAI API server"
PAGE=/docs
. "$(dirname "$0")/common.sh"

start "$@"
