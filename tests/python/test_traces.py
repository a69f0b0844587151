"""Traces: every public format becomes the same requests, and what is broken is named by its line."""

import gzip
import json
import pathlib

import pytest

from tokendepot.bench.traces import Request, TraceError, in_chunks, read_trace

TRACES = pathlib.Path(__file__).resolve().parents[1] / "traces"


def line(time_ms, tokens, ids, **more):
    return {"timestamp": time_ms, "input_length": tokens, "output_length": 7, "hash_ids": ids, **more}


def written(tmp_path, *items, name="trace.jsonl"):
    path = tmp_path / name
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items))
    return [str(path)]


@pytest.mark.parametrize(
    "name, requests, references, unique", [("conversation", 12_031, 288_500, 182_790), ("synthetic", 3_993, 121_877, 43_924)]
)
def test_the_mooncake_traces_are_read_whole(name, requests, references, unique):
    trace = read_trace([str(TRACES / f"{name}_trace.jsonl.gz")])
    assert (len(trace.requests), trace.references, trace.unique_blocks) == (requests, references, unique)
    assert (trace.format, trace.block_tokens, trace.broken_count) == ("mooncake", 512, 0)


def test_times_of_mooncake_are_milliseconds_and_requests_are_put_in_order(tmp_path):
    trace = read_trace(written(tmp_path, line(3000, 100, [5]), line(1000, 600, [5, 6]), line(2000, 1024, [8, 9])))
    assert [request.time_s for request in trace.requests] == [1.0, 2.0, 3.0]
    assert trace.requests[0] == Request(1.0, 600, 7, (0, 1))
    assert trace.span_s == 2.0


def test_qwen_bailian_counts_seconds_and_blocks_of_16(tmp_path):
    turn = {"chat_id": 2, "parent_chat_id": -1, "turn": 1, "type": "text"}
    trace = read_trace(written(tmp_path, line(61.25, 40, [1, 2, 3], **turn), line(70.5, 33, [1, 2, 9], **turn)))
    assert (trace.format, trace.block_tokens, trace.unique_blocks) == ("qwen-bailian", 16, 4)
    assert trace.requests[0].time_s == 61.25


def session(*requests, **more):
    return {"id": "s", "block_size": 64, "hash_id_scope": "local", "requests": list(requests), **more}


def turn(t, tokens, ids):
    return {"t": t, "type": "n", "in": tokens, "out": 3, "hash_ids": ids}


def test_agent_sessions_have_ids_of_their_own_unless_these_are_global(tmp_path):
    one, two = session(turn(0, 128, [1, 2])), session(turn(1, 128, [1, 2]))
    trace = read_trace(written(tmp_path, one, two))
    assert (trace.format, trace.block_tokens, trace.unique_blocks) == ("agent sessions", 64, 4)
    shared = [{**item, "hash_id_scope": "global"} for item in (one, two)]
    assert read_trace(written(tmp_path, *shared)).unique_blocks == 2


def test_sub_agents_are_requests_of_their_session_by_either_clock(tmp_path):
    for nested_t in (5.0, 105.0):  # from the sub-agent's start, and from the session's
        agent = {"t": 100.0, "type": "subagent", "requests": [turn(nested_t, 128, [1, 9])]}
        trace = read_trace(written(tmp_path, session(turn(0, 64, [1]), agent)))
        assert [request.time_s for request in trace.requests] == [0.0, 105.0]
        assert trace.requests[1].blocks[0] == trace.requests[0].blocks[0]


def test_sessions_start_one_after_the_other_when_that_is_asked_for(tmp_path):
    sessions = [session(turn(1, 64, [1])) for _ in range(3)]
    trace = read_trace(written(tmp_path, *sessions), session_every_s=10)
    assert [request.time_s for request in trace.requests] == [1.0, 11.0, 21.0]


def test_a_session_over_many_lines_is_one_document(tmp_path):
    path = tmp_path / "session.json"
    path.write_text(json.dumps(session(turn(0, 64, [1]), turn(2, 128, [1, 2])), indent=1))
    assert len(read_trace([str(path)]).requests) == 2
    path.write_text(json.dumps([line(0, 512, [1]), line(0, 1024, [1, 2])]))
    assert len(read_trace([str(path)]).requests) == 2


def test_equal_ids_behind_different_beginnings_are_different_blocks(tmp_path):
    trace = read_trace(written(tmp_path, line(0, 1024, [1, 7]), line(1, 1024, [2, 7]), line(2, 1536, [1, 7, 7])))
    assert [request.blocks for request in trace.requests] == [(0, 1), (2, 3), (0, 1, 4)]


def test_several_files_are_one_trace(tmp_path):
    paths = written(tmp_path, line(5, 512, [1]), name="a") + written(tmp_path, line(4, 1024, [1, 2]), name="b")
    trace = read_trace(paths)
    assert [len(request.blocks) for request in trace.requests] == [2, 1]
    assert trace.unique_blocks == 2


def test_ids_of_complete_blocks_only_are_understood(tmp_path):
    trace = read_trace(written(tmp_path, line(0, 1000, [1] * 15), line(1, 700, [1] * 10), line(2, 30, [])))
    assert trace.block_tokens == 64
    assert trace.tokens_of(trace.requests[0], 15) == 960


def test_the_first_requests_can_be_taken(tmp_path):
    trace = read_trace(written(tmp_path, *(line(i, 512, [i]) for i in range(9))), limit=4)
    assert (len(trace.requests), trace.unique_blocks) == (4, 4)


BROKEN = [
    ("{", "expected a JSON object"),
    ("[1]", "expected a JSON object, got [1]"),
    (line(0, 512, [1], timestamp=None), "expected a time of 0 or more as timestamp, got null"),
    (line(float("nan"), 512, [1]), "as timestamp, got NaN"),
    (line(-1, 512, [1]), "as timestamp, got -1"),
    (line(10**400, 512, [1]), "expected a time of 0 or more as timestamp, got 1000"),
    (line(0, -512, [1]), "expected a whole number of 0 or more as input_length, got -512"),
    (line(0, True, [1]), "as input_length, got true"),
    (line(0, 10**400, [1]), "expected at most 2147483648 as input_length, got 1000"),
    (line(0, 512, "abc"), 'expected a list of numbers or texts as hash_ids, got "abc"'),
    (line(0, 512, [None]), "as hash_ids, got [null]"),
    ({"timestamp": 0, "hash_ids": [1]}, "expected the field input_length"),
    (line(0, 5120, [1]), "1 hash_ids do not fit 5120 tokens in blocks of 512"),
    ({"requests": 5}, "expected a list as requests, got 5"),
    ("\x00\xff" * 20, "expected a JSON object"),
]


CUT = json.dumps(line(0, 1536, [1, 2, 3]))[:40]
BROKEN.append((CUT, "expected a JSON object"))


@pytest.mark.parametrize("number", [1, 3, 4])
@pytest.mark.parametrize("item, why", BROKEN, ids=[str(i) for i in range(len(BROKEN))])
def test_a_broken_line_is_named_skipped_and_counted(tmp_path, item, why, number):
    lines = [line(0, 1024, [1, 2]), line(0, 700, [1, 3]), line(9, 1536, [1, 2, 4])]
    lines.insert(number - 1, item)
    paths = written(tmp_path, *lines)
    trace = read_trace(paths)
    assert len(trace.requests) == 3
    assert trace.broken_count == 1
    where, said = trace.broken[0]
    assert where == f"trace '{paths[0]}', line {number}"
    assert why in said
    with pytest.raises(TraceError, match=f"line {number}: "):
        read_trace(paths, strict=True)


def test_a_last_line_that_was_cut_without_its_end_is_skipped_and_counted(tmp_path):
    paths = written(tmp_path, line(0, 1024, [1, 2]), line(0, 700, [1, 3]))
    with open(paths[0], "a") as file:
        file.write(CUT)
    trace = read_trace(paths)
    assert (len(trace.requests), trace.broken_count) == (2, 1)
    assert trace.broken[0][0].endswith("line 3")


def test_a_first_line_of_deep_brackets_costs_itself_only(tmp_path):
    trace = read_trace(written(tmp_path, "[" * 200_000, line(0, 1024, [1, 2])))
    assert (len(trace.requests), trace.broken[0][0][-6:]) == (1, "line 1")


def test_a_broken_turn_costs_itself_only(tmp_path):
    trace = read_trace(written(tmp_path, session(turn(0, 64, [1]), turn(0, 64, 1), 5, turn(3, 64, [1]))))
    assert (len(trace.requests), trace.broken_count) == (2, 2)
    assert trace.broken[0][0].endswith("line 1, request 2")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "expected requests, found nothing"),
        (b"\n\n", "expected requests, found nothing"),
        (b"hello\nworld\n", "found none; the first of 2 broken lines is .*line 1: expected a JSON object"),
        (b"version https://git-lfs.github.com/spec/v1\n", "found none"),
        (b'{\n"a": \n', "expected one JSON object a line, or one JSON document"),
        (gzip.compress(b'{"timestamp": 0}\n' * 5000, mtime=0)[:40], "expected whole gzip data"),
        (b"\x1f\x8bnot gzip", "expected whole gzip data"),
    ],
)
def test_what_is_no_trace_is_refused_in_words(tmp_path, content, words):
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=words):
        read_trace([str(path)])


def test_files_that_cannot_be_read_are_refused_in_words(tmp_path):
    with pytest.raises(TraceError, match=r"absent': cannot be read: No such file or directory"):
        read_trace([str(tmp_path / "absent")])
    with pytest.raises(TraceError, match=r"cannot be read: Is a directory"):
        read_trace([str(tmp_path)])


def test_a_block_size_that_cannot_be_told_is_asked_for(tmp_path):
    paths = written(tmp_path, line(0, 300, [1, 2, 3]), line(0, 700, [1, 2, 3, 4, 5, 6, 7]))
    with pytest.raises(TraceError, match="expected --block-tokens"):
        read_trace(paths)
    assert read_trace(paths, block_tokens=100).block_tokens == 100
    with pytest.raises(TraceError, match="no request fits blocks of 7 tokens"):
        read_trace(paths, block_tokens=7)
    with pytest.raises(TraceError, match="expected --block-tokens"):
        read_trace(written(tmp_path, line(0, 9, [])))


# --- chunks ----------------------------------------------------------------------------------------------------------


def test_larger_chunks_are_known_by_their_last_block(tmp_path):
    trace = read_trace(written(tmp_path, line(0, 96, [1, 2, 3, 4, 5, 6]), line(1, 80, [1, 2, 3, 9, 9]), line(2, 70, [1, 2, 3, 4, 5])))
    assert trace.block_tokens == 16
    chunked = in_chunks(trace, 32)
    assert [request.blocks for request in chunked.requests] == [(0, 1, 2), (0, 3), (0, 1)]
    assert (chunked.block_tokens, chunked.unique_blocks) == (32, 4)


def test_smaller_chunks_are_parts_of_a_block_and_complete(tmp_path):
    trace = read_trace(written(tmp_path, line(0, 1000, [4, 5]), line(1, 1024, [4, 6])))
    chunked = in_chunks(trace, 256)
    assert [request.blocks for request in chunked.requests] == [(0, 1, 2), (0, 1, 4, 5)]
    assert chunked.unique_blocks == 5


def test_chunks_that_do_not_fit_blocks_are_refused_in_words(tmp_path):
    trace = read_trace(written(tmp_path, line(0, 1000, [4, 5])))
    with pytest.raises(TraceError, match="chunk of 300 tokens: expected a multiple or a divisor of the trace's blocks of 512"):
        in_chunks(trace, 300)
    with pytest.raises(TraceError, match="chunk of 1024 tokens: expected one that a prompt fills, the longest has 1000 tokens"):
        in_chunks(trace, 1024)


def test_a_trace_without_any_block_is_refused_in_words(tmp_path):
    with pytest.raises(TraceError, match="expected hash_ids, none of its 1 requests has any"):
        read_trace(written(tmp_path, line(0, 9, [])), block_tokens=16)
