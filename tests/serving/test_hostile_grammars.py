"""What a few hostile bytes of a grammar may cost: little time and memory, and nothing after their client has left."""

import contextlib
import http.client
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import llguidance
import psutil
import pytest

from qwen.model.tokenization_qwen import QWenTokenizer
from qwen.serving.engine import grammar, grammar_trials, grammar_worker
from qwen.serving.engine.grammar import ConstraintFactory, StructuralTag
from tests.serving.engine.replies import wait_until

MULTIPLE = {"type": "integer", "multipleOf": 999_983}  # 10 seconds and 400 MB of llguidance


def branches(shift, number=10):
    """An expression whose intersection with others like it takes the product of their branches."""
    return "(" + "|".join(f"[a-{chr(98 + n)}].{{{n + shift}}}b" for n in range(number)) + ")"


def delayed(shift):
    """The same, only after a text that the trial of a grammar is not likely to find."""
    return f"[xyz]{{12}}(w{{5}}{branches(shift)}z*)*"


def sums(most):
    return " | ".join(" ".join(["s"] * number) for number in range(2, most))


def intersection(parts):
    return "start: A\nA: " + " & ".join(f"/{part}/" for part in parts)


TOO_LONG, TOO_MUCH = "it takes too long to compile. Simplify it.", "it intersects [38] expressions"
HOSTILE = {
    "multipleOf": ("json_schema", MULTIPLE, TOO_LONG),
    "$ref": ("json_schema", {"$defs": {"a": MULTIPLE}, "items": {"$ref": "#/$defs/a"}, "type": "array"}, TOO_LONG),
    "in Lark": ("grammar", f'start: "a" | %json {json.dumps(MULTIPLE)}', TOO_LONG),
    "in a tag": ("structural_tags", [StructuralTag("<", "<a>", MULTIPLE, "<")], TOO_LONG),
    "in a tool": ("tool_call", [{"name": "f", "parameters": {"properties": {"a": MULTIPLE}}}], TOO_LONG),
    "in many tools": (
        "tool_call",
        [
            {"name": f"f{n}", "parameters": {"properties": {"a": {"type": "integer", "multipleOf": 20_011 + 2 * n}}}}
            for n in range(100)
        ],
        TOO_LONG,
    ),
    "intersection": ("grammar", intersection(f"(.*a.{{{n}}}b.*)" for n in range(14)), "it intersects 14"),
    "delayed intersection": ("grammar", intersection(map(delayed, range(8))), TOO_MUCH),
    "large intersection": ("grammar", intersection([branches(0, 2000), branches(1, 2000)]), "it intersects 2"),
    "hidden intersection": (
        "grammar",
        intersection(map(delayed, range(8))).replace("start: A", 'start: A\nB: <x"y>') + ' | <z"w>',
        TOO_MUCH,
    ),
    "delayed patterns": (
        "json_schema",
        {"allOf": [{"type": "string", "pattern": f"^{delayed(n)}$"} for n in range(8)]},
        TOO_MUCH,
    ),
    "escaped patterns": (
        "grammar",
        "start: %json "
        + json.dumps({"allOf": [{"pattern": f"^{delayed(n)}$"} for n in range(8)]}).replace("a", "\\u0061"),
        TOO_MUCH,
    ),
    "ambiguous": ("grammar", f'start: s\ns: {sums(10)} | "a"', TOO_LONG),
    "ambiguous GBNF": ("grammar", f'root ::= s\ns ::= {sums(10)} | "a"', TOO_LONG),
    "520 optional": ("json_schema", {"type": "object", "properties": {f"p{n}": {} for n in range(520)}}, "max is 2000"),
}


@pytest.fixture(scope="module")
def factory(bundled_chat):
    tokenizer = QWenTokenizer(str(bundled_chat / "qwen.tiktoken"))
    return ConstraintFactory(tokenizer, len(tokenizer))


def processor_time(process):
    """The processor time of a process and of its children, those that have ended included."""
    times = [process.cpu_times()]
    with contextlib.suppress(psutil.NoSuchProcess):
        times += [child.cpu_times() for child in process.children(recursive=True)]
    return sum(each.user + each.system + each.children_user + each.children_system for each in times)


def trial_process(process):
    """The process of a server that tries grammars, if there is one."""
    for child in process.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(word.endswith("grammar_worker.py") for word in child.cmdline()):
                return child
    return None


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_cost_little(factory, name):
    method, argument, message = HOSTILE[name]
    factory.json_schema({"const": name})  # the child process runs
    this = psutil.Process()
    size, before, memory = len(json.dumps(argument)), processor_time(this), this.memory_info().rss
    with pytest.raises(ValueError, match=message):
        getattr(factory, method)(argument)
    assert processor_time(this) - before < 1 + size * 4 * grammar_trials.SECONDS_PER_CHARACTER
    assert this.memory_info().rss - memory < 100 * 2**20
    assert factory.json_schema({"const": name}).allowed().any()


def test_a_grammar_that_ends_the_process_is_refused(factory):
    factory.json_schema({"const": "this test's own"})  # one that passed before would start no process
    worker = psutil.Process(factory._trials._worker._process.pid)  # other factories have theirs
    with ThreadPoolExecutor() as pool:
        before = own_time(worker)
        building = pool.submit(factory.json_schema, padded(MULTIPLE))
        wait_until(lambda: own_time(worker) > before + 0.1)
        worker.kill()  # as the system does for lack of memory
        with pytest.raises(ValueError, match="The schema cannot be used: it takes too much memory, or is nested too"):
            building.result()
    assert factory.json_schema({"const": 2}).allowed().any()


def test_requests_share_what_is_built(factory, monkeypatch):
    built = []
    monkeypatch.setattr(
        grammar, "new_matcher", lambda *parts: built.append(parts[1]) or grammar_worker.new_matcher(*parts)
    )
    monkeypatch.setattr(grammar, "_MAX_BUILT", 8000)
    large = [letter * 3000 for letter in "abc"]
    first, second = (factory.regex(large[0]) for _ in range(2))
    assert len(built) == 1
    first.accept(int(first.allowed().nonzero()[0]))
    assert second.allowed().equal(factory.regex(large[0]).allowed())  # where the reply begins
    for text in large:  # more than are kept
        factory.regex(text)
    factory.regex(large[0])
    assert len(built) == 4


def padded(schema):
    """A schema with a text, which gives it seconds."""
    return {**schema, "description": "x" * 60_000}


def test_the_process_ends_with_its_parent():
    folder = Path(llguidance.__file__).parents[1]
    command = [sys.executable, "-I", "-S", grammar_worker.__file__, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert json.loads(process.stdout.readline()) == {"ready": True}
        grammar = f"start: %json {json.dumps(MULTIPLE)}"
        process.stdin.write(json.dumps({"grammar": grammar}).encode() + b"\n")
        process.stdin.flush()
        worker = psutil.Process(process.pid)
        before = own_time(worker)
        wait_until(lambda: own_time(worker) > before + 0.1)
        process.stdin.close()  # by the system, if the parent is killed
        assert process.wait(60) == 0
        assert process.stdout.read() == b""


def test_grammars_are_tried_once(factory, monkeypatch):
    runs = []
    run = factory._trials._run
    monkeypatch.setattr(factory._trials, "_run", lambda *arguments: runs.append(arguments) or run(*arguments))
    schema = {"type": "object", "properties": {"once": {"type": "integer"}}}
    tools = [{"name": "f", "parameters": schema}]
    for _ in range(2):
        factory.json_schema(schema)
        factory.tool_call(tools)
        factory.regex("once")
    assert len(runs) == 3
    factory.json_object()
    factory.choice(["cheap", "whatever it is"])
    assert len(runs) == 3


def test_long_texts_without_a_choice(factory):
    ids = factory._tokenizer.encode("a" * 20_000)
    constraint = factory.json_schema({"const": "a" * 20_000})
    started = time.thread_time()
    constraint.accept(factory._tokenizer.encode('"')[0])
    for token in ids[:5]:
        assert constraint.allowed()[token]
        constraint.accept(token)
    assert time.thread_time() - started < 0.5  # llguidance's own encoder takes a second


def test_a_delayed_intersection_of_few_small_expressions_is_allowed(factory):
    constraint = factory.grammar(intersection(map(delayed, range(2))))
    for byte in "x" * 12 + "w" * 5 + "aaaa":
        constraint.allowed()
        constraint.accept(factory._tokenizer.encode(byte)[0])
    written = 'start: A "&&" B\nA: /a&b/ & ~/c&d/ // & &\nB: "&amp;" | <&&&>\n# & & &'
    with pytest.raises(ValueError, match="special token"):
        factory.grammar(written)
    assert factory.grammar(written.replace(" | <&&&>", "")).allowed().any()


@pytest.mark.process
def test_neighbours_and_clients_that_leave(start_server, bundled_chat):
    server = start_server("-c", str(bundled_chat))
    process = psutil.Process(server.process.pid)
    url = f"{server.url}/v1/chat/completions"
    plain = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 8}

    def hostile(schema):
        schema_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return {**plain, "response_format": schema_format}

    client = httpx.Client(timeout=300, limits=httpx.Limits(max_connections=None))

    def send(body):
        return client.post(url, json=body)

    alone = send(plain).json()["choices"]
    with ThreadPoolExecutor(34) as pool:
        refused = [pool.submit(send, hostile({**MULTIPLE, "multipleOf": 999_983 - 2 * n})) for n in range(4)]
        answered = [pool.submit(send, plain) for _ in range(30)]
        assert all(future.result().json()["choices"] == alone for future in answered)
        for future in refused:
            assert future.result().status_code == 400
            assert future.result().json()["error"]["param"] == "response_format.json_schema.schema"
            assert "it takes too long to compile" in future.result().json()["error"]["message"]

    assert send(hostile({"const": 1})).json()["choices"][0]["message"]["content"] == "1"
    for ends in (False, True):
        worker = wait_until(lambda: trial_process(process))
        seen = [before := own_time(worker)]
        leaving = http.client.HTTPConnection(server.url.removeprefix("http://"))
        body = json.dumps(hostile(padded(MULTIPLE)))
        leaving.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        wait_until(lambda worker=worker, before=before: own_time(worker) > before + 0.1)
        leaving.close()
        if ends:
            server.signal()
            assert server.wait() == 0
        with pytest.raises(psutil.NoSuchProcess):
            wait_until(lambda worker=worker, seen=seen: seen.append(own_time(worker)))
        assert seen[-1] - before < 2  # and not what it may take
        if not ends:
            assert send(hostile({"const": 2})).json()["choices"][0]["message"]["content"] == "2"
    assert "Traceback" not in server.output()


def own_time(process):
    """The processor time of a process. Raises NoSuchProcess if it has ended."""
    if process.status() == psutil.STATUS_ZOMBIE:
        raise psutil.NoSuchProcess(process.pid)
    times = process.cpu_times()
    return times.user + times.system
