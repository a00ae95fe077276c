"""The serving bench: what its clients see of an answer, the figures made of it, its arguments, no process left behind."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from scripts.bench import gpu, lm_eval, load, report, serve, servers, words

ROOT = Path(__file__).resolve().parents[1]
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"


def event(text: str = "", **more: object) -> bytes:
    return f"data: {json.dumps({'choices': [{'text': text}], **more})}\n\n".encode()


def framed(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def test_an_answer_is_read_from_bytes_however_they_were_cut() -> None:
    usage = event(usage={"completion_tokens": 3})
    whole = (
        HEAD
        + framed(event(" ban"))
        + framed(event(" bek don"))
        + framed(usage)
        + framed(b"data: [DONE]\n\n")
        + framed(b"")
    )
    ends = [whole.index(b"\n\n", whole.index(word)) + 2 for word in (b" ban", b" don")]  # of the two events
    cuts = [0, 10, *ends, len(whole)]
    pieces = [(float(at), whole[a:b]) for at, (a, b) in enumerate(itertools.pairwise(cuts), 1)]
    assert load.read(load.Recording(0.5, pieces)) == load.Answer(0.5, [load.Chunk(2.0, 1), load.Chunk(3.0, 2)], 3)
    alone = [(float(at), whole[at : at + 1]) for at in range(len(whole))]
    assert [chunk.tokens for chunk in load.read(load.Recording(0, alone)).chunks] == [1, 2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 8\r\n\r\nno model", "HTTP 404: no model"),
        (HEAD + framed(event(" ban")) + framed(b""), "ended early, after 1 chunks"),
        (HEAD + framed(event(" ban")), "broke off"),
        (HEAD + framed(b'data: {"error": "no memory"}\n\n') + framed(b""), "no memory"),
    ],
)
def test_an_answer_that_is_none_is_an_error(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load.read(load.Recording(0.0, [(1.0, data)]))


def test_figures() -> None:
    answers = [
        load.Answer(0.0, [load.Chunk(0.1, 1), load.Chunk(0.2, 1), load.Chunk(0.6, 2)], 4),
        load.Answer(0.5, [load.Chunk(0.8, 1), load.Chunk(1.0, 1)], 2),
    ]
    figures = load.summary(answers)
    assert figures == pytest.approx(
        {
            "tokens_per_s": 6,
            "first_p50_ms": 100,
            "first_p99_ms": 300,
            "gap_p50_ms": 200,
            "gap_p99_ms": 400,
            "token_gap_p50_ms": 200,
            "token_gap_longest_ms": 200,
        }
    )


def test_every_client_sends_its_own_prompts_in_turn() -> None:
    """Over a socket: the requests that a server sees, and the answers that the clients get."""
    seen = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        seen.append(body)
        usage = {"completion_tokens": words.count(body["prompt"])}
        writer.write(HEAD + framed(event(body["prompt"])) + framed(event(usage=usage)) + framed(b""))
        await writer.drain()
        writer.close()

    async def run(loads: list[load.Load]) -> list[load.Recording]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            client = load.Client(server.sockets[0].getsockname()[1], "bench", {"ignore_eos": True})
            return await load.send_all(loads[0].prompts, client.send)

    loads = load.plan([3], 2, mixed=False, seed=0)
    answers = [load.read(recording) for recording in asyncio.run(run(loads))]
    assert [answer.tokens for answer in answers] == [load.PROMPT_TOKENS] * 6
    assert sorted(body["prompt"] for body in seen) == sorted(prompt for own in loads[0].prompts for prompt in own)
    assert all(body["stream"] and body["ignore_eos"] and body["model"] == "bench" for body in seen)


def test_no_prompt_comes_twice_and_mixed_ones_have_all_lengths() -> None:
    loads = load.plan([1, 8], 3, mixed=True, seed=0)
    assert [one.name for one in loads] == ["1", "8", "mixed"]
    prompts = [prompt for one in loads for own in [*one.warm_up, *one.prompts] for prompt in own]
    assert len(set(prompts)) == len(prompts)
    lengths = [words.count(prompt) for own in loads[-1].prompts for prompt in own]
    assert (min(lengths), max(lengths)) == (16, 1500)
    assert len(loads[-1].prompts) == 64


def test_a_word_is_a_token() -> None:
    from scripts.bench.serve_model import word_tokenizer

    tokenizer = word_tokenizer()
    text = words.prompt(Random(0), 50)
    ids = tokenizer(text)["input_ids"]
    assert len(tokenizer) == words.SIZE
    assert len(ids) == words.count(text) == 50
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([one]) for one in ids] == [f" {word}" for word in text.split()]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--only", "torch,them"], "no contender is called 'them'; choose from torch, "),
        (["--clients", "1,many"], "'many' is not a whole number from 1"),
        (["--rounds", "0"], "'0' is not a whole number from 1"),
        (["--json", "/no/such/place/figures.json"], "/no/such/place is not a directory"),
    ],
)
def test_arguments_are_checked(wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve.arguments().parse_args(wrong)
    assert message in capsys.readouterr().err


def test_the_table_compares_ours_with_each_of_the_others() -> None:
    def result(speed: float) -> serve.Result:
        return {"loads": {"8": dict.fromkeys(serve.COLUMNS, 10.0) | {"tokens_per_s": speed}}, "peak_rss_mib": 100.0}

    rounds = {"torch": [result(300), result(100), result(200)], "vllm-server": [result(100)] * 3}
    medians = {name: serve.median(results) for name, results in rounds.items()}
    text = serve.table(medians, serve.compare(medians))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0][:2] == ["8", "clients"]
    assert lines[1][:2] == ["torch", "200.0"]
    assert next(line for line in lines if line[1:2] == ["/"])[:5] == ["torch", "/", "vllm-server,", "8", "2.00"]


def test_the_readme_gets_a_table_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}old\n{report.END}after\n")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "PLOT", tmp_path / "serve.svg")
    speeds = {"torch": (90.0, 400.0), "vllm-server": (100.0, 500.0), "ipex-generate": (1.0, 1.0)}
    report.write(
        {
            name: {"loads": {"1": {"tokens_per_s": one}, "8": {"tokens_per_s": eight}, "mixed": {"tokens_per_s": 1.0}}}
            for name, (one, eight) in speeds.items()
        }
    )
    lines = readme.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "| `Torch()` | 90 (0.90) | 400 (0.80) |" in lines
    assert "old" not in lines
    assert not any("ipex" in line for line in lines)
    assert "clients" in (tmp_path / "serve.svg").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "torch"], "compares with vllm-server, which --only leaves out"),
        (["--dtype", "fp32"], "measured in bf16, not in fp32"),
    ],
)
def test_the_readme_is_not_asked_for_what_it_does_not_show(
    monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve", "--readme", *options])
    with pytest.raises(SystemExit, match=message):
        serve.main()


def test_ending_a_server_leaves_no_process() -> None:
    """Also none that has left its group and lost its parent, as Ray's daemons do."""
    code = """if True:
        import ctypes, subprocess
        from scripts.bench import servers
        servers.adopt_orphans()
        command = "(setsid sleep 1000 &); echo up; exec sleep 1000"
        process = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout.readline() == b"up\\n"
        assert len(servers.descendants()) == 2, servers.descendants()
        servers.end(process)
        print(servers.descendants())
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert ran.stdout == "[]\n", ran.stderr


def test_a_server_that_does_not_start_is_told_with_what_it_said(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "print('no such model', flush=True); exit(3)"], stdout=log_of(tmp_path)
    )
    with pytest.raises(SystemExit, match=r"(?s)no such model.*ended with exit code 3"):
        servers.wait_until_ready(process, servers.free_port(), tmp_path / "log")


def log_of(folder: Path) -> int:
    return os.open(folder / "log", os.O_CREAT | os.O_WRONLY)


def test_scores_that_differ_are_told() -> None:
    one = {"scores": {"questions, acc": 0.75}, "loglikelihoods": [-3.0, -4.0]}
    lines, same = lm_eval.compare(one, {"scores": {"questions, acc": 0.75}, "loglikelihoods": [-3.0, -4.0001]})
    assert same
    assert "1.0e-04" in lines[-1]
    assert not lm_eval.compare(one, {"scores": {"questions, acc": 0.7}, "loglikelihoods": [-3.0, -4.0]})[1]
    assert not lm_eval.compare(one, {"scores": {"questions, acc": 0.75}, "loglikelihoods": [-3.0, -4.2]})[1]


def test_on_a_gpu_speed_is_shown_beside_the_peers_and_the_memorys() -> None:
    figures = {"tokens_per_s": 300.0, "token_gap_p50_ms": 4.0}
    rounds = {
        "transformers": [{"1": figures | {"tokens_per_s": speed}} for speed in (90.0, 150.0, 100.0)],
        "torch": [{"1": figures}],
    }
    *_, peer, ours = gpu.table("8b", rounds, shortest=0.003).splitlines()
    assert peer.split() == ["1", "transformers", "100", "1.00"]
    assert ours.split() == ["1", "torch", "300", "3.00", "75%"]


def test_a_shape_that_nobody_knows_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.arguments().parse_args(["--shapes", "8b,9b"])
    assert "no shape is called '9b'; choose from 124m, 1b, 8b" in capsys.readouterr().err
