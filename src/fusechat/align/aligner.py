"""The default alignment as a whole: boundary, statistics, transfer. Two passes: count every conversation, then align each."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from fusechat.align.figures import Figures
from fusechat.align.sequence import Alignment, align_rows
from fusechat.align.transfer import Transferred, clipped_entries, mapped_entries, transfer
from fusechat.align.vocabulary import BackOff, Roles, VocabularyMap, back_offs, build_map, count_pairs, role_map
from fusechat.core.distributions import SparseDistribution
from fusechat.core.files import atomic_file
from fusechat.core.prepared import Prepared
from fusechat.core.spans import TokenBytes


@dataclass(frozen=True)
class Side:
    """One model's tokens: their bytes, and the token that its template ends a turn with."""

    tokens: TokenBytes
    end_of_turn: int | None

    @property
    def roles(self) -> Roles:
        tokenizer = self.tokens.tokenizer
        return Roles(self.end_of_turn, tokenizer.eos_token_id, tokenizer.bos_token_id)


class Aligner:
    """Aligns a source's distributions to the pivot's tokens. `unaligned` is `label` (one-hot gold token) or `skip`."""

    def __init__(self, pivot: Side, source: Side, *, top_1: bool = False, unaligned: str = "label") -> None:
        self.pivot, self.source = pivot, source
        self.top_1, self.label = top_1, unaligned == "label"
        self.roles = role_map(pivot.roles, source.roles)
        self.back_off = BackOff(pivot.tokens)
        self.figures = Figures()
        self.map: VocabularyMap | None = None
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self._needed: list[np.ndarray] = []

    def count(self, pivot: Prepared, source: Prepared, captured: SparseDistribution) -> None:
        """Adds one conversation to the statistics, and its candidates to what the map must know."""
        alignment = align_rows(pivot, source)
        rows = np.flatnonzero(alignment.unclipped & ~pivot.end_of_turn)
        self._pairs.append((source.gold[alignment.source_row[rows]], pivot.gold[rows]))
        self._needed.append(np.unique(captured.ids))

    def finish_counting(self) -> VocabularyMap:
        needed = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *self._needed]))
        self.map = build_map(
            count_pairs(self._pairs),
            needed[needed >= 0].astype(np.int64),
            source=self.source.tokens,
            back_off=self.back_off,
            roles=self.roles,
            top_1=self.top_1,
        )
        self._pairs, self._needed = [], []
        return self.map

    def align(self, pivot: Prepared, source: Prepared, captured: SparseDistribution, *, k: int) -> SparseDistribution:
        """Targets for the pivot's rows of one conversation, [n_pivot, k]."""
        assert self.map is not None, "count every conversation first"
        alignment = align_rows(pivot, source)
        entries = mapped_entries(alignment, captured, self.map)
        clipped = clipped_entries(
            alignment,
            captured,
            gold=(pivot.gold, source.gold),
            spell=(self.pivot.tokens, self.source.tokens),
            back_off=self.back_off,
            roles=self.roles,
        )
        row, token, mass = (np.concatenate(pair) for pair in zip(entries, clipped, strict=True))
        result = transfer(row, token, mass, n=len(pivot), k=k)
        self._count_figures(alignment, captured, result)
        return self._fill(pivot, alignment.source_row < 0, result.rows)

    def unaligned(self, pivot: Prepared, *, k: int) -> SparseDistribution:
        """Targets for a conversation that the source does not have."""
        empty = SparseDistribution(
            np.full((len(pivot), k), -1, dtype=np.int32),
            np.full((len(pivot), k), -np.inf),
            np.zeros(0, dtype=np.float32),
        )
        self.figures.without_source += 1
        self.figures.conversations += 1
        self.figures.positions += len(pivot)
        return self._fill(pivot, np.ones(len(pivot), dtype=bool), empty)

    def summary(self) -> dict[str, object]:
        assert self.map is not None, "count every conversation first"
        return {
            **self.figures.summary(),
            "map_rows": len(self.map.source),
            "map_entries": len(self.map.pivot),
            "map_entropy_bits": round(self.map.entropy(), 6),
            "map_rows_by_origin": back_offs(self.map),
        }

    def save_map(self, path: Path) -> None:
        """W as an Arrow IPC file: `source` int32, `pivot` int32 and `weight` float32 of every entry."""
        assert self.map is not None, "count every conversation first"
        source = np.repeat(self.map.source, np.diff(self.map.offset))
        table = pa.table(
            {
                "source": pa.array(source.astype(np.int32)),
                "pivot": pa.array(self.map.pivot.astype(np.int32)),
                "weight": pa.array(self.map.weight.astype(np.float32)),
            }
        )
        with (
            atomic_file(path) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as file,
        ):
            file.write_table(table)

    def _fill(self, pivot: Prepared, unaligned: np.ndarray, rows: SparseDistribution) -> SparseDistribution:
        if self.label:
            rows.ids[unaligned, 0] = pivot.gold[unaligned]
            rows.logprobs[unaligned, 0] = 0.0
        return rows

    def _count_figures(self, alignment: Alignment, captured: SparseDistribution, result: Transferred) -> None:
        assert self.map is not None
        self.figures.add(alignment, result)
        rows = alignment.source_row[alignment.unclipped]
        real = captured.ids[rows] >= 0
        self.figures.add_origins(
            captured.ids[rows][real].astype(np.int64), captured.probabilities[rows][real], self.map
        )
