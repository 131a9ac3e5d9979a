"""One command for each thing that is done with the asv suite; each prints the asv command that it runs.

python benchmarks/suite.py check                  look at the suite without running it
python benchmarks/suite.py quick                  run all of it once, in this Python; nothing is kept
python benchmarks/suite.py run COMMIT             measure a commit, and keep the figures
python benchmarks/suite.py history FILE           measure the commits that a file names
python benchmarks/suite.py compare BASE [COMMIT]  exit with 1 if COMMIT is slower than BASE
python benchmarks/suite.py publish                write the dashboard
python benchmarks/suite.py serve                  serve it to a browser on this machine
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONF = ROOT / "asv.conf.json"
HTML = ROOT / ".asv" / "html"
HISTORY = "bench_(latency|throughput|backward|accuracy|stats)"
"""What `history` measures: all that one core decides, in two minutes a commit."""

COMPARED = r"\.time_"
"""What `compare` compares: only of these asv keeps every sample, and so can tell noise from a change."""

FACTOR = 1.25
"""By how much slower fails a comparison. After one round on a busy machine, no change was seen as up to 1.19."""

SLOWER = re.compile(r"^\| [+!] .*\| (\S.*?) +\|$", re.MULTILINE)
"""A row of asv's table about a benchmark that became slower, or began to fail."""

ROUNDS = 4
"""Rounds of a comparison, each with processes of its own, in turns between the two commits."""

LAUNCH = "forkserver" if hasattr(os, "fork") else "spawn"
"""How `quick` starts its processes: forked from one that has imported everything, which takes 1 min instead of 3.

That is safe, as importing starts no threads. What is measured gets a Python of its own, as asv.conf.json says.
"""

MAY_BE_MISSING = ("bench_gpu.", "bench_threads.", "bench_peers.")
"""Benchmarks that may be n/a throughout: they need a GPU, more cores or other libraries."""


def asv(*arguments: str, conf: Path = CONF) -> int:
    """Run asv, and return its exit status."""
    print("$ asv", shlex.join(arguments), flush=True)
    return subprocess.run(command_of(conf, *arguments), cwd=ROOT, check=False).returncode


def command_of(conf: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "asv", "--config", str(conf), *arguments]


def this_python() -> str:
    """Return the environment that is there already, as asv names it."""
    return f"existing:{sys.executable}"


def registered(machine: str | None) -> list[str]:
    """Return asv's option for the machine, after asv has noted what this one is, if nobody has told it yet."""
    if not Path("~/.asv-machine.json").expanduser().exists():
        asv("machine", "--yes", *([] if machine is None else ["--machine", machine]))
    return [] if machine is None else ["--machine", machine]


def beside(folder: Path, **changed: str) -> Path:
    """Write a configuration like asv.conf.json that keeps its results in `folder`; return its path."""
    from asv.util import load_json  # it knows comments; not at the top, as asv imports this file where it is not

    conf = load_json(str(CONF), js_comments=True)
    conf |= {name: str(ROOT / conf[name]) for name in ("repo", "benchmark_dir", "env_dir", "html_dir")}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "asv.conf.json"
    path.write_text(json.dumps(conf | {"results_dir": str(folder / "results")} | changed))
    return path


def check(options: argparse.Namespace) -> int:
    return asv("check", "-E", this_python())


def quick(options: argparse.Namespace) -> int:
    """Run every benchmark once, and say how many ran; fail if one failed, gave no figure or does not say what it is."""
    with tempfile.TemporaryDirectory() as folder:
        conf = beside(Path(folder))
        arguments = ["--quick", "--launch-method", LAUNCH, "--show-stderr", "--bench", options.bench]
        arguments += [*registered(options.machine), "-E", this_python(), "--set-commit-hash", "HEAD"]
        status = asv("run", *arguments, conf=conf)
        files = [path for path in Path(folder).glob("results/*/*.json") if path.name != "machine.json"]
        results = {name: values for path in files for name, values in read(path).items()}
        listed = Path(folder) / "results" / "benchmarks.json"
        known = json.loads(listed.read_text()) if listed.exists() else {}
    known = {name: known[name] for name in known if name != "version" and re.search(options.bench, name)}
    nameless = [name for name, benchmark in known.items() if not is_described(benchmark)]
    failed = sorted(name for name in known if None in results.get(name, [None]))
    empty = [name for name, values in results.items() if name not in failed and all(map(is_missing, values))]
    wrong = [name for name in empty if not name.startswith(MAY_BE_MISSING)]
    ran = len(results) - len(failed) - len(empty)
    cells = sum(not is_missing(value) for values in results.values() for value in values)
    print(f"{ran} benchmarks of {len(known)} ran, with {cells} values")
    print(f"n/a here: {', '.join(empty) or 'none'}")
    if failed or wrong:
        print(f"failed: {', '.join(failed) or 'none'}; n/a but should not be: {', '.join(wrong) or 'none'}")
    if nameless:
        print(f"without a docstring, a unit or a version of their own: {', '.join(nameless)}")
    if ran < options.at_least:
        print(f"expected at least {options.at_least} benchmarks to run")
    return status or int(bool(failed or wrong or nameless) or ran < options.at_least)


def read(path: Path) -> dict[str, list[Any]]:
    """Return a result file's values by benchmark: None where it failed, NaN where it is n/a."""
    stored = json.loads(path.read_text())
    column = stored["result_columns"].index("result")
    return {name: row[column] or [None] for name, row in stored["results"].items()}


def is_described(benchmark: dict[str, Any]) -> bool:
    """Return whether a benchmark has what asv does without: a docstring, a unit, and a version that is no hash."""
    function = next(node for node in ast.walk(ast.parse(benchmark["code"])) if isinstance(node, ast.FunctionDef))
    return bool(ast.get_docstring(function)) and benchmark["unit"] != "unit" and benchmark["version"].isdecimal()


def is_missing(value: Any) -> bool:
    return value is None or value != value


def run(options: argparse.Namespace) -> int:
    wanted = ["--bench", options.bench, *registered(options.machine)]
    return asv("run", f"{options.commit}^!", "--show-stderr", *wanted)


def history(options: argparse.Namespace) -> int:
    wanted = ["--bench", options.bench, *registered(options.machine)]
    resume = ["--skip-existing-successful"] if options.resume else []
    return asv("run", f"HASHFILE:{options.file.resolve()}", *resume, *wanted)


def compare(options: argparse.Namespace) -> int:
    """Compare in `.asv`, away from the history, whose figures are seconds; measure twice what is found to be slower."""
    conf = beside(ROOT / ".asv" / "compare")
    wanted = [*registered(options.machine), options.base, options.commit]
    status, output = continuous(conf, options, options.bench, wanted)
    slower = SLOWER.findall(output)
    if status == 1 and slower:
        print(f"\nOnce more, as chance does not strike twice: {', '.join(slower)}\n")
        status, output = continuous(conf, options, f"^({'|'.join(map(re.escape, slower))})$", wanted)
    return status


def continuous(conf: Path, options: argparse.Namespace, bench: str, wanted: list[str]) -> tuple[int, str]:
    """Run `asv continuous`; return its exit status and what it printed."""
    arguments = ["continuous", "--factor", str(options.factor), "--interleave-rounds", "-a", f"rounds={options.rounds}"]
    arguments += ["--show-stderr", "--bench", bench, *wanted]
    print("$ NUMBANORM_BENCH_IN_COPIES=1 asv", shlex.join(arguments), flush=True)
    print("Figures are in times of np.copyto of the same array; asv prints them as seconds.", flush=True)
    environment = os.environ | {"NUMBANORM_BENCH_IN_COPIES": "1"}
    lines = []
    with subprocess.Popen(
        command_of(conf, *arguments), cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return running.returncode, "".join(lines)


def publish(options: argparse.Namespace) -> int:
    """Let asv write its data, and asv-tachyon the pages, with all that they load beside them."""
    html: Path = options.html.resolve()
    shutil.rmtree(html, ignore_errors=True)
    status = asv("publish", "--html-dir", str(html))
    if status:
        return status
    for legacy in (*html.glob("*.js"), *html.glob("*.css"), html / "error.html"):  # asv's own pages, which need CDNs
        legacy.unlink()
    done = subprocess.run([sys.executable, "-m", "asv_tachyon", "install", "--no-backup", str(html)], check=False)
    fill_in(html)
    print(f"The dashboard is in {html}")
    return done.returncode


def fill_in(html: Path) -> None:
    """Write what the pages ask for and asv does not write: subjects of commits, and empty files for what is not there.

    Without them everything works as well, but the browser's console fills with requests that failed.
    """
    index = json.loads((html / "index.json").read_text())
    log = git("log", "--no-walk", "--format=%H %s", *index["revision_to_hash"].values())
    content: dict[Path, Any] = {
        html / "commits.json": dict(line.split(" ", 1) for line in log.splitlines()),
        html / "profiles.json": {"paths": {}},
        html / "regressions-ignore.json": [],
    }
    graphs = html / "graphs"
    for folder in {path.parent for path in graphs.rglob("bench_*.json")}:
        for name in index["benchmarks"]:
            content[folder / f"{name}.json"] = []
            content[html / "samples" / folder.relative_to(graphs) / f"{name}.json"] = {}
    for path, value in content.items():
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value))


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def serve(options: argparse.Namespace) -> int:
    if not (options.html / "index.json").exists():
        print(f"no dashboard in {options.html}: run `python benchmarks/suite.py publish` first", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "asv_tachyon", "serve", str(options.html)]
    return subprocess.run([*command, "--host", "127.0.0.1", "--port", str(options.port)], check=False).returncode


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Any, bench: str | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(function.__name__)
        sub.set_defaults(function=function)
        if bench is not None:
            sub.add_argument("--bench", default=bench, help="only benchmarks whose names match; default: %(default)s")
            sub.add_argument("--machine", help="the machine's name among those that asv has been told of")
        return sub

    command(check)
    command(quick, ".").add_argument("--at-least", type=int, default=1, help="how many benchmarks must run")
    command(run, ".").add_argument("commit")
    past = command(history, HISTORY)
    past.add_argument("file", type=Path, help="full commit hashes, one a line")
    past.add_argument("--resume", action="store_true", help="leave out what was measured before")
    comparison = command(compare, COMPARED)
    comparison.add_argument("base")
    comparison.add_argument("commit", nargs="?", default="HEAD")
    comparison.add_argument("--factor", type=float, default=FACTOR)
    comparison.add_argument("--rounds", type=int, default=ROUNDS)
    pages = [command(publish), command(serve)]
    for page in pages:
        page.add_argument("--html", type=Path, default=HTML)
    pages[-1].add_argument("--port", type=int, default=8080)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    status: int = options.function(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
