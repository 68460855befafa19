# shellcheck shell=sh
# What the scripts beside this one share; they source it (any POSIX shell).
#
# Revolves around one container of one demo: what the person asks for, what Docker has to be told. What the demo does
# with its arguments it does not know. Nothing of the machine is shown to the container but the checkpoint, to read,
# and a volume of its own for downloads and compiled kernels.
#
# In:  DEMO, what entrypoint.sh calls it; TITLE, what people call it; PAGE, what to open of a server.
# Out: "$@", the arguments for the demo itself; start, which starts it with these.

IMAGE=
CHECKPOINT=
NAME=qwen
GPUS=all
CPU=no
PORT=8901
ADDRESS=127.0.0.1

usage() {
    cat <<TEXT
Usage: bash $0 [-i IMAGE] [-c CHECKPOINT] [-n NAME] [--cpu] [-- ARGUMENTS]

Runs the $TITLE in a container. ARGUMENTS go to the demo as they are.

  -i, --image IMAGE            built with docker/Dockerfile (qwen:cuda, with --cpu qwen:cpu)
  -c, --checkpoint CHECKPOINT  a folder or a hub id (the bundled toy)
  -n, --name NAME              of the container ($NAME)
      --gpus GPUS              for Docker: all, or '"device=0,1"' with both pairs of quotes ($GPUS)
      --cpu                    stay off the GPUs
TEXT
    [ "$DEMO" = cli ] || cat <<TEXT
      --port PORT              of this machine ($PORT)
      --host ADDRESS           of this machine; 0.0.0.0 lets other machines in ($ADDRESS)
TEXT
}

# Say what is wrong and end, with status 1 or another one.
fail() {
    printf '%s\n' "$1" >&2
    exit "${2:-1}"
}

while [ $# -gt 0 ]; do
    option=$1
    shift
    case $DEMO:$option in
        *:-h | *:--help)
            usage
            exit 0
            ;;
        *:--)
            break
            ;;
        *:--cpu)
            CPU=yes
            continue
            ;;
        *:-i | *:--image | *:-c | *:--checkpoint | *:-n | *:--name | *:--gpus) ;;
        web:--port | web:--host | api:--port | api:--host) ;;
        *) fail "There is no option $option here. -h lists them; arguments for the demo itself come after --." 2 ;;
    esac
    case ${1:-} in
        '' | -*) fail "$option needs a value." 2 ;;
    esac
    case $option in
        -i | --image) IMAGE=$1 ;;
        -c | --checkpoint) CHECKPOINT=$1 ;;
        -n | --name) NAME=$1 ;;
        --gpus) GPUS=$1 ;;
        --port) PORT=$1 ;;
        --host) ADDRESS=$1 ;;
    esac
    shift
done

if [ -z "$IMAGE" ]; then
    IMAGE=qwen:cuda
    [ "$CPU" = no ] || IMAGE=qwen:cpu
fi
case $PORT in
    *[!0-9]* | ??????*) fail "--port $PORT: a port is a whole number from 1 to 65535." 2 ;;
esac
if [ "$PORT" -lt 1 ] || [ "$PORT" -gt 65535 ]; then
    fail "--port $PORT: a port is a whole number from 1 to 65535." 2
fi

check_docker() {
    command -v docker >/dev/null 2>&1 ||
        fail "There is no docker command here. How to install it: https://docs.docker.com/engine/install/"
    said=$(docker version --format '{{.Server.Version}}' 2>&1 >/dev/null) || fail "Docker does not answer: $said
If it is not running, 'sudo systemctl start docker' starts it. If you are not allowed to use it, put sudo in front."
    if docker container inspect "$NAME" >/dev/null 2>&1; then
        fail "There is a container $NAME already. 'docker rm -f $NAME' stops and removes it, or -n names another one."
    fi
}

# Sets VARIANT, what the image was built as.
check_image() {
    build="build one with 'docker build -f docker/Dockerfile -t qwen:cuda .', or for a machine without a GPU with \
'docker build -f docker/Dockerfile -t qwen:cpu --build-arg VARIANT=cpu .'"
    case $IMAGE in
        qwenllm/*) fail "$IMAGE has the code that these models were published with, not this one: $build" ;;
    esac
    if ! docker image inspect "$IMAGE" >/dev/null 2>&1; then
        case $IMAGE in
            */*) docker pull "$IMAGE" || fail "The image $IMAGE is not here and could not be fetched." ;;
            *) fail "There is no image $IMAGE: $build" ;;
        esac
    fi
    VARIANT=$(docker image inspect --format '{{index .Config.Labels "qwen.variant"}}' "$IMAGE" 2>/dev/null) || VARIANT=
    case $VARIANT in
        cuda | cpu) ;;
        *) fail "$IMAGE was not built with docker/Dockerfile: $build" ;;
    esac
}

# The first file in folder $2 that is a link out of folder $1; status 1 where there is none.
link_out_of() {
    for file in "$2"/*; do
        [ -L "$file" ] || continue
        case $(readlink -f -- "$file") in
            "$1"/*) ;;
            *)
                printf '%s' "$file"
                return 0
                ;;
        esac
    done
    return 1
}

# Sets MOUNTED, the folder to show to the container, empty for none; and INSIDE, the checkpoint's name in there.
find_checkpoint() {
    MOUNTED=
    INSIDE=$CHECKPOINT
    [ -n "$CHECKPOINT" ] || return 0
    if [ ! -d "$CHECKPOINT" ]; then
        check_hub_id
        return 0
    fi
    folder=$(CDPATH="" cd -- "$CHECKPOINT" && pwd -P) || fail "$CHECKPOINT cannot be entered."
    if [ ! -f "$folder/config.json" ]; then
        [ ! -f "$folder/adapter_config.json" ] || fail "$CHECKPOINT is an adapter, whose model the container would not \
see. Merge it first: python finetune/merge_lora.py '$CHECKPOINT' MERGED"
        fail "$CHECKPOINT has no config.json: it is not a model folder, or its download stopped early."
    fi
    MOUNTED=$folder
    if link=$(link_out_of "$folder" "$folder"); then
        # A download of the Hugging Face hub: MODEL/snapshots/REVISION links to files in MODEL/blobs.
        MOUNTED=${folder%/snapshots/*}
        if [ ! -d "$MOUNTED/blobs" ] || link_out_of "$MOUNTED" "$folder" >/dev/null; then
            fail "$link is a link out of the folder, and the container would not see where it leads. \
'cp -rL' copies a folder with the files themselves."
        fi
    fi
    INSIDE=/data/checkpoints/${MOUNTED##*/}${folder#"$MOUNTED"}
}

# What is no folder must be OWNER/NAME; a typing error should not end in a container that starts again and again.
check_hub_id() {
    [ ! -e "$CHECKPOINT" ] || fail "$CHECKPOINT is a file. Name the folder that it lies in."
    printf '%s\n' "$CHECKPOINT" | grep -Eqx '[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*' ||
        fail "There is no folder $CHECKPOINT, and it is not a hub id (OWNER/NAME) either."
    if [ "${CHECKPOINT%%/*}" != Qwen ] && [ -d "${CHECKPOINT%/*}" ]; then
        fail "There is no folder $CHECKPOINT, though there is a folder ${CHECKPOINT%/*}."
    fi
}

# One field of Docker's --mount, which is a line of CSV: paths may have commas and quotes.
field() {
    printf '"%s"' "$(printf '%s' "$1" | sed 's/"/""/g')"
}

# Start the demo with these arguments.
start() {
    check_docker
    check_image
    find_checkpoint
    # As whoever calls, so that it may read what they may; never as root.
    user=$(id -u) group=$(id -g)
    if [ "$user" = 0 ]; then
        user=1000 group=1000
    fi

    [ -z "$INSIDE" ] || set -- -c "$INSIDE" "$@"
    [ "$CPU" = no ] || set -- --cpu-only "$@"
    set -- "$IMAGE" "$DEMO" "$@"
    [ "$CPU:$VARIANT" != no:cuda ] || set -- --gpus "$GPUS" "$@"
    if [ -n "$MOUNTED" ]; then
        target=/data/checkpoints/${MOUNTED##*/}
        set -- --mount "type=bind,$(field "source=$MOUNTED"),$(field "target=$target"),readonly" "$@"
    fi
    # Named without a value, a variable is passed on if it is set.
    for variable in HF_TOKEN HF_ENDPOINT HF_HUB_OFFLINE QWEN_HUB MODELSCOPE_API_TOKEN MODELSCOPE_ENDPOINT QWEN_API_KEY \
        QWEN_API_AUTH; do
        set -- --env "$variable" "$@"
    done
    set -- --name "$NAME" --init --pull never --user "$user:$group" --cap-drop ALL --security-opt no-new-privileges \
        --mount "type=volume,source=qwen-cache-$user,target=/home/qwen/.cache" "$@"

    if [ "$DEMO" = cli ]; then
        [ ! -t 0 ] || set -- --tty "$@"
        exec docker run --rm --interactive "$@"
    fi
    container=$(docker create --restart unless-stopped --publish "$ADDRESS:$PORT:8000" "$@") ||
        fail "Docker did not make the container."
    if ! said=$(docker start "$container" 2>&1 >/dev/null); then
        docker rm -f "$container" >/dev/null
        case $said in
            *"could not select device driver"* | *nvidia*)
                fail "$said
Docker cannot give it a GPU: docs/docker.md says what is needed for that. With --cpu it does without one."
                ;;
            *"already allocated"* | *"already in use"*)
                fail "$said
--port names another port."
                ;;
        esac
        fail "$said"
    fi
    case $ADDRESS in
        127.* | 0.0.0.0) host=localhost ;;
        *) host=$ADDRESS ;;
    esac
    cat <<TEXT
Successfully started $TITLE. Open 'http://$host:$PORT$PAGE' to try!
Run \`docker logs $NAME\` to check demo status.
Run \`docker rm -f $NAME\` to stop and remove the demo.
TEXT
    echo "It answers when the model is loaded, which may take minutes." >&2
}
