# What CI runs, and what a developer runs by hand: `uv run just NAME`, or `just NAME` where just is installed.

# Formatting, lint and types
check:
    uv run ruff format --check
    uv run ruff check
    uv run basedpyright

# The whole test suite; arguments go to pytest
test *ARGS:
    uv run pytest {{ARGS}}

# Only the tests that need a CUDA device
test-gpu *ARGS:
    uv run pytest -m gpu {{ARGS}}

# Every benchmark, one after the other: beside its peers and a physical limit, in one process each
bench:
    for file in tests/benchmarks/bench_*.py; do uv run python "$file" || exit 1; done

# The user pages, into docs/_build; any warning is an error
docs:
    uv run sphinx-build --fail-on-warning --nitpicky --builder html docs docs/_build

# The whole path on a CPU: train, convert, answer
quickstart *ARGS:
    uv run gpt-oss-vision quickstart {{ARGS}}
