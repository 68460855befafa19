# What the scripts beside this one share; they source it (any POSIX shell).
#
# In:  MODEL, the default model; MANY, "yes" for a process on every GPU (two processes where there is none).
# Out: MODEL, DATA, OUTPUT as the person wants them; "$@", every other argument, for finetune.py, where it wins over the
#      script's settings; launch, which starts finetune.py with the arguments that it is given and does not return.

ROOT=$(CDPATH="" cd -- "$(dirname -- "$0")/.." && pwd)
MODEL=$ROOT/$MODEL
DATA=$ROOT/examples/identity.json
OUTPUT=output_qwen

usage() {
    cat <<TEXT
Usage: bash $0 [-m MODEL] [-d DATA] [-o OUTPUT] [any argument of finetune.py]

  -m, --model    a folder or a hub id ($MODEL); with --hub modelscope, an id of ModelScope
  -d, --data     conversations to learn, a JSON file ($DATA)
  -o, --output   the folder that the result is written to ($OUTPUT)

'python finetune.py --help-all' lists the other arguments. The environment may name the interpreter (PYTHON), the processes
of a machine (GPUS_PER_NODE; every GPU without it), and for several machines NNODES, NODE_RANK, MASTER_ADDR and
MASTER_PORT (6001).
TEXT
}

# Takes its own arguments out of "$@": each is moved to the end, or dropped, until all have been seen.
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

# The interpreter of an active environment, else of the one that make makes.
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
