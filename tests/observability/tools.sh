#!/bin/sh
# Puts prometheus and promtool under build/tools/prometheus, unless they are on the PATH already. The Debian package is
# unpacked, not installed: installing it would start a service. Needs no root; says why when it cannot.
set -eu
cd "$(dirname "$0")/../.."
tools=build/tools/prometheus

if command -v prometheus >/dev/null && command -v promtool >/dev/null; then exit 0; fi
if [ -x "$tools/usr/bin/prometheus" ] && [ -x "$tools/usr/bin/promtool" ]; then exit 0; fi
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "prometheus: SKIPPED, it is not on the PATH and this is no Debian (install prometheus and promtool yourself)" >&2
    exit 0
fi

echo "set-up: prometheus and promtool in $tools"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! (cd "$folder" && { apt-get download -q prometheus || { apt-get update -q && apt-get download -q prometheus; }; }) \
    >"$folder/log" 2>&1; then
    echo "prometheus: SKIPPED, its Debian package could not be had: $(tail -n 1 "$folder/log")" >&2
    exit 0
fi
rm -rf "$tools"
mkdir -p "$tools"
dpkg-deb --extract "$folder"/prometheus_*.deb "$tools"
