"""The README's Python runs, and its picture and files are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


def test_examples_run_one_after_another():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["norm"].grad.keys() == {"weight", "bias"}
    assert names["moments"].count == 32 * 56 * 56


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README.read_text()))
def test_links_lead_somewhere(link):
    assert (ROOT / link).is_file()


@pytest.mark.parametrize("name", ["demo", "test"])
def test_commands_can_be_found(name):
    assert re.search(rf"<!-- command: {name} -->\n```sh\n\S.*\n```", README.read_text())
