from __future__ import annotations

from typing import Any

import pytest
from support.facts import ZERO, bad, expect, facts

from lora_probe_callbacks.checks.coverage.untrained_token import CHECK, judge
from lora_probe_callbacks.facts import (
    Coverage,
    Facts,
    TokenRowsFact,
    TokenTable,
)


def tables(*untrained: tuple[int, ...], rows: int = 8, **changes: Any) -> Facts:
    sides: tuple[Any, Any] = ("input", "output")
    found = tuple(TokenTable(s, s, rows, u) for s, u in zip(sides, untrained, strict=False))
    return facts(new_tokens=(6, 7), coverage=Coverage(tokens=found), **changes)


def rows(*starved: tuple[int, int], occurred: int = 2, name: str = "embed") -> TokenRowsFact:
    return TokenRowsFact(name, (6, 7), occurred, starved, (3, 30))


@pytest.mark.parametrize(
    ("what", "status", "cause"),
    [
        (facts(), "skipped", ""),
        (facts(new_tokens=(6,)), "pending", ""),
        (facts(new_tokens=(6,), coverage=Coverage()), "skipped", ""),
        (tables((), ()), "pass", ""),
        (tables((), (6, 7)), "pass", ""),  # an untied head may stay
        (tables((6, 7), (6, 7)), "fail", "frozen"),
        (tables((7,), (6, 7)), "fail", "frozen"),
        (tables((6, 7), ()), "warn", "input"),
        (tables((6, 7)), "fail", "frozen"),
        (tables((7,), (7,), rows=7), "fail", "beyond"),
    ],
)
def test_new_tokens(what: Facts, status: str, cause: str) -> None:
    verdict = judge(what)
    assert (verdict.status, verdict.cause) == (status, cause)


def test_tokens_beyond_the_tables_fail() -> None:
    found = (TokenTable("embed", "input", 6, (6, 7)), TokenTable("head", "output", 7, (6, 7)))
    expect(
        judge(facts(new_tokens=(6, 7), coverage=Coverage(tokens=found))),
        "fail",
        "token 7 has no row: the tables hold 7",
        cause="beyond",
        got="1 of 2 declared tokens beyond the last row",
        expected="at least 8 rows",
        fix="call resize_token_embeddings(len(tokenizer)) before the adapter is attached",
    )


def test_frozen_rows_fail() -> None:
    what = tables((7,), (6, 7))
    expect(
        judge(what),
        "fail",
        "the rows of 1 of 2 new tokens are frozen in input, output: token 7 cannot learn",
        cause="frozen",
        got="1 new rows that nobody trains",
        expected="each new row trained, in the embedding at least",
    )
    assert list(bad(what)) == ["LP604"]


def test_head_that_learns_alone_warns() -> None:
    expect(
        judge(tables((6, 7), ())),
        "warn",
        "the head learns the new tokens and input does not: the rows of token 6, 7 stay as they were initialised",
        cause="input",
        got="2 new rows frozen in input",
        expected="each new row trained in the embedding",
        fix="if the tokens only ever come out of the model, and never go in, nothing is wrong",
    )


def test_what_cannot_be_judged_says_why() -> None:
    expect(CHECK.judge(facts()), "skipped", "no new tokens were declared")
    expect(judge(facts(new_tokens=(6,))), "pending", "no training forward has begun")
    expect(judge(facts(new_tokens=(6,), coverage=Coverage())), "skipped", "the model tells of no embedding")


# --- gradients ------------------------------------------------------------------------------------


def test_rows_whose_gradient_is_taken_away_fail() -> None:
    what = tables((), (), token_rows=(rows(name="first"), rows((6, 1), (7, 2))))
    expect(
        judge(what),
        "fail",
        "the rows of 1 of 2 new tokens get no gradient in embed, though one arrives for them: token 7 cannot learn",
        cause="gradient",
        got="a gradient at the positions of these tokens, and exactly 0 in their rows, 2 probed steps in a row",
        expected="the gradient of its positions in each new row",
        fix="look for a hook or mask on the embedding's gradient",
        seen=(3, 30),
    )
    assert list(bad(what)) == ["LP604"]


def test_one_step_is_not_enough() -> None:
    expect(judge(tables((), (), token_rows=(rows((6, 1), (7, 1)),))), "pass")


def test_rows_that_get_their_gradient_pass() -> None:
    expect(judge(tables((), (), token_rows=(rows(),))), "pass")
    expect(judge(tables((), (), token_rows=(rows(occurred=0), rows(occurred=1)))), "pass")


def test_tokens_that_did_not_occur_are_pending() -> None:
    words = "no probed batch that was learned from has held one of them yet"
    expect(judge(tables((), (), token_rows=(rows(occurred=0),))), "pending", words)


@pytest.mark.parametrize(
    ("history", "status"),
    [({"zero": 2}, "pending"), ({"missing": 2}, "pending"), ({"had_gradient": False}, "pending"), ({}, "fail")],
)
def test_gradients_that_are_all_gone_are_left_to_their_own_check(history: dict[str, Any], status: str) -> None:
    verdict = judge(tables((), (), token_rows=(rows((6, 2)),), history=history))
    assert verdict.status == status
    if status == "pending":
        expect(verdict, "pending", "no gradient of the adapter is other than zero")


def test_zero_gradients_of_everything_are_told_once() -> None:
    zero = {"zero": 4, "had_signal": False}
    what = tables((), (), token_rows=(rows((6, 4), (7, 4)),), gradients=[ZERO] * 4, history=zero)
    assert list(bad(what)) == ["LP303"]
