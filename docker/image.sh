#!/bin/sh
# Build an image and run it, with Docker where a daemon answers and with buildah where none does.
#
#   docker/image.sh build cpu          builds logitserve:cpu (any further argument is one of docker build, buildah bud)
#   docker/image.sh run [ARGUMENT ...] runs it as its user on a read-only root, with $CACHE at /cache
#   docker/image.sh healthcheck        runs the command of its HEALTHCHECK
#   docker/image.sh config             prints its configuration as JSON
#   docker/image.sh files              writes its root file system to standard output, as a tar archive
#   docker/image.sh remove             removes it, and without Docker the base too when no other image is left
#
# Variables: IMAGE (logitserve:cpu), CACHE (a directory, for run and healthcheck; it becomes the image's user's, which only
# root can do), and LOGITSERVE_ ones, which run and healthcheck pass on. Without Docker: IMAGE_STORAGE, a directory
# for images. The server is then in the network of this machine, root must run this on Debian, and Debian's
# debootstrap makes the base.
set -eu

IMAGE=${IMAGE:-logitserve:cpu}
IMAGE_STORAGE=${IMAGE_STORAGE:-/var/tmp/logitserve-images}
CACHE=${CACHE:-}
USER_ID=10001
BASE=localhost/logitserve-base
source=$(cd "$(dirname "$0")/.." && pwd)

fail() {
    echo "$0: $*" >&2
    exit 1
}

has_docker() { docker info >/dev/null 2>&1; }

variables() { env | sed -n 's/^\(LOGITSERVE_[A-Z_]*\)=.*/\1/p'; }

# Give the cache to the image's user, if it is not theirs.
own_cache() {
    [ -n "$CACHE" ] || fail "CACHE names no directory"
    [ "$(stat --format %u "$CACHE")" = "$USER_ID" ] || chown "$USER_ID:$USER_ID" "$CACHE" 2>/dev/null ||
        fail "CACHE must belong to the image's user: sudo chown $USER_ID:$USER_ID $CACHE"
}

# --- With Docker ---

# docker_run ENTRYPOINT ARGUMENT ...: the image's own entrypoint if it is empty.
docker_run() {
    entrypoint=$1
    shift
    own_cache
    for name in $(variables); do set -- --env "$name" "$@"; done
    exec docker run --rm --init=false --network host --read-only --tmpfs /tmp --cap-drop ALL \
        --security-opt no-new-privileges --volume "$(cd "$CACHE" && pwd):/cache" \
        ${entrypoint:+--entrypoint "$entrypoint"} "$@"
}

# --- Without Docker ---

store() { buildah --root "$IMAGE_STORAGE/images" --runroot "$IMAGE_STORAGE/run" "$@"; }

# A base like python:slim, of this machine's own release.
make_base() {
    if store inspect --type image "$BASE" >/dev/null 2>&1; then return; fi
    # shellcheck source=/dev/null
    release=$(. /etc/os-release && echo "$VERSION_CODENAME")
    base=$IMAGE_STORAGE/base
    rm -rf "$base"
    mkdir -p "$base"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$release" "$base" >&2
    rm -rf "$base"/var/cache/apt/* "$base"/var/lib/apt/lists/* "$base"/var/log/* "$base"/usr/share/doc/*
    container=$(store from scratch)
    store copy --quiet "$container" "$base" / >/dev/null
    store commit --quiet --rm --format docker "$container" "$BASE" >/dev/null
    rm -rf "$base"
}

# How this machine reaches its packages: the configuration of apt and pip, what pip's names, and certificates. All
# that is mounted while the image is built, and is in none of its layers. An index on disk, .../simple, mostly
# keeps its files beside itself.
mounts() {
    pip_files=
    for file in /etc/pip.conf /etc/xdg/pip/pip.conf "$HOME/.pip/pip.conf" "$HOME/.config/pip/pip.conf" "${PIP_CONFIG_FILE:-}"; do
        if [ -f "$file" ]; then
            case $file in
                "$HOME"/*) echo "$file:/root/${file#"$HOME"/}" ;;
                *) echo "$file:$file" ;;
            esac
            pip_files="$pip_files $file"
        fi
    done
    # shellcheck disable=SC2086  # a list of files
    named=$(cat /dev/null $pip_files | sed 's/#.*//' | grep -oE '(^|[ =]|file://)/[^ ]+' | sed 's/^[ =]//; s/^file:\/\///; s/\/simple\/*$//' | sort -u)
    for path in $named; do
        if [ -e "$path" ]; then echo "$path:$path"; fi
    done
    echo /etc/apt:/etc/apt
    echo /etc/ssl/certs/ca-certificates.crt:/etc/ssl/certs/ca-certificates.crt
}

build_without_docker() {
    target=$1
    shift
    mkdir -p "$IMAGE_STORAGE"
    make_base
    for mount in $(mounts | sort -u); do set -- --volume "$mount:ro" "$@"; done
    # A container of an earlier image would go on showing that one.
    store rm "$(container_name)" >/dev/null 2>&1 || true
    store bud --isolation chroot --format docker --pull-never --target "$target" --build-arg PYTHON_IMAGE="$BASE" \
        --file "$source/docker/Dockerfile" --tag "localhost/$IMAGE" "$@" "$source"
}

field() { store inspect --type image --format "$1" "localhost/$IMAGE"; }

# enter COMMAND ...: a container's way in, without a runtime. The process that called becomes the command.
enter() {
    own_cache
    root=$(store mount "$(container)")
    directory=$(field '{{.Docker.Config.WorkingDir}}')
    user=$(field '{{.Docker.Config.User}}')
    for name in $(variables); do set -- "$name=$(printenv "$name")" "$@"; done
    newline='
'
    IFS=$newline
    for variable in $(field '{{range .Docker.Config.Env}}{{println .}}{{end}}'); do set -- "$variable" "$@"; done
    unset IFS
    # shellcheck disable=SC2016  # expanded by the inner shell
    exec unshare --mount --propagation private sh -euc '
        root=$1 cache=$2 directory=$3 user=$4
        shift 4
        mount --bind "$root" "$root"
        mount -o remount,bind,ro "$root"
        mount --bind "$cache" "$root/cache"
        mount --rbind /dev "$root/dev"
        mount -t proc proc "$root/proc"
        mount -t tmpfs -o noexec,nosuid,nodev tmpfs "$root/tmp"
        cd "$root/$directory"
        exec setpriv --bounding-set=-all,+sys_chroot,+setuid,+setgid --no-new-privs \
            chroot --userspec="$user" "$root" /usr/bin/env --ignore-environment --chdir="$directory" "$@"
    ' sh "$root" "$(cd "$CACHE" && pwd)" "$directory" "$user" "$@"
}

container_name() { echo "logitserve-$(echo "$IMAGE" | tr ':/' '--')"; }

# One container for all that looks into the image.
container() {
    name=$(container_name)
    store inspect --type container "$name" >/dev/null 2>&1 ||
        store from --pull-never --name "$name" "localhost/$IMAGE" >/dev/null
    echo "$name"
}

run_without_docker() {
    if [ $# -eq 0 ]; then
        # shellcheck disable=SC2046  # one word each
        set -- $(field '{{range .Docker.Config.Cmd}}{{println .}}{{end}}')
    fi
    # shellcheck disable=SC2046  # one word each
    enter $(field '{{range .Docker.Config.Entrypoint}}{{println .}}{{end}}') "$@"
}

files_of_docker() {
    container=$(docker create "$IMAGE")
    trap 'docker rm "$container" >/dev/null' EXIT
    docker export "$container"
}

# Remove the image and its container. The base, what failed builds left, and the storage go with the last image. All
# else in IMAGE_STORAGE is somebody else's.
remove_without_docker() {
    store rm "$(container_name)" >/dev/null 2>&1 || true
    store rmi --force "localhost/$IMAGE" >/dev/null
    if store images --noheading --format '{{.Name}}' | grep -qvxE "$BASE|<none>"; then return; fi
    store rm --all >/dev/null
    store rmi --all --force >/dev/null
    rm -rf "$IMAGE_STORAGE/images" "$IMAGE_STORAGE/run" "$IMAGE_STORAGE/base"
    rmdir --ignore-fail-on-non-empty "$IMAGE_STORAGE"
}

healthcheck_without_docker() {
    set --
    newline='
'
    IFS=$newline
    for word in $(field '{{range .Docker.Config.Healthcheck.Test}}{{println .}}{{end}}'); do set -- "$@" "$word"; done
    unset IFS
    shift # CMD
    enter "$@"
}

[ $# -gt 0 ] || fail "build, run, healthcheck, config, files or remove?"
action=$1
shift
if has_docker; then
    case $action in
        build)
            target=$1
            shift
            docker build --target "$target" --file "$source/docker/Dockerfile" --tag "$IMAGE" "$@" "$source"
            ;;
        run) docker_run "" "$IMAGE" "$@" ;;
        healthcheck)
            docker inspect --format '{{json .Config.Healthcheck.Test}}' "$IMAGE" | python3 -c '
import json, os, subprocess, sys
entrypoint, *arguments = json.load(sys.stdin)[1:]
container = subprocess.check_output(["docker", "ps", "--quiet", "--filter", f"ancestor={sys.argv[1]}"], text=True)
sys.exit(subprocess.call(["docker", "exec", container.split()[0], entrypoint, *arguments]))' "$IMAGE"
            ;;
        config) docker inspect --format '{{json .Config}}' "$IMAGE" ;;
        files) files_of_docker ;;
        remove) docker image rm --force "$IMAGE" ;;
        *) fail "unknown action $action" ;;
    esac
else
    case $action in
        build) build_without_docker "$@" ;;
        run) run_without_docker "$@" ;;
        healthcheck) healthcheck_without_docker ;;
        config)
            store inspect --type image "localhost/$IMAGE" | python3 -c '
import json, sys
json.dump(json.load(sys.stdin)["Docker"]["config"], sys.stdout)'
            ;;
        files) tar --create --directory "$(store mount "$(container)")" . ;;
        remove) remove_without_docker ;;
        *) fail "unknown action $action" ;;
    esac
fi
