# shellcheck shell=bash
# Sourced by the other scripts: runs one slow command with a line at its start, a sign of life and a line at its end.
# Lines go to stderr, so that stdout stays for results. The command's own output goes to $STEP_LOG, if that is set.

# The sign of life is a child, and the command runs in the foreground: so Ctrl-C reaches the command. It sleeps in a
# builtin, because a `sleep` process would outlive us and hold our caller's pipe open.
step_pulse() {
    local text=$1 started=$SECONDS
    while kill -0 $$ 2>/dev/null; do
        read -rt "${STEP_PULSE:-10}" _ <> <(:) || true
        echo "  ... $text, $((SECONDS - started)) s" >&2
    done
}

# step TEXT COMMAND...: TEXT completes the sentence "failed while ...". Returns the command's exit code.
step() {
    local text=$1 started=$SECONDS rc=0 pulse
    shift
    echo "$text ..." >&2
    step_pulse "$text" &
    pulse=$!
    if [[ -n ${STEP_LOG:-} ]]; then
        "$@" >>"$STEP_LOG" 2>&1 || rc=$?
    else
        "$@" || rc=$?
    fi
    { kill "$pulse" && wait "$pulse"; } 2>/dev/null || true
    if ((rc == 0)); then
        echo "$text: done, $((SECONDS - started)) s" >&2
    else
        [[ -z ${STEP_LOG:-} ]] || tail -n 20 "$STEP_LOG" >&2
        echo "Failed while $text (exit $rc)${STEP_LOG:+; the whole output is in $STEP_LOG}." >&2
    fi
    return "$rc"
}
