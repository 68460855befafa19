# shellcheck shell=sh
# Shared by the docker_*.sh scripts, which source it (any POSIX shell). Parses options and starts the container of a
# demo. The container can access only the checkpoint (read-only) and its own volume for downloads and compiled kernels.
#
# In:  DEMO, the name in entrypoint.sh; TITLE, the name in messages; PAGE, the URL path to open in a browser.
# Out: "$@", the arguments for the demo; start, a function that starts it with them.

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

Runs the $TITLE in a container. ARGUMENTS are passed to the demo.

  -i, --image IMAGE            image built with docker/Dockerfile (default: qwen:cuda, with --cpu qwen:cpu)
  -c, --checkpoint CHECKPOINT  a folder or a hub id (default: the bundled toy)
  -n, --name NAME              name of the container (default: $NAME)
      --gpus GPUS              GPUs for Docker: all, or '"device=0,1"' with both pairs of quotes (default: $GPUS)
      --cpu                    run on the CPU
TEXT
    [ "$DEMO" = cli ] || cat <<TEXT
      --port PORT              port on this machine (default: $PORT)
      --host ADDRESS           address on this machine; 0.0.0.0 lets other machines in (default: $ADDRESS)
TEXT
}

# Print message $1 and exit with status $2 (default: 1).
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
        *) fail "Unknown option $option. -h lists the options; put arguments for the demo after --." 2 ;;
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
    *[!0-9]* | ??????*) fail "--port $PORT: must be a whole number from 1 to 65535." 2 ;;
esac
if [ "$PORT" -lt 1 ] || [ "$PORT" -gt 65535 ]; then
    fail "--port $PORT: must be a whole number from 1 to 65535." 2
fi

check_docker() {
    command -v docker >/dev/null 2>&1 ||
        fail "Command not found: docker. Install it: https://docs.docker.com/engine/install/"
    said=$(docker version --format '{{.Server.Version}}' 2>&1 >/dev/null) || fail "Docker does not answer: $said
If it is not running, start it: 'sudo systemctl start docker'. If permission is denied, put sudo in front."
    if docker container inspect "$NAME" >/dev/null 2>&1; then
        fail "A container named $NAME exists already. Stop and remove it with 'docker rm -f $NAME', or choose another with -n."
    fi
}

BUILD="build one with 'docker build -f docker/Dockerfile -t qwen:cuda .', or for a machine without a GPU with \
'docker build -f docker/Dockerfile -t qwen:cpu --build-arg VARIANT=cpu .'"

# Set VARIANT, which the image was built with.
check_image() {
    if ! docker image inspect "$IMAGE" >/dev/null 2>&1; then
        case $IMAGE in
            */*) docker pull "$IMAGE" || fail "The image $IMAGE was not found and could not be pulled." ;;
            *) fail "The image $IMAGE was not found: $BUILD" ;;
        esac
    fi
    VARIANT=$(docker image inspect --format '{{index .Config.Labels "qwen.variant"}}' "$IMAGE" 2>/dev/null) || VARIANT=
    case $VARIANT in
        cuda | cpu) ;;
        *) fail "$IMAGE was not built with docker/Dockerfile: $BUILD" ;;
    esac
}

# Print the first file in folder $2 that links out of folder $1; status 1 if there is none.
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

# Set MOUNTED, the folder to mount (may be empty), and INSIDE, the checkpoint's path in the container.
find_checkpoint() {
    MOUNTED=
    INSIDE=$CHECKPOINT
    [ -n "$CHECKPOINT" ] || return 0
    if [ ! -d "$CHECKPOINT" ]; then
        check_hub_id
        return 0
    fi
    folder=$(CDPATH="" cd -- "$CHECKPOINT" && pwd -P) || fail "Cannot enter the folder $CHECKPOINT."
    if [ ! -f "$folder/config.json" ]; then
        [ ! -f "$folder/adapter_config.json" ] || fail "$CHECKPOINT is an adapter, and the container has no \
access to its base model. Merge it first: python finetune/merge_lora.py '$CHECKPOINT' MERGED"
        fail "$CHECKPOINT has no config.json: it is not a model folder, or its download stopped early."
    fi
    MOUNTED=$folder
    if link=$(link_out_of "$folder" "$folder"); then
        # Hugging Face cache: MODEL/snapshots/REVISION links to files in MODEL/blobs.
        MOUNTED=${folder%/snapshots/*}
        if [ ! -d "$MOUNTED/blobs" ] || link_out_of "$MOUNTED" "$folder" >/dev/null; then
            fail "$link is a link out of the folder, and the container has no access to its target. \
Copy the folder with 'cp -rL', which copies the files themselves."
        fi
    fi
    INSIDE=/data/checkpoints/${MOUNTED##*/}${folder#"$MOUNTED"}
}

# Anything but a folder must be OWNER/NAME. Otherwise a typing error would lead to a container that restarts forever.
check_hub_id() {
    [ ! -e "$CHECKPOINT" ] || fail "$CHECKPOINT is a file. Name the folder that contains it."
    printf '%s\n' "$CHECKPOINT" | grep -Eqx '[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*' ||
        fail "There is no folder $CHECKPOINT, and it is not a hub id (OWNER/NAME) either."
    if [ "${CHECKPOINT%%/*}" != Qwen ] && [ -d "${CHECKPOINT%/*}" ]; then
        fail "There is no folder $CHECKPOINT, though there is a folder ${CHECKPOINT%/*}."
    fi
}

# Quote one field of Docker's --mount, which is a line of CSV: paths may contain commas and quotes.
field() {
    printf '"%s"' "$(printf '%s' "$1" | sed 's/"/""/g')"
}

# Start the demo with the arguments "$@".
start() {
    case $IMAGE in
        qwenllm/*) fail "$IMAGE contains the original code of these models, not this repository: $BUILD" ;;
    esac
    check_docker
    check_image
    find_checkpoint
    # Run as the calling user, to have the same read permissions, but never as root.
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
    # --env without a value passes the variable on if it is set.
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
        fail "Docker could not create the container."
    if ! said=$(docker start "$container" 2>&1 >/dev/null); then
        docker rm -f "$container" >/dev/null
        case $said in
            *"could not select device driver"* | *nvidia*)
                fail "$said
Docker cannot provide a GPU: see docs/docker.md for the requirements, or run without a GPU with --cpu."
                ;;
            *"already allocated"* | *"already in use"*)
                fail "$said
Choose another port with --port."
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
    echo "It will answer once the model is loaded, which may take minutes." >&2
}
