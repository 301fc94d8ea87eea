#!/bin/sh
# Start Valkey with access rules made from the secret's files, as hashes; `start.sh ping` asks whether it answers.
set -eu

if [ "${1:-}" = ping ]; then
    REDISCLI_AUTH="$(cat "$SECRETS/password")" valkey-cli --user rankgr -p "${PORT:-6379}" ping | grep -q PONG
    exit
fi

user() { # NAME FILE RULES: nothing but keys of its own, and no command that concerns the server
    echo "user $1 on #$(printf %s "$(cat "$2")" | sha256sum | cut -d ' ' -f 1) resetchannels +@all -@dangerous $3"
}

umask 077
{
    echo "user default off"
    user rankgr "$SECRETS/password" "~$KEY_PREFIX:*"
    if [ -f "$SECRETS/ray-password" ]; then # Ray's state; what it asks the server for when it connects
        user ray "$SECRETS/ray-password" "~RAY* ~DUMMY +info +cluster|info +client|list +keys"
    fi
} > "$RULES"
exec valkey-server "$CONFIGURATION" --aclfile "$RULES"
