"""The documentation: every block runs as written, or gives the reason why it is not run."""

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwen._moved import MOVED
from qwen.checkpoint import loading
from tests.support import ROOT
from tests.support.markdown import NOT_RUN, RUN, SEPARATE_CHAPTERS, Block, Document, pages, repository_files
from tests.support.processes import Child
from tests.support.reader_machine import PUBLISHED
from tests.support.run_document import json_file, output_error, run_parts, split_commands, user_inputs

DOCUMENTS = [Document(page) for page in pages()]
BLOCKS = [block for document in DOCUMENTS for block in document.blocks]


class Run:
    """Runs parts of pages in parallel in a process, while tests wait for the results of their blocks.

    Args:
        parts: pages or parts of pages, see `run_document`.
        folder: an empty folder for the results.
        fork: whether to fork each `python`.
    """

    def __init__(self, parts: list[str], folder: Path, fork: bool):
        self._folder = folder
        self._process = Child(folder, run_parts, parts, folder, fork)

    def outcome(self, part: str, line: int) -> dict:
        """Wait for the result of the block that starts at a line."""
        file = json_file(self._folder, part)
        while True:
            ended = self._process.poll() is not None
            lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
            for outcome in map(json.loads, lines):
                if outcome["line"] == line:
                    return outcome
            if ended:
                pytest.fail(f"The run ended before this block:\n{self._process.output()}")
            time.sleep(0.05)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run the blocks of the selected tests."""
    parameters = (getattr(item, "callspec", None) for item in request.session.items if item.path == request.path)
    blocks = [spec.params["block"] for spec in parameters if spec and "block" in spec.params]
    # Nightly tests start every process as a reader would.
    fork = not any(block.nightly for block in blocks)
    run = Run([*dict.fromkeys(block.part for block in blocks)], tmp_path_factory.mktemp("pages"), fork)
    yield run
    run.stop()


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(
            block, id=f"{block.page}:{block.line}", marks=pytest.mark.nightly if block.nightly else pytest.mark.docs
        )
        for block in BLOCKS
        if block.is_run
    ],
)
def test_a_block_runs(block: Block, runs: Run, record_property: Callable[[str, object], None]) -> None:
    outcome = runs.outcome(block.part, block.line)
    record_property("seconds", outcome["seconds"])
    if outcome["error"] is not None:
        pytest.fail(f"{block.page}:{block.line}\n{block.code}\n{outcome['error']}\n{outcome['output']}", pytrace=False)


def test_separate_chapters_exist() -> None:
    for document in DOCUMENTS:
        chapters = {heading.anchor for heading in document.headings if heading.level == 2}
        assert chapters | {""} >= set(SEPARATE_CHAPTERS.get(document.page, ()))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.page)
def test_code_is_in_fences_of_a_known_language(document: Document) -> None:
    assert not document.indented, f"{document.page}: code is indented instead of fenced in lines {document.indented}"
    for block in document.blocks:
        where = f"{document.page}:{block.line}"
        assert block.language in RUN + NOT_RUN, f"{where}: unknown language {block.language!r}"
        assert block.closed, f"{where}: the fence is not closed"
        assert block.is_run or block.not_run is None or block.language in RUN, f"{where}: needs no reason"
    comments = document.text.count("<!-- not run") + document.text.count("<!-- run nightly")
    reasons = sum(block.not_run is not None or block.nightly for block in document.blocks)
    assert comments == reasons, "A comment has no reason, or no block follows it."


@pytest.mark.parametrize(
    ("comment", "reason"),
    [
        ("<!-- not run: a GPU -->", "a GPU"),
        ("<!-- not run: -->", None),
        ("<!-- not run -->", None),
        ("<!-- not run: a GPU -->\n\nA paragraph between them.", None),
    ],
)
def test_a_block_that_is_not_run_has_a_reason(comment: str, reason: str | None) -> None:
    (block,) = Document("page.md", f"{comment}\n```bash\nfalse\n```\n").blocks
    assert block.not_run == reason
    assert block.is_run == (reason is None)


@pytest.mark.parametrize("page", [name for name in repository_files() if name.endswith((".md", ".ipynb"))])
def test_pages_use_current_module_names(page: str) -> None:
    """Only the changelog mentions old names."""
    modules = set(re.findall(r"\bqwen(?:\.\w+)+", (ROOT / page).read_text(encoding="utf-8")))
    moved = {module for module in modules if any(f"{module}.".startswith(f"{old}.") for old in MOVED)}
    assert page == "CHANGELOG.md" or not moved


def test_changelog_lists_every_moved_module() -> None:
    (table,) = [table for table in Document("CHANGELOG.md").tables if table[0] == ["old", "new"]]
    assert {(old.strip("`"), new.strip("`")) for old, new in table[1:]} == set(MOVED.items())


# The runner


PAGE = """# A page

```bash
echo one
false
echo two
```

```text
one
```

```python
x = 2
print("x is", x)
```

```text
x is 3
```

```python
print("first\\nsecond\\nthird", x)
```

```text
first
…
third 2
```

```python
def f():
    raise ValueError("on purpose")
f()
```

<!-- not run: a GPU -->
```bash
exit 1
```

```bash
while read -r line; do echo "You said $line."; done
```

```text
User> yes
Qwen> You said yes.
User> no
Qwen> You said nothing.
```

## Servers

```bash
echo "import sys; sys.exit('No such model.')" > web_demo.py
python web_demo.py
```

```bash
cat > openai_api.py <<'END'
import http.server
import sys

server = http.server.HTTPServer(("127.0.0.1", 8000), http.server.SimpleHTTPRequestHandler)
try:
    server.serve_forever()
except KeyboardInterrupt:
    sys.exit("unclean" in sys.argv and 3)
END
python openai_api.py
curl --silent http://127.0.0.1:8000/LICENSE | grep --only-matching "Version 2.0, January"
```

```text
Version 2.0, January
```

### In Python

```python
import urllib.request
print(urllib.request.urlopen("http://localhost:8000/README.md").status)
```

## Another

```bash
python openai_api.py unclean
```

## Later

```bash
curl --silent http://127.0.0.1:8000/
```
"""


@pytest.mark.docs
def test_the_runner_reports_what_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    (folder := tmp_path / "run").mkdir()
    run = Run([str(page)], folder, fork=False)
    blocks = [block for block in Document(str(page)).blocks if block.is_run]
    outcomes = [run.outcome(str(page), block.line) for block in blocks]
    run.stop()
    failed = [bool(outcome["error"]) for outcome in outcomes]
    assert failed == [True, True, False, True, True, True, False, False, True, True]
    stopped, wrong, _, raised, other_reply, refused, *_, unclean, gone = outcomes
    assert "status 1" in stopped["error"]
    assert stopped["output"] == "one\n"
    assert "x is 3" in wrong["error"]
    assert wrong["output"] == "x is 2\n"
    assert f'page.md", line {blocks[3].line + 1}, in f' in raised["output"]
    assert "on purpose" in raised["output"]
    assert "You said nothing." in other_reply["error"]
    assert other_reply["output"] == "You said yes.\nYou said no.\n"
    assert "The server ended with status 1" in refused["error"]
    assert "No such model." in refused["output"]
    assert "status 3 on Ctrl-C" in unclean["error"]
    assert "status 7" in gone["error"]  # connection refused: a server stops at the end of its section


def test_every_published_model_is_on_the_reader_machine() -> None:
    assert set(PUBLISHED) == set(loading.PUBLISHED)


def test_commands_of_a_block() -> None:
    commands = ["a \\\n  b\n", "# c\n", "d <<'END'\nEND of\nEND\n", "echo 'x\ny'\n", "for i in 1 2; do\n  e\ndone\n"]
    assert split_commands("".join(commands)) == commands


def test_output_is_compared_line_by_line() -> None:
    assert output_error(["b"], "a\nb\nc\n") is None
    assert output_error(["a", "…", "d"], "a\nb\nc\nd\n") is None
    assert output_error(["a", "…", "b"], "a\nb\n") is None
    assert output_error(["b"], "ab\n")
    assert output_error(["a", "c"], "a\nb\nc")
    assert output_error(["a."], "ab")
    assert user_inputs("User> a\nQwen> b\nUser> c\n") == "a\nc\n"
    assert user_inputs("a User> b") == ""
