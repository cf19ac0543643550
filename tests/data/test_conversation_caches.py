"""Conversations in the token cache and in rows: whatever the file's format, the same bytes; and the weights of rows
against conversations rendered one by one."""

import csv
import json

import numpy as np
import pytest
from data.templates import TEMPLATES

from jaxformers.data.cache import open_cache
from jaxformers.data.config import DataConfig, TokenizerConfig
from jaxformers.data.corpus import build_tokenizer, open_corpus
from jaxformers.data.pipeline import train_iterator
from jaxformers.data.tokenizer import BOS, Tokenizer, byte_tokenizer

END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_tokenizer(("<|im_start|>", END)).with_chat_template(TEMPLATES["qwen2.5"])


def conversation(number: int) -> list[dict[str, str]]:
    """One to three turns of lengths that differ."""
    said = []
    for turn in range(1 + number % 3):
        said.append({"role": "user", "content": f"ask {number} " + "why " * (number * 7 % 5)})
        said.append({"role": "assistant", "content": f"say {number}.{turn} " + "é" * (number * 3 % 7) + "."})
    return said


CONVERSATIONS = [conversation(number) for number in range(30)]


@pytest.fixture
def folder(tmp_path):
    lines = [json.dumps({"messages": said}) + "\n" for said in CONVERSATIONS]
    (tmp_path / "chat.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path


@pytest.fixture
def config(folder):
    def make(**changed) -> DataConfig:
        chat = {"format": "auto"} | changed.pop("chat", {})
        values = {"paths": str(folder / "chat.jsonl"), "cache_dir": folder / "cache", "sequence_length": 256}
        values |= {"packing_window": 8, "workers": 1, "validation_fraction": 0.0}
        return DataConfig(**values | changed, chat=chat)

    return make


def expected(tokenizer: Tokenizer, said) -> tuple[list[int], list[int]]:
    """Ids, and 1 for each id between what begins an answer and what ends it, that end included; written anew."""
    ids, mask = [], []
    for message in said:
        header = tokenizer.encode(f"<|im_start|>{message['role']}\n", add_special_tokens=False)
        body = tokenizer.encode(f"{message['content']}{END}", add_special_tokens=False)
        newline = tokenizer.encode("\n", add_special_tokens=False)
        ids += header + body + newline
        learns = int(message["role"] == "assistant")
        mask += [0] * len(header) + [learns] * len(body) + [0] * len(newline)
    return ids, mask


def bytes_of(cache) -> list[bytes]:
    return [(cache.directory / name).read_bytes() for name in ("tokens.bin", "documents.bin", "learned.bin")]


def test_the_cache_holds_ids_masks_and_where_each_conversation_was(config, tokenizer):
    cache = open_cache(config(), tokenizer)
    assert len(cache.lengths) == len(CONVERSATIONS)
    for number, said in enumerate(CONVERSATIONS):
        cells = slice(cache.starts[number], cache.starts[number] + cache.lengths[number])
        ids, mask = expected(tokenizer, said)
        assert cache.tokens[cells].tolist() == ids
        assert cache.learned[cells].tolist() == mask
        assert cache.name_of(number).endswith(f"chat.jsonl:{number + 1}")
    assert not (cache.tokens == tokenizer.token_id(BOS)).any()
    assert cache.origins["turns"].sum(axis=0).tolist() == [0, 0, 60, 60, 0]


def test_texts_alone_have_no_mask(folder, tokenizer):
    (folder / "texts.jsonl").write_text('{"text": "a"}\n')
    cache = open_cache(DataConfig(paths=f"{folder}/texts.jsonl", cache_dir=folder / "cache", workers=1), tokenizer)
    assert cache.learned is cache.origins is None
    assert not {"learned.bin", "origins.bin"} & set(cache.manifest.files)


def python_rows():
    return [{"messages": said} for said in CONVERSATIONS]


def _csv(path):
    with open(path / "chat.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["messages", "note"])
        rows.writerows([json.dumps(said), "x"] for said in CONVERSATIONS)
    return {"paths": f"{path}/chat.csv"}


def _parquet(path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"id": list(range(30)), "messages": CONVERSATIONS})
    parquet.write_table(table, path / "chat.parquet", row_group_size=7)
    return {"paths": f"{path}/chat.parquet"}


def _arrow(path):
    import pyarrow
    from pyarrow import feather

    feather.write_feather(pyarrow.table({"messages": CONVERSATIONS, "id": list(range(30))}), path / "chat.arrow")
    return {"paths": f"{path}/chat.arrow"}


def _huggingface(path):
    import datasets

    datasets.Dataset.from_list(python_rows()).save_to_disk(path / "saved")
    return {"paths": f"{path}/saved", "format": "huggingface"}


def _arrayrecord(path):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(f"{path}/chat.arrayrecord", "group_size:1")
    for said in CONVERSATIONS:
        writer.write(json.dumps(said).encode())
    writer.close()
    return {"paths": f"{path}/chat.arrayrecord"}


def _python(path):
    return {"paths": f"{__name__}:python_rows", "format": "python"}


@pytest.mark.parametrize("make", [_csv, _parquet, _arrow, _huggingface, _arrayrecord, _python])
def test_the_same_conversations_in_any_format_are_the_same_bytes(make, config, tokenizer, tmp_path):
    truth = bytes_of(open_cache(config(), tokenizer))
    found = open_cache(config(**make(tmp_path)), tokenizer)
    assert bytes_of(found) == truth
    assert found.manifest.skipped == 0


def test_any_number_of_processes_makes_the_same_bytes(config, tokenizer, folder, monkeypatch):
    from jaxformers.data import shards

    monkeypatch.setattr(shards, "_LEAST_BYTES", 3000)
    one, two = (open_cache(config(workers=workers, cache_dir=folder / str(workers)), tokenizer) for workers in (1, 2))
    assert bytes_of(one) == bytes_of(two)
    assert (one.directory / "origins.bin").read_bytes() == (two.directory / "origins.bin").read_bytes()


@pytest.mark.parametrize("packing", ["first_fit", "best_fit", "none"])
def test_rows_weigh_what_is_to_be_learned_and_hold_conversations_whole(packing, config, tokenizer):
    rows = open_corpus(config(packing=packing), tokenizer).train
    seen = []
    for number in range(rows.rows_per_epoch):
        row = rows[number]
        for segment in range(1, row["segment_ids"].max() + 1):
            cells = row["segment_ids"] == segment
            ids, mask = row["tokens"][cells].tolist(), row["weights"][cells].tolist()
            assert row["targets"][cells].tolist() == [*ids[1:], 0]
            assert row["positions"][cells].tolist() == list(range(len(ids)))
            seen.append((ids, [0, *map(int, mask[:-1])]))
            assert mask[-1] == 0
    assert sorted(seen) == sorted(expected(tokenizer, said) for said in CONVERSATIONS)
    assert rows.learned == sum(sum(mask) for _, mask in seen)


def test_conversations_mix_with_texts_and_a_position_is_found_again(config, tokenizer, folder):
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"text {n} " * 9}) + "\n" for n in range(40)))
    texts = {"paths": f"{folder}/texts.jsonl", "chat": {"format": "none"}}
    mixed = config(paths=(), sources={"chat": {"paths": f"{folder}/chat.jsonl"}, "texts": texts})
    rows = open_corpus(mixed, tokenizer).train
    batches = train_iterator(rows, batch_size=2)
    for _ in range(3):
        next(batches)
    state = batches.get_state()
    later = [next(batches) for _ in range(3)]
    again = train_iterator(rows, batch_size=2)
    again.set_state(state)
    for batch in later:
        np.testing.assert_equal(next(again), batch)
    shares = [rows[n]["weights"].sum() / (rows[n]["segment_ids"] > 0).sum() for n in range(12)]
    assert min(shares) < 0.8  # conversations, half of them questions
    assert max(shares) > 0.95  # texts, all but their first tokens


def test_a_conversation_is_on_one_side_whatever_its_form_and_template(config, tokenizer, folder):
    sides = config(validation_fraction=0.3)
    before = open_corpus(sides, tokenizer).report
    shared = [{"conversations": [{"from": m["role"], "value": m["content"]} for m in said]} for said in CONVERSATIONS]
    (folder / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in shared))
    after = open_corpus(config(validation_fraction=0.3, chat={"template": "zephyr"}), tokenizer).report
    assert 0 < before.validation_documents == after.validation_documents < 30


def test_what_decides_the_mask_decides_the_cache(config, tokenizer):
    caches = {open_cache(config(chat=chat), tokenizer).directory for chat in ({}, {"learn": "last"}, {"learn": "all"})}
    caches |= {open_cache(config(chat={"template": "zephyr"}), tokenizer).directory}
    assert len(caches) == 4
    assert open_cache(config(chat={"too_long": "keep_end"}), tokenizer).directory in caches
    different = [{}, {"learn": "last"}, {"template": "zephyr"}, {"too_long": "keep_end"}]
    assert len({open_corpus(config(chat=chat), tokenizer).train.fingerprint for chat in different}) == 4


def test_a_copy_of_the_conversations_elsewhere_gives_the_same_rows(config, tokenizer, folder):
    (folder / "copy.jsonl").write_bytes((folder / "chat.jsonl").read_bytes())
    copied = open_corpus(config(paths=f"{folder}/copy.jsonl"), tokenizer).train
    assert copied.fingerprint == open_corpus(config(), tokenizer).train.fingerprint


# -- what is wrong


def lengths(tokenizer) -> list[int]:
    return [len(expected(tokenizer, said)[0]) for said in CONVERSATIONS]


def test_conversations_longer_than_a_row_are_left_out_cut_or_refused(config, tokenizer):
    sizes = lengths(tokenizer)
    row = sorted(sizes)[20]
    long = [number for number, size in enumerate(sizes) if size > row]
    report = open_corpus(config(sequence_length=row), tokenizer).report
    assert (report.too_long, report.train_documents) == (len(long), 30 - len(long))
    assert [name.rsplit(":")[-1] for name in report.too_long_names] == [str(number + 1) for number in long]
    for policy, part in (("keep_start", slice(row)), ("keep_end", slice(-row, None))):
        kept = open_corpus(config(sequence_length=row, chat={"too_long": policy}, packing="none"), tokenizer)
        found = [kept.train[n]["tokens"].tolist() for n in range(kept.train.rows_per_epoch)]
        wanted = [expected(tokenizer, CONVERSATIONS[number]) for number in long]
        wanted = [ids[part] for ids, mask in wanted if any(mask[part][1:])]
        assert kept.report.too_long == len(long)
        assert all(ids in found for ids in wanted)
        assert sum(row["weights"].sum() == 0 for row in map(kept.train.__getitem__, range(len(found)))) == 0
    name = f"chat.jsonl:{long[0] + 1}: a conversation of {sizes[long[0]]} tokens, and rows have {row}: raise"
    with pytest.raises(ValueError, match=name):
        open_corpus(config(sequence_length=row, chat={"too_long": "error"}), tokenizer)
    with pytest.raises(ValueError, match="every conversation is longer than a row of 8 tokens"):
        open_corpus(config(sequence_length=8), tokenizer)


def test_bad_conversations_are_counted_and_named_or_refused(config, tokenizer, folder):
    good = json.dumps({"messages": CONVERSATIONS[0]})
    bad = {
        json.dumps({"messages": [{"role": "robot", "content": "x"}]}): "turn 1 has the unknown role 'robot'",
        json.dumps({"messages": CONVERSATIONS[0][:1]}): "no turn of the assistant to learn",
        json.dumps({"messages": [*CONVERSATIONS[0], {"role": "user", "content": " "}]}): "turn 3 (user) is empty",
        json.dumps({"note": 1}): "no fields 'messages' or",
        "{": "not JSON",
    }
    (folder / "chat.jsonl").write_text("".join(f"{good}\n{line}\n" for line in bad))
    report = open_corpus(config(), tokenizer).report
    assert (report.train_documents, report.skipped) == (5, 5)
    for number, (name, reason) in enumerate(zip(report.skipped_names, bad.values(), strict=True), start=1):
        assert f"chat.jsonl:{2 * number}: {reason}" in name
    with pytest.raises(ValueError, match=r"chat.jsonl:2: turn 1 has the unknown role"):
        open_corpus(config(on_bad_text="error"), tokenizer)


def test_what_the_template_refuses_is_named(config, tokenizer, folder):
    strict = tokenizer.with_chat_template(TEMPLATES["gemma"])
    said = [{"role": "system", "content": "Be brief."}, *CONVERSATIONS[0]]
    (folder / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (said, CONVERSATIONS[0])))
    report = open_corpus(config(), strict).report
    broken = tokenizer.with_chat_template("{% for %}")
    with pytest.raises(
        ValueError, match=r"2 skipped, 0 empty; the first is .*1: the chat template is malformed: line 1"
    ):
        open_corpus(config(), broken)
    assert report.train_documents == 1
    assert report.skipped_names[0].endswith(
        "chat.jsonl:1: the chat template does not take this conversation: System role not supported"
    )


def test_a_tokenizer_without_a_template_needs_one_and_a_built_in_or_a_file_will_do(config, folder):
    plain = byte_tokenizer()
    with pytest.raises(ValueError, match=r"no chat template.*set data.chat.template to a file.* chatml, zephyr, plain"):
        open_corpus(config(), plain)
    with pytest.raises(ValueError, match=r"chatml, but the tokenizer has no token <\|im_start\|>: use zephyr"):
        open_corpus(config(chat={"template": "chatml"}), plain)
    with pytest.raises(ValueError, match=r"cannot read .*gone \(No such file.*built-in ones are chatml"):
        open_corpus(config(chat={"template": f"{folder}/gone"}), plain)
    (folder / "own.jinja").write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    cache = open_cache(config(chat={"template": f"{folder}/own.jinja"}), plain)
    first = bytes(cache.tokens[: cache.lengths[0]].astype(np.uint8)).decode()
    assert first == "".join(f"{message['content']}|" for message in CONVERSATIONS[0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"packing": "concat"}, "packing concat cuts documents anywhere"),
        ({"fim": {"rate": 0.5}}, "fim.rate is 0.5, but conversations"),
        ({"tokens_field": "ids"}, "tokens_field is 'ids', but conversations"),
        ({"format": "text"}, "files of format text hold no records"),
        ({"chat": {"format": "none", "learn": "last"}}, "chat is set, but chat.format is none"),
        ({"chat": {"fields": {"promt": "x"}}}, "names 'promt', which no form of a conversation has; known: mess"),
    ],
)
def test_settings_that_conversations_exclude_are_refused(changed, message, config):
    with pytest.raises(ValueError, match=message):
        config(**changed)


def test_a_tokenizer_learns_from_what_is_said(config, folder):
    trained = build_tokenizer(TokenizerConfig(kind="train", vocab_size=300, special_tokens=(END,)), config())
    assert trained.vocab_size == 300
    assert "Ġsay" in {trained.token(i) for i in range(300)} or "say" in {trained.token(i) for i in range(300)}
