"""Token views as JSON."""

from typing import Any

from fusechat.show.passages import Model, NextTokens, Token, TokenView, bytes_per_token


def to_json(shown: TokenView) -> dict[str, Any]:
    """`passages` has each text with both token lists and `alignment`: for every pivot token the index of the source token that
    starts at the same byte, or null. `piece`: the vocabulary's spelling; `begin`, `end`: bytes of the text."""
    pivot, source = shown.tokens("pivot"), shown.tokens("source")
    return {
        **({"conversation": shown.conversation} if shown.conversation is not None else {}),
        "pivot": _model(shown.pivot, pivot),
        "source": _model(shown.source, source),
        "shared_starts": shown.shared,
        "coverage_of_positions": shown.coverage,
        "pivot_tokens_inside_a_source_token": shown.inside,
        "notes": list(shown.notes),
        "passages": [
            {
                "text": passage.text,
                "pivot": [_token(token) for token in passage.pivot],
                "source": [_token(token) for token in passage.source],
                "alignment": [partner if partner >= 0 else None for partner in passage.partner],
            }
            for passage in shown.passages
        ],
    }


def _model(model: Model, tokens: list[Token]) -> dict[str, Any]:
    return {
        "model": model.label,
        "tokens": len(tokens),
        "bytes_per_token": bytes_per_token(tokens),
        "spans_from": "bytes" if model.exact else "offsets",
    }


def _token(token: Token) -> dict[str, Any]:
    return {
        "id": token.id,
        "piece": token.piece,
        "begin": token.begin,
        "end": token.end,
        "special": token.special,
        **({"end_of_turn": True} if token.end_of_turn else {}),
        **({"lead": True} if token.lead else {}),
        **({"distribution": _distribution(token.forecast)} if token.forecast is not None else {}),
    }


def _distribution(forecast: NextTokens) -> dict[str, Any] | None:
    if not forecast.candidates:
        return None
    return {
        "ids": [candidate.id for candidate in forecast.candidates],
        "probabilities": [candidate.probability for candidate in forecast.candidates],
        "tail": forecast.tail,
    }
