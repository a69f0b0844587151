"""Prompts are as long as they say, unlike each other when cold, and go on from themselves when warm."""

import json
import random

import pytest
from scripted_server import DONE, ScriptedServer, delta_event, event, text_event, word_ids

from tokendepot.bench.ttft import prompts
from tokendepot.bench.ttft.words import WORDS

ONE_TURN = ("--turns", "1")


def words_of(entry):
    prompt = entry["prompt"]
    return prompt if isinstance(prompt, str) else prompt[0]["content"]


# --- exactly N tokens, as the server counts (T10) ---


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize("has_tokenize", [True, False])
def test_first_turns_have_exactly_the_tokens_that_were_asked_for(serve, bench, endpoint, has_tokenize):
    server = ScriptedServer()
    server.has_tokenize = has_tokenize
    server = serve(server)
    code, output, result = bench("--url", server.url, "--endpoint", endpoint, "--contexts", "50,999", *ONE_TURN)
    assert code == 0
    assert [record["prompt_tokens"] for record in result["requests"]] == [50] * 3 + [999] * 3
    assert result["warnings"] == [] or "client saturated" in result["warnings"][0]
    assert result["tokens"]["counted_by"] == ("the server's /tokenize" if has_tokenize else "the server's usage")
    assert result["tokens"]["counted_by"] in output


class BytesAreTokens(ScriptedServer):
    def tokens(self, body):
        prompt = body["prompt"]
        return prompt if isinstance(prompt, list) else [1, *prompt.encode()]


@pytest.mark.parametrize("has_tokenize", [True, False])
def test_words_of_several_tokens_are_put_together_to_the_exact_count(serve, bench, has_tokenize):
    server = BytesAreTokens()
    server.has_tokenize, server.takes_ids = has_tokenize, False
    _, _, result = bench("--url", serve(server).url, "--contexts", "100,777", *ONE_TURN)
    assert [record["prompt_tokens"] for record in result["requests"]] == [100] * 3 + [777] * 3


def test_ids_are_sent_where_they_are_taken_as_they_are(serve, bench):
    server = serve(ScriptedServer())
    _, _, result = bench("--url", server.url, "--contexts", "100")
    assert result["tokens"]["sent_as"] == "token ids"
    first, second = (entry["prompt"] for entry in server.log()[2:][::3][:2])
    assert len(first) == 100 and second[:100] == first
    assert all(record["common_prefix"] == 100 for record in result["requests"] if record["turn"] == 2)


class CountsOtherwise(ScriptedServer):
    """Its completions see other tokens than its /tokenize says, as after a detour through text."""

    def __init__(self, factor, merged=0):
        super().__init__()
        self.factor, self.merged = factor, merged

    def usage(self, body):
        count = round(len(self.tokens(body)) * self.factor)
        return {"prompt_tokens": count - self.merged if count > 10 else count, "completion_tokens": 4}


@pytest.mark.parametrize(("factor", "merged", "drifts"), [(1.03, 0, True), (5, 0, True), (1.015, 0, False), (1, 1, False)])
def test_the_server_s_count_is_reported_and_a_drift_of_more_than_2_percent_is_warned_of(serve, bench, factor, merged, drifts):
    server = CountsOtherwise(factor, merged)
    server.takes_ids = False
    _, output, result = bench("--url", serve(server).url, "--contexts", "1000", *ONE_TURN)
    assert {record["prompt_tokens"] for record in result["requests"]} == {round(1000 * factor) - merged}
    assert result["summary"][0]["prompt_tokens"] == round(1000 * factor) - merged
    assert ("drift: a prompt of 1,000 tokens" in output) is drifts


def test_ids_that_the_server_counts_otherwise_are_not_sent(serve, bench):
    _, _, result = bench("--url", serve(CountsOtherwise(5)).url, "--contexts", "1000", *ONE_TURN)
    assert result["tokens"]["sent_as"] == "text"


class EndsAtOnce(ScriptedServer):
    """Where one token is asked for, the model ends with it: no text, but usage."""

    more = 0  # tokens around every prompt

    def usage(self, body):
        return {"prompt_tokens": len(self.tokens(body)) + self.more, "completion_tokens": 1}

    def script(self, body, number):
        if body["max_tokens"] > 1:
            return super().script(body, number)
        return [(0, self.piece(body, "") + self.end(body) + event({"choices": [], "usage": self.usage(body)}) + DONE)]


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_the_usage_of_an_answer_without_a_token_counts(serve, bench, endpoint):
    server = EndsAtOnce()
    server.has_tokenize = False
    code, output, result = bench("--url", serve(server).url, "--endpoint", endpoint, "--contexts", "60", "--turns", "1")
    assert code == 0, output
    assert result["tokens"]["counted_by"] == "the server's usage"
    assert [record["prompt_tokens"] for record in result["requests"]] == [60] * 3


def test_ids_that_an_answer_without_a_token_counts_otherwise_are_not_sent(serve, bench):
    server = EndsAtOnce()
    server.more = 7
    code, _, result = bench("--url", serve(server).url, "--contexts", "60", "--turns", "1")
    assert code == 0 and result["tokens"]["sent_as"] == "text"


class CountsNothing(ScriptedServer):
    has_tokenize = False

    def usage(self, body):
        return None


def test_a_server_that_does_not_count_needs_a_tokenizer_and_it_is_named(serve, bench, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    server = serve(CountsNothing())
    code, output, _ = bench("--url", server.url, "--contexts", "50", *ONE_TURN)
    assert code == 2 and "--tokenizer" in output
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "?", *WORDS, "What", "is", "and", "so", "on"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    code, output, result = bench("--url", server.url, "--contexts", "50", *ONE_TURN, "--tokenizer", file)
    assert code == 0 and str(file) in result["tokens"]["counted_by"] and "estimated" not in output
    assert "the server counts no prompt tokens" in output
    assert [len(entry["prompt"]) for entry in server.log()[-3:]] == [50] * 3
    assert all(record["prompt_tokens"] is None for record in result["requests"])


def test_a_context_without_room_for_its_question_is_skipped_and_said(serve, bench):
    code, output, result = bench("--url", serve(ScriptedServer()).url, "--contexts", "5,50", "--endpoint", "chat", *ONE_TURN)
    assert code == 0 and "skipped 5 tokens: question and template take" in output
    assert [cell["context"] for cell in result["summary"]] == [50]


# --- what the server says it had (T11) ---


class Chat(ScriptedServer):
    """A template over messages; answers think first."""

    strips_thinking = False
    stamps_date = False
    details: dict = {}
    asked = 0

    def tokens(self, body):
        if "prompt" in body:
            return super().tokens(body)
        ids = [1]
        if self.stamps_date:
            self.asked += 1
            ids = [1, 1000 + self.asked]
        for message in body["messages"]:
            thinks = [8, 8, 8] if message["role"] == "assistant" and not self.strips_thinking else []
            ids += [2, *thinks, *word_ids(message["content"]), 5]
        return [*ids, 2, 8] if self.strips_thinking else [*ids, 2]

    def script(self, body, number):
        said = delta_event(reasoning_content="hm") + delta_event(content="so")
        usage = {"prompt_tokens": len(self.tokens(body)), "completion_tokens": 2, **self.details}
        return [(0, said + self.end(body) + event({"choices": [], "usage": usage}) + DONE)]


CACHED = [
    ({"prompt_tokens_details": {"cached_tokens": 90}}, 90),
    ({"prompt_tokens_details": {"cached_tokens": 0}}, 0),
    ({"prompt_tokens_details": {"cached_tokens": None}}, None),
    ({"prompt_tokens_details": {}}, None),
    ({"prompt_tokens_details": None}, None),
    ({}, None),
]


@pytest.mark.parametrize(("details", "cached"), CACHED)
def test_cached_tokens_that_are_not_reported_are_not_0(serve, bench, details, cached):
    server = Chat()
    server.details = details
    _, output, result = bench("--url", serve(server).url, "--endpoint", "chat", "--contexts", "100")
    second = result["summary"][1]
    assert second["cached_tokens"] == cached
    assert second["hit_ratio"] == (None if cached is None else pytest.approx(cached / second["prompt_tokens"]))
    assert ("not reported" in output) is (cached is None)
    assert (" 0.0%" in output) is (cached == 0)


def test_each_turn_says_what_it_shares_with_the_turn_before(serve, bench):
    """All but the generation prompt that a stripping template leaves out."""
    for strips, shared in ((False, 100), (True, 99)):
        server = Chat()
        server.strips_thinking = strips
        code, _, result = bench("--url", serve(server).url, "--endpoint", "chat", "--contexts", "100", "--turns", "3")
        second = [record for record in result["requests"] if record["turn"] == 2]
        assert {(record["common_prefix"], record["common_prefix_of"]) for record in second} == {(shared, 100)}
        assert code == 0


def test_a_template_that_writes_the_date_makes_the_run_void_and_says_why(serve, bench):
    server = Chat()
    server.stamps_date = True
    code, output, result = bench("--url", serve(server).url, "--endpoint", "chat", "--contexts", "100")
    assert code == 1
    assert "turn 2 shares only 1 of the 100 tokens" in output
    assert {record["common_prefix"] for record in result["requests"] if record["turn"] == 2} == {1}


# --- cold is cold, warm is warm (T12) ---


class Remembers(ScriptedServer):
    """Finds every prefix that it has ever seen, as a store that survives restarts does."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def usage(self, body):
        ids = self.tokens(body)
        found = max((prompts.common_prefix(ids, old) for old in self.seen), default=0)
        self.seen.append(ids)
        return {"prompt_tokens": len(ids), "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": found}}


@pytest.mark.parametrize(("endpoint", "template"), [("completions", 0), ("chat", 3)])
def test_two_runs_with_one_seed_are_cold_each_time_and_their_second_turns_warm(serve, bench, endpoint, template):
    server = serve(Remembers())
    for _ in range(2):
        code, _, result = bench("--url", server.url, "--endpoint", endpoint, "--contexts", "200,400", "--seed", "7")
        assert code == 0
        for record in result["requests"]:
            if record["turn"] == 1:
                assert record["cached_tokens"] <= template + 3
            else:
                assert record["cached_tokens"] >= record["context"] - template - 1


def test_second_turns_begin_with_the_bytes_of_the_first(serve, bench):
    server = ScriptedServer()
    server.takes_ids = False
    server = serve(server)
    bench("--url", server.url, "--contexts", "200")
    sent = [entry["prompt"] for entry in server.log() if isinstance(entry["prompt"], str)][-6:]
    for first, second in zip(sent[:3], sent[3:], strict=True):
        assert second.startswith(first) and len(second) > len(first)


def test_the_result_has_the_matrix_of_what_prompts_share(serve, bench):
    _, _, result = bench("--url", serve(ScriptedServer()).url, "--contexts", "200", "--repeats", "4")
    overlap = result["overlap"]
    assert overlap["unit"] == overlap["matrix_unit"] == "tokens" and overlap["longest"] <= overlap["allowed"]
    for i, row in enumerate(overlap["matrix"]):
        for j, shared in enumerate(row):
            assert shared == 200 if i == j else shared <= overlap["allowed"]


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_cold_prompts_that_share_a_beginning_are_refused_before_they_are_sent(serve, bench, monkeypatch, endpoint):
    monkeypatch.setattr(prompts.Identity, "words", lambda self, vocabulary: vocabulary[:16])
    server = serve(ScriptedServer())
    code, output, result = bench("--url", server.url, "--endpoint", endpoint, "--contexts", "200")
    assert code == 3 and "they would not be cold" in output
    assert result["requests"] == []


def test_a_cold_turn_that_the_server_had_already_makes_the_run_void(serve, bench, monkeypatch):
    """The run's name is left out, so the second run asks what the first one did."""
    monkeypatch.setattr("secrets.token_hex", lambda size: "always the same")
    server = serve(Remembers())
    assert bench("--url", server.url, "--contexts", "200", *ONE_TURN)[0] == 0
    code, output, result = bench("--url", server.url, "--contexts", "200", *ONE_TURN)
    assert code == 1 and "turn 1 was not cold: of 200 tokens the server had 200" in output
    assert result["problems"]


def test_no_two_conversations_of_a_run_share_their_first_two_words():
    vocabulary = list(WORDS[:20])
    for run in range(20):
        heads = {tuple(prompts.Identity(str(run), 0, n).words(vocabulary)[:2]) for n in range(400)}
        assert len(heads) == 400


def test_the_common_prefix_is_what_a_plain_comparison_finds():
    rng = random.Random(1)
    for _ in range(2000):
        a = [rng.randrange(3) for _ in range(rng.randrange(40))]
        b = a[: rng.randrange(len(a) + 1)] + [rng.randrange(3) for _ in range(rng.randrange(10))]
        plain = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert prompts.common_prefix(a, b) == plain


def test_a_counter_whose_counts_do_not_add_up_is_refused(serve, bench):
    class Odd(ScriptedServer):
        has_tokenize = False
        calls = 0

        def usage(self, body):
            self.calls += 1
            return {"prompt_tokens": 10 + self.calls % 7, "completion_tokens": 1}

    code, output, _ = bench("--url", serve(Odd()).url, "--contexts", "200")
    assert code == 2 and "do not add up" in output


def test_an_answer_goes_into_the_next_turn(serve, bench):
    server = serve(ScriptedServer())
    bench("--url", server.url, "--endpoint", "chat", "--contexts", "100", "--repeats", "1", "--turns", "3")
    third = server.log()[-1]["prompt"]
    assert [message["role"] for message in third] == ["user", "assistant", "user", "assistant", "user"]
    assert third[1]["content"] == " one two three four"
    assert len({json.dumps(message) for message in third if message["role"] == "user"}) == 3


def test_one_token_events_are_not_needed_for_the_time_per_token(serve, bench):
    class Batches(ScriptedServer):
        def script(self, body, number):
            usage = {"prompt_tokens": len(self.tokens(body)), "completion_tokens": 5}
            return [(0, text_event("a")), (0.2, text_event("b c d e") + event({"choices": [], "usage": usage}) + DONE)]

    _, _, result = bench("--url", serve(Batches()).url, "--contexts", "50", *ONE_TURN)
    cell = result["summary"][0]
    between = cell["time_between_events_s"]["median"]
    assert between > 0 and cell["time_per_output_token_s"]["median"] == pytest.approx(between / 4)
