"""bench/: each part runs for a moment and counts right. Nothing here asserts a speed."""

import json
from pathlib import Path

import pytest

from bench import replay, report
from bench.cases import DIRECT, EVENTS, FASTAPI, PATH, RELAY, RIVULET, Bench, Outcome
from bench.plan import Plan
from bench.upstream import Answer
from bench.wire import ChunkedBody, MarkCounter, exchange, request

TOKENS = [b"#t=%020d" % number for number in (1, 22, 333)]


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))


@pytest.mark.parametrize("size", range(1, 40))
def test_counting_does_not_depend_on_where_the_reads_are_cut(size: int) -> None:
    """Chunks and marks come out whole whatever the size of a read, and though chunks cut marks."""
    text = b'{"content":"' + b"".join(TOKENS) + b'"}##t#t'
    wire = chunked(text[:13], text[13:40], text[40:])
    coding, counter, clocks = ChunkedBody(), MarkCounter(), MarkCounter()
    body, count, stamps = b"", 0, []
    for start in range(0, len(wire), size):
        assert not coding.ended
        piece = coding.feed(wire[start : start + size])
        body += piece
        count += counter.count(piece)
        stamps += clocks.stamps(piece)
    assert coding.ended
    assert coding.chunks == 3
    assert body == text
    assert count == 3
    assert stamps == [1, 22, 333]


def test_bytes_after_the_last_chunk_are_refused() -> None:
    """A response that goes on after its end is an error of the server, not more text."""
    with pytest.raises(ValueError, match="after the last chunk"):
        ChunkedBody().feed(chunked(b"x") + b"y")


@pytest.mark.parametrize("stamped", [0, 1])
@pytest.mark.parametrize("tokens", [1, 207, 208, 209, 1000])
def test_the_upstream_writes_what_its_model_name_says(stamped: int, tokens: int) -> None:
    """As many content events as asked, each valid JSON, then finish, usage where asked, [DONE]."""
    bench = Bench(runs=1, seconds=0.2)
    model = f"fake:k={tokens}:r=0:t={stamped}"
    asked = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    with bench.serving(DIRECT) as (upstream, _):
        answer = exchange(
            ("127.0.0.1", upstream.port),
            request("POST", "/v1/chat/completions", "upstream", json.dumps(asked).encode()),
        )
        assert upstream.get("/stats") == {"requests": 1, "tokens": tokens}
    *events, done, end = answer.body.split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    role, *contents, finish, usage = [json.loads(event.removeprefix(b"data: ")) for event in events]
    assert role["choices"][0]["delta"]["role"] == "assistant"
    assert len(contents) == tokens
    assert all(event["choices"][0]["delta"]["content"] for event in contents)
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["completion_tokens"] == tokens
    assert answer.chunks == tokens + 4


def test_a_model_name_may_leave_parts_out() -> None:
    """What is missing has its default."""
    assert Answer.named("fake:k=5") == Answer(tokens=5)
    assert Answer.named("fake:r=50:b=8:t=1") == Answer(rate=50, batch=8, stamped=True)


@pytest.mark.parametrize("peer", [DIRECT, RELAY, FASTAPI, RIVULET])
@pytest.mark.parametrize("rate", [0, 500])
def test_every_token_arrives_through_every_peer(peer: str, rate: int) -> None:
    """The load counts whole answers only and finds a clock in each token."""
    bench = Bench(runs=1, seconds=0.5)
    plan = Plan(streams=3, ramp=0.1, warmup=0.1, expect=20, clock=True)
    result = bench.sample(peer, f"fake:k=20:r={rate}:b=3:t=1", plan)
    assert (result.lost, result.extra, result.errors) == (0, 0, {})
    assert set(result.statuses) == {"200"}
    assert result.finished > 0
    assert result.tokens > 0
    assert result.latency_ms
    assert result.latency_ms.count == result.tokens
    assert result.rss_before > 0


def test_a_short_answer_is_a_loss() -> None:
    """Answers with fewer tokens than expected are counted as losses, with more as extra."""
    bench = Bench(runs=1, seconds=0.2)
    few = bench.sample(DIRECT, "fake:k=4:t=1", Plan(expect=5, ramp=0, warmup=0))
    assert (few.lost, few.extra) == (few.finished, 0)
    many = bench.sample(DIRECT, "fake:k=4:t=1", Plan(expect=1, ramp=0, warmup=0))
    assert (many.lost, many.extra) == (0, 3 * many.finished)


def test_readers_share_one_generation() -> None:
    """Each reader gets every token of the one answer, which the upstream was asked for once."""
    bench = Bench(runs=1, seconds=0.3)
    plan = Plan(readers=5, attach=EVENTS, ramp=0.1, warmup=0.1, expect=100, drain=30)
    with bench.serving(RIVULET) as (upstream, server):
        result = bench.load(upstream, server, "fake:k=100:r=100:t=1", plan)
        assert upstream.get("/stats") == {"requests": 1, "tokens": 100}
    assert (result.finished, result.lost, result.extra, result.errors) == (6, 0, 0, {})
    assert 0 < result.generated < result.tokens


def test_a_replay_is_measured_whole() -> None:
    """The replay's text is the answer's; its bytes, chunks and write calls are counted."""
    bench = Bench(runs=1, seconds=0.1)
    with bench.serving(RIVULET) as (_, server):
        seen = replay.measure(server, PATH, EVENTS, "fake:k=32:r=0")
    text = 2 * len(" the server of streaming. and token a response, in model to connection is\n")
    assert seen.text_bytes == text
    assert text < seen.body_bytes < seen.wire_bytes
    assert seen.chunks > 0
    assert seen.system_calls is None or seen.system_calls > 0


def test_a_server_that_does_not_start_is_an_error() -> None:
    """What it said is in the error."""
    bench = Bench(runs=1, seconds=0.1)
    with (
        pytest.raises(RuntimeError, match="did not start"),
        bench.serving(RIVULET, loop="no such loop"),
    ):
        pass


def test_the_report_is_made_from_all_cases_measured_so_far(tmp_path: Path) -> None:
    """One file a case; the page has targets, measures and runs of all, and there is a plot."""
    bench = Bench(runs=1, seconds=0.2)
    outcome = Outcome(runs=bench.side_by_side([DIRECT], "fake:k=3:t=1", Plan(expect=3)))
    outcome.add("tokens", DIRECT, [1234.0, 2.0, 3.0])
    outcome.at_most(5, "ms", "a wait", 7)
    for name in ("short", "saturated"):
        report.save(tmp_path, name, outcome, {"runs": 1, "seconds": 0.2})
    page = report.publish(tmp_path)
    assert "| saturated | a wait: at most 5 ms | 7 ms | NO |" in page
    assert "| short | tokens | upstream direct | 3 | 2 to 1,234 |" in page
    assert page.index("**saturated**") < page.index("**short**")
    assert (tmp_path / "results.md").read_text() == page
    assert (tmp_path / "plot.png").stat().st_size > 0
