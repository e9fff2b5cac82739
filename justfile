# What CI runs, and what a developer runs by hand: `uv run just NAME`, or `just NAME` where just is installed.

# Formatting, lint and types
check:
    uv run ruff format --check
    uv run ruff check
    uv run basedpyright

# The whole test suite; arguments go to pytest
test *ARGS:
    uv run pytest {{ARGS}}

# The tests for a quick answer: those that import no Megatron and take no long
quick *ARGS:
    uv run pytest tests/hf tests/ops tests/conversion/formats --no-megatron -m "not slow" {{ARGS}}

# Whether what we work around is still there upstream; a change of version runs these by default (tests/conftest.py)
upstream *ARGS:
    uv run pytest -m upstream {{ARGS}}

# Everything that a GPU should answer, in parts of under ten minutes (tests/gpu/run.py); on a CPU at toy size
gpu FOLDER *PARTS:
    PYTHONPATH=tests uv run python tests/gpu/run.py {{FOLDER}} {{PARTS}}

# The back end transformer_engine on a CPU, and ours where that package is installed, in an environment of its own
test-te *ARGS:
    #!/usr/bin/env bash
    set -euo pipefail
    export UV_PROJECT_ENVIRONMENT=.venv-te; unset VIRTUAL_ENV
    uv sync --quiet --inexact
    # Its torch part is compiled for 6 minutes with a CUDA toolkit, unless a wheel is at hand.
    packages=$(sed -n '/^te = \[/,/^\]/s/.*"\(.*\)".*/\1/p' pyproject.toml)
    options=(--quiet --python .venv-te --no-deps --no-build-isolation)
    if [ -d ../shared/wheels ]; then options+=(--find-links ../shared/wheels); fi
    if ! uv pip install "${options[@]}" $packages; then
        echo "skipped: Transformer Engine cannot be installed here"
        exit 0
    fi
    uv run --no-sync pytest tests/te {{ARGS}}
    # Of the whole suite, a few in one process. The first file imports PEFT, which imports Transformer Engine.
    uv run --no-sync pytest -n 0 tests/conversion/formats/test_safetensors.py \
        "tests/mcore/test_layouts.py::test_five_steps_equal_those_of_transformers[TP2]" \
        tests/recipes/training/test_training.py::test_in_bf16_the_vision_bias_stays_fp32_and_learns

# Whether this package resolves beside TRL and verl, and with the lowest transformers of its range
resolves:
    uv run python tests/resolves.py

# The tests of the transformers side that are quick, on the lowest transformers of the range, in an environment of its own
test-lowest *ARGS:
    #!/usr/bin/env bash
    set -euo pipefail
    export UV_PROJECT_ENVIRONMENT=.venv-lowest; unset VIRTUAL_ENV
    uv sync --quiet --inexact
    lowest=$(sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
    uv pip install --quiet --no-config --python .venv-lowest --no-deps "transformers==$lowest"
    uv run --no-sync pytest tests/hf/test_{modeling,generation,processing,image_processing,chat_template}.py \
        --no-megatron -m "not slow" -k "not every_parameter_matters" {{ARGS}}

# transformers' own common tests at the installed version, out of its source distribution, for tests/hf/common
mixins:
    #!/usr/bin/env bash
    set -euo pipefail
    name="transformers-$(sed -n 's/.*"transformers==\([0-9.]*\)".*/\1/p' pyproject.toml)"
    uvx pip@25.3 download --quiet --no-deps --no-binary transformers --dest .cache "${name/-/==}"
    tar -xzf ".cache/$name.tar.gz" -C .cache "$name/tests"
    touch ".cache/$name/tests/__init__.py" # one of the files imports its own folder

# nvidia-resiliency-ext, with what it imports and is not installed, for tests/recipes/launch/test_ft_launcher.py
resiliency:
    #!/usr/bin/env bash
    set -euo pipefail
    package=$(sed -n 's/^RESILIENCY = "\(.*\)"/\1/p' recipes/launch/plan.py)
    folder=.cache/${package/==/-}
    # Its wheel is named for glibc 2.39; `ft_launcher` is plain Python, and the tests need nothing else of it.
    options=(--quiet --no-config --no-deps --target "$folder.partial" --python-version 3.12)
    rm -rf "$folder" "$folder.partial"
    uv pip install "${options[@]}" --python-platform "$(uname -m)-manylinux_2_39" "$package"
    uv pip install "${options[@]}" defusedxml==0.7.1
    mv "$folder.partial" "$folder"

# Sink attention and the MXFP4 codec: beside their peers and a physical limit, in one process each
bench:
    uv run python tests/benchmarks/bench_attention.py
    uv run python tests/benchmarks/bench_mxfp4.py

# Converting a synthetic 20B beside what the disk of a folder gives: 75 GB at the widest, less with `--layers 2`
bench-conversion FOLDER *ARGS:
    uv run python tests/benchmarks/make_20b.py {{FOLDER}}/hf {{ARGS}}
    uv run python tests/benchmarks/bench_import.py {{FOLDER}}/hf {{FOLDER}}/megatron --keep
    uv run python tests/benchmarks/bench_export.py {{FOLDER}}/megatron {{FOLDER}}/back --hf {{FOLDER}}/hf

# Slices of gpt-oss-20B-Vision on one GPU, and the tokens/s per GPU that follow: 3 minutes
bench-gpu FOLDER *ARGS:
    uv run python tests/benchmarks/bench_gpu.py {{FOLDER}} {{ARGS}}

# What Megatron-Bridge writes into run_config.yaml for any model, after a change of its version
run-config-defaults:
    PYTHONPATH=tests uv run python tests/conversion/test_megatron_metadata.py

# The names and types of all settings, after a change of Megatron-Bridge's version or of our classes
schema:
    uv run python -m gpt_oss_vision.recipes.training.schema_generator

# The user pages, into docs/_build; any warning is an error
docs:
    uv run sphinx-build --fail-on-warning --nitpicky --builder html docs docs/_build

# The whole path on a CPU: train, convert, answer
quickstart *ARGS:
    uv run gpt-oss-vision quickstart {{ARGS}}

# A report or a page of samples as a browser shows it, wide and light, narrow and dark; needs chromium
screenshots PAGE:
    #!/usr/bin/env bash
    set -euo pipefail
    page=$(realpath {{PAGE}})
    for look in "wide 1280,4400 1" "narrow 500,8600 0"; do
        set -- $look
        chromium --headless=new --no-sandbox --hide-scrollbars --user-data-dir="$(mktemp -d)" --window-size="$2" \
            --blink-settings=preferredColorScheme="$3" --screenshot="${page%.html}-$1.png" "file://$page"
    done
