"""What a run reads: its corpus opened and described, and batches of it laid out on the run's mesh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import grain
from jax.sharding import Mesh, PartitionSpec
from rich.console import Console
from rich.progress import Progress

from jaxformers.config import RunConfig
from jaxformers.data.corpus import Corpus, CorpusReport, open_corpus
from jaxformers.data.pipeline import process_share, train_iterator, validation_batches
from jaxformers.data.rows import Row
from jaxformers.data.tokenizer import Tokenizer
from jaxformers.parallel.mesh import batch_sharding
from jaxformers.train.config import CheckpointConfig
from jaxformers.train.retention import VALIDATION, Metric


def open_run_corpus(config: RunConfig, tokenizer: Tokenizer, console: Console) -> Corpus:
    """The corpus, with a progress bar while it is tokenized."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("tokenizing", total=None, visible=False)
        return open_corpus(
            config.data,
            tokenizer,
            rows_before=config.train.rows_before,
            progress=lambda done, total: bar.update(task, completed=done, total=total, visible=True),
        )


def fingerprint(corpus: Corpus) -> str:
    """Equal where processes have the same rows to train and to validate on."""
    held_out = [source.validation for source in (corpus.sources or {"": corpus}).values()]
    return " ".join(rows.fingerprint_before(len(rows)) for rows in (corpus.train, *held_out))


def describe_corpus(corpus: Corpus) -> Iterator[str]:
    """What is said of a corpus when a run begins, line by line."""
    for name, source in (corpus.sources or {"": corpus}).items():
        for line in _describe(source.report):
            yield f"data{name and f' {name}'}: {line}"


def _describe(report: CorpusReport) -> list[str]:
    tests = f", {report.test_documents:,} kept for tests" if report.test_documents else ""
    lines = [
        f"{report.files:,} files, {report.train_documents:,} documents of {report.train_tokens:,} tokens, "
        f"{report.validation_documents:,} held out ({report.validation_tokens:,} tokens){tests}, "
        f"rows {100 * report.train_efficiency:.1f}% full"
    ]
    if report.skipped:
        lines.append(f"skipped {report.skipped} records that are no text, the first {report.skipped_names[0]}")
    if report.conversations:
        share = report.learned_tokens / max(report.train_tokens, 1)
        lines.append(
            f"{report.conversations:,} conversations, {report.learned_tokens:,} of the {report.train_tokens:,} tokens "
            f"({share:.1%}) are learned"
        )
    if report.too_long:
        lines.append(
            f"{report.too_long:,} conversations are longer than a row, left out or cut as data.chat.too_long says, the "
            f"first {report.too_long_names[0]}"
        )
    return lines


@dataclass(frozen=True)
class Feed:
    """A run's batches, those to validate on by source, and how they are laid out on its mesh."""

    batches: grain.DatasetIterator[Row]
    validation: Mapping[str, Sequence[Row]]
    spec: PartitionSpec


def make_feed(config: RunConfig, mesh: Mesh, corpus: Corpus) -> Feed:
    """The batches of a run on a mesh, this process's share of each."""
    train = config.train
    spec = batch_sharding((train.batch_size, config.data.sequence_length), mesh).spec
    share = process_share(mesh, spec)
    shares = {"process_index": share.index, "process_count": share.count}
    sources = {name: source.validation for name, source in (corpus.sources or {"": corpus}).items()}
    sources = {name: rows for name, rows in sources.items() if train.eval_batches and len(rows)}
    # An evaluation has the memory of a microbatch, and reads as many rows as the config says in whole batches, as many
    # of each source.
    size, most = train.batch_size // train.accumulation, train.eval_batches * train.accumulation
    most = -(-most // max(len(sources), 1))
    validation = {
        name: validation_batches(rows, batch_size=size, max_batches=most, **shares) for name, rows in sources.items()
    }
    ramp = {train.rows_before(step): rows for step, rows in train.batch_ramp.items()}
    with_sources = "sources" in config.monitor.values
    batches = train_iterator(
        corpus.train, batch_size=train.batch_size, batch_ramp=ramp, with_sources=with_sources, **shares
    )
    return Feed(batches, validation, spec)


def check_best(config: CheckpointConfig, feed: Feed) -> None:
    """Refuses to keep the best by a source that nothing is validated on."""
    names = [VALIDATION] if feed.validation else []
    names += [f"{VALIDATION}/{name}" for name in feed.validation] if len(feed.validation) > 1 else []
    metric = Metric.parse(config.best_metric)
    if config.keep_best is not None and metric.evaluated and metric.name not in names:
        raise ValueError(
            f"checkpoint.keep_best goes by {metric.name}, but validation measures {', '.join(names) or 'nothing'}"
        )
