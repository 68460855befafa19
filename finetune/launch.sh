# Shared by the scripts in this folder, which source it (any POSIX shell).
#
# In:  MODEL, the default model; MANY, "yes" for a process on every GPU (two processes without a GPU).
# Out: MODEL, DATA, OUTPUT as given by the user; "$@", all other arguments, which go to finetune.py and override the
#      script's settings; launch, a function that starts finetune.py with its arguments and does not return.

ROOT=$(CDPATH="" cd -- "$(dirname -- "$0")/.." && pwd)
MODEL=$ROOT/$MODEL
DATA=$ROOT/examples/identity.json
OUTPUT=output_qwen

usage() {
    cat <<TEXT
Usage: bash $0 [-m MODEL] [-d DATA] [-o OUTPUT] [any argument of finetune.py]

  -m, --model    folder or hub id (default: $MODEL); with --hub modelscope, an id of ModelScope
  -d, --data     conversations to train on, a JSON file (default: $DATA)
  -o, --output   folder for the result (default: $OUTPUT)

'python finetune.py --help-all' lists the other arguments. Environment variables: PYTHON (interpreter), GPUS_PER_NODE
(processes per machine, default: all GPUs), and for several machines NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT
(default: 6001).
TEXT
}

# Remove our own arguments from "$@": each argument is dropped or moved to the end, until all have been seen.
left=$#
while [ "$left" -gt 0 ]; do
    case $1 in
        -m | --model | -d | --data | -o | --output)
            value=
            [ "$left" -lt 2 ] || value=$2
            case $value in
                '' | -*)
                    echo "$1 needs a value." >&2
                    exit 2
                    ;;
            esac
            case $1 in
                -m | --model) MODEL=$value ;;
                -d | --data) DATA=$value ;;
                *) OUTPUT=$value ;;
            esac
            shift 2
            left=$((left - 2))
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *)
            set -- "$@" "$1"
            shift
            left=$((left - 1))
            ;;
    esac
done

# The interpreter of the active environment, else of the .venv that make creates.
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$ROOT/.venv/bin/python" ]; then
        PYTHON=$ROOT/.venv/bin/python
    fi
fi

launch() {
    if [ "$MANY" = yes ]; then
        exec "$PYTHON" "$ROOT/finetune/launch.py" "$ROOT/finetune.py" "$@"
    fi
    exec "$PYTHON" "$ROOT/finetune.py" "$@"
}
