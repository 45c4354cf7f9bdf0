"""LP604: rows of new tokens that nobody trains."""

from __future__ import annotations

import dataclasses

from lora_probe_callbacks.checks._base import Check, Verdict, fail, ok, pending, skipped, some, warn
from lora_probe_callbacks.facts import Facts

LOOKS = 2  # a gradient that arrives and is not there is exact; a second time it is no accident


def judge(facts: Facts) -> Verdict:
    """Look for declared tokens whose rows are frozen, or get no gradient although one arrives for them."""
    if not facts.new_tokens:
        return skipped("no new tokens were declared")
    if facts.coverage is None:
        return pending("no training forward has begun")
    tables = facts.coverage.tokens
    if not tables:
        return skipped("the model tells of no embedding (get_input_embeddings)")
    ids = facts.new_tokens
    beyond = [i for i in ids if all(i >= table.rows for table in tables)]
    if beyond:
        return fail(
            f"token {beyond[0]} has no row: the tables hold {max(t.rows for t in tables)}",
            cause="beyond",
            got=f"{len(beyond)} of {len(ids)} declared tokens beyond the last row",
            expected=f"at least {max(ids) + 1} rows",
            fix="call resize_token_embeddings(len(tokenizer)) before the adapter is attached, or correct new_token_ids",
        )
    nowhere = [i for i in ids if all(i in table.untrained for table in tables)]
    names = some([table.name for table in tables])
    if nowhere:
        return fail(
            f"the rows of {len(nowhere)} of {len(ids)} new tokens are frozen in {names}: {_tokens(nowhere)} cannot learn",
            cause="frozen",
            got=f"{len(nowhere)} new rows that nobody trains",
            expected="each new row trained, in the embedding at least",
        )
    unread = [(t.name, t.untrained) for t in tables if t.side == "input" and t.untrained]
    if unread:
        name, tokens = unread[0]
        return warn(
            f"the head learns the new tokens and {name} does not: the rows of {_tokens(list(tokens))} stay as they were initialised",
            cause="input",
            got=f"{len(tokens)} new rows frozen in {name}",
            expected="each new row trained in the embedding",
            fix="add the embedding to trainable_token_indices or modules_to_save; if the tokens only ever come out of the model, and never go in, "
            "nothing is wrong",
        )
    return _gradients(facts)


def _gradients(facts: Facts) -> Verdict:
    for rows in facts.token_rows:
        starved = [token for token, count in rows.starved if count >= LOOKS]
        if not starved:
            continue
        history = facts.history
        if not (history.had_gradient & (history.zero == 0) & (history.missing == 0)).any():
            return pending("no gradient of the adapter is other than zero, those of the new tokens neither")
        verdict = fail(
            f"the rows of {len(starved)} of {len(rows.ids)} new tokens get no gradient in {rows.name}, though one arrives for them: "
            f"{_tokens(starved)} cannot learn",
            cause="gradient",
            got=f"a gradient at the positions of these tokens, and exactly 0 in their rows, {LOOKS} probed steps in a row",
            expected="the gradient of its positions in each new row",
            fix="look for a hook or mask on the embedding's gradient, or a loop that zeroes rows of it: it must keep the new rows",
        )
        return dataclasses.replace(verdict, seen=rows.seen)
    if facts.token_rows and not any(rows.occurred for rows in facts.token_rows):
        return pending(
            "the rows of the new tokens train; no probed batch that was learned from has held one of them yet"
        )
    return ok()


def _tokens(ids: list[int]) -> str:
    return "token " + some([str(i) for i in ids])


CHECK = Check(
    code="LP604",
    name="untrained-token",
    what="A token in new_token_ids has a row in no table that trains: it fails. So it does where a gradient arrives at the positions of a token and "
    "is not in its row when the optimizer steps. If only the head's row trains, it warns.",
    why="resize_token_embeddings() before get_peft_model() leaves the new rows random and frozen, and the adapter's file does not hold them. A "
    "gradient mask that keeps the wrong rows does the same, beside a table that trains.",
    fix="Pass trainable_token_indices=[...] or modules_to_save=['embed_tokens', 'lm_head'] in the LoraConfig.",
    quiet="Rows trained by trainable_token_indices, modules_to_save, an adapter on the embedding or the table itself; tied tables; tokens that "
    "do not occur in a batch; an untied head that stays as it is.",
    threads=("huggingface/peft#1457", "hiyouga/LlamaFactory#6749"),
    needs=("coverage",),
    judge=judge,
)
