#!/usr/bin/env bash
# Installs what the peers of the fan-out cases need beside Python packages: Debian's nginx with nchan,
# Node.js and its `ws`, Redis. Does nothing that is done already.
set -euo pipefail
cd "$(dirname "$0")/peers"

missing=()
command -v node >/dev/null || missing+=(nodejs)
command -v npm >/dev/null || missing+=(npm)
[[ -e /usr/lib/nginx/modules/ngx_nchan_module.so ]] || missing+=(nginx libnginx-mod-nchan)
command -v redis-server >/dev/null || missing+=(redis-server)

if ((${#missing[@]})); then
    as_root=()
    if ((EUID != 0)); then as_root=(sudo); fi
    "${as_root[@]}" apt-get update
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends "${missing[@]}"
fi

# npm writes node_modules/.package-lock.json last, so that it says that all is there.
if [[ ! node_modules/.package-lock.json -nt package-lock.json ]]; then
    npm ci --no-audit --no-fund && touch node_modules/.package-lock.json
fi
