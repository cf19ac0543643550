"""Other people's clients against a real engine: LangChain's ChatOpenAI, and lm-eval's log-likelihoods."""

import asyncio
from typing import Literal

import numpy as np
import pytest
from pydantic import BaseModel, Field
from real_model import NAME, log_probabilities

# The clients' own warnings are no concern of ours.
pytestmark = [pytest.mark.xdist_group("real server"), pytest.mark.filterwarnings("ignore")]
WHY = "{} is not installed: pip install 'jaxformers[clients]'"
PAIRS = [("the quick brown", " fox"), ("1 + 1 =", " 2"), ("", "naïve café"), ("x", "y")]


class Mood(BaseModel):
    """How somebody feels."""

    mood: Literal["good", "bad"]
    score: int = Field(ge=0, le=9)


@pytest.fixture(scope="module")
def langchain(real):
    package = pytest.importorskip("langchain_openai", reason=WHY.format("langchain-openai"))
    url = f"{real.url}/v1"
    return package.ChatOpenAI(model=NAME, base_url=url, api_key="none", max_retries=0, max_tokens=200, seed=4)


def test_langchain_asks_and_streams(langchain):
    whole = langchain.invoke("hello")
    assert whole.content == "".join(chunk.content for chunk in langchain.stream("hello"))
    assert whole.usage_metadata["output_tokens"] > 0
    assert whole.response_metadata["finish_reason"] in ("stop", "length")
    together = asyncio.run(langchain.abatch(["hello", "you"]))
    assert together[0].content == whole.content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gets_the_type_that_it_asks_for(langchain, method):
    assert isinstance(langchain.with_structured_output(Mood, method=method).invoke("hello"), Mood)


def test_langchain_binds_tools_and_gives_their_results_back(langchain):
    from langchain_core.messages import HumanMessage, ToolMessage

    answer = langchain.bind_tools([Mood], tool_choice="any", parallel_tool_calls=False).invoke("hello")
    [call, *_] = answer.tool_calls
    assert call["name"] == "Mood"
    assert call["args"]["mood"] in ("good", "bad")
    results = [ToolMessage("noted", tool_call_id=call["id"]) for call in answer.tool_calls]
    said = [HumanMessage("hello"), answer, *results]
    assert langchain.bind_tools([Mood]).invoke(said, max_tokens=4).usage_metadata


@pytest.fixture(scope="module")
def lm_eval(real, model, tmp_path_factory):
    models = pytest.importorskip("lm_eval.models.openai_completions", reason=WHY.format("lm-eval"))
    folder = tmp_path_factory.mktemp("tokenizer")
    model.tokenizer.save(folder)
    return models.LocalCompletionsAPI(
        model=NAME, base_url=f"{real.url}/v1/completions", tokenizer=str(folder), max_length=512, max_retries=1
    )


def truth_of(model, context, continuation):
    """The continuation's log-likelihood behind the context, and whether it is what the model would say."""
    before, ids = list(context), list(continuation)
    rows = log_probabilities(model, [*before, *ids])[len(before) - 1 : -1]
    return rows[np.arange(len(ids)), ids].sum(), bool((rows.argmax(axis=-1) == ids).all())


def test_lm_eval_reads_the_models_own_log_likelihoods(lm_eval, model):
    from lm_eval.api.instance import Instance

    greedy = list(b"ab")
    for _ in range(2):
        greedy.append(int(log_probabilities(model, greedy)[-1].argmax()))
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(PAIRS)]
    ours = lm_eval.loglikelihood(asked)
    for (context, continuation), (likelihood, is_greedy) in zip(PAIRS, ours, strict=True):
        before = context.encode() or [model.tokenizer.bos_id]
        truth, is_best = truth_of(model, before, continuation.encode())
        assert likelihood == pytest.approx(truth, abs=1e-4)
        assert is_greedy == is_best
    rolling = lm_eval.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("a whole text",), 0)])
    truth, _ = truth_of(model, [model.tokenizer.bos_id], b"a whole text")
    assert rolling[0] == pytest.approx(truth, abs=1e-4)


def test_lm_eval_generates_until_a_stop(lm_eval):
    from lm_eval.api.instance import Instance

    settings = {"until": ["\n"], "max_gen_toks": 20, "do_sample": False}
    [text] = lm_eval.generate_until([Instance("generate_until", {}, ("Q: why?\nA:", settings), 0)])
    assert "\n" not in text


@pytest.mark.parametrize("new_tokens", [0, 1])
def test_log_likelihoods_as_harnesses_ask_for_them(real, model, new_tokens):
    """lm-eval's bodies: batches of ids, echoed with log-probabilities, and one token or none that nobody wants."""
    texts = [(b"the quick brown", b" fox"), (b"1 + 1 =", b" 2"), (b"x", b"y")]
    body = {"model": NAME, "temperature": 0, "max_tokens": new_tokens, "logprobs": 1, "seed": 1234, "echo": True}
    prompts = [list(context + continuation) for context, continuation in texts]
    choices = real.post("/v1/completions", {"prompt": prompts, **body}).json()["choices"]
    for (context, continuation), choice in zip(texts, choices, strict=True):
        told, stop = choice["logprobs"], len(context) + len(continuation)
        likelihood = sum(told["token_logprobs"][len(context) : stop])
        best = [max(top.values()) for top in told["top_logprobs"][len(context) : stop]]
        truth, is_best = truth_of(model, context, continuation)
        assert likelihood == pytest.approx(truth, abs=1e-4)
        assert (best == told["token_logprobs"][len(context) : stop]) == is_best
        assert len(told["tokens"]) == stop + new_tokens
