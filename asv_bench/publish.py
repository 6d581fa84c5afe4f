"""Publishes the committed results as asv's site, which then loads nothing from the network.

    python asv_bench/publish.py docs/_build/html/asv

The graphs need the commits that were measured. Where they are not there, as in a shallow clone, the site is one page that
says so, and nothing fails.
"""

import json
import re
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path

from configuration import FOLDER, scratch
from overview import draw, in_words

RESULTS = FOLDER / "results"
# Where the measured commits are looked for.
BRANCHES = ("main", "origin/main", "HEAD")
# asv has these on other servers; flot's package has no compressed files.
LOCAL = {"jquery-3.3.1.min.js": "jquery.min.js"} | {
    f"jquery.flot{part}.min.js": f"jquery.flot{part}.js" for part in ("", ".time", ".selection", ".categories")
}


def result_files(results: Path) -> list[Path]:
    """The files of measured commits, of all machines."""
    return sorted(path for path in results.glob("*/*.json") if path.name != "machine.json")


def commits_of(files: list[Path]) -> set[str]:
    """The commits that were measured."""
    return {json.loads(path.read_text(encoding="utf-8"))["commit_hash"] for path in files}


def git(*arguments: str) -> str | None:
    """What git answers about this repository; None when it fails."""
    try:
        run = subprocess.run(["git", *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return run.stdout if run.returncode == 0 else None


def branch_with(files: list[Path]) -> str | None:
    """The branch whose line of first parents holds all measured commits.

    What the machine ``local`` measured of other commits, as before a rebase, is not committed and does not count then.
    """
    for counted in (files, [path for path in files if path.parent.name != "local"] or files):
        for branch in BRANCHES:
            line = git("rev-list", "--first-parent", branch, "--")
            if line and commits_of(counted) <= set(line.split()):
                return branch
    return None


def obstacle(files: list[Path], branch: str | None) -> str | None:
    """Why there can be no graphs here; None when there can."""
    if not files:
        return "No results are committed yet. Measure some: make asv-history"
    if git("rev-parse", "--git-dir") is None:
        return "The graphs need the project's git history, and this is no clone of it."
    if branch is None:
        return (
            f"The graphs need the {len(commits_of(files))} commits that were measured, and this clone has not got them all on "
            "its main branch. If it is a shallow one, complete it (git fetch --unshallow) and build again."
        )
    return None


def localise(site: Path) -> None:
    """Let the pages load what lies beside them."""
    shutil.copytree(FOLDER / "www", site / "vendor")
    index = site / "index.html"

    def local(match: re.Match[str]) -> str:
        name = match["url"].rsplit("/", 1)[-1]
        name = LOCAL.get(name, name)
        if not (site / "vendor" / name).is_file():
            raise SystemExit(f"this asv loads {match['url']}, of which {FOLDER.name}/www has no copy")
        return f'{match["before"]}="vendor/{name}"'

    # A file of this site needs no checksum, and from a file:// address none could be checked.
    attributes = r'(?: (?:integrity|crossorigin|referrerpolicy)="[^"]*")*'
    remote = rf'(?P<before><(?:script|link)\b[^>]*\b(?:src|href))="(?P<url>https?://[^"]*)"{attributes}'
    text = re.sub(remote, local, index.read_text(encoding="utf-8"))
    # The source map is no part of the site.
    md5 = site / "vendor" / "md5.min.js"
    md5.write_text(re.sub(r"\n//# sourceMappingURL=\S*", "", md5.read_text(encoding="utf-8")), encoding="utf-8")
    index.write_text(text.replace("<html>", '<html lang="en">', 1), encoding="utf-8")


def leave_out_the_unmeasured(site: Path) -> None:
    """Take benchmarks without a result out of the index: the pages would ask for graphs that are not there."""
    path = site / "index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    summaries = site / "graphs" / "summary"
    index["benchmarks"] = {name: rest for name, rest in index["benchmarks"].items() if (summaries / f"{name}.json").is_file()}
    path.write_text(json.dumps(index), encoding="utf-8")


def explain(site: Path, reason: str) -> None:
    """A page, and a picture, that say why there are no graphs."""
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    head = "<!doctype html><html lang='en'><meta charset='utf-8'><title>History</title>"
    (site / "index.html").write_text(f"{head}<h1>No graphs</h1><p>{escape(reason)}</p></html>", encoding="utf-8")
    (site / "overview.svg").write_text(in_words(reason), encoding="utf-8")


def publish(site: Path, results: Path = RESULTS) -> None:
    """Write the site, or the page that says why there is none."""
    files = result_files(results)
    branch = branch_with(files)
    reason = obstacle(files, branch)
    if reason:
        print(f"asv's site: {reason}", file=sys.stderr)
        explain(site, reason)
        return
    configuration = scratch("publish", results_dir=str(results), branches=[branch], html_dir=str(site.resolve()))
    command = [sys.executable, "-m", "asv", "publish", "--no-pull", "--config", str(configuration)]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if run.returncode:
        raise SystemExit(run.stdout)
    localise(site)
    leave_out_the_unmeasured(site)
    draw(files, (git("rev-list", "--first-parent", "--reverse", str(branch), "--") or "").split(), site / "overview.svg")


if __name__ == "__main__":
    publish(Path(sys.argv[1]))
