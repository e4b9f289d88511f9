"""Stage 3, align: maps a source's distributions to the pivot's tokens. Public: `token_spans`, `align_starts`."""

from fusechat.align.sequence import align_starts
from fusechat.models.spans import token_spans

__all__ = ["align_starts", "token_spans"]
