"""Where a source would rarely have cut: shares by hand, and against a loop over bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligning import conversation, sparse, toy
from fusechat.align.boundary_bias import boundary_probability
from fusechat.align.spelling import Spelling
from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared
from fusechat.models.token_bytes import TokenBytes

TOKENS = toy("th", "the", "then", "t", "e", "n", "he")
TH, THE, THEN, T, E, N, HE, END = range(8)


def share(source: Prepared, captured: SparseDistribution) -> list[float]:
    return boundary_probability(source, captured, Spelling.of(TOKENS)).tolist()


def nll(*probabilities: float) -> list[float]:
    return [-float(np.log(probability)) for probability in probabilities]


def test_the_share_is_that_of_the_token_before_among_itself_and_what_is_longer() -> None:
    """`th` had 0.1, `the` and `then` 0.3 together, `t` and `n` do not begin with it; then `e` had all of what begins with `e`. A
    token that was not kept has its mass from its nll."""
    source = conversation(TOKENS, [TH, E, N])
    rows = [{THE: 0.2, THEN: 0.1, TH: 0.1, T: 0.3, N: 0.2}, {E: 0.5, HE: 0.25}, {N: 1.0}]
    assert share(source, sparse(rows, nll=nll(0.1, 0.5, 1.0))) == pytest.approx([1.0, 0.25, 1.0])
    source = conversation(TOKENS, [TH, E])
    captured = sparse([{THE: 0.45, THEN: 0.45}, {E: 1.0}], nll=nll(0.1, 1.0))
    assert share(source, captured) == pytest.approx([1.0, 0.1])


def test_a_response_starts_anew_and_its_end_of_turn_is_nobodys_cut() -> None:
    source = conversation(TOKENS, [TH, T], [E], ends=END)
    rows = [{THE: 0.5, TH: 0.25}, {THE: 0.75, T: 0.25}, {END: 1.0}, {E: 1.0}, {END: 1.0}]
    found = share(source, sparse(rows, nll=nll(0.25, 0.25, 1.0, 1.0, 1.0)))
    assert found == pytest.approx([1.0, 1 / 3, 1.0, 1.0, 1.0])
    source = conversation(TOKENS, [TH], [E])  # and without one
    assert share(source, sparse([{THE: 0.75, TH: 0.25}, {E: 1.0}], nll=nll(0.25, 1.0))) == [1.0, 1.0]


def test_a_special_token_and_one_in_the_models_padding_go_on_in_none() -> None:
    source = conversation(TOKENS, [END, T, E])
    source.input_ids[source.position[1]] = 99
    captured = sparse([{THE: 0.5}, {THE: 0.5}, {THE: 0.5}], nll=nll(0.01, 0.01, 0.01))
    assert share(source, captured) == [1.0, 1.0, 1.0]
    source = conversation(TOKENS, [TH, E])  # impossible all around is no share of nothing
    assert share(source, sparse([{N: 1.0}, {N: 1.0}], nll=[np.inf, np.inf])) == [1.0, 1.0]


def naive(source: Prepared, captured: SparseDistribution, tokens: TokenBytes) -> list[float]:
    result = []
    for j in range(len(source)):
        if j == 0 or source.response[j] != source.response[j - 1] or source.end_of_turn[j]:
            result.append(1.0)
            continue
        before, own = int(source.gold[j - 1]), float(np.exp(-captured.nll[j - 1]))
        more = sum(
            float(np.exp(logprob))
            for token, logprob in zip(captured.ids[j - 1].tolist(), captured.logprobs[j - 1].tolist(), strict=True)
            if token >= 0 and token not in tokens.special
            if tokens[token].startswith(tokens[before]) and tokens[token] != tokens[before]
        )
        result.append(own / (own + more))
    return result


@given(st.lists(st.lists(st.integers(0, HE), min_size=1, max_size=5), min_size=1, max_size=3), st.integers(0, 1000))
def test_shares_are_those_of_the_loop_over_bytes(responses: list[list[int]], seed: int) -> None:
    chance, source = np.random.default_rng(seed), conversation(TOKENS, *responses, ends=END)
    rows = []
    for _ in range(len(source)):
        kept = chance.permutation(len(TOKENS))[: chance.integers(0, 6)].tolist()
        rows.append(dict(zip(kept, chance.dirichlet(np.ones(6)).tolist(), strict=False)))
    captured = sparse(rows, k=6, nll=chance.exponential(1.0, len(source)).tolist())
    assert share(source, captured) == pytest.approx(naive(source, captured, TOKENS))
