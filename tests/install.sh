#!/usr/bin/env bash
# Installs what the tests need beside Python packages: Chromium, nginx, Redis, debootstrap, Node.js
# and its packages, and on Debian what `python3 -m venv` needs. Does nothing that is done already.
set -euo pipefail
cd "$(dirname "$0")"

missing=()
command -v chromium >/dev/null || missing+=(chromium)
command -v curl >/dev/null || missing+=(curl)
[[ -x /usr/sbin/debootstrap ]] || missing+=(debootstrap) # for tests/test_image.py
command -v node >/dev/null || missing+=(nodejs)
command -v npm >/dev/null || missing+=(npm)
[[ -x /usr/sbin/nginx ]] || missing+=(nginx)
command -v redis-server >/dev/null || missing+=(redis-server)
command -v redis-sentinel >/dev/null || missing+=(redis-sentinel)
command -v wrk >/dev/null || missing+=(wrk) # for docs/load-testing.md
"${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)

if ((${#missing[@]})); then
    as_root=()
    if ((EUID != 0)); then as_root=(sudo); fi
    "${as_root[@]}" apt-get update
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends "${missing[@]}"
fi

# npm writes node_modules/.package-lock.json last, so that it says that all is there.
if [[ ! js/node_modules/.package-lock.json -nt js/package-lock.json ]]; then
    (cd js && npm ci --no-audit --no-fund && touch node_modules/.package-lock.json)
fi
