"""Speed and memory of token alignment, each figure compared with what it is compared with in the same run: `make bench-alignment`.

On the two tokenizers of the quickstart, and conversations given as JSONL files (default: `examples/gold.yaml`). The source's
distributions are made up (its own token and others of the same text), because speed does not depend on what they say.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein
from transformers import PreTrainedTokenizerFast

from fusechat.align.aligner import Aligner, Pair, Side, Strategy, Survey
from fusechat.align.back_off import BackOff
from fusechat.align.batching import groups, join
from fusechat.align.blocks import Blocks, Conversations
from fusechat.align.counts import Seen, count_pairs
from fusechat.align.dtw import surface, warping_path
from fusechat.align.stats import AlignmentStats
from fusechat.data.distributions import SparseDistribution, write_distributions, write_store
from fusechat.data.prepared import FILE, Prepared, write_prepared
from fusechat.models.spans import encode_with_spans
from fusechat.models.token_bytes import token_bytes
from fusechat.pipeline import load_recipe
from fusechat.recipe.schema import PIVOT
from fusechat.run.files import digest

ROOT = Path(__file__).parents[1]
VOCABULARIES = ROOT.parent / "shared" / "tokenizers"  # real ones, where they are at hand
K, PAIRS = 10, 10_000_000


def main(files: list[Path]) -> None:
    recipe = load_recipe(ROOT / "examples" / "gold.yaml")
    tokenizers = [recipe.chat_model(name).tokenizer() for name in (PIVOT, next(iter(recipe.sources)))]
    texts = responses(files)
    print_line("figure", "measured", "compared with", "ratio", "aim")
    for which in (tokenizers, tokenizers[::-1]):
        throughput(which, texts)
    warping(tokenizers, texts)
    processes(tokenizers, texts)
    subprocess.run([sys.executable, __file__, "--map"], check=True)


def responses(files: list[Path]) -> list[str]:
    found = []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            found += [m["content"] for m in json.loads(line)["messages"] if m["role"] == "assistant"]
    return found


def throughput(tokenizers: list[Any], texts: list[str]) -> None:
    """All of the alignment on one core, compared with nothing but the two tokenizations."""
    pivot, source = (Side.of(token_bytes(tokenizer), None) for tokenizer in tokenizers)
    back_off = BackOff(pivot.tokens)
    captured = [made_up(source, text) for text in texts]
    least = {"tokenizations": np.inf, "all": np.inf}
    for strategy in (Strategy(), Strategy(unaligned="condition", look_ahead=True)):
        for _ in range(4):  # the first compiles
            began = time.perf_counter()
            for text in texts:
                for tokenizer in tokenizers:
                    _ = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
            least["tokenizations"] = min(least["tokenizations"], time.perf_counter() - began)
            began = time.perf_counter()
            positions = align_all(Pair(pivot, source, strategy), back_off, texts, captured)
            least["all"] = min(least["all"], time.perf_counter() - began)
        name = "boundary, statistics" + (", condition, look-ahead" if strategy.look_ahead else "")
        print_line(
            f"{name}: {positions} positions",
            f"{positions / least['all']:,.0f}/s",
            f"two tokenizations {least['tokenizations']:.2f} s",
            f"{least['all'] / least['tokenizations']:.2f}",
            "100,000/s; 3",
        )
        least["all"] = np.inf


def align_all(pair: Pair, back_off: BackOff, texts: list[str], captured: list[SparseDistribution]) -> int:
    """Spans, alignment, statistics and transfer of all texts; returns how many pivot tokens there were."""
    rows = [(prepared(pair.pivot, text, ""), prepared(pair.source, text, "")) for text in texts]
    several = [
        join([rows[index] for index in group], [captured[index] for index in group])
        for group in groups([len(ours) for ours, _ in rows])
    ]
    survey = Survey(pair)
    for each in several:
        survey.count(each.pivot, each.source)
    counts = survey.counts()
    is_open = pair.extendable_tokens(counts)
    survey = Survey(pair, is_open)
    for each in several:
        survey.need(each.pivot, each.source, each.captured)
    seen = survey.seen()
    seen.pairs = counts
    aligner = Aligner(pair, pair.build_map(seen, back_off), is_open)
    for each in several:
        assert each.captured is not None
        aligner.align(each.pivot, each.source, each.captured, k=K)
    return sum(len(ours) for ours, _ in rows)


def prepared(side: Side, text: str, name: str) -> Prepared:
    """A conversation that is one response and nothing else."""
    encoded = encode_with_spans(side.tokens.tokenizer, text)
    n = len(encoded.ids)
    return Prepared(
        id=name,
        input_ids=encoded.ids,
        position=np.arange(n, dtype=np.int32),
        response=np.zeros(n, dtype=np.int32),
        begin=encoded.spans[:, 0].astype(np.int32),
        end=encoded.spans[:, 1].astype(np.int32),
        end_of_turn=np.zeros(n, dtype=bool),
        content_bytes=np.array([len(text.encode())], dtype=np.int32),
    )


def made_up(side: Side, text: str) -> SparseDistribution:
    """Each row's own token first, then tokens of the same text drawn at random, of falling probability."""
    gold = prepared(side, text, "").gold
    drawn = np.random.default_rng(0).choice(gold, size=(len(gold), K)).astype(np.int32)
    ids = np.where(np.arange(K) == 0, gold[:, None], drawn)
    probability = 0.5 ** np.arange(1, K + 1)
    logprobs = np.broadcast_to(np.log(probability), ids.shape).astype(np.float16)
    return SparseDistribution(ids, logprobs, np.full(len(gold), np.log(2), dtype=np.float32))


def warping(tokenizers: list[Any], texts: list[str], tokens: int = 2048) -> None:
    """A pair of long sequences, compared with a programme with an edit distance (RapidFuzz's) for every cell."""
    text = "\n".join(texts)
    sides = [token_bytes(tokenizer) for tokenizer in tokenizers]
    spelt = []
    for tokenizer, table in zip(tokenizers, sides, strict=True):
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids[:tokens]
        spelt.append([surface(table[token]) for token in ids])
    warping_path(*spelt)  # compiles
    ours = least(lambda: warping_path(*spelt), 5)
    began = time.perf_counter()
    naive = naive_path(*spelt)
    theirs = time.perf_counter() - began
    same = np.array_equal(naive, warping_path(*spelt))
    print_line(
        f"dtw, {len(spelt[0])} × {len(spelt[1])} tokens, paths {'identical' if same else 'DIFFERENT'}",
        f"{ours * 1000:.0f} ms",
        f"a distance a cell {theirs:.1f} s",
        f"1/{theirs / ours:.0f}",
        "1/100",
    )


def naive_path(pivot: list[str], source: list[str]) -> np.ndarray:
    """Dynamic time warping as one writes it down first."""
    total = np.zeros((len(pivot), len(source)))
    steps: dict[tuple[int, int], tuple[int, int]] = {}
    for i in range(len(pivot)):
        for j in range(len(source)):
            before = [(i - 1, j - 1), (i, j - 1), (i - 1, j)]
            possible = [cell for cell in before if cell[0] >= 0 and cell[1] >= 0]
            if possible:
                steps[i, j] = min(possible, key=lambda cell: total[cell])  # the first of equals
            total[i, j] = Levenshtein.distance(pivot[i], source[j]) + (total[steps[i, j]] if possible else 0)
    path = [(len(pivot) - 1, len(source) - 1)]
    while path[-1] != (0, 0):
        path.append(steps[path[-1]])
    return np.array(path[::-1])


def processes(tokenizers: list[Any], texts: list[str], positions: int = 4_000_000) -> None:
    """The same conversations over one process and over two: time, and whether the bytes are the same."""
    pivot, source = (Side.of(token_bytes(tokenizer), None) for tokenizer in tokenizers)
    pair, back_off = Pair(pivot, source, Strategy(unaligned="condition", look_ahead=True)), BackOff(pivot.tokens)
    several = list(texts)
    while sum(len(text) for text in several) < 3 * positions:
        several += texts
    with tempfile.TemporaryDirectory() as room:
        places = [Path(room) / name for name in ("pivot", "source", "captured")]
        for place in places:
            place.mkdir()
        for place, side in zip(places, (pivot, source), strict=False):
            write_prepared(place / FILE, (prepared(side, text, str(i)) for i, text in enumerate(several)))
        write_distributions(places[2] / "all.arrow", ((str(i), made_up(source, t)) for i, t in enumerate(several)))
        write_store(places[2], k=K, files="*.arrow")
        size = sum(len(prepared(pivot, text, "")) for text in several)
        times, digests = {}, set()
        for number in (1, 2):
            data = Conversations(*([place] for place in places), names=("pivot", "source"), sizes=(1 << 30, 1 << 30))
            began = time.perf_counter()
            with Blocks(pair, data, processes=number) as blocks:
                vocabulary_map, is_open = blocks.build_map(back_off, nothing)
                rows = blocks.align(vocabulary_map, is_open, k=K, advance=nothing, figures=AlignmentStats())
                write_distributions(Path(room) / "aligned.arrow", rows)
            times[number] = time.perf_counter() - began
            digests.add(digest(Path(room) / "aligned.arrow"))
    print_line(
        f"align stage, {size} positions, 2 processes, {'same bytes' if len(digests) == 1 else 'OTHER BYTES'}",
        f"{times[2]:.1f} s",
        f"1 process {times[1]:.1f} s",
        f"{times[2] / times[1]:.2f}",
        "0.5",
    )


def nothing(amount: int = 1, note: str = "") -> None:
    """A progress bar that nobody sees."""


def vocabulary_map() -> None:
    """The map of 151,646 × 262,144 tokens from ten million pairs, in a process of its own: time, memory above what was there."""
    if not (VOCABULARIES / "qwen1_5").is_dir():
        print("vocabulary map: left out, Qwen's vocabulary is not at hand")
        return
    recipe = load_recipe(ROOT / "examples" / "gold.yaml")
    pivot = token_bytes(recipe.chat_model(next(iter(recipe.sources))).tokenizer())
    file = VOCABULARIES / "qwen1_5" / "tokenizer.json"
    source = token_bytes(PreTrainedTokenizerFast(tokenizer_file=str(file)))
    pair = Pair(Side.of(pivot, None), Side.of(source, None), Strategy())
    random = np.random.default_rng(0)
    # Source tokens by Zipf's law; most meet one pivot token of theirs, one in five any.
    drawn = (random.zipf(1.2, PAIRS) - 1) % len(source)
    met = np.where(random.random(PAIRS) < 0.8, drawn, random.integers(0, len(pivot), PAIRS)) % len(pivot)
    chunks = [(drawn[i : i + 10_000], met[i : i + 10_000]) for i in range(0, PAIRS, 10_000)]
    gc.collect()
    began = time.perf_counter()
    with peak_memory() as peak:
        counts = count_pairs(chunks)
        seen = Seen(pairs=counts, tokens=np.arange(len(source)))
        built = pair.build_map(seen, BackOff(pivot))
        seconds = time.perf_counter() - began
    print_line(
        f"map {len(source)} × {len(pivot)}, {len(built.pivot)} entries",
        f"{seconds:.1f} s",
        f"{peak()} MiB more than before",
        "",
        "30 s; 500 MB",
    )


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """How many MiB the process grows at most while the block runs, looked at every two milliseconds."""
    page, running = os.sysconf("SC_PAGE_SIZE"), True
    sizes = [resident()]

    def look() -> None:
        while running:
            sizes.append(resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield lambda: (max(sizes) - sizes[0]) * page >> 20
    finally:
        running = False
        watcher.join()


def resident() -> int:
    """Pages of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1])


def least(work: Callable[[], object], tries: int) -> float:
    times = []
    for _ in range(tries):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def print_line(*cells: str) -> None:
    print(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, (66, 12, 30, 8, 14), strict=True)).rstrip(),
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--map"]:
        vocabulary_map()
    else:
        main([Path(file) for file in sys.argv[1:]] or sorted((ROOT / "examples" / "data").glob("*.jsonl")))
