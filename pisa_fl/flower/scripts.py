"""What runs a federation's hosts, as templates: shell scripts, a unit for systemd, a file for Docker Compose."""

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""What Flower is told by its environment, on every host."""

HERE = "127.0.0.1,localhost,::1"
"""Hosts to which no proxy leads; the first of them comes first."""

DIRECT = """\
no_proxy="${no_proxy:-${NO_PROXY:-}}"  # no proxy leads to this host
[[ $no_proxy == "*" || $no_proxy == 127.0.0.1,* ]] || no_proxy="HERE${no_proxy:+,$no_proxy}"
export no_proxy NO_PROXY="$no_proxy\"""".replace("HERE", HERE)
"""How a host's own processes reach each other where HTTP has to go through a proxy."""

ENVIRONMENT = """\
# What Flower's commands need in a shell that talks to this SuperLink:  . environment.sh
export FLWR_HOME="$(cd "$(dirname "${{BASH_SOURCE[0]:-$0}}")" && pwd)/flwr"
export {quiet}
{direct}
export PISA_FL_NODES="${{FLWR_HOME%/flwr}}/nodes.txt"  # which key is which client's
mkdir -p "$FLWR_HOME"
cat >"$FLWR_HOME/config.toml.$$" <<END
[superlink]
default = "{name}"

[superlink.{name}]
address = "{local}"
root-certificates = "${{FLWR_HOME%/flwr}}/ca.crt"
END
mv "$FLWR_HOME/config.toml.$$" "$FLWR_HOME/config.toml"
"""

REGISTER = """\
#!/usr/bin/env bash
# Makes the keys in keys/ known to the SuperLink that runs here; run it again when there is a new one.
# nodes.txt tells which node is which client.
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"
umask 077
. ./environment.sh
unset FORCE_COLOR CLICOLOR_FORCE PY_COLORS TTY_COMPATIBLE TTY_INTERACTIVE COLUMNS  # what is read below is bare
export NO_COLOR=1 TERM=dumb PYTHONUTF8=1
for _ in {{1..60}}; do
    (: </dev/tcp/{local.host}/{local.port}) 2>/dev/null && break
    kill -0 $PPID 2>/dev/null || exit 1  # started by start.sh, and the SuperLink has ended
    sleep 1
done
nodes=$(flwr supernode list {name} --format json)
[[ $nodes == *'"success": true'* ]] || {{ echo "$nodes" >&2; exit 1; }}
touch nodes.txt
failed=0
for key in keys/*.pub; do
    read -r _ public client <"$key"
    node=$(awk -v public="$public" '$3 == public {{ node = $1 }} END {{ print node }}' nodes.txt)
    [[ -n $node && $nodes == *"\\"$node\\""* ]] && continue
    if answer=$(flwr supernode register "$key" {name}); then
        node=$(sed -n 's/.*SuperNode \\([0-9]*\\) registered.*/\\1/p' <<<"$answer")
        echo "$node $client $public" >>nodes.txt
        echo "registered $client as node $node"
    else
        echo "register.sh: $client could not be registered" >&2
        failed=1
    fi
done
exit $failed
"""

START_SUPERLINK = """\
#!/usr/bin/env bash
# Starts the SuperLink, which clients reach at {address}, and registers their keys.
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"
umask 077
chmod 700 .
chmod 600 server.key
. ./environment.sh
./register.sh &
exec {command}
"""

START_CLIENT = """\
#!/usr/bin/env bash
# Keeps client {client} running:  ./start.sh [FOLDER]  where FOLDER (or PISA_FL_DATA) holds data of its own, if any.
# PISA_FL_ALLOW="PACKAGE ..." names packages installed here whose classes a run's configuration may name; policy.toml
# says what else this client takes part in. It starts pisa-fl-supernode, and what does the client's work for it, again
# and again.
exec python -m pisa_fl.flower.keeper "$(dirname "${{BASH_SOURCE[0]}}")" "$@" -- {options}
"""

START_ON_WINDOWS = """\
@rem Keeps client {client} running:  start.cmd [FOLDER]  as start.sh does elsewhere.
@python -m pisa_fl.flower.keeper "%~dp0." %* -- {options}
"""

UNIT = """\
# Runs what is in a folder from boot on, as the user whose unit it is. Once, in that folder, with pisa-fl's environment
# active:
#   echo "PATH=$PATH" >service.env     # and PISA_FL_DATA=FOLDER, PISA_FL_ALLOW="PACKAGE ..." if need be
#   mkdir -p ~/.config/systemd/user && cp pisa-fl@.service ~/.config/systemd/user/
#   systemctl --user enable --now "pisa-fl@$(systemd-escape --path "$PWD").service"
#   loginctl enable-linger
[Unit]
Description=pisa-fl in %f
StartLimitIntervalSec=0

[Service]
EnvironmentFile=%f/service.env
ExecStart=%f/start.sh
Restart=always
RestartSec=2
KillMode=mixed
TimeoutStopSec=30
NoNewPrivileges=yes

[Install]
WantedBy=default.target
"""
"""A unit of systemd for any folder with a `start.sh`."""

COMPOSE = """\
# Client {client} in a container:  PISA_FL_USER="$(id -u):$(id -g)" docker compose up --detach
services:
  client-{client}:
    image: "${{PISA_FL_IMAGE:-pisa-fl}}"  # in which pisa-fl is installed: docs/federation.md
    user: "${{PISA_FL_USER:?is the user who owns this folder, as UID:GID}}"
    command: [/client/start.sh]  # with data of its own: [/client/start.sh, /data], and a volume for it
    environment:
      HOME: /tmp
      PISA_FL_CACHE: /client/cache
      PISA_FL_ALLOW: "${{PISA_FL_ALLOW:-}}"
    hostname: pisa-fl-client-{client}  # the same after the container is made anew
    volumes:
      - ".:/client"
      # - "/srv/mine:/data:ro"
    read_only: true
    tmpfs: [/tmp]
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
    init: true
    restart: always
    stop_grace_period: 30s
"""
"""A client's file for Docker Compose."""
