"""The checks that ``make docs`` and ``make site-check`` run find dead links and wrong spelling."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.site.links import dead_links, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def site(tmp_path):
    (tmp_path / "api").mkdir()
    (tmp_path / "index.html").write_text(
        '<a href="api/layers.html#moe">x</a> <a href="#here">x</a> <h1 id="here">x</h1> <a href="#">x</a>'
        '<a href="https://example.org/none">x</a> <a href="mailto:nobody">x</a>'
        '<a href="api/">x</a>'
    )
    (tmp_path / "api" / "layers.html").write_text('<dt id="moe"></dt><img src="../a%20b.png"><a href="../index.html?q=1">x</a>')
    (tmp_path / "api" / "index.html").write_text("")
    (tmp_path / "a b.png").touch()
    return tmp_path


def test_links_that_lead_somewhere_are_followed(site, capsys):
    assert dead_links(site) == (6, [])
    assert main(str(site)) == 0
    assert capsys.readouterr().out.endswith("6 links followed, 0 dead\n")


@pytest.mark.parametrize(
    ("link", "why"),
    [
        ("none.html", "no such file"),
        ("layers.html#none", "no such anchor"),
        ("#none", "no such anchor"),
        ("../none.png", "no such file"),
        ("../../index.html", "outside the site"),
    ],
)
def test_a_link_that_leads_nowhere_is_found(site, link, why, capsys):
    (site / "api" / "page.html").write_text(f'\n<img src="{link}">')
    assert dead_links(site)[1] == [f"api/page.html:2: {link}: {why}"]
    assert main(str(site)) == 1 and why in capsys.readouterr().out


def test_an_empty_folder_is_not_a_good_site(tmp_path):
    assert main(str(tmp_path)) == 1


def test_spelling_is_checked_with_the_words_that_are_allowed(tmp_path):
    # The run over the repository is a part of `make check`; this one shows that it would find something.
    pytest.importorskip("codespell_lib")
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["codespell"]["ignore-words-list"]
    page = tmp_path / "page.md"
    page.write_text(f"{allowed.replace(',', ' ')}\nrec" + "ieve\n")
    command = [sys.executable, "-m", "codespell_lib", str(page)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode and re.findall(r":(\d+): (\w+) ==> (\w+)", run.stdout) == [("2", "rec" + "ieve", "receive")]
