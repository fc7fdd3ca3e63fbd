#!/usr/bin/env bash
# Installs the appliance from this checkout: environment, data directory, first account and key; see --help.
# What it prints: progress and errors on stderr, secrets and the curl on stdout. Safe to run twice.
set -Eeuo pipefail
shopt -s inherit_errexit

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=scripts/step.sh
source "$root/scripts/step.sh"
venv=$root/.venv
appliance=$venv/bin/appliance
unit_file=${APPLIANCE_UNIT_FILE:-/etc/systemd/system/appliance.service} # the tests' way to leave the real one alone
service_user=appliance

usage() {
    cat <<'USAGE'
usage: ./install.sh [OPTION]...

Makes .venv in this checkout, builds llama.cpp (with CUDA where an NVIDIA GPU and nvcc are found), makes the data
directory, the master key, the database, the first account with its administrator and its first key, and prints both
secrets once. Run again, it changes only what is missing: nothing is overwritten, and no second key is made.

  --run            then serve in the foreground, with a ready-made curl
  --service        then write, enable and start a systemd service (root), under its own user `appliance`
  --print-unit     print the systemd unit that --service would write, and do nothing else
  --host HOST      address to listen on (for --run and --service; default: the setting, 127.0.0.1)
  --port PORT      port to listen on (likewise; default: the setting, 8080)
  --data-dir DIR   where the data lives (default: $APPLIANCE_DATA_DIR, else /var/lib/appliance as root,
                   ~/.local/share/appliance otherwise)
  --wheel-dir DIR  install from a wheelhouse made by scripts/make-wheelhouse: no network, no compiler
  --cpu            build for the processor alone, even where a GPU is found (a CUDA build that is there stays)
  --yes            ask nothing; as root, install missing Debian packages with apt-get
  --uninstall      remove the service and .venv; the data stays
  --purge          with --uninstall: delete the data too (keys, accounts, everything)
  --help           this text

Environment: PYTHON names the interpreter (3.11 or newer), CUDA_HOME the CUDA toolkit (/usr/local/cuda); CC, CXX and
CMAKE_ARGS reach the build of llama.cpp.
Exit codes: 0 done, 1 a step failed, 2 wrong options, 3 something is missing on this machine; --run ends with the
exit code of `appliance serve`.
USAGE
}

die() { # die CODE SENTENCE
    echo "install.sh: $2" >&2
    exit "$1"
}

doing="reading the options"
trap 'failed $?' ERR

# A failing subshell only passes its code up; the script itself says it once.
failed() {
    ((BASH_SUBSHELL == 0)) || exit "$1"
    die 1 "failed while $doing (exit $1); the lines above say why, and running it again goes on from here."
}

# ---- options

run=false service=false print_unit=false uninstall=false purge=false yes=false cpu=false
host='' port='' data_dir='' wheel_dir=''

parse_options() {
    while (($#)); do
        case $1 in
            --run) run=true ;;
            --service) service=true ;;
            --print-unit) print_unit=true ;;
            --uninstall) uninstall=true ;;
            --purge) purge=true ;;
            --yes | -y) yes=true ;;
            --cpu) cpu=true ;;
            --help | -h) usage && exit 0 ;;
            --host | --port | --data-dir | --wheel-dir) parse_value "$1" "${2-}" && shift ;;
            --host=* | --port=* | --data-dir=* | --wheel-dir=*) parse_value "${1%%=*}" "${1#*=}" ;;
            *) die 2 "unknown option $1; ./install.sh --help lists them." ;;
        esac
        shift
    done
}

parse_value() {
    [[ -n $2 && $2 != --* ]] || die 2 "$1 needs a value; ./install.sh --help shows which."
    [[ $2 != *[[:cntrl:]]* ]] || die 2 "$1 must not hold control characters."
    case $1 in
        --host) host=$2 ;;
        --port) port=$2 ;;
        --data-dir) data_dir=$2 ;;
        --wheel-dir) wheel_dir=$2 ;;
    esac
}

check_options() {
    [[ -z $port ]] || { [[ $port =~ ^[0-9]{1,5}$ ]] && ((10#$port >= 1 && 10#$port <= 65535)); } ||
        die 2 "--port must be a number from 1 to 65535, not '$port'."
    [[ $host != *[[:space:]]* ]] || die 2 "--host must be one address or name, not '$host'."
    ! { $run && $service; } || die 2 "--run and --service exclude each other: choose one."
    ! { $uninstall && { $run || $service; }; } || die 2 "--uninstall goes with neither --run nor --service."
    ! $purge || $uninstall || die 2 "--purge only goes with --uninstall."
    if [[ -n $wheel_dir ]] && ! compgen -G "$wheel_dir/*.whl" >/dev/null || [[ -n $wheel_dir && ! -f $wheel_dir/requirements.lock ]]; then
        die 2 "'$wheel_dir' is not a wheelhouse (wheels and their requirements.lock): make one with scripts/make-wheelhouse DIR."
    fi
    ! $service || ((EUID == 0)) || die 3 "--service needs root: run it with sudo."
    ! $service || systemd_runs ||
        die 3 "--service needs a running systemd and there is none here: use --run, or give the text of --print-unit to your own supervisor."
}

systemd_runs() {
    case $(systemctl is-system-running 2>/dev/null || true) in
        '' | offline | unknown) return 1 ;;
    esac
}

# An installed service knows its own data directory, so that a second run or --purge meets the same one.
choose_data_dir() {
    [[ -n $data_dir || ! -f $unit_file ]] || data_dir=$(sed -n 's/^# Data directory: //p' "$unit_file")
    [[ -n $data_dir ]] || data_dir=${APPLIANCE_DATA_DIR:-}
    if [[ -z $data_dir ]]; then
        data_dir=/var/lib/appliance
        ((EUID == 0)) || data_dir=$HOME/.local/share/appliance
    fi
    data_dir=$(realpath -m -- "$data_dir")
}

# ---- the machine

packages=() lacking=() python='' bootstrap=()

lacks() { # lacks WHAT PACKAGE...
    lacking+=("$1")
    packages+=("${@:2}")
}

find_python() {
    local name names=(python3 python3.14 python3.13 python3.12 python3.11)
    [[ -z ${PYTHON:-} ]] || names=("$PYTHON")
    python=''
    for name in "${names[@]}"; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$name
            break
        fi
    done
    if [[ -n $python ]]; then
        "$python" -c 'import ensurepip, venv' 2>/dev/null || lacks "Python's venv module" "$(basename "$python")-venv"
    elif [[ -n ${PYTHON:-} ]]; then
        die 3 "PYTHON names '$PYTHON', which is not Python 3.11 or newer: correct or unset it."
    elif command -v python3 >/dev/null; then
        lacks "Python 3.11 or newer (found $(python3 --version 2>&1))" python3.11 python3.11-venv
    else
        lacks "Python 3.11 or newer" python3 python3-venv
    fi
}

find_build_tools() {
    local version
    { command -v "${CXX:-c++}" || command -v g++ || command -v clang++; } >/dev/null || lacks "a C++ compiler" g++
    if ! command -v cmake >/dev/null; then
        lacks "CMake" cmake
        return
    fi
    version=$(cmake --version | sed -n '1s/[^0-9]*\([0-9]*\.[0-9]*\).*/\1/p')
    ((${version%.*} * 1000 + ${version#*.} >= 3021)) ||
        die 3 "CMake 3.21 or newer is needed (found $version): install one, e.g. with '${python:-python3} -m pip install --user cmake'."
}

has_gpu() {
    command -v nvidia-smi >/dev/null || return 1
    echo "looking for a GPU ..." >&2
    [[ $(timeout 30 nvidia-smi -L 2>/dev/null || true) == *"GPU "* ]]
}

find_gpu() {
    local nvcc
    has_gpu || return 0
    nvcc=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v nvcc) ||
        die 3 "an NVIDIA GPU is here, but nvcc is not: install the CUDA toolkit (apt-get install nvidia-cuda-toolkit) or set CUDA_HOME, or give --cpu."
    export CUDACXX=$nvcc
    bootstrap+=(--cuda)
}

check_disk() {
    local free
    free=$(df -Pk -- "$root" | awk 'NR == 2 { print int($4 / 1024) }')
    ((free >= 3072)) || die 3 "3 GB of free disk are needed at $root, and $free MB are free: free some, or move the checkout."
}

check_data_dir() {
    local parent=$data_dir
    while [[ ! -e $parent ]]; do parent=$(dirname "$parent"); done
    [[ -d $parent && -w $parent ]] || die 3 "$data_dir cannot be written: name another place with --data-dir, or run this as root."
    # --service gives the directory to another user, so it must not hold anything else.
    ! $service || holds_data || [[ -z $(find "$data_dir" -mindepth 1 ! -name lost+found ! -name config.toml -print -quit 2>/dev/null) ]] ||
        die 2 "$data_dir holds other files: name an empty place with --data-dir."
}

holds_data() {
    [[ -e $data_dir/appliance.db || -e $data_dir/secrets/master.key ]]
}

note_unused_gpu() {
    local built
    read -r _ built _ <"$venv/.bootstrap"
    if ! $cpu && [[ $built != cuda ]] && has_gpu; then
        echo "Note: an NVIDIA GPU is here, but this wheelhouse's llama.cpp does not use it: make one with 'scripts/make-wheelhouse --cuda'." >&2
    fi
}

apt_install() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get update && apt-get install --yes --no-install-recommends "${packages[@]}"
}

find_tools() {
    packages=() lacking=()
    find_python
    [[ -n $wheel_dir ]] || find_build_tools
}

# All that is missing goes into one sentence and one command.
mend_missing() {
    local what
    ((${#packages[@]})) || return 0
    what=$(printf '%s, ' "${lacking[@]}")
    if ! $yes || ((EUID != 0)) || ! command -v apt-get >/dev/null; then
        die 3 "missing: ${what%, }; fix: sudo apt-get install ${packages[*]} (as root, --yes does it for you)."
    fi
    step "installing ${packages[*]}" apt_install
    find_tools
    ((${#packages[@]} == 0)) || die 3 "missing even now: ${lacking[*]}; fix: install ${packages[*]} by hand."
}

check_machine() {
    doing="checking this machine"
    check_data_dir
    $cpu || [[ -n $wheel_dir ]] || find_gpu
    [[ -z $wheel_dir ]] || bootstrap+=(--wheel-dir "$wheel_dir")
    # An environment that is complete needs no tools any more.
    ! "$root/scripts/bootstrap" "${bootstrap[@]}" --check || return 0
    check_disk
    find_tools
    mend_missing
}

# ---- data and secrets

make_service_user() {
    doing="making the user $service_user"
    getent passwd "$service_user" >/dev/null ||
        useradd --system --user-group --no-create-home --home-dir "$data_dir" --shell /usr/sbin/nologin "$service_user"
    as_owner "$appliance" --help >/dev/null 2>&1 ||
        die 3 "the user $service_user cannot run $appliance: move the checkout to where all may read, e.g. /opt/appliance, and run it there."
    mkdir -p "$data_dir"
    chown -R -h "$service_user:$service_user" "$data_dir"
}

# The data belongs to whoever will serve it. The directory we were called from may be closed to that user.
as_owner() {
    if $service; then
        (cd / && runuser -u "$service_user" -- "$@")
    else
        "$@"
    fi
}

key=YOUR_KEY

initialise() {
    local answer fields
    doing="making the data directory $data_dir"
    echo "making the data directory, the master key and the database in $data_dir ..." >&2
    answer=$(as_owner "$appliance" init --json --data-dir "$data_dir")
    # Through stdin: arguments can be read by every user of the machine.
    mapfile -t fields < <("$venv/bin/python" -c 'import json, sys
answer = json.load(sys.stdin)
print(answer["created"], *(answer.get(name, "") for name in ("account", "user", "password", "key")), sep="\n")' <<<"$answer")
    if [[ ${fields[0]} != True ]]; then
        echo "The data directory was there already: nothing was changed, no new key was made." >&2
        return
    fi
    key=${fields[4]}
    cat <<TEXT

  account   ${fields[1]} (enterprise)
  user      ${fields[2]}
  password  ${fields[3]}
  key       $key

Keep the password and the key now: they are shown only this once, and only their hashes are stored.
TEXT
}

# ---- serving

serve_options() {
    options=(--data-dir "$data_dir")
    [[ -z $host ]] || options+=(--host "$host")
    [[ -z $port ]] || options+=(--port "$port")
}

base_url() {
    "$venv/bin/python" - "$data_dir" "$host" "$port" <<'PYTHON'
import sys
from appliance import config

data_dir, host, port = sys.argv[1:]
server = config.load(data_dir).server
host = host or server.host
host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
scheme = "https" if server.tls_cert else "http"
print(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port or server.port}")
PYTHON
}

print_curl() {
    local url
    doing="reading the settings"
    url=$(base_url)
    cat <<TEXT

curl -X POST $url/llm/chat \\
  -H "Authorization: Bearer $key" \\
  -H "Content-Type: application/json" \\
  -d '{"messages":[{"role":"user","content":"Hello"}]}'

TEXT
}

serve() {
    echo "Serving until Ctrl-C. In another terminal:"
    print_curl
    serve_options
    exec "$appliance" serve "${options[@]}"
}

# ---- the service

# One word of ExecStart or ReadWritePaths: systemd expands % and (in commands) $, and splits at spaces.
unit_word() {
    local word=${1//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//%/%%}
    printf '"%s"' "${word//\$/${2-\$\$}}"
}

stop_seconds() {
    "$venv/bin/python" - "$data_dir" <<'PYTHON'
import sys
from appliance import config

print(int(config.load(sys.argv[1]).server.drain_seconds) + 15)
PYTHON
}

unit_command() {
    local word line
    serve_options
    line=$(unit_word "$appliance")
    for word in serve "${options[@]}"; do line+=" $(unit_word "$word")"; done
    echo "$line"
}

# Not here on purpose: MemoryDenyWriteExecute and PrivateDevices, which CUDA cannot live with.
unit_text() {
    local homes=yes capabilities='' command stop
    command=$(unit_command)
    stop=$(stop_seconds)
    # A home is hidden from the service, unless the checkout or the data lies in one.
    case "$root/ $data_dir/" in /home/* | /root* | *' /home/'* | *' /root'*) homes=read-only ;; esac
    [[ -z $port || $port -ge 1024 ]] || capabilities=CAP_NET_BIND_SERVICE
    cat <<UNIT
# Written by install.sh; local changes belong into 'systemctl edit appliance'.
# Data directory: $data_dir
[Unit]
Description=Appliance, a language model for the team
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=300
StartLimitBurst=5

[Service]
Type=exec
User=$service_user
Group=$service_user
ExecStart=$command
ExecReload=/bin/kill -HUP \$MAINPID
EnvironmentFile=-/etc/appliance/environment
RuntimeDirectory=appliance
RuntimeDirectoryMode=0700
Restart=always
RestartSec=2
# Above [server] drain_seconds, so that running answers end first; raise both together.
TimeoutStopSec=$stop
KillMode=mixed
LimitNOFILE=65536
LimitMEMLOCK=infinity
UMask=0077
ReadWritePaths=$(unit_word "$data_dir" "\$")
ProtectSystem=strict
ProtectHome=$homes
PrivateTmp=yes
NoNewPrivileges=yes
CapabilityBoundingSet=$capabilities
AmbientCapabilities=$capabilities
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
RemoveIPC=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
UNIT
}

# A unit that was kept may listen elsewhere than the settings say.
take_units_address() {
    host=$(sed -n 's/^ExecStart=.* "--host" "\([^"]*\)".*/\1/p' "$unit_file")
    port=$(sed -n 's/^ExecStart=.* "--port" "\([^"]*\)".*/\1/p' "$unit_file")
}

# A unit that is there already is kept unless an option asks for another; the old one is then kept beside it.
write_unit() {
    local text
    doing="writing $unit_file"
    text=$(unit_text)
    if [[ -f $unit_file && $text != "$(<"$unit_file")" ]]; then
        if [[ -z $host$port ]]; then
            echo "$unit_file is kept as it is (give --host or --port, or --uninstall first, to have it written anew)." >&2
            take_units_address
            return
        fi
        cp -p "$unit_file" "$unit_file.old"
    fi
    printf '%s\n' "$text" >"$unit_file"
    chmod 0644 "$unit_file"
}

wait_until_active() {
    local tries
    for ((tries = 0; tries < 30; tries++)); do
        sleep 1
        systemctl is-active --quiet appliance && "$venv/bin/python" - "$(base_url)" <<'PYTHON' && return
import ssl
import sys
import urllib.request

context = ssl._create_unverified_context()  # only asks whether anybody answers
urllib.request.urlopen(sys.argv[1] + "/healthz", timeout=2, context=context)
PYTHON
    done 2>/dev/null
    return 1
}

install_service() {
    write_unit
    doing="starting the service"
    systemctl daemon-reload
    systemctl enable appliance
    step "starting the service" systemctl restart appliance
    step "waiting for the service to answer" wait_until_active ||
        die 1 "the service does not answer: 'journalctl -u appliance' says why."
    echo "The service runs ('systemctl status appliance'). Use it with:"
    print_curl
}

# ---- the way back

confirm_purge() {
    holds_data || die 2 "$data_dir holds no appliance data, so nothing was removed: name the right place with --data-dir."
    [[ $data_dir != "$HOME" && $root/ != "$data_dir"/* ]] ||
        die 2 "$data_dir holds more than the appliance's data, so nothing was removed: delete its files by hand."
    ! $yes || return 0
    [[ -t 0 ]] || die 2 "--purge deletes keys, accounts and all other data for good: add --yes to confirm."
    local answer
    read -rp "Delete all data in $data_dir for good? Type yes: " answer
    [[ $answer == yes ]] || die 2 "nothing was removed."
}

remove_service() {
    [[ -f $unit_file ]] || return 0
    ((EUID == 0)) || die 3 "the service can only be removed by root: run this with sudo."
    doing="removing the service"
    ! systemd_runs || step "stopping the service" systemctl disable --now appliance
    rm -f "$unit_file" "$unit_file.old"
    ! systemd_runs || systemctl daemon-reload
}

remove_all() {
    ! $purge || confirm_purge
    remove_service
    doing="removing .venv"
    rm -rf "$venv" "$root/appliance.egg-info" "$root/.bootstrap.log"
    if $purge; then
        doing="deleting $data_dir"
        rm -rf -- "$data_dir"
        echo "Removed, the data in $data_dir too."
    else
        echo "Removed. The data stays in $data_dir (--uninstall --purge deletes it)."
    fi
}

main() {
    parse_options "$@"
    check_options
    choose_data_dir
    if $uninstall; then
        remove_all
        return
    fi
    if $print_unit; then
        [[ -x $appliance ]] || die 3 "the unit needs the installed appliance: run ./install.sh first."
        doing="writing the unit"
        unit_text
        return
    fi
    check_machine
    doing="preparing .venv"
    PYTHON=${python:-python3} "$root/scripts/bootstrap" "${bootstrap[@]}"
    note_unused_gpu
    ! $service || make_service_user
    initialise
    if $service; then
        install_service
    elif $run; then
        serve
    else
        echo "Installed. To serve: $root/install.sh --run, or as a service: sudo $root/install.sh --service."
    fi
}

main "$@"
